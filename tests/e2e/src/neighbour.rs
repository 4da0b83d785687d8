//! Another machine on a private network, with a plain web server. It must not serve anything but the given files.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result};
use tokio::net::TcpStream;

use crate::waiting::until;
use crate::wire::Wire;

/// Serves files; dropping it removes everything.
pub struct Neighbour {
    server: Child,
    /// Where it is, and where this machine is on the same network.
    pub wire: Wire,
}

impl Neighbour {
    /// Serves a directory over plain HTTP, port 80.
    pub async fn serve(directory: &Path) -> Result<Self> {
        let wire = Wire::lay()?;
        let mut server = Command::new("ip");
        server
            .args(["netns", "exec", &wire.name, "busybox", "httpd", "-f", "-p", "80", "-h"])
            .arg(directory);
        server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let neighbour = Self {
            server: server.spawn().context("cannot start a web server")?,
            wire,
        };
        until("the neighbour's web server", async || {
            Ok(TcpStream::connect((neighbour.wire.address.as_str(), 80)).await.ok())
        })
        .await?;
        Ok(neighbour)
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        let _gone = self.server.kill();
        let _gone = self.server.wait();
    }
}
