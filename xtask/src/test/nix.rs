//! The tests of the Nix files: that they can be read, what the module makes of its options, and that it and the other
//! readers of the same files agree. Knows no option itself. Nothing is built and nothing is fetched here.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::Report;
use crate::workspace::{Workspace, cargo};
use crate::{command, units};

/// Where the flake's inputs are: nothing of them is in the repository.
const NIXPKGS: &str = "CHOIR_NIXPKGS";
const CRANE: &str = "CHOIR_CRANE";

/// Keys of the configuration file that the module leaves out: what listens is the socket unit's, and the other runtime
/// isolates nothing.
const LEFT_OUT: &[(&str, &str)] = &[("listen", "address"), ("listen", "port"), ("sandboxes", "runtime")];

/// Program, what makes it fail at a finding, and the package that has it; a program that is there is not built again.
const LINTERS: &[(&str, &str, &str)] = &[
    ("nixfmt", "--check", "nixfmt_rs@0.5.3"),
    ("deadnix", "--fail", "deadnix@1.3.1"),
];

/// `programs`: where the shipped programs were built.
pub(super) fn run(workspace: &Workspace, programs: &Path, report: &mut Report) {
    let root = &workspace.workspace_root;
    report.check("nix", || {
        readable(root)?;
        options(root)?;
        let compared: Compared = evaluated(root, "nix/tests/compared.nix")?;
        same_units(&compared)?;
        accepted(&compared.settings, programs, &workspace.target_directory)?;
        every_key(&compared.settings, root)
    });
    for (linter, argument, package) in LINTERS {
        report.check(linter, || {
            let tools = workspace.target_directory.join("tools");
            let mut install = cargo();
            install.args(["install", "--quiet", "--debug", "--locked", "--root"]);
            command::run(install.arg(&tools).arg(package))?;
            let mut lint = Command::new(tools.join("bin").join(linter));
            // Of the quick start what counts is that it is short.
            let mut files = files(root, "*.nix")?;
            files.retain(|file| !file.ends_with("quick-start.nix"));
            command::run(lint.arg(argument).args(files))
        });
    }
    match (std::env::var_os(NIXPKGS), std::env::var_os(CRANE)) {
        (Some(nixpkgs), Some(crane)) => report.check("flake", || {
            let inputs = [("nixpkgs", PathBuf::from(nixpkgs)), ("crane", PathBuf::from(crane))];
            flake(root, &inputs, &workspace.target_directory)
        }),
        _ => report.skip(
            "flake",
            "CHOIR_NIXPKGS and CHOIR_CRANE do not say where the flake's inputs are, so its packages and hosts were not evaluated (docs/verification.md)",
        ),
    }
}

/// Files of the repository by their name, without what was built or downloaded.
fn files(root: &Path, name: &str) -> Result<Vec<PathBuf>> {
    let mut find = Command::new("find");
    find.arg(root);
    for other in ["target", "data", "node_modules", ".git"] {
        find.args(["-name", other, "-prune", "-o"]);
    }
    let found = command::capture(find.args(["-type", "f", "-name", name, "-print"]))?;
    Ok(found.lines().map(PathBuf::from).collect())
}

/// Every file is Nix, and the root's lock is the only one.
fn readable(root: &Path) -> Result<()> {
    let all = files(root, "*.nix")?;
    ensure!(!all.is_empty(), "there is no Nix file below {}", root.display());
    command::capture(nix_instantiate().arg("--parse").args(all))?;
    for lock in files(root, "flake.lock")? {
        if lock.parent() != Some(root) {
            bail!(
                "{} goes stale unnoticed: the root has the only lock; remove it",
                lock.display()
            );
        }
    }
    Ok(())
}

/// Needs no store, so that it runs for everybody.
fn nix_instantiate() -> Command {
    let mut command = Command::new("nix-instantiate");
    command.args(["--store", "dummy://"]);
    command
}

