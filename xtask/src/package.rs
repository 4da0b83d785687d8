//! `cargo xtask package`: a Debian package of the programs, their units, and what a machine without a compiler and without
//! a registry needs to run them. What is done when it is installed is in `deploy/debian`; this only packs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::packages::{self, Purpose};
use crate::workspace::Workspace;
use crate::{binaries, command, units};

/// What goes in beside the programs and units: from the repository, to below the root, its mode.
const FILES: &[(&str, &str, u32)] = &[
    ("deploy/debian/hypervisor.toml", "etc/choir/hypervisor.toml", 0o644),
    ("deploy/debian/containers.conf", "usr/lib/choir/containers.conf", 0o644),
    ("deploy/debian/make-image", "usr/lib/choir/make-image", 0o755),
    ("deploy/debian/policy-rc.d", "usr/share/choir/image/policy-rc.d", 0o755),
    ("deploy/box", "usr/sbin/choir-box", 0o755),
    (
        "sandbox/image/customize.sh",
        "usr/share/choir/image/customize.sh",
        0o644,
    ),
    (
        "sandbox/image/packages.txt",
        "usr/share/choir/image/packages.txt",
        0o644,
    ),
    ("LICENSE", "usr/share/doc/choir/copyright", 0o644),
    ("deploy/debian/postinst", "DEBIAN/postinst", 0o755),
    ("deploy/debian/prerm", "DEBIAN/prerm", 0o755),
    ("deploy/debian/postrm", "DEBIAN/postrm", 0o755),
];

/// (program, where)
const PROGRAMS: &[(&str, &str)] = &[
    ("choir", "usr/bin/choir"),
    ("choir-hypervisor", "usr/lib/choir/choir-hypervisor"),
    ("choir-sandbox", "usr/lib/choir/choir-sandbox"),
    ("choir-volumes", "usr/lib/choir/choir-volumes"),
];

/// Where the hypervisor finds what it offers for download.
const DOWNLOADS: &str = "usr/share/choir/downloads";

#[cfg(target_arch = "x86_64")]
const DOWNLOAD: &str = "usr/share/choir/downloads/choir-linux-x86_64";
#[cfg(not(target_arch = "x86_64"))]
const DOWNLOAD: &str = "usr/share/choir/downloads/choir-linux-aarch64";

/// What its owner may change, and keeps over an upgrade.
const CONFFILES: &str = "/etc/choir/hypervisor.toml\n";

#[derive(Args, Default)]
pub struct Options {
    /// Where the package goes [default: target/package]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// More programs that the box offers for download, each named choir-SYSTEM-MACHINE
    #[arg(long, value_name = "DIR")]
    downloads: Option<PathBuf>,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    println!("{}", build(options)?.display());
    Ok(ExitCode::SUCCESS)
}

/// Returns the package.
pub fn build(options: &Options) -> Result<PathBuf> {
    packages::ensure(&[Purpose::Build])?;
    if command::find("dpkg-deb").is_none() {
        bail!("a Debian package is built with dpkg-deb: install the package dpkg, or build on Debian");
    }
    let workspace = Workspace::load()?;
    let out = match &options.out {
        Some(directory) => std::path::absolute(directory)?,
        None => workspace.target_directory.join("package"),
    };
    let programs = out.join("programs");
    binaries::build_static(&workspace, &programs)?;
    let from = Contents {
        repository: &workspace.workspace_root,
        programs: &programs,
        downloads: options.downloads.as_deref(),
        version: env!("CARGO_PKG_VERSION"),
    };
    pack(&from, &out)
}

/// What a package is made of.
pub struct Contents<'a> {
    pub repository: &'a Path,
    /// A directory of them.
    pub programs: &'a Path,
    /// More programs to offer, in a directory.
    pub downloads: Option<&'a Path>,
    pub version: &'a str,
}

