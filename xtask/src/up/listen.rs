//! The listening sockets of the control plane, which outlive any one hypervisor process. Loopback
//! only: reaching this machine from another one is a proxy's or a tunnel's work.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;

use anyhow::{Context, Error, Result, anyhow};

/// Connections that wait while a crashed hypervisor is started again.
const BACKLOG: i32 = 4096;

pub struct Listeners {
    port: u16,
    sockets: Vec<TcpListener>,
}

impl Listeners {
    /// Binds 127.0.0.1 and, where the machine has it, ::1; port 0 takes one that is free.
    pub fn bind(port: u16) -> Result<Self> {
        let first = listen(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).map_err(|error| explained(port, error))?;
        let port = first.local_addr()?.port();
        let mut sockets = vec![first];
        match listen(SocketAddr::from((Ipv6Addr::LOCALHOST, port))) {
            Ok(second) => sockets.push(second),
            Err(error) if error.kind() == ErrorKind::AddrInUse => return Err(explained(port, error)),
            Err(_no_ipv6) => {}
        }
        Ok(Self { port, sockets })
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// The control origin: passkeys need a name, so never an IP address.
    pub fn address(&self) -> String {
        format!("http://localhost:{}", self.port)
    }

    /// Descriptors for a process to inherit.
    pub fn duplicate(&self) -> Result<Vec<OwnedFd>> {
        let copies = self.sockets.iter().map(|socket| socket.try_clone().map(OwnedFd::from));
        copies
            .collect::<Result<_, _>>()
            .context("cannot duplicate a listening socket")
    }
}

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = TcpListener::bind(address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

fn explained(port: u16, error: std::io::Error) -> Error {
    match error.kind() {
        ErrorKind::AddrInUse => anyhow!(
            "port {port} is already in use on this machine: choose another with `--port N`, or `--port 0` for any that is free"
        ),
        ErrorKind::PermissionDenied => {
            anyhow!("port {port} needs root: choose one above 1023 with `--port N`")
        }
        _ => Error::new(error).context(format!("cannot listen on port {port}")),
    }
}

#[cfg(test)]
mod tests {
    use super::Listeners;

    #[test]
    fn a_busy_port_is_named_with_the_way_out() {
        let first = Listeners::bind(0).unwrap();
        let error = Listeners::bind(first.port()).err().unwrap().to_string();
        assert!(
            error.contains(&first.port().to_string()) && error.contains("--port"),
            "{error}"
        );
    }
}
