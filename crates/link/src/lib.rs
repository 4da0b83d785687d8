//! The control link between a sandbox's agent and the runtime: messages with descriptors over `SOCK_SEQPACKET`.
//! It must not know what is behind either end: no containers, no HTTP, no storage.

pub mod channel;
pub mod message;
pub mod sweep;

pub use channel::{Channel, Listener};
pub use message::{AgentConfig, FromAgent, ListenerKind, SelfReport, ToAgent};
