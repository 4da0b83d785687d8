//! Another machine on a private network: a network namespace with a web server in it. It must not touch an address or
//! a device that it did not make.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use tokio::net::TcpStream;

use crate::waiting::until;

/// Serves files; dropping it removes everything.
pub struct Neighbour {
    name: String,
    /// Its address, and that of this machine on the same wire.
    pub address: String,
    pub ours: String,
    server: Child,
}

impl Neighbour {
    /// Serves a directory over plain HTTP, port 80.
    pub async fn serve(directory: &Path) -> Result<Self> {
        let process = std::process::id();
        // Names of devices have at most 15 characters.
        let (name, wire) = (format!("choir-e2e-{process}"), format!("che{}", process % 10_000_000));
        let network = format!("10.254.{}", process % 250);
        let (ours, address) = (format!("{network}.1"), format!("{network}.2"));
        let peer = format!("{wire}p");
        ip(&["netns", "add", &name])?;
        let mut server = Command::new("ip");
        server
            .args(["netns", "exec", &name, "busybox", "httpd", "-f", "-p", "80", "-h"])
            .arg(directory);
        server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // From here on dropping it cleans up, whatever fails.
        let neighbour = Self {
            name: name.clone(),
            server: server.spawn().context("cannot start a web server")?,
            address: address.clone(),
            ours: ours.clone(),
        };
        ip(&[
            "link", "add", &wire, "type", "veth", "peer", "name", &peer, "netns", &name,
        ])?;
        ip(&["addr", "add", &format!("{ours}/30"), "dev", &wire])?;
        ip(&["link", "set", &wire, "up"])?;
        ip(&["-n", &name, "addr", "add", &format!("{address}/30"), "dev", &peer])?;
        ip(&["-n", &name, "link", "set", &peer, "up"])?;
        until("the neighbour's web server", async || {
            Ok(TcpStream::connect((address.as_str(), 80)).await.ok())
        })
        .await?;
        Ok(neighbour)
    }

    /// Its network namespace.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        // Its devices go with the namespace, and that with its last process.
        let _gone = self.server.kill();
        let _gone = self.server.wait();
        if let Err(error) = ip(&["netns", "del", &self.name]) {
            eprintln!("the network namespace {} is left: {error:#}", self.name);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(arguments).output().context("cannot run ip")?;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "ip {}: {told}", arguments.join(" "));
    Ok(())
}
