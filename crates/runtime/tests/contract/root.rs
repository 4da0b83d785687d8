//! The root of a sandbox in these tests: as little as a shell needs, and what else a test lends it.

use std::fs;
use std::os::unix::fs::{PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::rig::IDS;

pub fn busybox() -> Option<PathBuf> {
    ["/bin/busybox", "/usr/bin/busybox"]
        .map(PathBuf::from)
        .into_iter()
        .find(|p| p.is_file())
}

/// The smallest system that has a shell, on a volume that belongs to the mapped ids.
pub fn populate(volume: &Path) {
    let root = volume.join("root");
    for dir in [
        "bin",
        "usr/bin",
        "proc",
        "sys",
        "dev",
        "run",
        "tmp",
        "etc",
        "root",
        "home/choir",
        "var/lib",
        "usr/libexec/choir",
    ] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    fs::copy(busybox().unwrap(), root.join("bin/busybox")).unwrap();
    let applets = Command::new(busybox().unwrap()).arg("--list").output().unwrap();
    for applet in String::from_utf8(applets.stdout)
        .unwrap()
        .lines()
        .filter(|a| *a != "busybox")
    {
        symlink("/bin/busybox", root.join("bin").join(applet)).unwrap();
    }
    symlink("/usr/libexec/choir/choir-sandbox", root.join("usr/bin/sudo")).unwrap();
    let passwd = "root:x:0:0::/root:/bin/sh\nchoir:x:1000:1000::/home/choir:/bin/sh\n";
    fs::write(root.join("etc/passwd"), passwd).unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\nchoir:x:1000:\n").unwrap();
    fs::create_dir_all(volume.join("home")).unwrap();
    give(volume, IDS.base);
    lchown(volume.join("home"), Some(IDS.base + 1000), Some(IDS.base + 1000)).unwrap();
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
}

/// Everything below belongs to the host's user and group `id`.
pub fn give(path: &Path, id: u32) {
    lchown(path, Some(id), Some(id)).unwrap();
    if fs::symlink_metadata(path).unwrap().is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            give(&entry.unwrap().path(), id);
        }
    }
}

/// Puts a program of this machine, with its libraries, into the sandbox's /bin, `root` being the owner.
pub fn lend(volume: &Path, program: &str) {
    let root = volume.join("root");
    let program = Path::new("/usr/bin").join(program);
    let needs = Command::new("ldd")
        .arg(&program)
        .output()
        .expect("ldd, which every glibc has");
    let needs = String::from_utf8(needs.stdout).unwrap();
    // `libc.so.6 => /lib/x/libc.so.6 (0x7f..)`, and the loader, without an arrow.
    let libraries = needs
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(Path::new);
    let target = Path::new("/bin").join(program.file_name().unwrap());
    for (from, to) in libraries.map(|l| (l, l)).chain([(program.as_path(), target.as_path())]) {
        let to = root.join(to.strip_prefix("/").unwrap());
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        let _ = fs::remove_file(&to);
        fs::copy(from, &to).unwrap();
        lchown(&to, Some(IDS.base), Some(IDS.base)).unwrap();
    }
}
