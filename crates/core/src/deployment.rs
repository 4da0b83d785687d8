//! The life of one deployment: a journalled attempt to change what a slot means.
//!
//! ```text
//! Preparing ──▶ Verifying ──▶ Switching ──▶ Draining ──▶ Succeeded
//!     └────────────┴──────────────┴──▶ Failed (no route changed)
//! ```
//!
//! Everything before `Switching` is committed is undone after a crash; everything after it is rolled forward.

use serde::{Deserialize, Serialize};

/// What a deployment does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Swap,
}

/// How far a deployment is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    Preparing,
    Verifying,
    Switching,
    Draining,
    Succeeded,
    Failed,
}

impl Step {
    /// Whether nothing more will happen.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed)
    }

    /// What recovery makes of a deployment found at this step after a crash. The commit of `Draining` is the
    /// switch itself, so only from there on is there something to finish.
    pub fn recovered(self) -> Self {
        match self {
            Self::Preparing | Self::Verifying | Self::Switching | Self::Failed => Self::Failed,
            Self::Draining | Self::Succeeded => Self::Succeeded,
        }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Verifying => "verifying",
            Self::Switching => "switching",
            Self::Draining => "draining",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
        }
    }
}
