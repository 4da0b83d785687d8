//! `cargo xtask bench`: the product and its peers side by side on this machine. It prepares and cleans up; what is
//! measured, and how, is choir-bench's.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Serialize;

use crate::command;
use crate::data::DataDir;
use crate::packages::{self, Purpose};
use crate::up::{mounts, podman};
use crate::workspace::{Workspace, agent_target, cargo};

const NODE_PROXY: &str = "configurable-http-proxy";

#[derive(Args)]
pub struct Options {
    /// One benchmark: memory, proxy, websocket, wake-stopped, wake-paused, exec, swap, snapshot or egress
    name: Option<String>,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    /// Few short rounds: shows that it works, says little about speed
    #[arg(long)]
    quick: bool,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    packages::ensure(&[Purpose::Build, Purpose::Podman, Purpose::Image, Purpose::Bench])?;
    let workspace = Workspace::load()?;
    let out = workspace.target_directory.join("bench");
    let data = out.join("data");
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    let programs = build(&workspace)?;
    let node_proxy = install_node_proxy(&out.join("node"))?;
    // What an interrupted run left behind; each run begins with a ChoirOS that nobody has claimed.
    remove(&data)?;
    let measured = ourselves(&["up", "--release", "--port", "0", "--detach", "--data"], &data)
        .and_then(|()| measure(options, &workspace, &out, &data, programs, node_proxy));
    if measured.is_err() {
        // Why it failed may be there only.
        let log = out.join("up.log");
        let _none = fs::copy(data.join("up.log"), &log);
        eprintln!("the hypervisor's log is kept in {}", log.display());
    }
    let removed = remove(&data);
    measured.and(removed).map(|()| ExitCode::SUCCESS)
}

/// What choir-bench is told.
#[derive(Serialize)]
struct Setup {
    address: String,
    invite: String,
    hypervisor: PathBuf,
    up: PathBuf,
    log: PathBuf,
    volumes_socket: PathBuf,
    volumes: PathBuf,
    podman: Program,
    app: PathBuf,
    node_proxy: PathBuf,
    out: PathBuf,
    about: About,
}

#[derive(Serialize)]
struct Program {
    program: String,
    arguments: Vec<String>,
    environment: BTreeMap<String, String>,
}

#[derive(Serialize)]
struct About {
    commit: String,
    date: String,
    kernel: String,
    machine: String,
    peers: BTreeMap<&'static str, String>,
}

/// choir-bench, and the app that goes into a sandbox.
struct Programs {
    bench: PathBuf,
    app: PathBuf,
}

fn build(workspace: &Workspace) -> Result<Programs> {
    let mut bench = cargo();
    bench.args(["build", "--release", "--package", "choir-bench", "--bin", "choir-bench"]);
    // It starts an instance of its own, by this program.
    command::run(bench.args(["--package", "xtask", "--bin", "xtask"]))?;
    let target = agent_target();
    let mut app = cargo();
    app.args([
        "rustc",
        "--release",
        "--package",
        "choir-bench",
        "--bin",
        "choir-bench-app",
    ]);
    // Without its symbols it is small enough to be handed in by one call.
    app.args([
        "--no-default-features",
        "--target",
        &target,
        "--",
        "-C",
        "strip=symbols",
    ]);
    command::run(&mut app)?;
    let built = &workspace.target_directory;
    Ok(Programs {
        bench: built.join("release/choir-bench"),
        app: built.join(target).join("release/choir-bench-app"),
    })
}

/// From npm; the newest major version that this machine's Node runs. Its script's path.
fn install_node_proxy(directory: &Path) -> Result<PathBuf> {
    let script = directory
        .join("node_modules")
        .join(NODE_PROXY)
        .join("bin")
        .join(NODE_PROXY);
    if !script.exists() {
        let version = command::capture(Command::new("node").arg("--version"))?;
        let major = version
            .trim_start_matches('v')
            .split('.')
            .next()
            .and_then(|major| major.parse().ok());
        let wanted = if major.unwrap_or(0) >= 20 { 5 } else { 4 };
        fs::create_dir_all(directory)?;
        let mut npm = Command::new("npm");
        npm.args(["install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix"])
            .arg(directory);
        command::capture(npm.arg(format!("{NODE_PROXY}@{wanted}")))?;
    }
    Ok(script)
}