/// Returns the package, which is put into `out`.
pub fn pack(from: &Contents<'_>, out: &Path) -> Result<PathBuf> {
    let Contents {
        repository,
        programs,
        downloads,
        version,
    } = from;
    let tree = out.join("tree");
    if tree.exists() {
        fs::remove_dir_all(&tree).with_context(|| format!("cannot clear {}", tree.display()))?;
    }
    for (from, to, mode) in FILES {
        put(&repository.join(from), &tree.join(to), *mode)?;
    }
    if let Some(directory) = downloads {
        let cannot = || format!("cannot read {}", directory.display());
        for entry in fs::read_dir(directory).with_context(cannot)? {
            let entry = entry.with_context(cannot)?;
            put(&entry.path(), &tree.join(DOWNLOADS).join(entry.file_name()), 0o755)?;
        }
    }
    // After the others: the program of this machine is the one that is packed.
    for (program, to) in PROGRAMS {
        put(&programs.join(program), &tree.join(to), 0o755)?;
    }
    units::write(&tree, units::DEBIAN)?;
    // For who looks after the box: `choir-hypervisor claim`, `fsck`, `backup`.
    fs::create_dir_all(tree.join("usr/sbin"))?;
    std::os::unix::fs::symlink("../lib/choir/choir-hypervisor", tree.join("usr/sbin/choir-hypervisor"))?;
    let template = fs::read_to_string(repository.join("deploy/debian/control"))?;
    let kibibytes = size(&tree)?.div_ceil(1024);
    fs::write(tree.join("DEBIAN/control"), control(&template, version, kibibytes))?;
    fs::write(tree.join("DEBIAN/conffiles"), CONFFILES)?;
    // By its other name for other machines to download, where symbolic links are not followed. It takes no room.
    link(&tree.join("usr/bin/choir"), &tree.join(DOWNLOAD))?;
    make_plain(&tree)?;
    let package = out.join(format!("choir_{version}_{}.deb", architecture()));
    let mut build = Command::new("dpkg-deb");
    // Read by the dpkg of Debian 12 and later, and made in seconds.
    build.arg("-Zzstd");
    build.args(["--build", "--root-owner-group"]).arg(&tree).arg(&package);
    command::capture(&mut build)?;
    Ok(package)
}

fn put(from: &Path, to: &Path, mode: u32) -> Result<()> {
    let directory = to.parent().context("a packed file has a directory")?;
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(mode))?;
    Ok(())
}

/// In the place of what is there.
fn link(from: &Path, to: &Path) -> Result<()> {
    let directory = to.parent().context("a packed file has a directory")?;
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    if to.exists() {
        fs::remove_file(to)?;
    }
    fs::hard_link(from, to).with_context(|| format!("cannot link {}", to.display()))
}

fn control(template: &str, version: &str, kibibytes: u64) -> String {
    template
        .replace("@version@", version)
        .replace("@architecture@", architecture())
        .replace("@kibibytes@", &kibibytes.to_string())
}

/// As Debian calls it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Bytes of all files.
fn size(directory: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let about = entry.metadata()?;
        bytes += if about.is_dir() {
            size(&entry.path())?
        } else {
            about.len()
        };
    }
    Ok(bytes)
}

