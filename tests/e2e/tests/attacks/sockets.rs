//! Which TCP ports an instance with running sandboxes opens, seen from the machine itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use choir_core::Slot;
use choir_e2e::person;
use choir_e2e::waiting::until;
use choir_hypervisor::places::own_addresses;
use tokio::net::TcpStream;

use super::Scene;

/// Where sandboxes listen inside: the apps, the agent, broker and egress.
const INSIDE: [u16; 5] = [3000, 8080, UNUSED, 9091, 9092];
/// Nothing listens there, but an earlier design had a sandbox at it.
const UNUSED: u16 = 8081;

/// What this machine was like before the instance was started.
pub struct Before {
    listeners: BTreeMap<u64, u16>,
    processes: BTreeSet<u32>,
}

impl Before {
    pub fn now() -> Result<Self> {
        Ok(Self {
            listeners: listeners()?,
            processes: parents().into_keys().collect(),
        })
    }
}

pub async fn only_the_hypervisor_listens(scene: &Scene<'_>, before: &Before) -> Result<()> {
    until("no listener but the hypervisor's to be new", async || {
        nothing_else_is_new(scene, before).map(Some)
    })
    .await?;
    let mut addresses = own_addresses();
    addresses.push(IpAddr::from([127, 0, 0, 1]));
    for port in INSIDE {
        if before.listeners.values().any(|known| *known == port) {
            eprintln!("port {port} was in use on this machine before, and is left out");
            continue;
        }
        for address in &addresses {
            let reached = TcpStream::connect(SocketAddr::new(*address, port)).await;
            ensure!(reached.is_err(), "somebody answers on {address} port {port}");
        }
    }
    // The controls: the instance's own port answers there, and the apps and agents inside.
    let own = SocketAddr::from(([127, 0, 0, 1], scene.instance.port()));
    TcpStream::connect(own)
        .await
        .context("the hypervisor's port is closed")?;
    for slot in Slot::ALL {
        for port in INSIDE.into_iter().filter(|port| *port != UNUSED) {
            let ask = format!("curl -s -o /dev/null -w '%{{num_connects}}' http://127.0.0.1:{port}/");
            let connected = person::exec(scene.client, slot, &ask).await?.stdout;
            ensure!(connected == "1", "nobody listens on port {port} in {slot}");
        }
    }
    Ok(())
}

/// Fails with a listener that is neither old, nor the hypervisor's, nor of a process that others started meanwhile.
fn nothing_else_is_new(scene: &Scene<'_>, before: &Before) -> Result<()> {
    let parents = parents();
    let owners = owners();
    let mut own = 0;
    for (inode, port) in listeners()? {
        if before.listeners.contains_key(&inode) {
            continue;
        }
        if port == scene.instance.port() {
            own += 1;
            continue;
        }
        let holders = owners.get(&inode).map(Vec::as_slice).unwrap_or_default();
        let elsewhere = |pid: &u32| is_of_others(scene, &parents, before, *pid) || is_of_this_test(&parents, *pid);
        ensure!(
            !holders.is_empty() && holders.iter().all(elsewhere),
            "port {port} is new, and open in {:?}",
            holders.iter().map(|pid| command_line(*pid)).collect::<Vec<_>>()
        );
    }
    ensure!(own > 0, "the hypervisor does not listen");
    Ok(())
}

/// Whether a process that was there before started this one, which is none of the instance's: those have its data
/// directory in their own command line or in that of one above.
fn is_of_others(scene: &Scene<'_>, parents: &BTreeMap<u32, u32>, before: &Before, pid: u32) -> bool {
    let (ours, data) = (std::process::id(), scene.instance.path(""));
    let data = data.to_str().unwrap_or_default();
    let above = ancestors(parents, pid);
    !above.iter().any(|it| *it == ours || command_line(*it).contains(data))
        && above.iter().any(|it| *it > 1 && before.processes.contains(it))
}

/// The browser, and the servers of the test itself.
fn is_of_this_test(parents: &BTreeMap<u32, u32>, pid: u32) -> bool {
    let ours = std::process::id();
    pid == ours || ancestors(parents, pid).contains(&ours) && command_line(pid).contains("chromium")
}

/// Empty for a process that is gone.
fn command_line(pid: u32) -> String {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).replace('\0', " ")
}

/// A process and those above it.
fn ancestors(parents: &BTreeMap<u32, u32>, pid: u32) -> Vec<u32> {
    std::iter::successors(Some(pid), |pid| parents.get(pid).copied().filter(|it| *it > 0)).collect()
}

/// The port of every listening socket of this machine, by inode; proc_pid_net(5). Namespaces of sandboxes are not this
/// machine's.
fn listeners() -> Result<BTreeMap<u64, u16>> {
    const LISTEN: &str = "0A";
    let mut found = BTreeMap::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        for line in fs::read_to_string(table).unwrap_or_default().lines().skip(1) {
            let words: Vec<_> = line.split_whitespace().collect();
            if words.get(3) == Some(&LISTEN) {
                let port = words[1].rsplit(':').next().context("no port")?;
                found.insert(words[9].parse()?, u16::from_str_radix(port, 16)?);
            }
        }
    }
    Ok(found)
}

/// Who holds each socket, by inode.
fn owners() -> BTreeMap<u64, Vec<u32>> {
    let mut found: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
    for pid in parents().into_keys() {
        let held = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let links = held.filter_map(|it| fs::read_link(it.path()).ok());
        for link in links {
            let inode = link
                .to_str()
                .and_then(|it| it.strip_prefix("socket:[")?.strip_suffix(']'));
            if let Some(inode) = inode.and_then(|it| it.parse().ok()) {
                found.entry(inode).or_default().push(pid);
            }
        }
    }
    found
}

/// The parent of each process, from field 4 of proc_pid_stat(5).
fn parents() -> BTreeMap<u32, u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|it| it.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
        Some((pid, parent))
    })
    .collect()
}