fn evaluated<T: DeserializeOwned>(root: &Path, file: &str) -> Result<T> {
    let mut evaluate = nix_instantiate();
    evaluate.args(["--eval", "--strict", "--json"]).arg(root.join(file));
    let text = command::capture(&mut evaluate)?;
    serde_json::from_str(&text).with_context(|| format!("{file} gives something unexpected"))
}

#[derive(Deserialize)]
struct Outcome {
    /// Which library of modules was used.
    library: String,
    passed: usize,
    failed: Vec<Failed>,
}

#[derive(Deserialize)]
struct Failed {
    name: String,
    got: serde_json::Value,
    expected: serde_json::Value,
}

fn options(root: &Path) -> Result<()> {
    let outcome: Outcome = evaluated(root, "nix/tests/default.nix")?;
    for Failed { name, got, expected } in &outcome.failed {
        eprintln!("nix/tests: {name}:\n  got      {got}\n  expected {expected}");
    }
    println!("    {} passed, on the library of {}", outcome.passed, outcome.library);
    ensure!(
        outcome.failed.is_empty(),
        "{} tests of nix/tests failed",
        outcome.failed.len()
    );
    Ok(())
}

/// What the module makes that something else makes or reads, too.
#[derive(Deserialize)]
struct Compared {
    /// Texts of unit files by `system/NAME` and `user/NAME`.
    units: BTreeMap<PathBuf, String>,
    places: BTreeMap<String, String>,
    tmpfiles: Vec<String>,
    /// A configuration file with every key that the module knows.
    settings: toml::Table,
}

/// The module and `cargo xtask units` make the same of `deploy/units.json`.
fn same_units(compared: &Compared) -> Result<()> {
    let places = compared.places.iter();
    let places: Vec<(&str, &str)> = places.map(|(name, place)| (name.as_str(), place.as_str())).collect();
    let mut rendered = units::texts(&places)?;
    let lines = rendered.remove(Path::new("usr/lib/tmpfiles.d/choir.conf"));
    let lines = lines.context("`cargo xtask units` writes no lines of tmpfiles.d")?;
    for line in lines.lines() {
        ensure!(
            compared.tmpfiles.iter().any(|own| own == line),
            "the module leaves out `{line}`"
        );
    }
    let module = |(name, text): (&PathBuf, &String)| (Path::new("usr/lib/systemd").join(name), text.clone());
    let module: BTreeMap<PathBuf, String> = compared.units.iter().map(module).collect();
    for (name, text) in &rendered {
        let own = module.get(name).map(String::as_str).unwrap_or_default();
        ensure!(
            own == text,
            "{} differs; the module has\n{own}and units has\n{text}",
            name.display()
        );
    }
    ensure!(
        module.len() == rendered.len(),
        "the module has units that `cargo xtask units` has not"
    );
    Ok(())
}

/// The hypervisor knows every key that the module can set, and would say so of another.
fn accepted(settings: &toml::Table, programs: &Path, target: &Path) -> Result<()> {
    let file = target.join("every-setting.toml");
    let check = |settings: &toml::Table| {
        fs::write(&file, toml::to_string(settings)?)?;
        let mut hypervisor = Command::new(programs.join("choir-hypervisor"));
        command::capture(hypervisor.arg("--config").arg(&file).arg("check-config"))
    };
    check(settings)?;
    let mut unknown = settings.clone();
    unknown.insert("colour".to_owned(), toml::Value::Integer(3));
    ensure!(
        check(&unknown).is_err(),
        "choir-hypervisor accepts a key that it does not know"
    );
    Ok(())
}

