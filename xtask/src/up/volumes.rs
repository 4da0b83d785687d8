//! The disk that volumes live on, and the helper that manages it: a btrfs file system in a sparse
//! file where we may mount one, else plain directories.

use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::command;
use crate::data::DataDir;
use crate::up::Runtime;
use crate::up::mounts::is_mounted;
use crate::up::supervise::Service;

const LARGEST: u64 = 60 << 30;

#[derive(Debug)]
pub enum Disk {
    Btrfs,
    /// Copies instead of snapshots, and no limit.
    Plain {
        reason: String,
    },
}

/// Makes and mounts the file system. A disk that was btrfs once is never replaced by directories.
pub fn prepare(data: &DataDir, runtime: Runtime) -> Result<Disk> {
    let (image, directory) = (data.volumes_image(), data.volumes());
    if is_mounted(&directory)? {
        return Ok(Disk::Btrfs);
    }
    if image.exists() {
        mount(&image, &directory)?;
        return Ok(Disk::Btrfs);
    }
    if let Some(reason) = obstacle(&directory, runtime) {
        return Ok(Disk::Plain { reason });
    }
    match create(&image).and_then(|()| mount(&image, &directory)) {
        Ok(()) => Ok(Disk::Btrfs),
        Err(error) => {
            let _absent = fs::remove_file(&image);
            Ok(Disk::Plain {
                reason: format!("this machine cannot mount one: {error:#}"),
            })
        }
    }
}

/// The helper on that disk.
pub fn service(data: &DataDir, disk: &Disk) -> Service {
    let (program, directory) = (data.bin().join("choir-volumes"), data.volumes());
    let socket = data.volumes_socket();
    let plain = matches!(disk, Disk::Plain { .. });
    let log = data.logs().join("choir-volumes.log");
    Service::new("choir-volumes", data, Some(log), move || {
        // A socket file that nobody listens on any more is in the way.
        let _absent = fs::remove_file(&socket);
        let mut command = Command::new(&program);
        command
            .arg("serve")
            .arg("--dir")
            .arg(&directory)
            .arg("--socket")
            .arg(&socket);
        if plain {
            command.arg("--plain");
        }
        Ok(command)
    })
}

fn obstacle(directory: &Path, runtime: Runtime) -> Option<String> {
    let in_kernel = || {
        fs::read_to_string("/proc/filesystems").is_ok_and(|text| text.contains("\tbtrfs"))
            || command::capture(Command::new("modprobe").arg("btrfs")).is_ok()
    };
    if runtime == Runtime::Process {
        Some("the process runtime is for quick trials".into())
    } else if fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_some()) {
        Some("this data directory was made that way".into())
    } else if !rustix::process::geteuid().is_root() {
        Some("only root can mount a btrfs file system".into())
    } else if command::find("mkfs.btrfs").is_none() {
        Some("mkfs.btrfs is not installed (package btrfs-progs)".into())
    } else if !in_kernel() {
        Some("this kernel has no btrfs".into())
    } else {
        None
    }
}

fn create(image: &Path) -> Result<()> {
    let directory = image.parent().context("the image has a directory")?;
    let disk = rustix::fs::statvfs(directory)?;
    let size = size_for(disk.f_bavail * disk.f_frsize);
    println!(
        "==> making the data volume: a sparse file of up to {} GB",
        size / 1_000_000_000
    );
    // Under another name until it is whole: what has the name is mounted, not made again. Everybody's
    // files will be in it.
    let partial = image.with_extension("partial");
    let file = File::options()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&partial)?;
    file.set_len(size)
        .with_context(|| format!("cannot make {}", partial.display()))?;
    // Small nodes: a snapshot writes a reference to each thing in a node, among those of all other copies (ADR-0026).
    let options = ["--quiet", "--force", "--nodesize", "4096"];
    command::capture(Command::new("mkfs.btrfs").args(options).arg(&partial))?;
    Ok(fs::rename(&partial, image)?)
}

/// Most of what is free, in bytes, so that a full volume leaves room for the database.
fn size_for(free: u64) -> u64 {
    LARGEST.min(free / 5 * 4)
}

fn mount(image: &Path, directory: &Path) -> Result<()> {
    command::capture(
        Command::new("mount")
            .args(["-o", "loop,noatime,nosuid,nodev"])
            .arg(image)
            .arg(directory),
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{LARGEST, size_for};

    #[test]
    fn the_volume_leaves_a_fifth_of_the_disk_free() {
        assert_eq!(size_for(100 << 30), LARGEST);
        assert_eq!(size_for(10 << 30), 8 << 30);
    }
}
