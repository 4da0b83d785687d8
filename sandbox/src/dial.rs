//! Connections from outside to a port inside the sandbox, made on demand. It must not know what they carry.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::net::TcpStream;

use crate::agent::Ports;

const WITHIN: Duration = Duration::from_secs(5);

/// Connects to 127.0.0.1, then ::1. The error is a sentence for the runtime's log.
pub async fn dial(ports: &Ports, port: u16) -> Result<OwnedFd, String> {
    if ports.is_reserved(port) {
        return Err("this port is the agent's own".to_owned());
    }
    let connect = async {
        match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
            Ok(stream) => Ok(stream),
            Err(e) => TcpStream::connect((Ipv6Addr::LOCALHOST, port)).await.map_err(|_| e),
        }
    };
    let stream = tokio::time::timeout(WITHIN, connect)
        .await
        .map_err(|_| format!("port {port} did not answer within 5 s"))?
        .map_err(|e| format!("nothing listens on port {port}: {e}"))?;
    Ok(stream.into_std().map_err(|e| e.to_string())?.into())
}
