//! Why a test cannot run on this machine, said in `CHOIR_SKIP_LOG`. It must not skip for any other reason: what is
//! broken fails.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

/// Whether `test` must be left out here; the reason is then in the log.
pub fn cannot_run(test: &str) -> bool {
    let Some(reason) = obstacle() else { return false };
    says(test, reason);
    true
}

/// Tells whoever counts that something is left out.
pub fn says(test: &str, reason: &str) {
    eprintln!("{test} is skipped: {reason}");
    if let Some(log) = std::env::var_os("CHOIR_SKIP_LOG") {
        let written = File::options()
            .append(true)
            .create(true)
            .open(log)
            .and_then(|mut file| writeln!(file, "{test}: {reason}"));
        written.expect("the skip log can be written");
    }
}

fn obstacle() -> Option<&'static str> {
    if std::env::var_os("CHOIR_FAST").is_some_and(|value| value == "1") {
        return Some("CHOIR_FAST=1 leaves Podman and the browser out");
    }
    if !rustix::process::geteuid().is_root() {
        return Some("only root can mount the volumes' file system and limit sandboxes");
    }
    [
        ("podman", "Podman is not installed (package podman)"),
        ("chromium", "Chromium is not installed (package chromium)"),
        ("mkfs.btrfs", "mkfs.btrfs is not installed (package btrfs-progs)"),
    ]
    .into_iter()
    .find_map(|(program, reason)| (!is_installed(program)).then_some(reason))
}

/// Whether a program is there, for administrators or for everybody.
pub fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let administrators = ["/usr/sbin", "/sbin"].map(|directory| Path::new(directory).to_owned());
    std::env::split_paths(&path)
        .chain(administrators)
        .any(|directory| directory.join(program).is_file())
}
