//! A NixOS host: its system is built or was built elsewhere, is copied with all it needs, and becomes its newest generation.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::{Change, Site};
use crate::command;

pub const IS_ONE: &str = "test -e /etc/NIXOS";
pub const IS_NONE: &str = "that is no NixOS host: bring a package to a Debian one, without --flake and --closure";

/// Its generations.
const PROFILE: &str = "/nix/var/nix/profiles/system";

/// The path of a system in the store of this machine.
#[derive(Debug)]
pub struct Built(String);

impl Built {
    /// Built now, of `FLAKE#NAME`.
    pub fn of_flake(nix: &Path, flake: &str) -> Result<Self> {
        let (place, name) = flake.split_once('#').unwrap_or_default();
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
        ensure!(
            !place.is_empty() && !name.is_empty() && name.bytes().all(is_plain),
            "--flake must be a flake and the name of one of its hosts, such as .#choir-ec2"
        );
        let system = format!("{place}#nixosConfigurations.{name}.config.system.build.toplevel");
        let mut build = Command::new(nix);
        build.args(["build", "--no-link", "--print-out-paths", &system]);
        let built = command::capture(&mut build).context("the system could not be built")?;
        Self::before(built.trim())
    }

    /// Built before: just this, and nothing that is like it.
    pub fn before(path: &str) -> Result<Self> {
        let name = path.strip_prefix("/nix/store/").unwrap_or_default();
        let (hash, name) = name.split_once('-').unwrap_or_default();
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"+-._?=".contains(&byte);
        ensure!(
            hash.len() == 32 && hash.bytes().all(|byte| byte.is_ascii_alphanumeric()) && name.bytes().all(is_plain),
            "`{path}` is no path of a system in the Nix store"
        );
        Ok(Self(path.to_owned()))
    }
}

/// Copies it to the host, which does not use it yet.
pub fn bring(site: &Site, nix: &Path, system: &Built) -> Result<Change> {
    let Built(system) = system;
    let options: Vec<String> = site.ssh_options.iter().map(|option| format!("-o {option}")).collect();
    ensure!(
        !site
            .ssh_options
            .iter()
            .any(|option| option.contains(char::is_whitespace)),
        "nix takes no option of ssh that has a space in it; put it into the configuration of ssh"
    );
    let mut copy = Command::new(nix);
    copy.args(["copy", "--substitute-on-destination", "--to"]);
    copy.arg(format!("ssh://{}", site.host)).arg(system);
    command::run(copy.env("NIX_SSHOPTS", options.join(" "))).context("the system could not be copied")?;
    let former = command::capture(&mut site.ssh(&[], &format!("readlink -f {PROFILE}")));
    let Built(former) = Built::before(former.context("the host does not say which system it has")?.trim())?;
    Ok(Change {
        forward: switch(system),
        back: switch(&former),
        returns: false,
    })
}

