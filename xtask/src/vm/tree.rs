//! The package in a Debian that has nothing yet, at the speed of this machine: from nothing to a claim link, on to other
//! versions by SSH, and to nothing again.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use super::container::Container;
use super::runbook::Runbook;
use super::{LIST, SMALL_RELEASE, debian};

const SUITE: &str = "trixie";
/// A system that boots and is reached by SSH; it is not given what the package depends on, nor what software is made with.
const PACKAGES: &[&str] = &["dbus", "openssh-server", "systemd-sysv"];
/// As somebody's Debian is, who has changed nothing; what this machine's mirror needs stays. SSH has no port of its own,
/// since all ports are this machine's.
const SETTINGS: &str = r#"set -eu
sed -i /Install-Recommends/d "$1"/etc/apt/apt.conf.d/99mmdebstrap
ssh-keygen -q -t ed25519 -N '' -C install-test -f "$OUT/key"
install -m 0644 "$OUT/key.pub" "$1/etc/ssh/authorized_keys"
echo 'AuthorizedKeysFile /etc/ssh/authorized_keys' > "$1/etc/ssh/sshd_config.d/clean.conf"
chroot "$1" systemctl --quiet disable ssh.service
echo clean > "$1/etc/hostname"
"#;
/// Sparse: what is on it takes a fraction of that.
const SIZE: &str = "16G";
const PROCESSORS: &str = "0,1";
/// In seconds, as promised: from a package to a claim link, with all that comes from the mirror.
const WITHIN: f64 = 120.0;

/// What is tried.
pub struct Packages {
    /// What is installed.
    pub first: PathBuf,
    /// What it is replaced by.
    pub next: PathBuf,
    /// Its hypervisor does not run.
    pub broken: PathBuf,
    /// The default release.
    pub release: PathBuf,
}

struct Clean {
    container: Container,
    key: PathBuf,
    packages: Packages,
    install: Runbook,
}

type Step = fn(&mut Clean) -> Result<String>;

/// Tells of it line by line.
pub fn tell(directory: &Path, repository: &Path, packages: Packages) -> Result<()> {
    TcpListener::bind("127.0.0.1:9090")
        .context("port 9090 of this machine is in use, which the container shares: stop what listens there")?;
    let tree = debian::tree(directory, SUITE, PACKAGES, SETTINGS)?;
    let disk = directory.join("tree.img");
    debian::image(&disk, SIZE, &tree.join("root"))?;
    let told = tell_of(&disk, tree.join("key"), directory, repository, packages);
    fs::remove_file(&disk)?;
    told
}

fn tell_of(disk: &Path, key: PathBuf, directory: &Path, repository: &Path, packages: Packages) -> Result<()> {
    let files = [
        (packages.first.as_path(), "/media/first.deb"),
        (packages.release.as_path(), "/media/release.tar"),
    ];
    let mut clean = Clean {
        container: Container::start(disk, PROCESSORS, &files, directory)?,
        packages,
        key,
        install: Runbook::read(&repository.join("docs/runbook/install.md"))?,
    };
    let steps: &[(&str, Step)] = &[
        ("has no compiler", Clean::begins),
        ("is installed, until there is a claim link", Clean::is_installed),
        ("is ready, with a small default release", Clean::is_ready),
        ("xtask deploy", Clean::deployed),
        ("xtask deploy of what does not run", Clean::not_deployed),
        ("down, up, removed, and back", Clean::comes_back),
        ("is removed for good", Clean::purged),
    ];
    for (name, step) in steps {
        let begun = Instant::now();
        let said = step(&mut clean).with_context(|| (*name).to_owned());
        if said.is_err() {
            println!("{}", clean.evidence());
        }
        println!("    {:>6.1} s  {name}: {}", begun.elapsed().as_secs_f64(), said?);
    }
    clean.install.is_done()
}

impl Clean {
    fn begins(&mut self) -> Result<String> {
        self.container.run(&format!(
            "{LIST}
            if command -v cc gcc clang rustc cargo nix podman; then exit 1; fi
            for n in $(seq 0 63); do test -e /dev/loop$n || mknod /dev/loop$n b 7 $n; done
            test -e /dev/loop-control || mknod /dev/loop-control c 10 237
            list > before.txt
            cp /media/first.deb choir.deb
            {SMALL_RELEASE}
            . /etc/os-release
            echo \"$PRETTY_NAME, $(systemctl --version | sed -n 1p), $(nproc) processors\""
        ))
    }