fn measure(
    options: &Options,
    workspace: &Workspace,
    out: &Path,
    data: &Path,
    programs: Programs,
    node_proxy: PathBuf,
) -> Result<()> {
    let data = DataDir::open(data)?;
    let link = fs::read_to_string(data.claim_link()).context("the hypervisor wrote no claim link")?;
    let (_, invite) = link
        .trim()
        .split_once("invite=")
        .context("the claim link has no invite")?;
    let setup = Setup {
        address: fs::read_to_string(data.address())?.trim().to_owned(),
        invite: invite.to_owned(),
        hypervisor: data.pid_file("choir-hypervisor"),
        up: data.up_pid(),
        log: data.up_log(),
        volumes_socket: data.volumes_socket(),
        volumes: data.volumes(),
        podman: program(&podman::command(&data)),
        app: programs.app,
        about: about(workspace, &node_proxy)?,
        node_proxy,
        out: out.to_owned(),
    };
    let file = data.run().join("bench.json");
    fs::write(&file, serde_json::to_string(&setup)?)?;
    let mut bench = Command::new(programs.bench);
    bench.env("CHOIR_BIN", data.bin());
    bench.arg(file).args(&options.name);
    for (given, flag) in [(options.json, "--json"), (options.quick, "--quick")] {
        if given {
            bench.arg(flag);
        }
    }
    command::run(&mut bench)?;
    if !options.json {
        println!("{}, {}, {}", setup.about.commit, setup.about.date, setup.about.machine);
        println!("The samples are in {}", out.display());
    }
    Ok(())
}

fn program(command: &Command) -> Program {
    let text = |text: &std::ffi::OsStr| text.to_string_lossy().into_owned();
    let environment = command
        .get_envs()
        .filter_map(|(name, value)| Some((text(name), text(value?))));
    Program {
        program: text(command.get_program()),
        arguments: command.get_args().map(text).collect(),
        environment: environment.collect(),
    }
}

fn about(workspace: &Workspace, node_proxy: &Path) -> Result<About> {
    let read = |path| fs::read_to_string(path).with_context(|| format!("cannot read {path}"));
    let processors = read("/proc/cpuinfo")?;
    let models = processors.lines().filter(|line| line.starts_with("model name"));
    let model = models
        .filter_map(|line| Some(line.split_once(": ")?.1))
        .next()
        .unwrap_or("unknown");
    let mut git = Command::new("git");
    git.arg("-C")
        .arg(&workspace.workspace_root)
        .args(["describe", "--always", "--dirty", "--abbrev=10"]);
    let mut nginx = Command::new("sh");
    nginx.args(["-c", "nginx -v 2>&1 | sed 's,.*/,,'"]);
    let package = fs::read_to_string(node_proxy.with_file_name("../package.json")).unwrap_or_default();
    let package: serde_json::Value = serde_json::from_str(&package).unwrap_or_default();
    let version = |name| command::capture(Command::new(name).arg("--version"));
    Ok(About {
        commit: command::capture(&mut git)?,
        date: command::capture(Command::new("date").args(["-u", "+%Y-%m-%dT%H:%M:%SZ"]))?,
        kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        machine: format!("{} x {model}", processors.matches("processor\t").count()),
        peers: BTreeMap::from([
            ("nginx", command::capture(&mut nginx)?),
            ("caddy", command::capture(Command::new("caddy").arg("version"))?),
            (NODE_PROXY, package["version"].as_str().unwrap_or("unknown").to_owned()),
            ("node", version("node")?),
            ("podman", version("podman")?),
            ("oci_runtime", podman::oci_runtime().to_owned()),
        ]),
    })
}

/// Stops what runs on a data directory, and deletes it.
fn remove(data: &Path) -> Result<()> {
    if !data.exists() {
        return Ok(());
    }
    ourselves(&["down", "--data"], data)?;
    if mounts::is_mounted(&DataDir::open(data)?.volumes())? {
        bail!(
            "{} is still mounted: nothing was deleted",
            data.join("volumes").display()
        );
    }
    fs::remove_dir_all(data).with_context(|| format!("cannot delete {}", data.display()))
}

/// Another verb, as people give it; only errors are shown.
fn ourselves(arguments: &[&str], data: &Path) -> Result<()> {
    command::capture(Command::new("/proc/self/exe").args(arguments).arg(data)).map(drop)
}
