//! Which Debian packages and Rust targets this machine lacks, why they are needed, and how they
//! get here. A package counts as present when its program or file is, wherever it came from.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::{command, workspace};

/// What is about to be done, which decides what is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Compiling the programs.
    Build,
    /// Running sandboxes in Podman.
    Podman,
    /// Building the default release.
    Image,
    /// Running the tests.
    Test,
    /// Measuring beside other people's programs.
    Bench,
}

struct Package {
    name: &'static str,
    purpose: Purpose,
    /// A program to look for, or an absolute path.
    probe: &'static str,
    why: &'static str,
}

const fn package(purpose: Purpose, name: &'static str, probe: &'static str, why: &'static str) -> Package {
    Package {
        name,
        purpose,
        probe,
        why,
    }
}

const PACKAGES: &[Package] = &[
    package(
        Purpose::Build,
        "build-essential",
        "cc",
        "links the programs and compiles SQLite",
    ),
    package(
        Purpose::Build,
        "musl-tools",
        "musl-gcc",
        "links the static sandbox agent",
    ),
    package(Purpose::Podman, "podman", "podman", "runs the sandboxes"),
    package(Purpose::Podman, "crun", "crun", "starts containers on cgroup v2"),
    package(
        Purpose::Podman,
        "runc",
        "runc",
        "starts containers on cgroup v1 and hybrid hosts",
    ),
    package(Purpose::Podman, "conmon", "conmon", "watches over each container"),
    package(
        Purpose::Podman,
        "netavark",
        "/usr/lib/podman/netavark",
        "Podman does not start without it",
    ),
    package(
        Purpose::Podman,
        "uidmap",
        "newuidmap",
        "maps a sandbox's users to ids of their own",
    ),
    package(
        Purpose::Podman,
        "btrfs-progs",
        "mkfs.btrfs",
        "makes the data volume with its snapshots",
    ),
    package(
        Purpose::Image,
        "mmdebstrap",
        "mmdebstrap",
        "builds the default release from packages",
    ),
    package(
        Purpose::Image,
        "debian-archive-keyring",
        "/usr/share/keyrings/debian-archive-keyring.gpg",
        "checks those packages' signatures",
    ),
    package(
        Purpose::Image,
        "ca-certificates",
        "/etc/ssl/certs/ca-certificates.crt",
        "lets programs trust TLS servers",
    ),
    package(Purpose::Image, "zstd", "zstd", "unpacks packages and images"),
    package(Purpose::Test, "git", "git", "is cloned with in the end-to-end tests"),
    package(
        Purpose::Test,
        "openssh-client",
        "ssh-keygen",
        "makes the keys of the tests and verifies what they sign",
    ),
    package(
        Purpose::Test,
        "openssh-server",
        "/usr/sbin/sshd",
        "is what sandboxes clone from and push to in the end-to-end tests",
    ),
    package(
        Purpose::Test,
        "docker-registry",
        "docker-registry",
        "is what images are pulled from in the end-to-end tests",
    ),
    package(
        Purpose::Test,
        "busybox-static",
        "busybox",
        "is the whole root file system of the runtime's tests",
    ),
    package(
        Purpose::Test,
        "qemu-system-x86",
        "qemu-system-x86_64",
        "is the virtual machine in which the Debian package is tried",
    ),
    package(Purpose::Test, "e2fsprogs", "mkfs.ext4", "makes that machine's disk"),
    package(
        Purpose::Test,
        "systemd-container",
        "systemd-nspawn",
        "boots the clean Debian into which the package is installed",
    ),
    package(
        Purpose::Test,
        "iproute2",
        "ip",
        "makes the network namespaces of the tests",
    ),
    package(
        Purpose::Test,
        "iptables",
        "iptables",
        "lets the tests start a container on Podman's default network",
    ),
    package(
        Purpose::Test,
        "nftables",
        "nft",
        "is what Podman 5 makes that network with",
    ),
    package(
        Purpose::Test,
        "chromium",
        "chromium",
        "is the browser of the end-to-end tests",
    ),
    package(Purpose::Test, "chromium-driver", "chromedriver", "drives that browser"),
    package(
        Purpose::Test,
        "nodejs",
        "node",
        "runs the tests' small web applications",
    ),
    package(Purpose::Test, "npm", "npm", "installs packages in the end-to-end tests"),
    package(Purpose::Test, "systemd", "systemd-analyze", "judges the unit files"),
    package(Purpose::Test, "dpkg", "dpkg-deb", "builds the package"),
    package(
        Purpose::Test,
        "virtualenv",
        "virtualenv",
        "keeps the Python packages of the AWS stack's tests apart",
    ),
    package(Purpose::Test, "shellcheck", "shellcheck", "reads our shell scripts"),
    package(
        Purpose::Test,
        "nix-bin",
        "nix-instantiate",
        "evaluates the NixOS module in its tests",
    ),
    package(Purpose::Test, "curl", "curl", "sends the AWS host's memory in its test"),
    package(Purpose::Test, "jq", "jq", "reads the AWS host's keys in its test"),
    package(
        Purpose::Test,
        "nginx",
        "nginx",
        "is a proxy that the recipes are tried with",
    ),
    package(
        Purpose::Test,
        "caddy",
        "caddy",
        "is a proxy that the recipes are tried with",
    ),
    package(Purpose::Bench, "wrk", "wrk", "makes the benchmarks' load"),
    package(Purpose::Bench, "nginx", "nginx", "is measured beside our proxy"),
    package(Purpose::Bench, "caddy", "caddy", "is measured beside our proxy"),
    package(
        Purpose::Bench,
        "nodejs",
        "node",
        "runs configurable-http-proxy, measured beside our proxy",
    ),
    package(Purpose::Bench, "npm", "npm", "installs configurable-http-proxy"),
];