/// It goes on where the connection is lost.
fn switch(system: &str) -> String {
    format!(
        "nix-env --profile {PROFILE} --set {system} && systemd-run --quiet --collect --wait --pipe --service-type=exec \
         --unit=choir-switch {system}/bin/switch-to-configuration switch"
    )
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::deploy::deploy;

    const OLD: &str = "/nix/store/00000000000000000000000000000000-nixos-system-choir-1";
    const NEW: &str = "/nix/store/11111111111111111111111111111111-nixos-system-choir-2";

    /// Notes what is asked of the host, and is not well as long as it has a system that it is said not to be well with.
    const SSH: &str = r#"#!/bin/sh
cd "$(dirname "$0")"
for last; do :; done
echo "$last" >> asked
case "$last" in
"readlink -f "*) cat present ;;
*"invites create") echo "https://box/register?invite=1" ;;
*switch-to-configuration*)
    system=${last#*--set }
    echo "${system%% *}" > present
    ! grep -qxF "$(cat present)" stuck ;;
esac
"#;
    const CHOIR: &str = r#"#!/bin/sh
cd "$(dirname "$0")"
echo smoke >> asked
! grep -qxF "$(cat present)" unwell
"#;
    const NIX: &str = r#"#!/bin/sh
cd "$(dirname "$0")"
echo "nix $* [$NIX_SSHOPTS]" >> asked
[ "$1" != build ] || echo /nix/store/11111111111111111111111111111111-nixos-system-choir-2
"#;

    struct Rehearsal {
        directory: tempfile::TempDir,
        site: Site,
    }

    impl Rehearsal {
        /// With a host that cannot switch to some systems, and is not well with others.
        fn with(stuck: &str, unwell: &str) -> Self {
            let directory = tempfile::tempdir().unwrap();
            for (name, text) in [("ssh", SSH), ("choir", CHOIR), ("nix", NIX)] {
                let program = directory.path().join(name);
                fs::write(&program, text).unwrap();
                fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
            }
            for (name, text) in [("present", OLD), ("stuck", stuck), ("unwell", unwell)] {
                fs::write(directory.path().join(name), format!("{text}\n")).unwrap();
            }
            let choir = directory.path().join("choir");
            let site = Site {
                ssh: directory.path().join("ssh"),
                ssh_options: vec!["Port=2222".into()],
                host: "root@box".into(),
                url: "https://choir.example.com".into(),
                smokes: true,
                choir: Box::new(move || Command::new(&choir)),
            };
            Self { directory, site }
        }

        fn nix(&self) -> std::path::PathBuf {
            self.directory.path().join("nix")
        }

        fn run(&self) -> Result<(), String> {
            let built = Built::of_flake(&self.nix(), ".#choir-ec2").unwrap();
            let change = bring(&self.site, &self.nix(), &built).unwrap();
            deploy(&self.site, &change).map_err(|error| format!("{error:#}"))
        }

        fn said(&self, file: &str) -> String {
            fs::read_to_string(self.directory.path().join(file)).unwrap()
        }
    }

    #[test]
    fn a_system_is_built_copied_switched_to_and_tried() {
        let rehearsal = Rehearsal::with("none", "none");
        assert_eq!(rehearsal.run(), Ok(()));
        assert_eq!(rehearsal.said("present").trim(), NEW);
        let asked = rehearsal.said("asked");
        let steps: Vec<&str> = asked.lines().collect();
        assert_eq!(
            steps[..3],
            [
                "nix build --no-link --print-out-paths .#nixosConfigurations.choir-ec2.config.system.build.toplevel []",
                &format!("nix copy --substitute-on-destination --to ssh://root@box {NEW} [-o Port=2222]"),
                "readlink -f /nix/var/nix/profiles/system",
            ]
        );
        assert_eq!(steps.last(), Some(&"smoke"));
    }

    #[test]
    fn a_system_that_people_cannot_use_gives_way_to_the_generation_before_which_is_tried_too() {
        let rehearsal = Rehearsal::with("none", NEW);
        let error = rehearsal.run().unwrap_err();
        assert!(error.contains("the one before is back, and they can use it"), "{error}");
        assert_eq!(rehearsal.said("present").trim(), OLD);
        assert_eq!(rehearsal.said("asked").matches("smoke").count(), 2);
    }

    #[test]
    fn a_system_that_cannot_be_switched_to_gives_way_too() {
        let rehearsal = Rehearsal::with(NEW, "none");
        let error = rehearsal.run().unwrap_err();
        assert!(error.contains("the one before is back"), "{error}");
        assert_eq!(rehearsal.said("present").trim(), OLD);
    }

    #[test]
    fn where_the_one_before_cannot_be_used_either_that_is_said() {
        let error = Rehearsal::with("none", &format!("{OLD}\n{NEW}")).run().unwrap_err();
        assert!(
            error.contains("the version before is back, and not well either"),
            "{error}"
        );
    }

    #[test]
    fn only_a_path_of_the_store_is_a_system_and_only_a_name_of_a_host_is_built() {
        for path in [
            "",
            "/etc",
            "/nix/store/short-x",
            "/nix/store/11111111111111111111111111111111-x; reboot",
        ] {
            assert!(Built::before(path).is_err(), "{path}");
        }
        assert!(Built::before(NEW).is_ok());
        for flake in ["", ".", "#host", ".#", ".#host.config", ".#a b"] {
            assert!(Built::of_flake(Path::new("/bin/false"), flake).is_err(), "{flake}");
        }
    }
}
