//! `cargo xtask deploy`: brings a package to a Debian host, or a system to a NixOS host, over SSH, looks from outside whether
//! people can use it, and goes back where they cannot. How a package is put in and taken back is known to `choir-box`, on the
//! host; a system is switched to by itself.

mod nixos;

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use data_encoding::HEXLOWER;
use sha2::{Digest, Sha256};

use crate::workspace::cargo;
use crate::{command, package};

/// Where the package goes on the host, in a directory of `choir-box`.
const THERE: &str = "/var/cache/choir/deploy.deb";

/// Where `choir-box upgrade` leaves the version before.
const FORMER: &str = "/var/cache/choir/former.deb";

/// An admin's token on the host; its timers use it, too.
const TOKEN: &str = "/etc/choir/operator-token";

#[derive(Args)]
pub struct Options {
    /// The host, as ssh takes it; commands must run there as root
    host: String,
    /// The package to bring to a Debian host [default: one that is built now]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["flake", "closure"])]
    package: Option<PathBuf>,
    /// The system to build with Nix and bring to a NixOS host, such as .#choir-ec2
    #[arg(long, value_name = "FLAKE#NAME", conflicts_with = "closure")]
    flake: Option<String>,
    /// The system to bring to a NixOS host, as it was built and tested before
    #[arg(long, value_name = "STORE_PATH")]
    closure: Option<String>,
    /// An option of ssh, as in its configuration; may be given several times
    #[arg(long, value_name = "NAME=VALUE")]
    ssh_option: Vec<String>,
    /// Where people reach the box; `http://localhost:PORT` through a tunnel
    #[arg(long, default_value = "http://localhost:9090")]
    url: String,
    /// Look at /readyz only; a smoke leaves a user without workspaces behind
    #[arg(long)]
    no_smoke: bool,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b":/.-".contains(&byte);
    ensure!(
        options.url.starts_with("http") && options.url.bytes().all(is_plain),
        "--url must be an address such as https://choir.example.com"
    );
    let site = Site {
        ssh: "ssh".into(),
        ssh_options: options.ssh_option.clone(),
        host: options.host.clone(),
        url: options.url.trim_end_matches('/').to_owned(),
        smokes: !options.no_smoke,
        choir: Box::new(|| {
            let mut choir = cargo();
            choir.args(["run", "--quiet", "--package", "choir", "--"]);
            choir
        }),
    };
    let built = match (&options.flake, &options.closure) {
        (Some(flake), _) => Some(nixos::Built::of_flake(Path::new("nix"), flake)?),
        (None, Some(path)) => Some(nixos::Built::before(path)?),
        (None, None) => None,
    };
    let change = match built {
        Some(built) => {
            site.examine(nixos::IS_ONE, nixos::IS_NONE)?;
            nixos::bring(&site, Path::new("nix"), &built)?
        }
        None => {
            site.examine("command -v choir-box > /dev/null", NO_BOX)?;
            let package = match &options.package {
                Some(file) => file.clone(),
                None => package::build(&package::Options::default())?,
            };
            bring(&site, &package)?
        }
    };
    deploy(&site, &change)?;
    Ok(ExitCode::SUCCESS)
}

const NO_BOX: &str = "ChoirOS is not installed there: docs/runbook/install.md; for NixOS say --flake or --closure";

/// What the host does of itself once it has the new version.
struct Change {
    forward: String,
    back: String,
    /// Whether it goes back by itself where it cannot go forward.
    returns: bool,
}

fn bring(site: &Site, package: &Path) -> Result<Change> {
    let sum = site.copy(package)?;
    Ok(Change {
        forward: format!("choir-box upgrade {THERE} --sha256 {sum}"),
        back: format!("choir-box upgrade {FORMER}"),
        returns: true,
    })
}

/// Ends well only when the new version is in and people can use it.
fn deploy(site: &Site, change: &Change) -> Result<()> {
    let error = match site.on_host(&change.forward) {
        Err(error) if change.returns => {
            site.look()
                .context("the upgrade failed, and the host is not well: docs/runbook/deploy.md says what to do")?;
            return Err(error.context("the upgrade failed; the version before runs, and people can use it"));
        }
        Err(error) => error,
        Ok(()) => match site.look() {
            Err(error) => error,
            Ok(()) => {
                println!("==> deployed");
                return Ok(());
            }
        },
    };
    eprintln!("xtask: {error:#}; going back to the version before");
    site.on_host(&change.back)
        .context("the version before could not be put back: docs/runbook/deploy.md says what to do")?;
    site.look().context("the version before is back, and not well either")?;
    bail!("people could not use the new version; the one before is back, and they can use it");
}

/// A host, and how people come to it.
struct Site {
    ssh: PathBuf,
    ssh_options: Vec<String>,
    host: String,
    /// Without a slash at its end.
    url: String,
    smokes: bool,
    /// The command line of this checkout.
    choir: Box<dyn Fn() -> Command>,
}

