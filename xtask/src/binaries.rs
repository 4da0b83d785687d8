//! Builds the programs that are shipped and puts them side by side in one directory.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::command;
use crate::workspace::{Workspace, agent_target, cargo};

/// The agent is apart because it is linked statically.
const PROGRAMS: &[&str] = &["choir-hypervisor", "choir", "choir-volumes"];
const AGENT: &str = "choir-sandbox";

/// Builds everything and installs it into `directory`; what did not change is left alone.
pub fn build(workspace: &Workspace, release: bool, directory: &Path) -> Result<()> {
    println!(
        "==> building the programs ({})",
        if release { "release" } else { "debug" }
    );
    let begun = Instant::now();
    let profile: &[&str] = if release { &["--release"] } else { &[] };
    let mut host = cargo();
    host.arg("build").args(profile);
    for program in PROGRAMS {
        host.args(["--package", program]);
    }
    command::run(&mut host)?;
    let target = agent_target();
    let mut agent = cargo();
    agent
        .args(["build", "--package", AGENT, "--target", &target])
        .args(profile);
    command::run(&mut agent)?;

    let folder = if release { "release" } else { "debug" };
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    for program in PROGRAMS {
        let built = workspace.target_directory.join(folder).join(program);
        install(&built, &directory.join(program))?;
    }
    let built = workspace.target_directory.join(target).join(folder).join(AGENT);
    install(&built, &directory.join(AGENT))?;
    println!("==> built in {} s", begun.elapsed().as_secs());
    Ok(())
}

/// Builds everything optimised and linked statically, so that it runs on any Linux of this architecture, and installs it
/// into `directory` without what only a debugger reads.
pub fn build_static(workspace: &Workspace, directory: &Path) -> Result<()> {
    println!("==> building the programs (release, static)");
    let target = agent_target();
    let mut build = cargo();
    build.args(["build", "--release", "--target", &target]);
    for program in programs() {
        build.args(["--package", program]);
    }
    command::run(&mut build)?;
    strip(&workspace.target_directory.join(target).join("release"), directory)
}

/// Copies the programs without what only a debugger reads.
pub fn strip(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("cannot create {}", to.display()))?;
    for program in programs() {
        let mut strip = Command::new("strip");
        strip.args(["--strip-debug", "-o"]).arg(to.join(program));
        command::run(strip.arg(from.join(program)))?;
    }
    Ok(())
}

fn programs() -> impl Iterator<Item = &'static str> {
    PROGRAMS.iter().copied().chain([AGENT])
}

/// Builds a hypervisor that leaks on purpose and dies where it is told, for the tests that must notice. What Cargo builds
/// next takes its place in the target directory.
pub fn build_faulty(workspace: &Workspace, directory: &Path) -> Result<()> {
    // With the others, although they stay as they are: so their libraries are built once.
    let mut faulty = cargo();
    faulty.arg("build");
    for program in PROGRAMS {
        faulty.args(["--package", program]);
    }
    faulty.args(["--features", "choir-hypervisor/leak,choir-hypervisor/failpoints"]);
    command::run(&mut faulty)?;
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let built = workspace.target_directory.join("debug/choir-hypervisor");
    install(&built, &directory.join("faulty-choir-hypervisor"))
}

/// Replaces by rename: running programs keep the file they were started from.
fn install(built: &Path, installed: &Path) -> Result<()> {
    let from = fs::metadata(built).with_context(|| format!("{} was not built", built.display()))?;
    if let Ok(to) = fs::metadata(installed)
        && to.len() == from.len()
        && to.modified()? == from.modified()?
    {
        return Ok(());
    }
    let next = installed.with_extension("next");
    fs::copy(built, &next).with_context(|| format!("cannot write {}", next.display()))?;
    File::options()
        .write(true)
        .open(&next)?
        .set_modified(from.modified()?)?;
    fs::rename(&next, installed)?;
    Ok(())
}