/// Installs what `purposes` need and this machine lacks, saying what and why. Asks before using
/// sudo. On a system without apt, or when nobody can be asked, the error is the list.
pub fn ensure(purposes: &[Purpose]) -> Result<()> {
    let missing = missing(purposes, is_present);
    if !missing.is_empty() {
        println!("==> {} missing on this machine:", counted(missing.len()));
        for package in &missing {
            println!("    {:<24} {}", package.name, package.why);
        }
        install(&missing.iter().map(|package| package.name).collect::<Vec<_>>())?;
    }
    if purposes.contains(&Purpose::Build) {
        ensure_agent_target()?;
    }
    Ok(())
}

/// Gets the package lists where there are none, so that `is_available` can tell.
pub fn ensure_lists() -> Result<()> {
    if has_package_lists() {
        Ok(())
    } else {
        apt(rustix::process::geteuid().is_root(), &["update"])
    }
}

/// Whether this Debian has a package of that name.
pub fn is_available(name: &str) -> bool {
    command::capture(Command::new("apt-cache").args(["show", "--quiet=2", name])).is_ok_and(|text| !text.is_empty())
}

/// Whether a test has the program it needs; where not, the test is named among those that were left out.
#[cfg(test)]
pub fn is_here_for(test: &str, program: &str) -> bool {
    if command::find(program).is_some() {
        return true;
    }
    let line = format!("{test}: there is no {program} here; `cargo xtask test` without --fast installs it\n");
    eprint!("skipped: {line}");
    if let Some(log) = std::env::var_os("CHOIR_SKIP_LOG") {
        let mut log = std::fs::File::options().append(true).open(log).unwrap();
        log.write_all(line.as_bytes()).unwrap();
    }
    false
}

fn missing(purposes: &[Purpose], is_present: impl Fn(&str) -> bool) -> Vec<&'static Package> {
    PACKAGES
        .iter()
        .filter(|package| purposes.contains(&package.purpose) && !is_present(package.probe))
        .collect()
}

fn is_present(probe: &str) -> bool {
    if probe.starts_with('/') {
        Path::new(probe).exists()
    } else {
        command::find(probe).is_some()
    }
}

fn counted(packages: usize) -> String {
    if packages == 1 {
        "1 package is".into()
    } else {
        format!("{packages} packages are")
    }
}

fn install(names: &[&str]) -> Result<()> {
    if command::find("apt-get").is_none() {
        bail!(
            "this system has no apt: install what Debian calls {} with its own package manager, \
             then run this again",
            names.join(", ")
        );
    }
    let root = rustix::process::geteuid().is_root();
    if !root {
        ask_for_sudo(names)?;
    }
    ensure_lists()?;
    let mut arguments = vec!["install", "--yes", "--no-install-recommends"];
    arguments.extend(names);
    if apt(root, &arguments).is_err() {
        // Old lists name files that a mirror has already replaced.
        apt(root, &["update"])?;
        apt(root, &arguments)?;
    }
    Ok(())
}

fn ask_for_sudo(names: &[&str]) -> Result<()> {
    let by_hand = format!("sudo apt-get install --no-install-recommends {}", names.join(" "));
    if command::find("sudo").is_none() || !std::io::stdin().is_terminal() {
        bail!("installing packages needs root: run `{by_hand}`, then run this again");
    }
    print!("Install them now with sudo? [Y/n] ");
    std::io::stdout().flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    if !matches!(answer.trim(), "" | "y" | "Y" | "yes") {
        bail!("nothing was installed: run `{by_hand}` when it suits you, then run this again");
    }
    Ok(())
}

fn apt(root: bool, arguments: &[&str]) -> Result<()> {
    let mut command = Command::new(if root { "env" } else { "sudo" });
    command
        .args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "-q"])
        .args(arguments);
    println!("==> apt-get {}", arguments.join(" "));
    command::run(&mut command)
}

fn has_package_lists() -> bool {
    std::fs::read_dir("/var/lib/apt/lists").is_ok_and(|mut entries| {
        entries.any(|entry| entry.is_ok_and(|entry| entry.file_name().to_string_lossy().contains("_Packages")))
    })
}

fn ensure_agent_target() -> Result<()> {
    let target = workspace::agent_target();
    let mut rustc = Command::new("rustc");
    if let Some(manifest) = std::env::var_os("CARGO_MANIFEST_DIR") {
        rustc.current_dir(manifest);
    }
    let libraries = command::capture(rustc.args(["--print", "target-libdir", "--target", &target]))?;
    if Path::new(&libraries).exists() {
        return Ok(());
    }
    if command::find("rustup").is_none() {
        bail!(
            "the sandbox agent needs Rust's standard library for {target}, and there is no rustup \
             here to add it: install that target with your Rust toolchain's own packages"
        );
    }
    println!("==> rustup target add {target} (the sandbox agent is linked statically)");
    command::run(Command::new("rustup").args(["target", "add", &target]))
}

#[cfg(test)]
mod tests {
    use super::{PACKAGES, Purpose, missing};

    #[test]
    fn only_what_the_purpose_needs_and_the_machine_lacks_is_missing() {
        let names: Vec<_> = missing(&[Purpose::Image], |probe| probe != "mmdebstrap")
            .iter()
            .map(|package| package.name)
            .collect();
        assert_eq!(names, ["mmdebstrap"]);
    }

    #[test]
    fn a_machine_with_everything_lacks_nothing() {
        let all = [
            Purpose::Build,
            Purpose::Podman,
            Purpose::Image,
            Purpose::Test,
            Purpose::Bench,
        ];
        assert!(missing(&all, |_| true).is_empty());
        assert_eq!(missing(&all, |_| false).len(), PACKAGES.len());
    }
}
