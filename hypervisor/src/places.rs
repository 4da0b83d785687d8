//! Small dealings with this host: descriptors handed over, private files, own addresses.

use std::io::Write as _;
use std::net::IpAddr;
use std::os::fd::RawFd;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::Context;
use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_gid, set_thread_groups, set_thread_uid};

/// The descriptors that systemd, or `up` in its place, hands over: `LISTEN_FDS` from 3 on, if `LISTEN_PID` is us.
pub fn inherited_sockets() -> std::ops::Range<RawFd> {
    let number = |name| std::env::var(name).ok().and_then(|v| v.parse::<i64>().ok());
    let ours = number("LISTEN_PID") == Some(i64::from(std::process::id()));
    let count = number("LISTEN_FDS")
        .filter(|n| ours && (1..=16).contains(n))
        .unwrap_or(0);
    3..3 + i32::try_from(count).unwrap_or(0)
}

/// Keeps what this process has in memory to itself: it leaves no core dump, and only root may trace it or read its
/// memory, not even other programs of its own user.
pub fn keep_memory_private() -> anyhow::Result<()> {
    use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, none)
        .and_then(|()| set_dumpable_behavior(DumpableBehavior::NotDumpable))
        .context("the kernel does not let this process keep its memory private")
}

/// How many client connections the descriptor limit allows: two descriptors each, and some kept for the database,
/// sandboxes and the container service.
pub fn most_connections() -> usize {
    const KEPT: u64 = 512;
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile)
        .current
        .unwrap_or(1 << 20);
    usize::try_from(limit.saturating_sub(KEPT) / 2)
        .unwrap_or(usize::MAX)
        .clamp(32, 100_000)
}

/// Goes on as the user whose file this is, where root is at work for another: what root makes beside it, its owner could not
/// write, and the volumes helper listens to its owner only. Before a second thread begins.
pub fn act_as_owner_of(path: &Path) -> anyhow::Result<()> {
    let Ok(file) = std::fs::metadata(path) else {
        return Ok(());
    };
    if !rustix::process::geteuid().is_root() || file.uid() == 0 {
        return Ok(());
    }
    let (user, group) = (Uid::from_raw(file.uid()), Gid::from_raw(file.gid()));
    // Of a thread, and there is no other yet.
    set_thread_groups(&[])
        .and_then(|()| set_thread_gid(group))
        .and_then(|()| set_thread_uid(user))
        .with_context(|| format!("this cannot go on as user {}", file.uid()))
}

/// Writes a file that only its owner can read, in one step: readers see the old text or the new.
pub fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    let new = path.with_extension("new");
    let write = || -> std::io::Result<()> {
        let _ = std::fs::remove_file(&new);
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&new, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// A one-line secret from a file.
pub fn read_secret(path: &Path) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let secret = text.trim();
    anyhow::ensure!(
        secret.len() >= 16,
        "the secret in {} has under 16 characters",
        path.display()
    );
    Ok(secret.to_owned())
}

/// Bytes that are free to us, and all, where a file or directory is.
pub fn room(path: &Path) -> std::io::Result<(u64, u64)> {
    let disk = rustix::fs::statvfs(path)?;
    Ok((disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize))
}

/// An archive with nothing in it, for runtimes that need no image.
pub fn empty_archive(path: &Path) -> anyhow::Result<PathBuf> {
    // Two blocks of zeros end a tar archive (POSIX.1-1988).
    std::fs::write(path, [0; 1024]).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path.to_owned())
}

/// The addresses of this box's own interfaces, which sandboxes must not reach through the gateway.
pub fn own_addresses() -> Vec<IpAddr> {
    let v4 = std::fs::read_to_string("/proc/net/fib_trie").unwrap_or_default();
    let v6 = std::fs::read_to_string("/proc/net/if_inet6").unwrap_or_default();
    local_v4(&v4).chain(local_v6(&v6)).collect()
}

/// In `fib_trie` the line after an address says whether it is local to this host.
fn local_v4(trie: &str) -> impl Iterator<Item = IpAddr> {
    let lines: Vec<&str> = trie.lines().map(str::trim).collect();
    let mut found: Vec<IpAddr> = lines
        .windows(2)
        .filter(|pair| pair[1].starts_with("/32 host LOCAL"))
        .filter_map(|pair| pair[0].strip_prefix("|-- ")?.parse().ok())
        .collect();
    found.sort();
    found.dedup();
    found.into_iter()
}

fn local_v6(table: &str) -> impl Iterator<Item = IpAddr> {
    table.lines().filter_map(|line| {
        let digits = line.get(..32)?;
        u128::from_str_radix(digits, 16)
            .ok()
            .map(|bits| IpAddr::V6(bits.into()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_addresses_are_read_from_the_kernels_tables() {
        let trie = "Local:\n  +-- 0.0.0.0/0\n     |-- 192.0.2.7\n        /32 host LOCAL\n     |-- 192.0.2.255\n        /32 link BROADCAST\n";
        assert_eq!(
            local_v4(trie).collect::<Vec<_>>(),
            ["192.0.2.7".parse::<IpAddr>().unwrap()]
        );
        let table = "00000000000000000000000000000001 01 80 10 80       lo\n";
        assert_eq!(local_v6(table).collect::<Vec<_>>(), ["::1".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn a_private_file_is_readable_by_its_owner_only() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("secret");
        write_private(&path, "one").unwrap();
        write_private(&path, "two").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "two");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
