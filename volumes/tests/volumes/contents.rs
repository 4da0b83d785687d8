//! What is inside volumes: tar streams, good and hostile, and the shift of owners.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::support::{Server, code, on_each_backend};
use rustix::fs::{XattrFlags, getxattr, setxattr};
use serde_json::{Value, json};
use tar::{Builder, EntryType, Header};

pub const CAPABILITY: &str = "security.capability";
/// NET_BIND_SERVICE, effective, version 2.
pub const VALUE: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

pub fn root_only() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: owners can be changed by root only");
    }
    root
}

pub fn header(name: &str, kind: EntryType, mode: u32, size: usize) -> Header {
    let mut header = Header::new_gnu();
    // Not `set_path`, which refuses what the hostile cases need.
    header.as_gnu_mut().expect("a GNU header").name[..name.len()].copy_from_slice(name.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size as u64);
    header.set_uid(0);
    header.set_gid(0);
    header
}

pub fn add(tar: &mut Builder<Vec<u8>>, mut header: Header, link: &str, data: &[u8]) {
    header.as_gnu_mut().expect("a GNU header").linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_cksum();
    tar.append(&header, data).expect("appended");
}

fn good_tar() -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    add(&mut tar, header("./", EntryType::Directory, 0o711, 0), "", b"");
    add(&mut tar, header("./bin/", EntryType::Directory, 0o755, 0), "", b"");
    let mut sudo = header("./bin/sudo", EntryType::Regular, 0o4755, 4);
    sudo.set_uid(0);
    sudo.set_gid(42);
    add(&mut tar, sudo, "", b"sudo");
    add(
        &mut tar,
        header("./bin/again", EntryType::Link, 0o4755, 0),
        "./bin/sudo",
        b"",
    );
    add(&mut tar, header("./sbin", EntryType::Symlink, 0o777, 0), "/bin", b"");
    let extension = ("SCHILY.xattr.security.capability", &VALUE[..]);
    tar.append_pax_extensions([extension]).expect("an extension");
    add(
        &mut tar,
        header("./bin/ping", EntryType::Regular, 0o755, 4),
        "",
        b"ping",
    );
    add(&mut tar, header("./tmp/", EntryType::Directory, 0o1777, 0), "", b"");
    add(
        &mut tar,
        header("opt/deep/file", EntryType::Regular, 0o600, 4),
        "",
        b"deep",
    );
    tar.into_inner().expect("a tar")
}

fn send(server: &Server, id: &str, tar: &[u8]) -> Value {
    let path = server.pool.beside("stream.tar");
    fs::write(&path, tar).expect("a tar");
    let mut client = server.connect();
    let request = json!({"verb": "create", "volume": id, "from": "tar"});
    client.say_with(&request, File::open(path).expect("a tar"));
    client.hear().expect("an answer")
}

fn digest(bytes: &[u8]) -> String {
    let mut child = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("sha256sum runs");
    child.stdin.take().expect("an input").write_all(bytes).expect("fed");
    let mut said = String::new();
    child
        .stdout
        .take()
        .expect("an output")
        .read_to_string(&mut said)
        .expect("read");
    child.wait().expect("it ends");
    said[..64].to_owned()
}

#[test]
fn a_tar_is_unpacked_with_owners_modes_links_and_capabilities() {
    if !root_only() {
        return;
    }
    on_each_backend(|server| {
        let tar = good_tar();
        let answer = send(&server, "rel", &tar);
        assert_eq!(answer, json!({"bytes": tar.len(), "sha256": digest(&tar)}));
        let stat = |path: &str| fs::symlink_metadata(server.path(path)).expect("there");
        assert_eq!(stat("rel/root").mode() & 0o7777, 0o711);
        assert_eq!(stat("rel/root/bin/sudo").mode() & 0o7777, 0o4755);
        assert_eq!(stat("rel/root/bin/sudo").gid(), 42);
        assert_eq!(stat("rel/root/bin/sudo").ino(), stat("rel/root/bin/again").ino());
        assert_eq!(stat("rel/root/tmp").mode() & 0o7777, 0o1777);
        assert_eq!(
            fs::read_link(server.path("rel/root/sbin")).expect("a link"),
            Path::new("/bin")
        );
        assert_eq!(capability(&server.path("rel/root/bin/ping")), VALUE);
        assert_eq!(stat("rel/root/opt/deep/file").len(), 4);
        assert_eq!(stat("rel/root/opt").mode() & 0o777, 0o755);
        // Setuid programs of the host's root: beyond everybody's reach until shifted.
        assert_eq!(stat("rel").mode() & 0o777, 0o700);
        server.done(&json!({"verb": "shift", "volume": "rel", "base": 300_000}));
        assert_eq!(stat("rel").mode() & 0o777, 0o711);
        assert_eq!(stat("rel/root/bin/sudo").mode() & 0o7777, 0o4755);
        assert_eq!(stat("rel/root/bin/sudo").gid(), 300_042);
    });
}

