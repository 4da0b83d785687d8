//! The hypervisor through its real router: temporary SQLite, a simulated runtime, software passkeys.

mod auth;
mod fleet;
mod memory;
mod program;
mod support;
