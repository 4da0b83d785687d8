//! Signing in and everything around it, through the router.

mod guard;
mod hosts;
mod passkeys;
mod recovery;
mod register;
mod sessions;
mod timing;
mod tokens;
