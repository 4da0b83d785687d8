//! Another machine on a private network, with a plain web server and what a test starts beside it. It must not serve
//! anything but the given files.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result};
use tokio::net::TcpStream;

use crate::waiting::until;
use crate::wire::Wire;

/// Serves files; dropping it removes everything.
pub struct Neighbour {
    servers: Vec<Child>,
    /// Where it is, and where this machine is on the same network.
    pub wire: Wire,
}

impl Neighbour {
    /// Serves a directory over plain HTTP, port 80.
    pub async fn serve(directory: &Path) -> Result<Self> {
        let mut neighbour = Self {
            servers: Vec::new(),
            wire: Wire::lay()?,
        };
        let directory = directory.to_str().context("a path in UTF-8")?;
        neighbour
            .also(80, &["busybox", "httpd", "-f", "-p", "80", "-h", directory])
            .await?;
        Ok(neighbour)
    }

    /// Starts one more server there, and waits until it listens on the port.
    pub async fn also(&mut self, port: u16, command: &[&str]) -> Result<()> {
        let mut server = Command::new("ip");
        server.args(["netns", "exec", &self.wire.name]).args(command);
        server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let started = server.spawn().with_context(|| format!("cannot start {}", command[0]))?;
        self.servers.push(started);
        until(&format!("the neighbour's {}", command[0]), async || {
            Ok(TcpStream::connect((self.wire.address.as_str(), port)).await.ok())
        })
        .await?;
        Ok(())
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        for server in &mut self.servers {
            let _gone = server.kill();
            let _gone = server.wait();
        }
    }
}