#[test]
fn a_tar_comes_through_a_pipe_and_its_volume_is_busy_meanwhile() {
    if !root_only() {
        return;
    }
    on_each_backend(|server| {
        let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
        rustix::io::ioctl_fionbio(&reader, true).expect("non-blocking");
        let request = json!({"verb": "create", "volume": "rel", "from": "tar"});
        let mut client = server.connect();
        client.say_with(&request, &reader);
        drop(reader);
        while !server.path(".new-rel/root").exists() {
            std::thread::yield_now();
        }
        assert_eq!(server.code(&json!({"verb": "create", "volume": "rel"})), "busy");
        server.done(&json!({"verb": "create", "volume": "other"}));
        let tar = good_tar();
        File::from(writer).write_all(&tar).expect("fed");
        assert_eq!(client.hear().expect("an answer")["sha256"], digest(&tar));
    });
}

#[test]
fn hostile_tars_are_refused_and_leave_nothing() {
    if !root_only() {
        return;
    }
    on_each_backend(|server| {
        let outside = server.pool.beside("outside");
        fs::create_dir(&outside).expect("a directory");
        let target = outside.to_str().expect("a path");
        let climb = format!("../../../{}", outside.file_name().expect("a name").to_string_lossy());
        let file = |name: &str| header(name, EntryType::Regular, 0o644, 4);
        let link = header("link", EntryType::Symlink, 0o777, 0);
        let cases: Vec<(&str, Vec<(Header, &str)>)> = vec![
            ("dots", vec![(file(&format!("{climb}/evil")), "")]),
            ("inner-dots", vec![(file("a/../evil"), "")]),
            ("absolute", vec![(file(&format!("{target}/evil")), "")]),
            ("character", vec![(header("tty", EntryType::Char, 0o666, 0), "")]),
            ("block", vec![(header("disk", EntryType::Block, 0o666, 0), "")]),
            ("fifo", vec![(header("fifo", EntryType::Fifo, 0o666, 0), "")]),
            ("through", vec![(link.clone(), target), (file("link/evil"), "")]),
            (
                "through-climbing",
                vec![(link.clone(), climb.as_str()), (file("link/evil"), "")],
            ),
            (
                "through-inside",
                vec![
                    (header("real/", EntryType::Directory, 0o755, 0), ""),
                    (link, "real"),
                    (file("link/evil"), ""),
                ],
            ),
            (
                "hard-dots",
                vec![(header("passwd", EntryType::Link, 0o644, 0), "../../etc/passwd")],
            ),
            (
                "hard-absolute",
                vec![(header("passwd", EntryType::Link, 0o644, 0), "/etc/passwd")],
            ),
        ];
        for (name, entries) in cases {
            let mut tar = Builder::new(Vec::new());
            for (header, link) in entries {
                let size = header.size().expect("a size") as usize;
                add(&mut tar, header, link, &b"evil"[..size]);
            }
            let answer = send(&server, "rel", &tar.into_inner().expect("a tar"));
            assert_eq!(code(&answer), "refused", "{name}: {answer}");
            assert!(
                !server.path("rel").exists() && !server.path(".new-rel").exists(),
                "{name}"
            );
        }
        assert_eq!(fs::read_dir(&outside).expect("readable").count(), 0);
        assert_eq!(code(&send(&server, "rel", &[b'x'; 2048])), "refused");
        assert_eq!(code(&send(&server, "rel", &good_tar()[..700])), "refused");
        assert!(send(&server, "rel", &good_tar()).get("error").is_none());
    });
}

#[test]
fn only_files_and_pipes_are_read_and_only_where_a_tar_belongs() {
    on_each_backend(|server| {
        let request = json!({"verb": "create", "volume": "rel", "from": "tar"});
        assert_eq!(server.code(&request), "invalid");
        for wrong in ["/dev/zero", "/"] {
            let mut client = server.connect();
            client.say_with(&request, File::open(wrong).expect("opened"));
            assert_eq!(code(&client.hear().expect("an answer")), "refused");
        }
        let mut client = server.connect();
        let request = json!({"verb": "create", "volume": "rel"});
        client.say_with(&request, File::open("/dev/null").expect("opened"));
        assert_eq!(code(&client.hear().expect("an answer")), "invalid");
        client.ask(&request);
        assert!(server.path("rel/root").exists());
    });
}

