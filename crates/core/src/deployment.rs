//! The life of one deployment: a journalled attempt to change what a slot means.
//!
//! ```text
//! exchange   Preparing ──▶ Verifying ──▶ Switching ──▶ Draining ──▶ Succeeded
//!                └────────────┴─────────────┴──▶ Failed (nothing was changed)
//!                ┌──────────────────────────┴──▶ Failed
//! refill     Preparing ──▶ Switching ──▶ Draining ──▶ Starting ──▶ Succeeded
//!                                           └────────────┴──▶ Returning ──▶ RolledBack
//! ```
//!
//! An exchange swaps the two slots' sandboxes. A refill leaves a slot its sandbox and gives that other contents.
//! Everything before `Switching` is committed is undone after a crash; everything after it is rolled forward.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{DeploymentId, ReleaseId, SandboxId, SnapshotId};

/// How many of the last deployments of a workspace can be undone.
pub const UNDOABLE: usize = 5;

/// What a deployment does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Live becomes dev, and dev live.
    Swap,
    /// What live was before a deployment comes back.
    Rollback,
    /// A release into a slot; its home stays.
    Deploy,
    /// A snapshot into a slot.
    Restore,
    /// A copy of live, or of a snapshot, into dev.
    Fork,
}

/// How far a deployment is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    Preparing,
    Verifying,
    Switching,
    Draining,
    Starting,
    Returning,
    Succeeded,
    Failed,
    RolledBack,
}

/// What a volume is to be filled with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Contents {
    /// All of it with a snapshot's.
    Snapshot(SnapshotId),
    /// The system with a release's; the home stays.
    Release(ReleaseId),
}

/// What is to become of a sandbox's volume before its next start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refill {
    pub deployment: DeploymentId,
    /// What it holds until then is kept as this snapshot.
    pub keep: SnapshotId,
    pub with: Contents,
}

/// A sandbox that a swap took out of live and froze. While it is still frozen since then, it is as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Displaced {
    pub sandbox: SandboxId,
    pub generation: u64,
    pub since: Timestamp,
}

impl Kind {
    pub const ALL: [Self; 5] = [Self::Swap, Self::Rollback, Self::Deploy, Self::Restore, Self::Fork];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Swap => "swap",
            Self::Rollback => "rollback",
            Self::Deploy => "deploy",
            Self::Restore => "restore",
            Self::Fork => "fork",
        }
    }
}

impl Step {
    pub const ALL: [Self; 9] = [
        Self::Preparing,
        Self::Verifying,
        Self::Switching,
        Self::Draining,
        Self::Starting,
        Self::Returning,
        Self::Succeeded,
        Self::Failed,
        Self::RolledBack,
    ];

    /// Whether nothing more will happen.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::RolledBack)
    }

    /// Whether the switch was committed, so that only forward leads out.
    pub fn is_switched(self) -> bool {
        matches!(self, Self::Draining | Self::Starting | Self::Returning)
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Verifying => "verifying",
            Self::Switching => "switching",
            Self::Draining => "draining",
            Self::Starting => "starting",
            Self::Returning => "returning",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::RolledBack => "rolled_back",
        }
    }
}
