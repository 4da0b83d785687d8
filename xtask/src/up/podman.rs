//! Podman's API service for one data directory: its own storage, run-time state and settings, so
//! that neither the user's containers nor their containers.conf are touched.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::data::DataDir;
use crate::up::supervise::Service;

/// What to do when the service does not come up.
pub const ADVICE: &str = "Podman's service did not start: `podman info` shows whether Podman works \
    here at all; `cargo xtask up --runtime process` does without it, and without isolation";

/// The OCI runtime that works with this host's control groups: crun refuses version 1.
pub fn oci_runtime() -> &'static str {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        "crun"
    } else {
        "runc"
    }
}

/// The service, listening on the data directory's socket.
pub fn service(data: &DataDir) -> Result<Service> {
    write_settings(data)?;
    let socket = data.podman_socket();
    let data_dir = DataDir::open(data.root())?;
    let log = data.logs().join("podman.log");
    Ok(Service::new("podman", data, Some(log), move || {
        // A socket file that nobody listens on any more is in the way.
        let _absent = fs::remove_file(&socket);
        let mut command = yielding(&command(&data_dir));
        command.args(["system", "service", "--time=0"]);
        command.arg(format!("unix://{}", socket.display()));
        Ok(command)
    }))
}

/// The same at a lower priority, which all that it starts has, too: what runs in sandboxes and what starts them get all of
/// the processors but for what the hypervisor needs to answer.
fn yielding(command: &Command) -> Command {
    let mut yielding = Command::new("nice");
    yielding.arg("-n10").arg(command.get_program()).args(command.get_args());
    yielding.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    yielding
}

/// `podman` with this data directory's storage; the settings are there once `up` has run.
pub fn command(data: &DataDir) -> Command {
    let mut command = Command::new("podman");
    command.arg("--root").arg(data.podman().join("storage"));
    command.arg("--runroot").arg(data.podman_run().join("containers"));
    command.arg("--tmpdir").arg(data.podman_run().join("libpod"));
    command.env("CONTAINERS_CONF", settings_file(data));
    command
}

fn settings_file(data: &DataDir) -> std::path::PathBuf {
    data.podman().join("containers.conf")
}

/// containers.conf(5), as far as it matters here.
#[derive(Serialize)]
struct Settings {
    containers: Containers,
    engine: Engine,
    network: Network,
}

#[derive(Serialize)]
struct Network {
    network_backend: &'static str,
}

#[derive(Serialize)]
struct Containers {
    netns: &'static str,
    http_proxy: bool,
}

#[derive(Serialize)]
struct Engine {
    runtime: &'static str,
    cgroup_manager: &'static str,
    events_logger: &'static str,
}

fn write_settings(data: &DataDir) -> Result<()> {
    let systemd = Path::new("/run/systemd/system").exists();
    let settings = Settings {
        containers: Containers {
            netns: "none",
            http_proxy: false,
        },
        engine: Engine {
            runtime: oci_runtime(),
            cgroup_manager: if systemd { "systemd" } else { "cgroupfs" },
            events_logger: if systemd { "journald" } else { "file" },
        },
        // Sandboxes have no network; Podman must still be told which backend not to miss.
        network: Network {
            network_backend: "netavark",
        },
    };
    let file = settings_file(data);
    fs::create_dir_all(data.podman())?;
    fs::write(&file, toml::to_string(&settings)?).with_context(|| format!("cannot write {}", file.display()))
}
