//! `cargo xtask units`: unit files from `deploy/units.json`, the one source of their settings, with the paths of a Debian
//! system. It must not know what the programs do, nor decide a setting.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde::Deserialize;

use crate::workspace::Workspace;

const SOURCE: &str = include_str!("../../deploy/units.json");

/// What stands for each name between at signs on a Debian system with our package.
pub const DEBIAN: &[(&str, &str)] = &[
    ("alert", "/etc/choir/alert"),
    ("bin", "/usr/bin"),
    ("config", "/etc/choir/hypervisor.toml"),
    ("containers_conf", "/usr/lib/choir/containers.conf"),
    ("id", "/usr/bin/id"),
    ("image", "/var/lib/choir/image/default.tar"),
    ("libexec", "/usr/lib/choir"),
    ("podman", "/usr/bin/podman"),
    ("sh", "/bin/sh"),
    ("systemctl", "/bin/systemctl"),
    ("url", "http://localhost:9090"),
];

#[derive(Args)]
pub struct Options {
    /// Where the files go, as below the root of a system [default: target/units]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    let out = match &options.out {
        Some(directory) => directory.clone(),
        None => Workspace::load()?.target_directory.join("units"),
    };
    for name in write(&out, DEBIAN)? {
        println!("{}", out.join(name).display());
    }
    Ok(ExitCode::SUCCESS)
}

/// Each file's text by its name below the root.
pub fn texts(places: &[(&str, &str)]) -> Result<BTreeMap<PathBuf, String>> {
    Units::read()?.render(places)
}

/// Writes every file below `root`, and returns their names.
pub fn write(root: &Path, places: &[(&str, &str)]) -> Result<Vec<PathBuf>> {
    let files = texts(places)?;
    for (name, text) in &files {
        let file = root.join(name);
        let directory = file.parent().context("a unit file has a directory")?;
        fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
        fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(files.into_keys().collect())
}

/// All of `deploy/units.json`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Units {
    /// Settings that several services share; a service's own come on top.
    profiles: BTreeMap<String, Settings>,
    system: BTreeMap<String, Unit>,
    /// For the manager of the container owner.
    user: BTreeMap<String, Unit>,
    /// Lines of tmpfiles.d(5).
    tmpfiles: Vec<String>,
}

type Settings = BTreeMap<String, Values>;

#[derive(Clone, Deserialize)]
#[serde(untagged)]
enum Values {
    One(String),
    /// The setting once for each.
    Many(Vec<String>),
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields, default)]
struct Unit {
    #[serde(rename = "profile")]
    profile: Option<String>,
    unit: Settings,
    service: Settings,
    socket: Settings,
    timer: Settings,
    mount: Settings,
    install: Settings,
}

impl Units {
    fn read() -> Result<Self> {
        serde_json::from_str(SOURCE).context("deploy/units.json cannot be read")
    }

    fn render(&self, places: &[(&str, &str)]) -> Result<BTreeMap<PathBuf, String>> {
        let mut files = BTreeMap::new();
        for (directory, units) in [("system", &self.system), ("user", &self.user)] {
            for (name, unit) in units {
                let text = self.text(unit).with_context(|| format!("in {name}"))?;
                let file = Path::new("usr/lib/systemd").join(directory).join(name);
                files.insert(file, fill(&text, places)?);
            }
        }
        let lines: String = self.tmpfiles.iter().map(|line| format!("{line}\n")).collect();
        files.insert("usr/lib/tmpfiles.d/choir.conf".into(), fill(&lines, places)?);
        Ok(files)
    }

    fn text(&self, unit: &Unit) -> Result<String> {
        let mut service = match &unit.profile {
            Some(name) => {
                let profile = self.profiles.get(name);
                profile
                    .with_context(|| format!("there is no profile `{name}`"))?
                    .clone()
            }
            None => Settings::new(),
        };
        service.extend(unit.service.clone());
        let sections = [
            ("Unit", &unit.unit),
            ("Service", &service),
            ("Socket", &unit.socket),
            ("Timer", &unit.timer),
            ("Mount", &unit.mount),
            ("Install", &unit.install),
        ];
        let mut text = String::new();
        for (name, settings) in sections {
            if !settings.is_empty() {
                text.push_str(&section(name, settings)?);
            }
        }
        Ok(text)
    }
}

fn section(name: &str, settings: &Settings) -> Result<String> {
    let mut text = format!("[{name}]\n");
    for (setting, values) in settings {
        let values = match values {
            Values::One(value) => std::slice::from_ref(value),
            Values::Many(values) => values.as_slice(),
        };
        for value in values {
            ensure!(!value.contains('\n'), "{setting} has a line break in it");
            text.push_str(&format!("{setting}={value}\n"));
        }
    }
    text.push('\n');
    Ok(text)
}

