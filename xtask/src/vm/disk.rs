//! The disks of the virtual machine: a Debian of this machine's own release that has what our package depends on, and one
//! with what is carried in. Knows nothing of what is done with them.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use data_encoding::HEXLOWER;
use sha2::{Digest, Sha256};

use crate::command;
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
const SIZE: &str = "12G";

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
    format(&root, SIZE, &tree.join("root"))?;
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
    format(&disk.carried, "4G", &load)?;
    fs::remove_dir_all(&load)?;
    Ok(disk)
}

fn format(image: &Path, size: &str, content: &Path) -> Result<()> {
    let _former = fs::remove_file(image);
    command::run(Command::new("truncate").args(["--size", size]).arg(image))?;
    let mut mkfs = Command::new("mkfs.ext4");
    mkfs.args(["-q", "-F", "-E", "root_owner=0:0", "-d"]);
    command::run(mkfs.arg(content).arg(image))
}

/// `root`, `kernel`, `initrd` and `key` in a directory that is called after what went in.
fn tree(directory: &Path, suite: Option<&str>) -> Result<PathBuf> {
    let own = host::suite()?;
    let suite = suite.unwrap_or(&own).to_owned();
    // The mirror has the others, too.
    let (stanzas, lines) = host::sources(&own)?;
    let [stanzas, lines] = [stanzas, lines].map(|text| text.replace(&own, &suite));
    let options = host::apt_options()?;
    let packages = packages();
    let mut hash = Sha256::new();
    for part in [
        &suite,
        &stanzas,
        &lines,
        &options.join("\n"),
        &packages.join(","),
        SETTINGS,
    ] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let name = format!("tree-{}", HEXLOWER.encode(&hash.finalize()[..8]));
    let tree = directory.join(name);
    if tree.exists() {
        return Ok(tree);
    }
    println!("    Debian {suite} for the virtual machine is put together (a minute, once)");
    let partial = directory.join("tree.partial");
    if partial.exists() {
        fs::remove_dir_all(&partial)?;
    }
    fs::create_dir_all(&partial)?;
    fs::set_permissions(&partial, Permissions::from_mode(0o755))?;
    let key = partial.join("key");
    let mut keygen = Command::new("ssh-keygen");
    command::run(
        keygen
            .args(["-q", "-t", "ed25519", "-N", "", "-C", "vm-test", "-f"])
            .arg(&key),
    )?;
    let mut mmdebstrap = Command::new("mmdebstrap");
    mmdebstrap.args(["--quiet", "--variant=minbase", "--format=directory"]);
    mmdebstrap.arg(format!("--include={}", packages.join(",")));
    for option in options {
        mmdebstrap.arg(format!("--aptopt={option}"));
    }
    mmdebstrap.arg(format!("--customize-hook={SETTINGS}"));
    mmdebstrap.arg(&suite).arg(partial.join("root"));
    for (name, text) in [("debian.sources", stanzas), ("debian.list", lines)] {
        if !text.is_empty() {
            let file = partial.join(name);
            fs::write(&file, text)?;
            mmdebstrap.arg(file);
        }
    }
    command::run(mmdebstrap.env("TMPDIR", &partial).env("KEY", key.with_extension("pub")))?;
    for (link, name) in [("vmlinuz", "kernel"), ("initrd.img", "initrd")] {
        let boot = partial.join("root/boot");
        fs::copy(newest(&boot, link)?, partial.join(name))?;
    }
    fs::rename(&partial, &tree)?;
    Ok(tree)
}

/// Run by mmdebstrap with the tree as `$1`.
const SETTINGS: &str = r#"set -eu
install -m 0644 "$KEY" "$1/etc/ssh/authorized_keys"
echo 'AuthorizedKeysFile /etc/ssh/authorized_keys' > "$1/etc/ssh/sshd_config.d/vm.conf"
printf '[Match]\nName=e*\n[Network]\nDHCP=yes\n' > "$1/etc/systemd/network/10-vm.network"
chroot "$1" systemctl --quiet enable systemd-networkd
echo choir-vm > "$1/etc/hostname"
# It reaches nobody, which apt notices at once where there is no resolver to wait for.
: > "$1/etc/resolv.conf"
printf '/dev/vda / ext4 defaults 0 1\n/dev/vdb /media ext4 ro 0 0\n' > "$1/etc/fstab"
"#;

fn newest(directory: &Path, start: &str) -> Result<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(directory)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with(start))
        })
        .collect();
    found.sort();
    match found.pop() {
        Some(path) => Ok(path),
        None => bail!("the virtual machine's Debian has no {start} in /boot"),
    }
}

/// What the control file says that the package depends on, so that it installs without a mirror.
fn packages() -> Vec<String> {
    let line = CONTROL.lines().find_map(|line| line.strip_prefix("Depends: "));
    let depends = line.unwrap_or_default().split(", ");
    let mut names: Vec<String> = depends
        .filter_map(|dependency| dependency.split(' ').next())
        .chain(SYSTEM.iter().copied())
        .map(str::to_owned)
        .collect();
    names.sort();
    names.dedup();
    names
}
