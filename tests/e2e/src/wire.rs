//! A wire to another machine on a private network: a network namespace of its own. It must not touch an address or a
//! device that it did not make.

use std::fs::File;
use std::net::TcpListener;
use std::os::fd::AsFd as _;
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::{Context as _, Result, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Wires that this process has laid.
static LAID: AtomicU8 = AtomicU8::new(0);

/// Dropping it removes everything.
pub struct Wire {
    /// The network namespace.
    pub name: String,
    /// The other machine's address, and that of this machine on the same wire.
    pub address: String,
    pub ours: String,
}

impl Wire {
    pub fn lay() -> Result<Self> {
        let (process, nth) = (std::process::id(), LAID.fetch_add(1, Ordering::Relaxed));
        // Names of devices have at most 15 characters.
        let device = format!("che{}{}", process % 10_000_000, char::from(b'a' + nth % 26));
        let network = format!("10.{}.{}", 254 - nth, process % 250);
        let wire = Self {
            name: format!("choir-e2e-{process}-{nth}"),
            address: format!("{network}.2"),
            ours: format!("{network}.1"),
        };
        let peer = format!("{device}p");
        ip(&["netns", "add", &wire.name])?;
        ip(&[
            "link", "add", &device, "type", "veth", "peer", "name", &peer, "netns", &wire.name,
        ])?;
        ip(&["addr", "add", &format!("{}/30", wire.ours), "dev", &device])?;
        ip(&["link", "set", &device, "up"])?;
        ip(&[
            "-n",
            &wire.name,
            "addr",
            "add",
            &format!("{}/30", wire.address),
            "dev",
            &peer,
        ])?;
        ip(&["-n", &wire.name, "link", "set", &peer, "up"])?;
        ip(&["-n", &wire.name, "link", "set", "lo", "up"])?;
        Ok(wire)
    }

    /// A port of the other machine, served from this process.
    pub fn listen(&self, port: u16) -> Result<TcpListener> {
        let name = self.name.clone();
        // A thread of its own moves there and ends; the socket stays where it was made.
        let bound = std::thread::spawn(move || {
            let namespace = File::open(format!("/run/netns/{name}"))?;
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            anyhow::Ok(TcpListener::bind(("0.0.0.0", port))?)
        });
        let listener = bound.join().ok().context("the binding thread panicked")??;
        listener.set_nonblocking(true)?;
        Ok(listener)
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        // Its devices go with the namespace, and that with its last process and socket.
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
