//! Wire types of both HTTP APIs: the hypervisor's and the sandbox agent's. Builds for wasm32.
//! It must not know how anything is stored, run or drawn.

pub mod admin;
#[cfg(feature = "client")]
pub mod client;
pub mod error;

pub mod sandbox;
pub mod workspaces;
