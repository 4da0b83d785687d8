//! The small servers that ChoirOS and its peers are measured with: the app that is proxied to, and the check that the
//! peers' proxies ask before each request. One thread and no framework, so that what stands in front of it is what
//! is measured. It must not know who is in front.
//!
//! ```text
//! choir-bench-app serve ADDRESS…          answers GETs, and echoes websockets
//! choir-bench-app auth ADDRESS NAME HASH  204 to who has the cookie NAME with this SHA-256 (hexadecimal), else 401
//! ```
//!
//! An address is `unix:PATH` or `tcp:IP:PORT`.

mod echo;
mod server;
mod session;

use anyhow::{Result, bail};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["serve", addresses @ ..] if !addresses.is_empty() => server::run(addresses, |_| HELLO),
        ["auth", address, name, hash] => {
            let sessions = session::Sessions::new(name, hash)?;
            server::run(&[address], |head| if sessions.has(head) { PASS } else { STOP })
        }
        _ => bail!("give `serve ADDRESS…` or `auth ADDRESS NAME HASH`"),
    }
}

const HELLO: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 13\r\n\r\nHello, world\n";
const PASS: &[u8] = b"HTTP/1.1 204 No Content\r\n\r\n";
const STOP: &[u8] = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n";