/// The module can set every key that the hypervisor knows.
fn every_key(settings: &toml::Table, root: &Path) -> Result<()> {
    let source = fs::read_to_string(root.join("hypervisor/src/config.rs"))?;
    let sections = fields(&source, "Config");
    ensure!(
        !sections.is_empty(),
        "hypervisor/src/config.rs has no `pub struct Config` that can be read"
    );
    for (section, kind) in sections {
        let Some(toml::Value::Table(table)) = settings.get(&section) else {
            bail!("nix/module/settings.nix has no section `{section}`");
        };
        // Of the section of providers every key is the operator's own.
        let known: BTreeSet<&str> = table.keys().map(String::as_str).collect();
        for (key, _) in fields(&source, &kind) {
            let is_known = known.contains(key.as_str()) || LEFT_OUT.contains(&(section.as_str(), key.as_str()));
            ensure!(is_known, "nix/module/settings.nix cannot set `{key}` of `{section}`");
        }
    }
    Ok(())
}

/// Names and types of a structure's public fields, as they stand in the source.
fn fields(source: &str, name: &str) -> Vec<(String, String)> {
    let opening = format!("pub struct {name} {{\n");
    let Some((_, body)) = source.split_once(&opening) else {
        return Vec::new();
    };
    let body = body.split_once("\n}").map_or(body, |(body, _)| body);
    let field = |line: &str| {
        let (name, kind) = line.trim().strip_prefix("pub ")?.split_once(": ")?;
        Some((name.to_owned(), kind.trim_end_matches(',').to_owned()))
    };
    body.lines().filter_map(field).collect()
}

/// Evaluates everything that the flake has for this system, with its inputs from outside.
fn flake(root: &Path, inputs: &[(&str, PathBuf)], target: &Path) -> Result<()> {
    let mut nix = Command::new("nix");
    // As a repository, so that what was built is not copied along.
    let url = format!("git+file://{}", root.display());
    nix.args(["flake", "check", "--no-build", "--offline", "--no-write-lock-file"]);
    nix.arg("--store").arg(target.join("nix-store"));
    for (name, path) in inputs {
        nix.args(["--override-input", name, &format!("path:{}", path.display())]);
    }
    let settings = [
        "experimental-features = nix-command flakes",
        "flake-registry =",
        "substituters =",
        "build-users-group =",
        "allow-import-from-derivation = false",
    ];
    nix.env("NIX_CONFIG", settings.join("\n"));
    command::run(nix.arg(url))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = include_str!("../../../nix/source.nix");

    #[test]
    fn public_fields_are_found_in_the_source_and_no_others() {
        let source = "pub struct A {\n    /// Of it.\n    pub one: u16,\n    two: B,\n    pub three: Option<B>,\n}\n\npub struct B {\n    pub four: u8,\n}\n";
        let of = |name: &str| fields(source, name);
        let field = |name: &str, kind: &str| (name.to_owned(), kind.to_owned());
        assert_eq!(of("A"), [field("one", "u16"), field("three", "Option<B>")]);
        assert_eq!(of("B"), [field("four", "u8")]);
        assert!(of("C").is_empty());
    }

    #[test]
    fn the_quick_start_of_the_readme_is_the_one_that_is_evaluated_and_short() {
        let quick_start = include_str!("../../../nix/quick-start.nix");
        assert!(include_str!("../../../README.md").contains(&format!("```nix\n{quick_start}```\n")));
        assert!(quick_start.lines().count() <= 15);
    }

    /// Files that a program's source takes in, by their extension.
    fn taken_in(directory: &Path, found: &mut BTreeSet<String>) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                taken_in(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                for macro_name in ["include_str!(\"", "include_bytes!(\""] {
                    let names = text.split(macro_name).skip(1).filter_map(|rest| rest.split('"').next());
                    found.extend(names.filter_map(|name| name.rsplit('.').next()).map(str::to_owned));
                }
            }
        }
    }

    #[test]
    fn the_sources_for_nix_have_every_kind_of_file_that_a_program_takes_in() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut found = BTreeSet::new();
        for directory in ["crates", "hypervisor", "sandbox", "volumes", "cli"] {
            taken_in(&root.join(directory), &mut found);
        }
        assert!(found.contains("sql") && found.contains("json"), "{found:?}");
        for extension in found {
            assert!(
                SOURCE.contains(&format!("    \"{extension}\"\n")),
                "nix/source.nix leaves out *.{extension}"
            );
        }
    }
}
