//! Workspaces, slots, deployments and releases as they go over the wire. It must not know how they are kept or run.

use std::collections::BTreeMap;

use choir_core::deployment::{Kind, Step};
use choir_core::sandbox::{Desired, Observed};
use choir_core::{
    DeploymentId, Limits, Name, ReleaseConfig, ReleaseId, SandboxId, Slot, SnapshotId, WorkspaceId, WorkspaceSettings,
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// `POST /api/workspaces`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateWorkspace {
    pub name: Name,
    /// What both sandboxes start from; the newest verified release where missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<ReleaseId>,
}

/// `GET /api/workspaces`, and every list: one page and how to get the next.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Page<T> {
    pub items: Vec<T>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

/// `GET /api/workspaces/{ws}`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Workspace {
    pub id: WorkspaceId,
    pub name: Name,
    pub user: Name,
    pub created_at: Timestamp,
    pub settings: WorkspaceSettings,
    pub slots: Slots,
    /// The deployment that is under way, if one is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub open_deployment: Option<DeploymentId>,
    /// What a rollback would undo now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undo: Option<Undo>,
}

/// What a rollback would undo.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Undo {
    pub deployment: DeploymentId,
    pub kind: Kind,
    pub at: Timestamp,
    /// Whether the sandbox that it took out of live is frozen as it was: then it comes back in under a second, processes
    /// and all. Else live starts anew on a copy of the snapshot.
    pub warm: bool,
}

/// Both slots.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Slots {
    pub live: SlotView,
    pub dev: SlotView,
}

impl Slots {
    pub fn get(&self, slot: Slot) -> &SlotView {
        match slot {
            Slot::Live => &self.live,
            Slot::Dev => &self.dev,
        }
    }
}

/// One slot with the sandbox it points at.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SlotView {
    pub slot: Slot,
    pub sandbox: SandboxId,
    pub release: ReleaseId,
    pub desired: Desired,
    /// `ready`, `stopped`, …: the name of the observed state, or `queued` while it waits for a place to run in.
    pub state: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// One sentence where something is wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Where the slot's app is served.
    pub address: String,
    pub limits: Limits,
    pub app_port: u16,
    /// Missing where the sandbox that runs found no such file when it started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub choir_toml: Option<ChoirToml>,
}

impl SlotView {
    /// Fills in what the observed state says.
    pub fn observe(&mut self, observed: &Observed) {
        self.state = observed.name().to_owned();
        self.generation = observed.generation();
        self.since = observed.since();
        self.reason = observed.reason();
    }

    /// So many of its processes ran out of memory; it goes on without them.
    pub fn lacked_memory(&mut self, processes: u64) {
        if processes > 0 && self.reason.is_none() {
            self.reason = Some(format!(
                "processes that ran out of memory and were killed: {processes}; raise `limits.memory` or use less"
            ));
        }
    }

    /// The box is short of memory, so it stays asleep for now.
    pub fn lacks_memory(&mut self) {
        let waits = self.state == "stopped" && self.desired == Desired::Running;
        if waits {
            "queued".clone_into(&mut self.state);
        }
        if waits || self.state == "paused" {
            self.reason = Some("the box is short of memory; it runs again when there is enough".to_owned());
        }
    }

    /// It waits until fewer than `most` run, with so many in line before it.
    pub fn queue(&mut self, most: usize, before: usize) {
        "queued".clone_into(&mut self.state);
        self.reason = Some(format!(
            "no more than {most} may run at once; in line before it: {before}"
        ));
    }
}

/// `GET /api/workspaces/{ws}/config`: each setting in effect and which layer it is from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EffectiveConfig {
    pub settings: BTreeMap<String, EffectiveSetting>,
    /// Missing where the sandbox that runs found no such file when it started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub choir_toml: Option<ChoirToml>,
}

/// The file in a sandbox's home that says how to run it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum ChoirToml {
    InEffect,
    /// Nothing of it is in effect.
    Refused {
        reason: String,
    },
}

