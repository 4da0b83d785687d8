//! What leaves a sandbox, and with which secrets. Now: to which addresses it may go.
//! It must not know of containers or of HTTP routing.

pub mod address;

pub use address::{AddressPolicy, Refusal};
