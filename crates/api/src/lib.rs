//! Wire types of both HTTP APIs: the hypervisor's and the sandbox agent's. Builds for wasm32.
//! It must not know how anything is stored, run or drawn.

pub mod admin;
pub mod audit;
#[cfg(feature = "client")]
pub mod client;
pub mod error;
pub mod events;
pub mod grants;
pub mod prove;
pub mod sandbox;
pub mod secrets;
pub mod usage;
pub mod workspaces;
