//! Drives the real binary over its socket.

mod contents;
mod support;
mod verbs;
