//! Containers and volumes behind two traits: `Runtime` (Podman, Process, Sim) and `Volumes` (the helper's client).
//! It must not know users, sessions, routes or storage: it starts what it is told and says what it sees.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use choir_core::sandbox::Exit;
use choir_core::snapshot::Diff;
use choir_core::{Door, Generation, IdRange, Limits, Own, SandboxId, Slot};
pub use choir_link::message::{AGENT_DIR, BUNDLE, MAX_CONFIG};
pub use choir_link::{AgentConfig, ListenerKind, sweep};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

mod compare;
mod examine;
mod gate;
pub mod libpod;
mod link;
mod logs;
mod own_ids;
pub mod podman;
mod process;
mod process_log;
mod process_tree;
pub mod sim;
mod sim_app;
mod sim_volumes;
pub mod stream;
pub mod template;
pub mod volumes;
mod watch;

pub use podman::{Podman, PodmanOptions};
pub use process::Process;
pub use sim::Sim;
pub use sim_volumes::SimVolumes;
pub use stream::Stream;
pub use volumes::VolumesClient;

/// Everything one generation is made from. Two equal specs make two equal containers.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec {
    pub generation: Generation,
    /// Proves that whoever answers is this generation; 64 hexadecimal characters.
    pub nonce: String,
    /// The owner's host ids.
    pub ids: IdRange,
    pub limits: Limits,
    /// Where two sandboxes want the same processor, live gets more of it.
    pub slot: Slot,
    pub hostname: String,
    pub agent: AgentConfig,
}

/// How the runtime sees one container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "status")]
pub enum Seen {
    Absent,
    /// Made, never started.
    Created,
    Running,
    Paused,
    Exited(Exit),
}

/// A container found by its labels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub generation: Generation,
    pub nonce: String,
    pub seen: Seen,
}

/// What a runtime tells without being asked.
#[derive(Debug)]
pub enum Notice {
    /// The agent proved its nonce and its confinement equals the template. Comes again when the agent reconnects. What its
    /// home says of how to run it is in effect as far as it concerns what runs inside.
    Ready { generation: Generation, own: Arc<Own> },
    /// A container ended.
    Exited { generation: Generation, exit: Exit },
    /// The agent lost its connection and has not come back yet.
    Lost { generation: Generation },
    /// The container or its agent is not what the template says; the runtime has killed it.
    Refused { generation: Generation, reason: String },
    /// Tasks and terminals that run without any traffic, and how many processes have run out of memory so far.
    Activity {
        generation: Generation,
        tasks: u32,
        terminals: u32,
        oom_kills: u64,
    },
    /// Somebody inside connected to the broker or the egress port.
    Inside {
        generation: Generation,
        kind: ListenerKind,
        stream: Stream,
    },
}

/// Use of the box by one sandbox now. Bytes, except where the name says otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    pub cpu_ns: u64,
    pub memory: u64,
    pub memory_limit: u64,
    pub pids: u64,
}

/// One line of a container's log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// `stdout` or `stderr`.
    pub stream: String,
    pub line: String,
}

/// Why the runtime could not do it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing answers, or it takes too long: try again later.
    #[error("the container service does not answer: {0}")]
    Unavailable(String),
    /// It answered with something that is no answer.
    #[error("the container service answered what it should not: {0}")]
    Protocol(String),
    /// It answered, and refused.
    #[error("the container service refused: {0}")]
    Refused(String),
    /// The disk has no room for it.
    #[error("the disk is full: {0}")]
    NoSpace(String),
    #[error("there is no such container")]
    NotFound,
    /// The container is in another state than the call needs, or somebody else is changing it.
    #[error("the container is busy: {0}")]
    Busy(String),
    /// The sandbox does not listen there.
    #[error("nothing in the sandbox listens on this port")]
    NotListening,
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Runs generations. Every call has a deadline of its own and is idempotent: asked twice, it is done once.
#[async_trait]
pub trait Runtime: Send + Sync {
    /// What it is and in which version, for `doctor`: pairs of name and value.
    async fn describe(&self) -> Result<BTreeMap<String, String>>;
    /// Whether it answers at all; asked often.
    async fn ping(&self) -> Result<()> {
        self.describe().await.map(drop)
    }
    /// Everything with our label, running or not.
    async fn list(&self) -> Result<Vec<Found>>;
    /// Makes the container and opens the door its agent will knock at; starts nothing.
    async fn create(&self, spec: &Spec) -> Result<()>;
    /// Opens the door again for a container another process of ours made.
    async fn adopt(&self, spec: &Spec) -> Result<()>;
    /// Starts a created container. Readiness comes as a `Notice`.
    async fn start(&self, generation: &Generation) -> Result<()>;
    /// SIGTERM, then SIGKILL after `grace`. Returns when it has ended.
    async fn stop(&self, generation: &Generation, grace: std::time::Duration) -> Result<Exit>;
    async fn pause(&self, generation: &Generation) -> Result<()>;
    async fn unpause(&self, generation: &Generation) -> Result<()>;
    /// Kills if need be, and removes until it is gone, with its sockets.
    async fn remove(&self, generation: &Generation) -> Result<()>;
    async fn inspect(&self, generation: &Generation) -> Result<Seen>;
    /// What the container service tells of it to whoever may ask, as it is.
    async fn description(&self, generation: &Generation) -> Result<Vec<u8>>;
    /// Changes memory, cpus and pids of a running container, and which slot's part of the processors it gets. Disk is the
    /// volume's.
    async fn limit(&self, generation: &Generation, limits: &Limits, slot: Slot) -> Result<()>;
    async fn stats(&self, generation: &Generation) -> Result<Stats>;
    /// The last `tail` lines, then, if `follow`, what comes, until the receiver is dropped.
    async fn logs(&self, generation: &Generation, tail: usize, follow: bool) -> Result<mpsc::Receiver<LogLine>>;
    /// A fresh connection into the sandbox.
    async fn open(&self, generation: &Generation, door: Door) -> Result<Stream>;
    /// The notices, once: there is one listener, the reconciler.
    fn notices(&self) -> Option<mpsc::Receiver<Notice>>;
}

