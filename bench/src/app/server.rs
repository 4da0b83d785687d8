//! One epoll loop over keep-alive connections: request heads in, constant answers out. It must not know what is
//! answered. Requests have no body; answers fit a socket's buffer.

use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;

use anyhow::{Context, Result, bail};
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::SocketFlags;

use crate::echo;

/// Read at once.
const CHUNK: usize = 16 * 1024;
/// A longer head is not from one of our clients.
const MAX_HEAD: usize = 64 * 1024;

struct Connection {
    socket: OwnedFd,
    /// What was read and not yet answered.
    unread: Vec<u8>,
    websocket: bool,
}

/// Serves until the process is ended. `answer` gets each request's head.
pub fn run(addresses: &[&str], mut answer: impl FnMut(&[u8]) -> &'static [u8]) -> Result<()> {
    let poll = epoll::create(CreateFlags::CLOEXEC)?;
    let mut listeners = HashMap::new();
    for address in addresses {
        let listener = listen(address).with_context(|| format!("cannot listen on {address}"))?;
        epoll::add(&poll, &listener, token(&listener), EventFlags::IN)?;
        listeners.insert(token(&listener).u64(), listener);
    }
    let mut connections: HashMap<u64, Connection> = HashMap::new();
    let mut events = Vec::with_capacity(256);
    let mut buffer = vec![0; CHUNK];
    loop {
        match epoll::wait(&poll, spare_capacity(&mut events), None) {
            // Thawing a frozen process interrupts it.
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for event in events.drain(..) {
            let key = event.data.u64();
            if let Some(listener) = listeners.get(&key) {
                let Ok(socket) = rustix::net::accept_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC)
                else {
                    continue;
                };
                // Unix sockets have no such option.
                let _unix = rustix::net::sockopt::set_tcp_nodelay(&socket, true);
                epoll::add(&poll, &socket, token(&socket), EventFlags::IN)?;
                let connection = Connection {
                    unread: Vec::new(),
                    websocket: false,
                    socket,
                };
                connections.insert(token(&connection.socket).u64(), connection);
            } else if let Some(connection) = connections.get_mut(&key)
                && !connection.step(&mut buffer, &mut answer)
            {
                connections.remove(&key);
            }
        }
    }
}

fn listen(address: &str) -> Result<OwnedFd> {
    let socket: OwnedFd = match address.split_once(':') {
        Some(("unix", path)) => UnixListener::bind(path)?.into(),
        Some(("tcp", address)) => TcpListener::bind(address.parse::<SocketAddr>()?)?.into(),
        _ => bail!("an address is `unix:PATH` or `tcp:IP:PORT`"),
    };
    rustix::io::ioctl_fionbio(&socket, true)?;
    Ok(socket)
}

fn token(socket: &impl AsFd) -> EventData {
    EventData::new_u64(u64::from(socket.as_fd().as_raw_fd().unsigned_abs()))
}

impl Connection {
    /// Answers what came; false once the connection is over.
    fn step(&mut self, buffer: &mut [u8], answer: &mut impl FnMut(&[u8]) -> &'static [u8]) -> bool {
        match rustix::io::read(&self.socket, &mut *buffer) {
            Ok(0) => return false,
            Ok(length) => self.unread.extend_from_slice(&buffer[..length]),
            Err(Errno::AGAIN | Errno::INTR) => return true,
            Err(_) => return false,
        }
        if self.websocket {
            return self.echo();
        }
        while let Some(end) = self.unread.windows(4).position(|four| four == b"\r\n\r\n") {
            let head: Vec<u8> = self.unread.drain(..end + 4).collect();
            if let Some(accepted) = echo::accept(&head) {
                self.websocket = true;
                return self.write(accepted.as_bytes()) && self.echo();
            }
            if !self.write(answer(&head)) {
                return false;
            }
        }
        self.unread.len() <= MAX_HEAD
    }

    fn echo(&mut self) -> bool {
        while let Some(echo) = echo::next(&mut self.unread) {
            if !self.write(&echo.bytes) || echo.last {
                return false;
            }
        }
        true
    }

    fn write(&self, bytes: &[u8]) -> bool {
        rustix::io::write(&self.socket, bytes) == Ok(bytes.len())
    }
}