/// A value and where it comes from: `choir.toml`, `workspace`, `release` or `default`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EffectiveSetting {
    pub value: serde_json::Value,
    pub from: String,
}

/// `GET /api/workspaces/{ws}/deployments/{id}`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Deployment {
    pub id: DeploymentId,
    pub kind: Kind,
    /// The slot that it changes; a swap's is `live`.
    pub slot: Slot,
    pub step: Step,
    pub created_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Timestamp>,
    /// Why it failed, in one sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// When each step began, in order.
    pub steps: Vec<DeploymentStep>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeploymentStep {
    pub step: Step,
    pub at: Timestamp,
    /// Since the step before it began.
    pub took_ms: u64,
}

/// `POST /api/workspaces/{ws}/rollback`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rollback {
    /// The deployment to undo, with all after it: one of the last five of live that succeeded. The last where missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<DeploymentId>,
}

/// `POST /api/workspaces/{ws}/fork`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fork {
    /// What dev is to be a copy of; live as it is where missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<SnapshotId>,
}

/// `POST /api/workspaces/{ws}/slots/{slot}/deploy`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Deploy {
    pub release: ReleaseId,
}

/// `GET …/slots/{slot}/snapshots/{id}`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Snapshot {
    pub id: SnapshotId,
    /// The slot that the sandbox was in.
    pub slot: Slot,
    pub sandbox: SandboxId,
    pub release: ReleaseId,
    /// What the slot held before this changed it, or before this was taken back; missing where none did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deployment: Option<DeploymentId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken_for: Option<Kind>,
    /// Whether the schedule took it; else, and where it is of no deployment, somebody asked for it.
    #[serde(default)]
    pub scheduled: bool,
    pub created_at: Timestamp,
    /// What it refers to, shared with others or not.
    pub bytes: u64,
}

/// `POST /api/releases`: either a known image with a config of one's own, or what a sandbox's system is now.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateRelease {
    /// `image_digest` of a release that is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<SandboxId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Where missing: none for an image, and for a sandbox the one of the release that it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<ReleaseConfig>,
}

impl CreateRelease {
    /// The image with this digest, run like this.
    pub fn of_image(image: &str, config: ReleaseConfig) -> Self {
        Self {
            image: Some(image.to_owned()),
            config: Some(config),
            ..Self::default()
        }
    }

    /// What the system of this sandbox is now, run as it is.
    pub fn of_sandbox(sandbox: SandboxId) -> Self {
        Self {
            sandbox: Some(sandbox),
            ..Self::default()
        }
    }
}

/// `POST /api/releases/archive`, whose body is an image archive.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UploadRelease {
    pub name: String,
    /// As JSON.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait_s: Option<u64>,
}

/// `GET /api/releases/{id}`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Release {
    pub id: ReleaseId,
    pub name: String,
    /// Whether it is the caller's own; else it is the box's.
    pub own: bool,
    /// The image's SHA-256, hexadecimal; of a release that was made of a sandbox, its own id.
    pub image_digest: String,
    pub config: ReleaseConfig,
    /// `importing`, `candidate`, `verified`, `rejected` or `retired`.
    pub state: String,
    /// Why it was rejected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    pub created_at: Timestamp,
    /// What its volume refers to, shared with others or not; missing while there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// The caller's slots that run it, as `workspace/slot`.
    #[serde(default)]
    pub used_by: Vec<String>,
    /// How many slots of other users run it.
    #[serde(default)]
    pub used_elsewhere: usize,
}

/// `GET …/slots/{slot}/stats`. Bytes and nanoseconds.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct SlotStats {
    pub cpu_ns: u64,
    pub memory: u64,
    pub memory_limit: u64,
    pub pids: u64,
    pub disk: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_limit: Option<u64>,
}

/// One line of `GET …/slots/{slot}/logs`, which answers `{"items":[…]}`, or SSE events `line` with `?follow=true`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LogLine {
    /// `stdout` or `stderr`.
    pub stream: String,
    pub line: String,
}
