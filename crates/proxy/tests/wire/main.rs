//! The proxy over real sockets: raw bytes in, and a recorder upstream that shows what came through.

mod egress;
mod harness;
mod heads;
mod lifecycle;
mod redirects;
mod strip;
mod websocket;
