//! Drives the real binary over its socket.

mod contents;
mod diff;
mod images;
mod pack;
mod support;
mod verbs;
