//! The data plane: requests in by Host, HTTP and websocket bytes through to one generation of a sandbox, drain out.
//! It must not know of users, sessions, storage, secrets or containers; who may pass is asked of a [`Gate`], and how
//! a sandbox is reached of a [`Dial`].
//!
//! A request's way: [`server`] accepts it, `head` refuses what two parsers could read differently, the Host names
//! its target, `site` refuses what another site made the browser send, the gate admits it, `headers` rebuilds its
//! head, [`forward`] carries it, and `tunnel` takes over when the upstream answers 101.

pub mod answer;
pub mod body;
pub mod cookies;
pub mod egress;
pub mod forward;
mod frames;
mod head;
mod headers;
mod pace;
mod pool;
pub mod pulse;
pub mod route;
pub mod server;
mod site;
mod tunnel;

pub use answer::Answers;
pub use body::Body;
pub use forward::{Face, Forwarder, Via};
pub use pulse::Pulse;
pub use route::{Activity, Admission, Clock, Control, Dial, Gate, Io, Peer, Route, Visitor};
pub use server::{Bounds, Server};