/// Directories and unit files as everybody may read them, whatever the umask of who packs is.
fn make_plain(directory: &Path) -> Result<()> {
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755))?;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let about = entry.metadata()?;
        let executable = about.permissions().mode() & 0o100 != 0;
        if about.is_dir() {
            make_plain(&entry.path())?;
        } else if about.is_file() && !executable {
            fs::set_permissions(entry.path(), fs::Permissions::from_mode(0o644))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::os::unix::process::CommandExt;

    use super::*;

    const UNITS: &str = include_str!("../../deploy/units.json");
    const POSTINST: &str = include_str!("../../deploy/debian/postinst");
    const POSTRM: &str = include_str!("../../deploy/debian/postrm");

    fn repository() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
    }

    /// A package of programs that do nothing.
    fn packed(out: &Path) -> PathBuf {
        let programs = out.join("programs");
        fs::create_dir_all(&programs).unwrap();
        for (program, _) in PROGRAMS {
            fs::write(programs.join(program), "#!/bin/sh\n").unwrap();
        }
        let downloads = out.join("downloads");
        fs::create_dir_all(&downloads).unwrap();
        fs::write(downloads.join("choir-macos-aarch64"), "another").unwrap();
        let from = Contents {
            repository: &repository(),
            programs: &programs,
            downloads: Some(&downloads),
            version: env!("CARGO_PKG_VERSION"),
        };
        pack(&from, out).unwrap()
    }

    fn asked(package: &Path, arguments: &[&str]) -> String {
        let (question, fields) = arguments.split_first().unwrap();
        command::capture(Command::new("dpkg-deb").arg(question).arg(package).args(fields)).unwrap()
    }

    /// Every path below a directory that a package or a program owns at run time.
    fn owned_paths(text: &str) -> BTreeSet<String> {
        let end = |c: char| !(c.is_ascii_alphanumeric() || "/._-*".contains(c));
        let words = text.split(end).filter(|word| {
            ["/var/lib/", "/etc/choir", "/run/choir", "/etc/systemd/"]
                .iter()
                .any(|start| word.starts_with(start))
        });
        words.map(|word| word.trim_end_matches(['.', '*']).to_owned()).collect()
    }

    /// What the script that purges removes by path.
    fn purged_paths() -> Vec<String> {
        let lines = POSTRM.lines().filter(|line| line.starts_with("rm "));
        lines.flat_map(owned_paths).collect()
    }

    fn is_purged(path: &str) -> bool {
        let purged = purged_paths();
        purged
            .iter()
            .any(|gone| path == gone || path.starts_with(&format!("{gone}/")))
    }

    #[test]
    fn the_package_holds_every_program_unit_and_script_with_its_owner_and_mode() {
        if !packages::is_here_for("package: what is in it", "dpkg-deb") {
            return;
        }
        let out = tempfile::tempdir().unwrap();
        let listed = asked(&packed(out.path()), &["--contents"]);
        let find = |name: &str| {
            let line = listed.lines().find(|line| line.ends_with(name));
            line.unwrap_or_else(|| panic!("{name} is not in\n{listed}"))
        };
        for (_, to) in PROGRAMS {
            assert!(find(&format!(" ./{to}")).starts_with("-rwxr-xr-x root/root"));
        }
        for unit in ["system/choir-hypervisor.service", "user/choir-podman.socket"] {
            assert!(find(&format!(" ./usr/lib/systemd/{unit}")).starts_with("-rw-r--r-- root/root"));
        }
        for (_, to, _) in FILES.iter().filter(|(_, to, _)| !to.starts_with("DEBIAN/")) {
            find(&format!(" ./{to}"));
        }
        find(&format!(" ./{DOWNLOADS}/choir-macos-aarch64"));
        find(&format!(" ./{DOWNLOAD} link to ./usr/bin/choir"));
        find(" -> ../lib/choir/choir-hypervisor");
        assert!(listed.lines().all(|line| line.contains(" root/root ")), "{listed}");
    }

    #[test]
    fn the_control_file_says_what_the_units_need_and_keeps_the_owners_settings() {
        if !packages::is_here_for("package: its control file", "dpkg-deb") {
            return;
        }
        let out = tempfile::tempdir().unwrap();
        let package = packed(out.path());
        assert_eq!(asked(&package, &["--field", "Version"]), env!("CARGO_PKG_VERSION"));
        assert_eq!(asked(&package, &["--field", "Architecture"]), architecture());
        let depends = asked(&package, &["--field", "Depends"]);
        for name in [
            "btrfs-progs",
            "crun",
            "dbus-user-session",
            "mmdebstrap",
            "podman",
            "uidmap",
        ] {
            assert!(
                depends.split(", ").any(|word| word.split(' ').next() == Some(name)),
                "{depends}"
            );
        }
        assert!(
            asked(&package, &["--field", "Installed-Size"])
                .parse::<u64>()
                .is_ok_and(|size| size > 0)
        );
        assert_eq!(asked(&package, &["--info", "conffiles"]).trim(), CONFFILES.trim());
    }

    #[test]
    fn shellcheck_finds_nothing_in_the_scripts_and_something_in_a_bad_one() {
        if !packages::is_here_for("package: its scripts", "shellcheck") {
            return;
        }
        let scripts = FILES
            .iter()
            .filter(|(from, _, mode)| from.starts_with("deploy/") && *mode == 0o755);
        for (script, _, _) in scripts {
            command::capture(Command::new("shellcheck").arg(repository().join(script))).unwrap();
        }
        let bad = tempfile::NamedTempFile::new().unwrap();
        fs::write(bad.path(), "#!/bin/sh\nrm $1\n").unwrap();
        assert!(command::capture(Command::new("shellcheck").arg(bad.path())).is_err());
    }

    /// `deploy/box`, without root's rights where the test has them.
    fn choir_box(arguments: &[&str]) -> (Option<i32>, String) {
        let script = fs::read_to_string(repository().join("deploy/box")).unwrap();
        let mut command = Command::new("sh");
        command
            .args(["-c", &script, "choir-box"])
            .args(arguments)
            .current_dir("/");
        if rustix::process::geteuid().is_root() {
            command.uid(65_534);
        }
        let output = command.output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(said).unwrap())
    }

    #[test]
    fn choir_box_explains_itself_to_anybody_and_works_for_root_only() {
        let (code, help) = choir_box(&["--help"]);
        assert_eq!(code, Some(0), "{help}");
        for verb in ["install", "upgrade", "down", "up", "status", "uninstall"] {
            assert!(help.contains(&format!("\n  {verb} ")), "{help}");
            assert_eq!(choir_box(&[verb, "--help"]), (Some(0), help.clone()));
            let (code, refused) = choir_box(&[verb]);
            assert!(code == Some(1) && refused.contains("only root"), "{verb}: {refused}");
            assert_eq!(refused.lines().count(), 1, "{refused}");
        }
        assert_eq!(choir_box(&["reinstall"]), (Some(2), help));
    }

    #[test]
    fn a_purge_removes_every_path_that_installing_or_running_makes() {
        let made: BTreeSet<_> = owned_paths(POSTINST).into_iter().chain(owned_paths(UNITS)).collect();
        assert!(made.contains("/var/lib/systemd/linger/choir-sandbox") && made.contains("/etc/choir/secrets"));
        let left: Vec<_> = made.iter().filter(|path| !is_purged(path)).collect();
        assert_eq!(
            left,
            [&"/var/lib/systemd/linger".to_owned()],
            "Debian's own directory stays"
        );
        assert!(!is_purged("/var/lib/choirs"));
    }

    #[test]
    fn a_purge_removes_every_user_and_disables_every_unit_that_installing_made() {
        let users: Vec<_> = POSTINST
            .lines()
            .filter_map(|line| line.strip_prefix("add_user "))
            .collect();
        assert_eq!(users.len(), 2);
        // With the same home: that is how it is known to be ours.
        for user in &users {
            assert!(
                POSTRM.lines().any(|line| line == format!("remove_user {user}")),
                "{user}"
            );
        }
        let loops = |script: &str| {
            let lines = script
                .lines()
                .map(str::trim)
                .filter(|line| line.starts_with("for unit in "));
            lines.map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(loops(POSTINST).len(), 1);
        assert_eq!(loops(POSTINST), loops(POSTRM));
        for (enable, purge) in [
            ("--user enable choir-podman.socket", "--user purge choir-podman.socket"),
            ("/etc/sub$1", "/etc/subuid /etc/subgid"),
        ] {
            assert!(POSTINST.contains(enable) && POSTRM.contains(purge), "{enable}");
        }
    }
}
