//! What sandboxes used of the model providers, as it is read. It must not know prices.

use choir_core::{Capability, Name, Slot};
use jiff::civil::Date;
use serde::{Deserialize, Serialize};

/// `GET /me/usage` and `GET /admin/usage`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// The newest day first.
    pub items: Vec<UsageRow>,
    /// Today's use of each of the box's keys, where one user's is asked for.
    pub caps: Vec<Cap>,
}

/// One day (UTC) at one place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsageRow {
    pub day: Date,
    pub user: Name,
    pub workspace: Name,
    /// The slot that the sandbox was in at each call.
    pub slot: Slot,
    pub provider: Capability,
    pub key: KeyOwner,
    /// Requests that were sent, answered or not.
    pub requests: u64,
    /// Tokens as the provider counts them; estimated for answers that were broken off.
    pub input_tokens: u64,
    /// The part of the input that the provider had in its cache.
    pub cached_tokens: u64,
    pub output_tokens: u64,
}

/// Whose key was used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyOwner {
    /// The box's.
    Platform,
    /// The user's own, by a grant.
    Own,
}

/// How much of a daily cap is used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cap {
    pub provider: Capability,
    pub requests: u64,
    pub daily_requests: Option<u64>,
    /// Input and output together.
    pub tokens: u64,
    pub daily_tokens: Option<u64>,
    pub resets_in_s: u64,
}