impl Site {
    fn ssh(&self, more: &[&str], remote: &str) -> Command {
        let mut ssh = Command::new(&self.ssh);
        for option in &self.ssh_options {
            ssh.args(["-o", option]);
        }
        ssh.args(more).args(["--", &self.host, remote]);
        ssh
    }

    fn on_host(&self, remote: &str) -> Result<()> {
        command::run(self.ssh(&[], remote).stdin(Stdio::null()))
    }

    /// Refuses, before anything is built or changed, what could not be brought to its end.
    fn examine(&self, is_one: &str, is_none: &'static str) -> Result<()> {
        let has = |test: &str| self.on_host(test);
        has("true").context("the host cannot be reached: name it as ssh takes it")?;
        has("test \"$(id -u)\" -eq 0").context("commands do not run as root there: name the host as root@HOST")?;
        has(is_one).context(is_none)?;
        if self.smokes {
            has(&format!("test -s {TOKEN}")).with_context(|| {
                format!("the smoke needs an invite: put an admin's token into {TOKEN} there, or say --no-smoke")
            })?;
        }
        Ok(())
    }

    /// Returns the package's SHA-256, by which the host sees that it came whole.
    fn copy(&self, package: &Path) -> Result<String> {
        let cannot = || format!("cannot read {}", package.display());
        let sum = HEXLOWER.encode(&Sha256::digest(fs::read(package).with_context(cannot)?));
        let place = Path::new(THERE).parent().unwrap_or(Path::new("/"));
        let remote = format!("install -d -m 0700 {} && cat > {THERE}", place.display());
        command::run(self.ssh(&[], &remote).stdin(File::open(package).with_context(cannot)?))?;
        Ok(sum)
    }

    /// Whether people can use it, from this machine.
    fn look(&self) -> Result<()> {
        let _tunnel = self.tunnel()?;
        if self.smokes {
            return self.smoke();
        }
        println!("==> looking at /readyz; without a smoke nobody tried to sign in or to run anything");
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--show-error", "--fail", "--noproxy", "localhost"]);
        curl.args(["--write-out", "\\n"]);
        curl.args(["--retry", "60", "--retry-delay", "2", "--retry-all-errors"]);
        command::run(curl.arg(format!("{}/readyz", self.url)))
    }

    fn smoke(&self) -> Result<()> {
        let make = format!(
            "CHOIR_TOKEN_FILE={TOKEN} XDG_CONFIG_HOME=/tmp choir --url {} invites create",
            self.url
        );
        let invite = command::capture(&mut self.ssh(&[], &make)).context("the host could not make an invite")?;
        let mut smoke = (self.choir)();
        // By its standard input: arguments are seen by everybody on this machine.
        smoke.args(["--url", &self.url, "smoke", "--invite-file", "/dev/stdin"]);
        let mut running = smoke.stdin(Stdio::piped()).spawn().context("cannot start the smoke")?;
        if let Some(mut input) = running.stdin.take() {
            input.write_all(invite.as_bytes())?;
        }
        let status = running.wait()?;
        ensure!(status.success(), "the smoke failed ({status})");
        Ok(())
    }

    /// Where people reach the box at their own machine only, this becomes one of those.
    fn tunnel(&self) -> Result<Option<Tunnel>> {
        let Some(port) = self.url.strip_prefix("http://localhost:") else {
            return Ok(None);
        };
        let forward = format!("127.0.0.1:{port}:localhost:{port}");
        let more = ["-o", "ExitOnForwardFailure=yes", "-L", &forward];
        // Forwards are set up before the command begins.
        let mut ssh = self.ssh(&more, "echo open && cat");
        let child = ssh.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut tunnel = Tunnel(child.context("cannot start ssh")?);
        let mut line = String::new();
        if let Some(output) = tunnel.0.stdout.take() {
            BufReader::new(output).read_line(&mut line)?;
        }
        ensure!(
            line == "open\n",
            "no tunnel to the host could be opened: is port {port} of this machine in use?"
        );
        Ok(Some(tunnel))
    }
}

/// An ssh that forwards a port until this is dropped.
struct Tunnel(Child);

impl Drop for Tunnel {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// Notes what is asked of the host, and answers as it would.
    const SSH: &str = r#"#!/bin/sh
cd "$(dirname "$0")"
for last; do :; done
echo "$*" >> asked
case "$last" in
*"cat > "*) cat > copied ;;
"echo open && cat") echo open && cat ;;
*"invites create") echo "https://box/register?invite=$(grep -c create asked)" ;;
*former.deb) rm -f unwell; [ ! -e stuck ] ;;
*deploy.deb*) [ ! -e refused ] ;;
esac
"#;

    /// The smoke of a box that is well unless it is said not to be.
    const CHOIR: &str = r#"#!/bin/sh