pub fn capability(path: &Path) -> Vec<u8> {
    let mut value = [0; 64];
    let length = getxattr(path, CAPABILITY, &mut value).expect("a capability");
    value[..length].to_vec()
}

pub fn set(path: &Path, name: &str, value: &[u8]) {
    setxattr(path, name, value, XattrFlags::empty()).expect("an attribute");
}

/// The same capability for the root of a range.
pub fn version_3(value: [u8; 20], base: u32) -> Vec<u8> {
    let mut value = value.to_vec();
    value[3] = 3;
    value.extend(base.to_le_bytes());
    value
}

#[test]
fn a_shift_keeps_setuid_bits_and_capabilities_and_may_be_repeated() {
    if !root_only() {
        return;
    }
    on_each_backend(|server| {
        server.done(&json!({"verb": "create", "volume": "box"}));
        let path = |name: &str| server.path(&format!("box/root/{name}"));
        let outside = server.pool.beside("outside");
        for name in [outside.clone(), path("sudo"), path("ping"), path("mine"), path("far")] {
            fs::write(name, "x").expect("a file");
        }
        fs::set_permissions(path("sudo"), PermissionsExt::from_mode(0o6755)).expect("setuid");
        set(&path("ping"), CAPABILITY, &VALUE);
        chown(path("mine"), Some(1000), Some(1001)).expect("an owner");
        chown(path("far"), Some(4_000_000), Some(7)).expect("an owner");
        symlink(&outside, path("link")).expect("a link");
        fs::hard_link(path("sudo"), path("hard")).expect("a link");
        let deep = path("deep").join("d/".repeat(200));
        fs::create_dir_all(&deep).expect("directories");

        let shift = |base: u32| server.done(&json!({"verb": "shift", "volume": "box", "base": base}));
        let owner = |name: &str| {
            let stat = fs::symlink_metadata(path(name)).expect("there");
            (stat.uid(), stat.gid(), stat.mode() & 0o7777)
        };
        for base in [300_000, 500_000] {
            assert!(shift(base)["files"].as_u64().expect("a count") > 200);
            assert_eq!(shift(base), json!({"files": 0}));
            assert_eq!(owner("sudo"), (base, base, 0o6755));
            assert_eq!(owner("hard"), (base, base, 0o6755));
            assert_eq!(owner("mine"), (base + 1000, base + 1001, 0o644));
            assert_eq!(owner("far"), (base + 65_534, base + 7, 0o644));
            assert_eq!(owner("link").0, base);
            assert_eq!(owner(""), (base, base, 0o755));
            assert_eq!(fs::metadata(&deep).expect("there").uid(), base);
            assert_eq!(fs::metadata(server.path("box/home")).expect("there").uid(), base + 1000);
            assert_eq!(capability(&path("ping")), version_3(VALUE, base));
        }
        assert_eq!(fs::metadata(&outside).expect("there").uid(), 0);
        let near = json!({"verb": "shift", "volume": "box", "base": 500_100});
        assert_eq!(server.code(&near), "invalid");
        server.done(&json!({"verb": "snapshot", "source": "box", "volume": "new", "only": "root"}));
        assert_eq!(fs::metadata(server.path("new/home")).expect("there").uid(), 501_000);
        let again = json!({"verb": "shift", "volume": "new", "base": 500_000});
        assert_eq!(server.done(&again), json!({"files": 0}));
    });
}

#[test]
fn an_interrupted_shift_is_finished_by_the_next() {
    if !root_only() {
        return;
    }
    on_each_backend(|server| {
        server.done(&json!({"verb": "create", "volume": "box"}));
        let path = |name: &str| server.path(&format!("box/root/{name}"));
        for name in ["sudo", "later"] {
            fs::write(path(name), "x").expect("a file");
        }
        // Stopped after the change of owner took the setuid bit and the capability of `sudo`.
        set(&path(""), "trusted.choir.base", b"0>300000");
        let mut kept = 0o4755_u32.to_le_bytes().to_vec();
        kept.extend(version_3(VALUE, 300_000));
        set(&path("sudo"), "trusted.choir.kept", &kept);
        chown(path("sudo"), Some(300_000), Some(300_000)).expect("an owner");

        server.done(&json!({"verb": "shift", "volume": "box", "base": 300_000}));
        let stat = fs::metadata(path("sudo")).expect("there");
        assert_eq!((stat.uid(), stat.mode() & 0o7777), (300_000, 0o4755));
        assert_eq!(capability(&path("sudo")), version_3(VALUE, 300_000));
        assert_eq!(fs::metadata(path("later")).expect("there").uid(), 300_000);
        assert!(getxattr(path("sudo"), "trusted.choir.kept", &mut [0_u8; 64]).is_err());
    });
}
