//! The hypervisor through its real router: temporary SQLite, a simulated runtime, software passkeys.

mod auth;
mod fleet;
mod program;
mod support;