/// How much a volume holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    pub bytes: u64,
    pub limit: Option<u64>,
    /// False where the disk cannot enforce limits (plain copies).
    pub enforced: bool,
}

/// The disk that all volumes share, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    pub total: u64,
    pub free: u64,
}

/// The sandboxes' disks. Names are volume ids: a sandbox's, a release's or a snapshot's.
#[async_trait]
pub trait Volumes: Send + Sync {
    /// `btrfs`, `plain` or `sim`, for `doctor`.
    async fn backend(&self) -> Result<String>;
    async fn list(&self) -> Result<Vec<String>>;
    async fn space(&self) -> Result<Space>;
    /// Makes a release's volume from an image archive; returns the SHA-256 of the archive as read, in hexadecimal.
    async fn import(&self, release: &str, archive: &std::path::Path) -> Result<String>;
    /// Makes a release's volume, of at most so many bytes, from an archive of an image; returns the image's digest.
    async fn import_image(&self, release: &str, archive: &std::path::Path, most: u64) -> Result<String>;
    /// Gives all files of a volume to a range, container id 0 to its base.
    async fn shift(&self, volume: &str, ids: IdRange) -> Result<()>;
    /// Nothing changes it any more. What on the host does so all the same is noticed: it is not copied then.
    async fn seal(&self, volume: &str) -> Result<()>;
    /// A new volume whose `root` is the source's and whose home is empty. Already there: nothing is done.
    async fn derive(&self, source: &str, target: &str) -> Result<()>;
    /// Puts a copy of the release's `root` in the place of the sandbox's; its home stays.
    async fn replace_root(&self, release: &str, sandbox: &SandboxId) -> Result<()>;
    /// A copy of both parts. Already there: nothing is done.
    async fn snapshot(&self, source: &str, target: &str, readonly: bool) -> Result<()>;
    /// Gone or never there: fine.
    async fn delete(&self, volume: &str) -> Result<()>;
    async fn limit(&self, volume: &str, bytes: u64) -> Result<()>;
    async fn usage(&self, volume: &str) -> Result<Usage>;
    /// What `to` holds otherwise than `from`, with at most `most` paths as inside a sandbox. Either may change meanwhile.
    async fn diff(&self, from: &str, to: &str, most: usize) -> Result<Diff>;
    /// Writes a read-only snapshot as one tar: `root/…` and `home/…`, owners as inside.
    async fn pack(&self, snapshot: &str, into: OwnedFd) -> Result<()>;
    /// Makes a read-only snapshot, of at most so many bytes, of what `pack` wrote; its files belong to `ids`.
    async fn unpack(&self, snapshot: &str, from: OwnedFd, ids: IdRange, most: u64) -> Result<()>;
}

/// Where the real runtimes find things on this host.
#[derive(Debug, Clone)]
pub struct Places {
    /// Volumes: `<volumes>/<id>/root` and `<volumes>/<id>/home`.
    pub volumes: PathBuf,
    /// Sockets, nonces and files of ours, one directory a generation.
    pub run: PathBuf,
    /// The static agent.
    pub agent: PathBuf,
}
