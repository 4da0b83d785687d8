//! What agent and runtime say to each other over the control link, and how much of it is believed.
//!
//! ```text
//! agent                                   runtime
//!   Hello{nonce, report, own} ──────────▶   checks nonce and report
//!   ◀─────────────────── Welcome{config}    + listening socket for the agent's API
//!   Listener{Broker} + fd ──────────────▶
//!   Listener{Egress} + fd ──────────────▶
//!   ◀───────────────────────── Dial{id}     on demand, many at once
//!   Dialled{id} + fd, or DialFailed{id} ─▶
//!   Activity{..} ───────────────────────▶   when it changes
//! ```
//!
//! The agent's side is hostile: the runtime accepts only what fits, at most one descriptor a message, each checked.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::channel::MAX_MESSAGE;

/// Where a sandbox finds the control socket and the nonce, mounted read-only.
pub const RUN_DIR: &str = "/run/choir";
/// Name of the hypervisor's socket in the run directory.
pub const SOCKET: &str = "hypervisor.sock";
/// Name of the nonce file in the run directory.
pub const NONCE: &str = "nonce";
/// The agent's own writable run directory inside a sandbox.
pub const AGENT_DIR: &str = "/run/choir-agent";
/// Name, in the agent's directory, of the certificates that programs inside believe.
pub const BUNDLE: &str = "ca-certificates.crt";
/// Where the agent's binary is mounted inside a sandbox.
pub const AGENT_BINARY: &str = "/usr/libexec/choir/choir-sandbox";
/// The longest configuration of an agent, in bytes as JSON: it is sent in one message.
pub const MAX_CONFIG: usize = MAX_MESSAGE - 1024;
/// The version both sides speak; a runtime serves this one and the one before.
pub const PROTOCOL: u32 = 1;

/// Agent to runtime.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FromAgent {
    Hello {
        protocol: u32,
        version: String,
        generation: u64,
        nonce: String,
        report: Box<SelfReport>,
        /// The home's `choir.toml` as it was when the agent started, or why it cannot be read.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        own: Option<Result<String, String>>,
    },
    /// With the descriptor of a listening loopback socket inside the sandbox.
    Listener {
        kind: ListenerKind,
    },
    /// With the descriptor of a connected loopback socket.
    Dialled {
        id: u64,
    },
    DialFailed {
        id: u64,
        reason: String,
    },
    /// How much is going on that proxied bytes do not show.
    Activity {
        tasks: u32,
        terminals: u32,
        /// Processes that the kernel has killed for want of memory since the container started.
        #[serde(default)]
        oom_kills: u64,
    },
}

/// Runtime to agent.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToAgent {
    /// With the descriptor of the listening Unix socket on which the agent serves its API.
    Welcome { config: Box<AgentConfig> },
    /// Connect to 127.0.0.1, then ::1, port `port`, and answer with `id`.
    Dial { id: u64, port: u16 },
}

/// Whose connections arrive on a handed-over listener. Identity is the listener, so there is no token to steal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ListenerKind {
    Broker,
    Egress,
}

impl ListenerKind {
    /// The loopback port inside the sandbox.
    pub fn port(self) -> u16 {
        match self {
            Self::Broker => 9091,
            Self::Egress => 9092,
        }
    }
}

/// How the agent runs things, sent with each welcome.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct AgentConfig {
    pub sandbox_id: String,
    pub generation: u64,
    pub nonce: String,
    /// The whole environment of a user's process, HOME, PATH and proxy variables included.
    pub env: BTreeMap<String, String>,
    /// Shell lines run as the user once per generation, by name; `start` is the app itself.
    pub services: BTreeMap<String, String>,
    /// The certificate, in PEM, that programs inside believe besides those that the image trusts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authority: Option<String>,
    /// Why the home's `choir.toml` is not in effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unheeded: Option<String>,
}

/// What the agent sees of its own confinement; compared with the template before the sandbox is used.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SelfReport {
    /// `/proc/self/status`: CapBnd and CapEff as hexadecimal text, NoNewPrivs and Seccomp as numbers.
    pub cap_bounding: String,
    pub cap_effective: String,
    pub no_new_privs: u8,
    pub seccomp: u8,
    /// Lines of `/proc/self/uid_map`, fields separated by one space.
    pub uid_map: Vec<String>,
    /// `mount point` → `options`, from `/proc/self/mountinfo`, per-mount and super options joined by a comma.
    pub mounts: BTreeMap<String, String>,
    /// Names of network interfaces.
    pub interfaces: Vec<String>,
    /// Soft limits: `nofile`, `nproc`, `core`.
    pub rlimits: BTreeMap<String, u64>,
    /// Names in the agent's own environment.
    pub env_names: Vec<String>,
    /// Host uid of a file the agent wrote to the volume is what the runtime checks; this is the file's name there.
    pub proof_file: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agent_and_runtime_of_the_version_before_are_understood() {
        let report = serde_json::to_string(&SelfReport::default()).unwrap();
        let hello = format!(
            r#"{{"type":"hello","protocol":1,"version":"0.1.0","generation":0,"nonce":"n","report":{report}}}"#
        );
        let hello: FromAgent = serde_json::from_str(&hello).unwrap();
        assert!(matches!(hello, FromAgent::Hello { own: None, .. }));
        let config = r#"{"sandbox_id":"s","generation":1,"nonce":"n","env":{},"services":{}}"#;
        let config: AgentConfig = serde_json::from_str(config).unwrap();
        assert_eq!((config.authority, config.unheeded), (None, None));
    }
}
