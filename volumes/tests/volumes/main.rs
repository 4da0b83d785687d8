//! Drives the real binary over its socket.

mod contents;
mod images;
mod support;
mod verbs;