/// The text with what stands for each `@name@` in it.
fn fill(text: &str, places: &[(&str, &str)]) -> Result<String> {
    let mut filled = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('@') {
        filled.push_str(before);
        match after.split_once('@') {
            Some((name, behind)) if is_name(name) => {
                let place = places.iter().find(|(known, _)| *known == name);
                let (_, place) = place.with_context(|| format!("nothing is known to stand for @{name}@"))?;
                filled.push_str(place);
                rest = behind;
            }
            // A group of system calls.
            _ => {
                filled.push('@');
                rest = after;
            }
        }
    }
    filled.push_str(rest);
    Ok(filled)
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    use super::*;
    use crate::packages;

    /// Exposure that `systemd-analyze security` may find, in tenths.
    const MOST_EXPOSED: &str = "15";

    /// Programs that do nothing, and the places that name them.
    fn stubs(root: &Path) -> Vec<(&'static str, String)> {
        let stub = root.join("stub");
        fs::create_dir_all(&stub).unwrap();
        for program in [
            "choir",
            "choir-hypervisor",
            "choir-volumes",
            "make-image",
            "alert",
            "id",
            "podman",
            "sh",
            "systemctl",
        ] {
            let file = stub.join(program);
            fs::write(&file, "#!/bin/sh\n").unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let place = |(name, place): &(&'static str, &str)| match *name {
            "bin" | "libexec" => (*name, stub.display().to_string()),
            "alert" | "id" | "podman" | "sh" | "systemctl" => (*name, stub.join(name).display().to_string()),
            _ => (*name, (*place).to_owned()),
        };
        DEBIAN.iter().map(place).collect()
    }

    /// The unit files with programs that exist, below a directory of the test's own.
    fn rendered(root: &Path) -> PathBuf {
        let places = stubs(root);
        let places: Vec<(&str, &str)> = places.iter().map(|(name, place)| (*name, place.as_str())).collect();
        write(root, &places).unwrap();
        root.join("usr/lib/systemd")
    }

    /// Everything that verifying these files says.
    fn verified(manager: &str, directory: &Path, runtime: &Path) -> String {
        let files = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
        let output = Command::new("systemd-analyze")
            .args(["verify", "--man=no", manager])
            .args(files)
            .env("XDG_RUNTIME_DIR", runtime)
            .output()
            .unwrap();
        // Old versions end with 0 whatever they find.
        [output.stdout, output.stderr]
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .concat()
    }

    #[test]
    fn every_place_is_filled_in_and_an_unknown_one_is_named() {
        let files = Units::read().unwrap().render(DEBIAN).unwrap();
        assert!(
            files[Path::new("usr/lib/systemd/system/choir-hypervisor.service")].contains("ExecStart=/usr/lib/choir/")
        );
        assert_eq!(fill("~@mount @keyring a@b", DEBIAN).unwrap(), "~@mount @keyring a@b");
        let error = fill("ExecStart=@nowhere@/x", DEBIAN).unwrap_err().to_string();
        assert!(error.contains("@nowhere@"), "{error}");
    }

    #[test]
    fn a_services_own_setting_comes_on_top_of_its_profile() {
        let text = r#"{"profiles": {"p": {"A": "1", "B": "1"}}, "user": {}, "tmpfiles": [],
            "system": {"x.service": {"profile": "p", "Service": {"B": ["2", "3"]}}}}"#;
        let units: Units = serde_json::from_str(text).unwrap();
        let files = units.render(&[]).unwrap();
        let file = &files[Path::new("usr/lib/systemd/system/x.service")];
        assert_eq!(file, "[Service]\nA=1\nB=2\nB=3\n\n");
    }

    #[test]
    fn systemd_finds_nothing_wrong_with_any_unit_and_something_with_a_wrong_one() {
        if !packages::is_here_for("units: systemd's verdict on the unit files", "systemd-analyze") {
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let units = rendered(root.path());
        assert_eq!(verified("--system", &units.join("system"), root.path()), "");
        assert_eq!(verified("--user", &units.join("user"), root.path()), "");
        let broken = units.join("system/choir-hypervisor.service");
        let text = fs::read_to_string(&broken)
            .unwrap()
            .replace("NoNewPrivileges=", "NoNewPrivilege=");
        fs::write(&broken, text).unwrap();
        let said = verified("--system", &units.join("system"), root.path());
        assert!(said.contains("NoNewPrivilege"), "{said}");
    }

    #[test]
    fn the_hypervisor_is_hardly_exposed_and_would_be_without_its_profile() {
        if !packages::is_here_for("units: how exposed the hypervisor is", "systemd-analyze") {
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let file = rendered(root.path()).join("system/choir-hypervisor.service");
        let judged = || {
            let mut analyze = Command::new("systemd-analyze");
            analyze.args(["security", "--offline=true", "--no-pager", "--threshold", MOST_EXPOSED]);
            analyze.arg(&file).output().unwrap()
        };
        let output = judged();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        let text = fs::read_to_string(&file).unwrap();
        let open: String = text
            .lines()
            .filter(|line| !line.starts_with("SystemCallFilter=") && !line.starts_with("Protect"))
            .map(|line| format!("{line}\n"))
            .collect();
        fs::write(&file, open).unwrap();
        assert!(!judged().status.success());
    }
}
