//! Mounts of a data directory, and a path to it that sandboxes can walk: a sandbox's root is an
//! unprivileged user outside, whom a private home above the data directory would stop.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command;
use crate::data::DataDir;

/// The data directory itself, or where it is mounted a second time because a directory above it is
/// closed to other users. Only root can do that, and only root's Podman needs it.
pub fn open_path(data: &DataDir) -> Result<PathBuf> {
    if !rustix::process::geteuid().is_root() || is_open(data.root())? {
        return Ok(data.root().to_owned());
    }
    let place = data.open_place();
    let complete = is_mounted(&place)? && is_mounted(&place.join("volumes"))? == is_mounted(&data.volumes())?;
    if !complete {
        unmount(&place)?;
        fs::DirBuilder::new().recursive(true).mode(0o711).create(&place)?;
        let mut mount = Command::new("mount");
        mount.args(["--rbind", "--make-rprivate"]).arg(data.root()).arg(&place);
        command::capture(&mut mount)?;
    }
    Ok(place)
}

/// Takes that second mount off.
pub fn close_path(data: &DataDir) -> Result<()> {
    let place = data.open_place();
    unmount(&place)?;
    // Never recursively: were it still mounted, everything would be gone.
    let _absent = fs::remove_dir(place);
    Ok(())
}

/// Takes off what is mounted there, and below.
pub fn unmount(directory: &Path) -> Result<()> {
    if is_mounted(directory)? {
        let mut umount = Command::new("umount");
        command::capture(umount.arg("--recursive").arg(directory))
            .with_context(|| format!("{} is still in use: `fuser -vm` names by what", directory.display()))?;
    }
    Ok(())
}

pub fn is_mounted(directory: &Path) -> Result<bool> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("cannot read the mounts")?;
    let directory = directory.to_str().context("the data directory's path is not UTF-8")?;
    Ok(mount_points(&text).any(|point| point == directory))
}

/// Whether everybody may pass through the directory and all above it.
fn is_open(directory: &Path) -> Result<bool> {
    for directory in directory.ancestors() {
        if fs::metadata(directory)?.permissions().mode() & 0o001 == 0 {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Field 5 of proc_pid_mountinfo(5), which writes spaces as \040.
fn mount_points(mountinfo: &str) -> impl Iterator<Item = String> {
    let fields = mountinfo.lines().filter_map(|line| line.split(' ').nth(4));
    fields.map(|point| point.replace("\\040", " "))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::{is_open, mount_points};

    #[test]
    fn mount_points_with_spaces_are_found() {
        let text = "36 35 98:0 / /srv/my\\040data rw,noatime shared:1 - btrfs /dev/loop0 rw\n";
        assert_eq!(mount_points(text).collect::<Vec<_>>(), ["/srv/my data"]);
    }

    #[test]
    fn a_private_directory_is_closed_to_sandboxes() {
        assert!(is_open("/usr/bin".as_ref()).unwrap());
        let private = tempfile::tempdir().unwrap();
        fs::set_permissions(private.path(), fs::Permissions::from_mode(0o700)).unwrap();
        assert!(!is_open(private.path()).unwrap());
    }
}
