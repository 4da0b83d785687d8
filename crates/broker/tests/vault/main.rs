//! The vault over a real database and key file: what it seals, forgets, refuses, and keeps through a rotation.

mod forgetting;
mod prove;
mod rig;
mod rotation;
mod sealed;
mod sealing;