    fn is_installed(&mut self) -> Result<String> {
        let commands = self.install.next()?;
        let begun = Instant::now();
        let said = self.container.run(&commands)?;
        let took = begun.elapsed().as_secs_f64();
        ensure!(said.contains("Claim it within"), "no claim link:\n{said}");
        ensure!(
            took <= WITHIN,
            "from the package to a claim link it took {took:.0} s, where {WITHIN} are promised"
        );
        let claim = self.install.next()?;
        self.container.run(&format!(
            "if command -v cc gcc clang rustc cargo nix; then exit 1; fi\n{claim}"
        ))?;
        Ok(commands.trim().replace('\n', "; "))
    }

    fn is_ready(&mut self) -> Result<String> {
        let commands = self.install.next()?;
        let said = self.container.run(&commands)?;
        let ready = said.lines().find(|line| line.starts_with("ready "));
        Ok(ready.with_context(|| said.clone())?.to_owned())
    }

    fn deployed(&mut self) -> Result<String> {
        let was = self.version()?;
        self.deploy(&self.packages.next)?;
        let is = self.version()?;
        ensure!(was != is, "it is {is} before and after");
        Ok(format!("{was} to {is}"))
    }

    fn not_deployed(&mut self) -> Result<String> {
        let was = self.version()?;
        match self.deploy(&self.packages.broken) {
            Ok(said) => bail!("a version that does not run was deployed:\n{said}"),
            Err(error) => {
                let last = error.to_string().lines().last().unwrap_or_default().to_owned();
                let expected = "xtask: the upgrade failed; the version before runs, and people can use it";
                ensure!(last.starts_with(expected), "{error}");
            }
        }
        let is = self.version()?;
        ensure!(was == is, "it was {was} and is {is}");
        Ok(format!("{is} runs on"))
    }

    /// By the command, in a network of its own: the port of its tunnel is the one on which the box listens, whose ports are
    /// this machine's.
    fn deploy(&self, package: &Path) -> Result<String> {
        let enter = self.container.enter().join(" ");
        let options = [
            format!("ProxyCommand={enter} sh -c 'mkdir -p /run/sshd; exec /usr/sbin/sshd -i'"),
            format!("IdentityFile={}", self.key.display()),
            "UserKnownHostsFile=/dev/null".to_owned(),
            "StrictHostKeyChecking=no".to_owned(),
            "LogLevel=ERROR".to_owned(),
            "BatchMode=yes".to_owned(),
        ];
        let mut deploy = Command::new("unshare");
        deploy.args(["--net", "sh", "-euc", "ip link set lo up; exec \"$0\" \"$@\" 2>&1"]);
        deploy.arg(std::env::current_exe()?);
        deploy
            .args(["deploy", "root@clean", "--no-smoke", "--package"])
            .arg(package);
        for option in options {
            deploy.args(["--ssh-option", &option]);
        }
        let output = deploy.output().context("cannot start xtask")?;
        let said = String::from_utf8_lossy(&output.stdout).trim_end().to_owned();
        ensure!(output.status.success(), "{said}");
        Ok(said)
    }

    fn version(&self) -> Result<String> {
        self.container.run("choir-box status | sed -n 1p")
    }

    /// The runbook's blocks from the check of the settings to a removal that keeps everything.
    fn comes_back(&mut self) -> Result<String> {
        for _ in ["check", "down and up", "remove and install"] {
            let commands = self.install.next()?;
            self.container.run(&commands)?;
        }
        self.version()
    }

    fn purged(&mut self) -> Result<String> {
        let purge = self.install.next()?;
        let script = format!("{purge}\n{LIST}\n{LEFT}");
        let said = self.container.run(&script)?;
        Ok(said.lines().last().unwrap_or_default().to_owned())
    }

    /// Its last words, for who reads of a failure.
    fn evidence(&self) -> String {
        let asked = "journalctl --no-pager --output=short-precise --lines=60 --priority=info; systemctl --failed";
        self.container.run(asked).unwrap_or_else(|error| format!("{error:#}"))
    }
}

/// Of what is new after the purge, and in none of the packages that ours brought, nothing is ours.
const LEFT: &str = r#"
fail() { echo "left behind: $*"; exit 1; }
list | comm -13 before.txt - > new.txt
cat /var/lib/dpkg/info/*.list | sort -u | comm -23 new.txt - > left.txt
if grep choir left.txt; then fail "a file"; fi
# Debian keeps its lists of users as they were before the last change.
if grep -r --exclude='*-' choir /etc; then fail "a line in /etc"; fi
if grep /choir/ /proc/mounts; then fail "a mount"; fi
if getent passwd | grep choir; then fail "a user"; fi
if systemctl list-units --all --plain --no-legend 'choir*' '*choir*.mount' | grep .; then fail "a unit"; fi
echo no file, user, mount or unit
"#;