cd "$(dirname "$0")"
echo "smoke $* $(cat)" >> asked
[ ! -e unwell ]
"#;

    struct Rehearsal {
        directory: tempfile::TempDir,
        site: Site,
    }

    impl Rehearsal {
        /// With a host that these files say something about.
        fn with(marks: &[&str], url: &str) -> Self {
            let directory = tempfile::tempdir().unwrap();
            for (name, text) in [("ssh", SSH), ("choir", CHOIR)] {
                let program = directory.path().join(name);
                fs::write(&program, text).unwrap();
                fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
            }
            for mark in marks {
                fs::write(directory.path().join(mark), "").unwrap();
            }
            let choir = directory.path().join("choir");
            let site = Site {
                ssh: directory.path().join("ssh"),
                ssh_options: vec!["Port=2222".into()],
                host: "root@box".into(),
                url: url.into(),
                smokes: true,
                choir: Box::new(move || Command::new(&choir)),
            };
            Self { directory, site }
        }

        /// Deploys a package of three bytes; how it ended, and what was asked for, in order and shortened.
        fn run(&self) -> (Result<(), String>, Vec<&'static str>) {
            let package = self.directory.path().join("choir.deb");
            fs::write(&package, "abc").unwrap();
            let done = bring(&self.site, &package).and_then(|change| deploy(&self.site, &change));
            let done = done.map_err(|error| format!("{error:#}"));
            let kinds = [
                ("cat > /var/cache/choir/deploy.deb", "copy"),
                ("former.deb", "back"),
                ("upgrade", "upgrade"),
                ("invites create", "invite"),
                ("echo open", "tunnel"),
                ("smoke", "smoke"),
            ];
            let kind = |line: &str| {
                let found = kinds.iter().find(|(part, _)| line.contains(part));
                found.unwrap_or_else(|| panic!("nobody expected {line}")).1
            };
            (done, self.asked().lines().map(kind).collect())
        }

        fn asked(&self) -> String {
            fs::read_to_string(self.directory.path().join("asked")).unwrap()
        }
    }

    #[test]
    fn a_version_that_people_can_use_stays() {
        let rehearsal = Rehearsal::with(&[], "https://choir.example.com");
        let (done, steps) = rehearsal.run();
        assert_eq!((done, steps), (Ok(()), vec!["copy", "upgrade", "invite", "smoke"]));
        let copied = fs::read_to_string(rehearsal.directory.path().join("copied")).unwrap();
        assert_eq!(copied, "abc");
        let asked = rehearsal.asked();
        // FIPS 180-2, appendix B.1.
        assert!(
            asked.contains("--sha256 ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
            "{asked}"
        );
        assert!(
            asked
                .lines()
                .all(|line| line.starts_with("smoke ") || line.starts_with("-o Port=2222 "))
        );
        assert!(
            asked.contains("smoke --url https://choir.example.com smoke --invite-file /dev/stdin https://box/"),
            "{asked}"
        );
    }

    #[test]
    fn a_version_that_people_cannot_use_goes_back_and_the_one_before_is_tried_with_an_invite_of_its_own() {
        let rehearsal = Rehearsal::with(&["unwell"], "https://choir.example.com");
        let (done, steps) = rehearsal.run();
        let expected = ["copy", "upgrade", "invite", "smoke", "back", "invite", "smoke"];
        assert_eq!(steps, expected);
        assert!(
            done.unwrap_err()
                .contains("the one before is back, and they can use it")
        );
        let asked = rehearsal.asked();
        assert!(asked.contains("invite=1") && asked.contains("invite=2"), "{asked}");
    }

    #[test]
    fn what_the_host_put_back_by_itself_is_looked_at_and_not_put_back_twice() {
        let (done, steps) = Rehearsal::with(&["refused"], "https://choir.example.com").run();
        assert_eq!(steps, ["copy", "upgrade", "invite", "smoke"]);
        assert!(
            done.unwrap_err()
                .starts_with("the upgrade failed; the version before runs")
        );
        let (done, _) = Rehearsal::with(&["refused", "unwell"], "https://choir.example.com").run();
        assert!(done.unwrap_err().contains("the host is not well"));
    }

    #[test]
    fn a_version_that_does_not_go_back_is_said_to_be_there() {
        let (done, steps) = Rehearsal::with(&["unwell", "stuck"], "https://choir.example.com").run();
        assert_eq!(steps.last(), Some(&"back"));
        assert!(done.unwrap_err().contains("could not be put back"));
    }

    #[test]
    fn a_box_at_localhost_is_reached_through_a_tunnel_to_the_same_port() {
        let rehearsal = Rehearsal::with(&[], "http://localhost:9090");
        let (done, steps) = rehearsal.run();
        assert_eq!(
            (done, steps),
            (Ok(()), vec!["copy", "upgrade", "tunnel", "invite", "smoke"])
        );
        let asked = rehearsal.asked();
        assert!(
            asked.contains("-L 127.0.0.1:9090:localhost:9090 -- root@box echo open"),
            "{asked}"
        );
    }
}
