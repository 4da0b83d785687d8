//! The pure heart of ChoirOS: names, hosts, lifecycles and policy as functions of (state, event, now).
//! It must not know of I/O, clocks, environment, async runtimes or storage.

pub mod awake;
pub mod deployment;
pub mod egress;
pub mod grant;
pub mod host;
pub mod ids;
pub mod limits;
pub mod logins;
pub mod memory;
pub mod name;
pub mod own;
pub mod sandbox;
mod schedule;
pub mod settings;
pub mod slot;
pub mod snapshot;

pub use awake::Awake;
pub use egress::{EgressPolicy, HostName, HostPattern};
pub use grant::{Capability, Inject, Rule, SshUse};
pub use host::{Door, Hosts, SandboxHost, Target};
pub use ids::{
    DeploymentId, Generation, GrantId, GrantRequestId, IdRange, ReleaseId, SandboxId, SnapshotId, UserId, WorkspaceId,
};
pub use limits::Limits;
pub use logins::Login;
pub use name::{Name, SecretName};
pub use own::Own;
pub use schedule::Schedule;
pub use settings::{Access, ReleaseConfig, WorkspaceSettings};
pub use slot::Slot;
