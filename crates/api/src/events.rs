//! `GET /api/events`: what changes, as it changes. Each event's id resumes after it, by `Last-Event-ID`. It must not
//! know how they come about.

use choir_core::deployment::{Kind, Step};
use choir_core::{DeploymentId, Name, ReleaseId, SandboxId, Slot, WorkspaceId};
use serde::{Deserialize, Serialize};

/// The first event of a stream: from here on nothing is missed.
pub const BEGIN: &str = "begin";
/// Events were missed, because too many came or the hypervisor was restarted: read everything anew.
pub const MISSED: &str = "missed";
/// Data: [`SandboxChanged`].
pub const SANDBOX: &str = "sandbox";
/// Data: [`DeploymentStepped`].
pub const DEPLOYMENT: &str = "deployment";
/// Data: [`WorkspaceChanged`].
pub const WORKSPACE: &str = "workspace";
/// Data: [`ReleaseChanged`].
pub const RELEASE: &str = "release";

/// A sandbox is in another state, or in another generation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxChanged {
    pub workspace: WorkspaceId,
    pub sandbox: SandboxId,
    /// The name of the observed state.
    pub state: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// A deployment has come to another step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeploymentStepped {
    pub workspace: WorkspaceId,
    pub id: DeploymentId,
    pub kind: Kind,
    pub slot: Slot,
    pub step: Step,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What a workspace's slots and settings mean has changed, or it is there now, or being deleted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkspaceChanged {
    pub id: WorkspaceId,
    pub name: Name,
    pub deleting: bool,
}

/// A release was made or rejected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseChanged {
    pub id: ReleaseId,
    pub state: String,
}
