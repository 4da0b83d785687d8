//! Questions to the programs we started: is it there yet? Each answers at once or within a second.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(1);

/// Whether somebody accepts connections there.
pub fn accepts(socket: &Path) -> bool {
    UnixStream::connect(socket).is_ok()
}

/// Whether Podman's service answers its ping.
pub fn podman(socket: &Path) -> bool {
    let Ok(stream) = UnixStream::connect(socket) else {
        return false;
    };
    let timed = stream.set_read_timeout(Some(LIMIT)).is_ok();
    timed && is_ok(stream, "/_ping", "localhost")
}

/// Whether the hypervisor says that all of its parts are ready. The connection always succeeds,
/// because the listening socket is ours; a hypervisor that is not there yet just does not answer.
pub fn hypervisor(port: u16) -> bool {
    let Ok(stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else {
        return false;
    };
    let timed = stream.set_read_timeout(Some(LIMIT)).is_ok();
    timed && is_ok(stream, "/readyz", &format!("localhost:{port}"))
}

fn is_ok(mut stream: impl Read + Write, path: &str, host: &str) -> bool {
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    let mut status = [0; 12];
    stream.write_all(request.as_bytes()).is_ok()
        && stream.read_exact(&mut status).is_ok()
        && status.starts_with(b"HTTP/1.")
        && status.ends_with(b" 200")
}
