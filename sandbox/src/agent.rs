//! What all parts of the agent share: where it is, what it was told, what runs. It must not do any of it itself.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use choir_link::{AgentConfig, ListenerKind, message};
use jiff::Timestamp;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::own;
use crate::reaper::Reaper;
use crate::ssh_agent;
use crate::tasks::Tasks;
use crate::terminals::Terminals;
use crate::user::User;

/// Where the agent lives.
#[derive(Debug, Clone)]
pub struct Place {
    /// The hypervisor's socket and the nonce, read-only.
    pub run: PathBuf,
    /// The agent's own sockets and files.
    pub agent: PathBuf,
    /// Set in development mode, where there is no container: HOME, and nothing changes identity.
    pub dev_home: Option<PathBuf>,
}

impl Place {
    /// `CHOIR_RUN_DIR`, `CHOIR_AGENT_DIR` and `CHOIR_HOME` together switch development mode on.
    pub fn from_env() -> Self {
        let var = |name| std::env::var_os(name).map(PathBuf::from);
        match (var("CHOIR_RUN_DIR"), var("CHOIR_AGENT_DIR"), var("CHOIR_HOME")) {
            (Some(run), Some(agent), Some(home)) => Self {
                run,
                agent,
                dev_home: Some(home),
            },
            _ => Self {
                run: message::RUN_DIR.into(),
                agent: message::AGENT_DIR.into(),
                dev_home: None,
            },
        }
    }

    /// Where the sandbox may say of itself how it is to be run.
    fn home(&self) -> &Path {
        self.dev_home.as_deref().unwrap_or(Path::new("/home/choir"))
    }

    pub fn is_dev(&self) -> bool {
        self.dev_home.is_some()
    }
}

/// The loopback ports the agent holds. They stay bound while the hypervisor restarts, so connections queue.
#[derive(Debug)]
pub struct Ports {
    pub broker: TcpListener,
    pub egress: TcpListener,
    /// The API on TCP; absent where something else has the port, and in development mode.
    pub api: Option<TcpListener>,
}

impl Ports {
    /// Binds the contract's ports, or any free ones in development mode.
    pub fn bind(place: &Place) -> std::io::Result<Self> {
        let bind = |port: u16| TcpListener::bind(("127.0.0.1", if place.is_dev() { 0 } else { port }));
        Ok(Self {
            broker: bind(ListenerKind::Broker.port())?,
            egress: bind(ListenerKind::Egress.port())?,
            api: if place.is_dev() {
                None
            } else {
                bind(choir_core::host::AGENT_PORT).ok()
            },
        })
    }

    /// Whether a port is the agent's own, so that nothing from outside may be connected to it.
    pub fn is_reserved(&self, port: u16) -> bool {
        let own = [Some(&self.broker), Some(&self.egress), self.api.as_ref()];
        own.into_iter()
            .flatten()
            .any(|l| l.local_addr().is_ok_and(|a| a.port() == port))
            || choir_core::host::RESERVED_PORTS.contains(&port)
    }
}

/// How much runs that proxied bytes do not show, and what could not go on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Activity {
    pub tasks: u32,
    pub terminals: u32,
    /// Processes that the kernel has killed for want of memory.
    pub oom_kills: u64,
}

/// The shared state. The runtime is one thread; the locks only satisfy the compiler and are never contended.
pub struct Agent {
    pub place: Place,
    pub ports: Ports,
    pub reaper: Reaper,
    pub tasks: Tasks,
    pub terminals: Terminals,
    pub clock: fn() -> Timestamp,
    /// The home's `choir.toml` when the agent started. What is written later is of the next generation.
    pub own: Option<Result<String, String>>,
    random: fn() -> [u8; 16],
    started: Instant,
    config: Mutex<Arc<AgentConfig>>,
    activity: watch::Sender<Activity>,
    stopping: AtomicBool,
}

impl Agent {
    pub fn new(place: Place, ports: Ports, clock: fn() -> Timestamp, random: fn() -> [u8; 16]) -> Arc<Self> {
        Arc::new(Self {
            tasks: Tasks::new(place.agent.join("tasks")),
            terminals: Terminals::default(),
            reaper: Reaper::default(),
            own: own::read(place.home()),
            place,
            ports,
            clock,
            random,
            started: Instant::now(),
            config: Mutex::default(),
            activity: watch::Sender::new(Activity::default()),
            stopping: AtomicBool::new(false),
        })
    }

    pub fn config(&self) -> Arc<AgentConfig> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn set_config(&self, config: AgentConfig) {
        *self.config.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
    }

    /// A fresh id: `prefix` and 26 base-32 characters.
    pub fn id(&self, prefix: &str) -> String {
        let text = data_encoding::BASE32_NOPAD.encode(&(self.random)());
        format!("{prefix}{}", text.to_ascii_lowercase())
    }

    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    pub fn activity(&self) -> watch::Receiver<Activity> {
        self.activity.subscribe()
    }

    /// Counts again; to be called whenever a task or terminal came or went, or a process ended.
    pub fn count(&self) {
        let now = Activity {
            tasks: self.tasks.active(),
            terminals: self.terminals.open(),
            oom_kills: oom_kills(),
        };
        self.activity.send_if_modified(|old| std::mem::replace(old, now) != now);
    }

    /// The user everything of the user's runs as.
    pub fn user(&self) -> User {
        User::choir(self.place.dev_home.as_deref())
    }

    /// The environment of a user's process: who they are, then what the hypervisor says, then `extra`.
    pub fn environment(&self, user: &User, extra: &BTreeMap<String, String>) -> BTreeMap<OsString, OsString> {
        let mut env = user.environment();
        for (name, value) in &self.config().env {
            env.insert(name.into(), self.own_places(value).into());
        }
        if let Some(home) = &self.place.dev_home {
            env.insert("HOME".into(), home.into());
            // Tells `sudo` where to ask.
            env.insert("CHOIR_AGENT_DIR".into(), self.place.agent.clone().into());
            env.insert("SSH_AUTH_SOCK".into(), self.place.agent.join(ssh_agent::SOCKET).into());
        }
        env.extend(extra.iter().map(|(name, value)| (name.into(), value.into())));
        env
    }

    /// In development mode ports and directory are not the contract's, so values that name those are rewritten.
    fn own_places(&self, value: &str) -> String {
        if !self.place.is_dev() {
            return value.to_owned();
        }
        let mut value = value.replace(message::AGENT_DIR, &self.place.agent.to_string_lossy());
        for (listener, kind) in [
            (&self.ports.broker, ListenerKind::Broker),
            (&self.ports.egress, ListenerKind::Egress),
        ] {
            if let Ok(address) = listener.local_addr() {
                value = value.replace(&format!("127.0.0.1:{}", kind.port()), &address.to_string());
            }
        }
        value
    }
}

/// As the container's own cgroup counts them: version 2's file, then version 1's.
fn oom_kills() -> u64 {
    let files = [
        "/sys/fs/cgroup/memory.events",
        "/sys/fs/cgroup/memory/memory.oom_control",
    ];
    let text = files
        .iter()
        .find_map(|file| std::fs::read_to_string(file).ok())
        .unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("oom_kill "))
        .and_then(|count| count.trim().parse().ok())
        .unwrap_or(0)
}
