//! The disks of the virtual machine: a Debian of this machine's own release that has what our package depends on, and one
//! with what is carried in. Knows nothing of what is done with them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::debian;
use crate::image::host;

/// Beside what the package depends on: a system that boots and is reached by SSH, and what the story looks with.
const SYSTEM: &[&str] = &[
    "age",
    "curl",
    "initramfs-tools",
    "iproute2",
    "linux-image-cloud-amd64",
    "openssh-server",
    "procps",
    "python3-minimal",
    "systemd-sysv",
    "udev",
];
const CONTROL: &str = include_str!("../../../deploy/debian/control");
/// Sparse: what is on it takes a fraction of that.
const SIZE: &str = "20G";

/// What QEMU starts from.
pub struct Disk {
    pub root: PathBuf,
    /// Mounted at /media.
    pub carried: PathBuf,
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    /// Lets root in.
    pub key: PathBuf,
}

/// Makes both in `directory`; the tree of packages is found there a second time.
pub fn make(directory: &Path, suite: Option<&str>, carried: &[(&str, &Path)]) -> Result<Disk> {
    let tree = tree(directory, suite)?;
    let root = directory.join("root.img");
    debian::image(&root, SIZE, &tree.join("root"))?;
    let load = directory.join("carried");
    fs::create_dir_all(&load)?;
    for (name, file) in carried {
        fs::copy(file, load.join(name)).with_context(|| format!("cannot copy {}", file.display()))?;
    }
    let disk = Disk {
        root,
        carried: directory.join("carried.img"),
        kernel: tree.join("kernel"),
        initrd: tree.join("initrd"),
        key: tree.join("key"),
    };
    debian::image(&disk.carried, "4G", &load)?;
    fs::remove_dir_all(&load)?;
    Ok(disk)
}

/// `root`, `kernel`, `initrd` and `key` in a directory.
fn tree(directory: &Path, suite: Option<&str>) -> Result<PathBuf> {
    let own = host::suite()?;
    let packages = packages();
    debian::tree(directory, suite.unwrap_or(&own), &packages, SETTINGS)
}

const SETTINGS: &str = r#"set -eu
ssh-keygen -q -t ed25519 -N '' -C vm-test -f "$OUT/key"
install -m 0644 "$OUT/key.pub" "$1/etc/ssh/authorized_keys"
echo 'AuthorizedKeysFile /etc/ssh/authorized_keys' > "$1/etc/ssh/sshd_config.d/vm.conf"
printf '[Match]\nName=e*\n[Network]\nDHCP=yes\n' > "$1/etc/systemd/network/10-vm.network"
chroot "$1" systemctl --quiet enable systemd-networkd
echo choir-vm > "$1/etc/hostname"
# It reaches nobody, which apt notices at once where there is no resolver to wait for.
: > "$1/etc/resolv.conf"
printf '/dev/vda / ext4 defaults 0 1\n/dev/vdb /media ext4 ro 0 0\n' > "$1/etc/fstab"
cp "$1"/boot/vmlinuz-* "$OUT/kernel"
cp "$1"/boot/initrd.img-* "$OUT/initrd"
"#;

/// What the control file says that the package depends on, so that it installs without a mirror.
fn packages() -> Vec<&'static str> {
    let line = CONTROL.lines().find_map(|line| line.strip_prefix("Depends: "));
    let depends = line.unwrap_or_default().split(", ");
    let mut names: Vec<_> = depends
        .filter_map(|dependency| dependency.split(' ').next())
        .chain(SYSTEM.iter().copied())
        .collect();
    names.sort();
    names.dedup();
    names
}
