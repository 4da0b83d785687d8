//! `cargo xtask down`: stops everything that `up` started for a data directory, the sandboxes
//! included. Files stay; the next `up` finds them.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;

use crate::command;
use crate::data::DataDir;
use crate::process::Handle;
use crate::up::{mounts, podman, supervise};

/// Longer than `up` itself takes to stop three programs in order.
const GRACE: Duration = Duration::from_secs(100);
/// How long the monitors of removed containers may take.
const CLEAN_UP: Duration = Duration::from_secs(20);
/// After this long a monitor does not clean up: it watches over what Podman has forgotten.
const FORGOTTEN: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(100);

#[derive(Args)]
pub struct Options {
    /// The data directory that was given to `up`
    #[arg(long, value_name = "DIR", default_value = "data")]
    data: PathBuf,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    let data = DataDir::open(&options.data)?;
    if let Some(up) = Handle::from_file(&data.up_pid()) {
        println!("==> stopping the hypervisor");
        up.stop(GRACE);
    }
    supervise::stop_leftovers(&data);
    remove_containers(&data)?;
    mounts::close_path(&data)?;
    mounts::unmount(&data.volumes())?;
    for file in [
        data.up_pid(),
        data.address(),
        data.podman_socket(),
        data.volumes_socket(),
    ] {
        let _absent = fs::remove_file(file);
    }
    println!("ChoirOS is down; {} is kept", data.root().display());
    Ok(ExitCode::SUCCESS)
}

/// The storage is this data directory's own, so every container in it is ours.
fn remove_containers(data: &DataDir) -> Result<()> {
    if !data.podman().exists() || command::find("podman").is_none() {
        return Ok(());
    }
    let remove = || command::capture(podman::command(data).args(["rm", "--all", "--force", "--time", "0"]));
    // Of a container that ended after its monitor had died, Podman learns by failing to kill it.
    let removed = remove()
        .or_else(|_| remove())
        .context("the sandboxes could not be stopped")?;
    match removed.lines().count() {
        0 => {}
        number => println!("==> removed {number} containers"),
    }
    let storage = data.podman().join("storage");
    // Each container's monitor runs a clean-up of its own afterwards, which mounts the storage again.
    let begun = Instant::now();
    loop {
        let left = Handle::with_argument(&storage);
        if left.is_empty() || begun.elapsed() > CLEAN_UP {
            break;
        }
        for process in left {
            // Where Podman was killed just after it had made a container, it does not know of it: the monitor waits
            // for its end, and nobody else will end it.
            if !process.wait(FORGOTTEN.saturating_sub(begun.elapsed()).max(LOOK)) {
                process.kill_containers();
            }
        }
    }
    // Podman keeps a mount of its own here, which would pin the file system below.
    for directory in [storage.join("overlay"), data.podman_run()] {
        let _not_mounted = command::capture(std::process::Command::new("umount").arg(directory));
    }
    let _absent = fs::remove_dir_all(data.podman_run());
    Ok(())
}
