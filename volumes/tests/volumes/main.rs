//! Drives the real binary over its socket.

mod contents;
mod diff;
mod images;
mod support;
mod verbs;
