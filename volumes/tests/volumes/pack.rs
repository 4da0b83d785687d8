//! pack, and create from what it wrote: what a volume is after it, and streams that are hostile or break off.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use tar::{Builder, EntryType, Header};

use crate::contents::{CAPABILITY, VALUE, add, capability, header, root_only, set, version_3};
use crate::support::{Client, Server, code, on_each_backend, run};

const BASE: u32 = 300_000;
/// DAC_OVERRIDE and FOWNER: as a byte that is a newline.
const NEWLINE: [u8; 20] = [1, 0, 0, 2, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const MOST: u64 = 1 << 30;

/// Begins to pack; what comes is read from the pipe.
fn begin(server: &Server, id: &str) -> (Client, File) {
    let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
    let mut client = server.connect();
    client.say_with(&json!({"verb": "pack", "volume": id}), &writer);
    (client, File::from(reader))
}

fn pack(server: &Server, id: &str) -> Vec<u8> {
    let (mut client, mut reader) = begin(server, id);
    let mut tar = Vec::new();
    reader.read_to_end(&mut tar).expect("read");
    assert_eq!(client.hear().expect("an answer"), json!({"bytes": tar.len()}));
    tar
}

fn request(id: &str, base: u32, most: u64) -> Value {
    json!({"verb": "create", "volume": id, "from": "volume", "base": base, "most": most})
}

fn create(server: &Server, request: &Value, tar: &[u8]) -> Value {
    let path = server.pool.beside("volume.tar");
    fs::write(&path, tar).expect("a tar");
    let mut client = server.connect();
    client.say_with(request, File::open(path).expect("a tar"));
    client.hear().expect("an answer")
}

fn created(server: &Server, id: &str, base: u32, tar: &[u8]) {
    let answer = create(server, &request(id, base, MOST), tar);
    assert_eq!(answer["bytes"], tar.len(), "{answer}");
}

/// Packs a read-only snapshot of a volume whose trees `fill` filled.
fn packed(server: &Server, fill: impl Fn(&Path)) -> Vec<u8> {
    server.done(&json!({"verb": "create", "volume": "box"}));
    fill(&server.path("box"));
    server.done(&json!({"verb": "snapshot", "source": "box", "volume": "kept", "readonly": true}));
    pack(server, "kept")
}

fn nothing_is_left(server: &Server, id: &str, why: &str) {
    let left = [server.path(id), server.path(&format!(".new-{id}"))];
    assert!(!left.iter().any(|path| path.exists()), "{why}");
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).expect("a file");
}

fn modify(path: &Path, nanoseconds: u64) {
    let file = File::options().write(true).open(path).expect("a file");
    let time = SystemTime::UNIX_EPOCH + Duration::from_nanos(nanoseconds);
    file.set_modified(time).expect("a time");
}

fn fill(volume: &Path) {
    let path = |name: &str| volume.join(name);
    fs::create_dir(path("root/bin")).expect("a directory");
    fs::set_permissions(path("root/bin"), Permissions::from_mode(0o2711)).expect("a mode");
    for name in ["root/bin/sudo", "root/ping", "root/odd", "home/mine", "home/old"] {
        write(&path(name), name);
    }
    chown(path("root/bin/sudo"), Some(0), Some(42)).expect("an owner");
    fs::set_permissions(path("root/bin/sudo"), Permissions::from_mode(0o4755)).expect("setuid");
    fs::create_dir(path("root/sbin")).expect("a directory");
    fs::hard_link(path("root/bin/sudo"), path("root/sbin/sudo")).expect("a link");
    set(&path("root/ping"), CAPABILITY, &VALUE);
    set(&path("root/odd"), CAPABILITY, &NEWLINE);
    chown(path("home/mine"), Some(1000), Some(1001)).expect("an owner");
    modify(&path("home/mine"), 1_000_000_000_123_456_789);
    modify(&path("home/old"), 0);
    symlink("./a//b/./c/", path("home/link")).expect("a link");
    symlink("long/".repeat(100), path("root/link")).expect("a link");
    let deep = path("home").join(format!("{}/", "d".repeat(200)).repeat(4));
    fs::create_dir_all(&deep).expect("directories");
    write(&deep.join(OsStr::from_bytes(b"a\xff\n\\b")), "deep");
    fs::hard_link(deep.join(OsStr::from_bytes(b"a\xff\n\\b")), deep.join("again")).expect("a link");
    let sparse = File::create(path("home/sparse")).expect("a file");
    sparse.set_len(1 << 30).expect("a length");
    sparse.write_all_at(b"middle", 512 << 20).expect("written");
    fs::create_dir(path("root/empty")).expect("a directory");
}

#[test]
fn a_volume_that_was_packed_is_made_again_as_it_was() {
    if !root_only() {
        return;
    }
    on_each_backend(|server| {
        server.done(&json!({"verb": "create", "volume": "box"}));
        fill(&server.path("box"));
        server.done(&json!({"verb": "shift", "volume": "box", "base": BASE}));
        server.done(&json!({"verb": "snapshot", "source": "box", "volume": "kept", "readonly": true}));
        let tar = pack(&server, "kept");
        assert!(tar.len() < 1 << 20, "what is sparse takes no room: {}", tar.len());
        let file = server.pool.beside("kept.tar");
        fs::write(&file, &tar).expect("a tar");
        let listed = run("tar", &["--list", "--file", file.to_str().expect("a path")]);
        assert!(listed.expect("other programs read it").contains("home/sparse\n"));
        created(&server, "same", BASE, &tar);
        let difference = |from: &str, to: &str| {
            let told = server.done(&json!({"verb": "diff", "from": from, "to": to}));
            assert_eq!(told["truncated"], false);
            told["entries"].clone()
        };
        assert_eq!(difference("kept", "same"), json!([]));
        created(&server, "other", 500_000, &tar);
        for (id, base) in [("kept", BASE), ("same", BASE), ("other", 500_000)] {
            let path = |name: &str| server.path(&format!("{id}/{name}"));
            let stat = |name: &str| fs::symlink_metadata(path(name)).expect("there");
            let owner = |name: &str| (stat(name).uid() - base, stat(name).gid() - base);
            assert_eq!(owner("root"), (0, 0), "{id}");
            assert_eq!(owner("home"), (1000, 1000), "{id}");
            assert_eq!(owner("root/bin/sudo"), (0, 42), "{id}");
            assert_eq!(owner("home/mine"), (1000, 1001), "{id}");
            assert_eq!(owner("home/link"), (0, 0), "{id}");
            assert_eq!(stat("root/bin/sudo").mode() & 0o7777, 0o4755, "{id}");
            assert_eq!(stat("root/bin").mode() & 0o7777, 0o2711, "{id}");
            assert_eq!(stat("root/bin/sudo").ino(), stat("root/sbin/sudo").ino(), "{id}");
            assert_eq!(capability(&path("root/ping")), version_3(VALUE, base), "{id}");
            assert_eq!(capability(&path("root/odd")), version_3(NEWLINE, base), "{id}");
            assert_eq!(fs::read_to_string(path("home/mine")).expect("readable"), "home/mine");
            assert_eq!(stat("home/mine").mtime_nsec(), 123_456_789, "{id}");
            let link = fs::read_link(path("home/link")).expect("a link");
            assert_eq!(link.as_os_str(), "./a//b/./c/", "{id}");
            let mut middle = [0; 8];
            let sparse = File::open(path("home/sparse")).expect("a file");
            sparse.read_exact_at(&mut middle, (512 << 20) - 1).expect("read");
            assert_eq!(&middle, b"\0middle\0", "{id}");
            assert_eq!(stat("home/sparse").len(), 1 << 30, "{id}");
            assert!(stat("home/sparse").blocks() < 2048, "{id} is sparse");
        }
        // A read-only snapshot like any other.
        let shift = json!({"verb": "shift", "volume": "same", "base": 700_000});
        assert_eq!(server.code(&shift), "refused");
        created(&server, "third", BASE, &pack(&server, "same"));
        assert_eq!(difference("same", "third"), json!([]));
        server.done(&json!({"verb": "snapshot", "source": "same", "volume": "back"}));
        write(&server.path("back/home/mine"), "changed");
        server.done(&json!({"verb": "shift", "volume": "back", "base": 700_000}));
        for id in ["same", "third", "other"] {
            server.done(&json!({"verb": "delete", "volume": id}));
        }
    });
}

#[test]
fn what_is_no_data_is_left_out_and_owners_from_elsewhere_are_nobody() {
    if !root_only() {
        return;
    }
    on_each_backend(|server| {
        server.done(&json!({"verb": "create", "volume": "box"}));
        let home = server.path("box/home");
        run("mkfifo", &[home.join("fifo").to_str().expect("a path")]).expect("a FIFO");
        let _socket = UnixListener::bind(home.join("socket")).expect("a socket");
        write(&home.join("file"), "text");
        write(&home.join("stray"), "text");
        if !server.pool.plain {
            let nested = home.join("nested");
            run("btrfs", &["subvolume", "create", nested.to_str().expect("a path")]).expect("nested");
            write(&nested.join("inner"), "text");
        }
        server.done(&json!({"verb": "shift", "volume": "box", "base": BASE}));
        // Root's of the host, and beyond the range.
        chown(home.join("stray"), Some(0), Some(4_000_000)).expect("an owner");
        server.done(&json!({"verb": "snapshot", "source": "box", "volume": "kept", "readonly": true}));
        created(&server, "new", 500_000, &pack(&server, "kept"));
        let mut names: Vec<_> = fs::read_dir(server.path("new/home"))
            .expect("readable")
            .map(|entry| entry.expect("an entry").file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["file", "stray"]);
        let stray = fs::metadata(server.path("new/home/stray")).expect("there");
        assert_eq!((stray.uid(), stray.gid()), (565_534, 565_534));
        let file = fs::metadata(server.path("new/home/file")).expect("there");
        assert_eq!((file.uid(), file.gid()), (500_000, 500_000));
    });
}

#[test]
fn only_a_read_only_snapshot_is_packed_and_only_to_a_file_or_pipe() {
    if !root_only() {
        return;
    }
    on_each_backend(|server| {
        server.done(&json!({"verb": "create", "volume": "box"}));
        server.done(&json!({"verb": "snapshot", "source": "box", "volume": "kept", "readonly": true}));
        for (id, expected) in [("box", "refused"), ("none", "not_found")] {
            let (mut client, mut reader) = begin(&server, id);
            assert_eq!(code(&client.hear().expect("an answer")), expected);
            assert_eq!(reader.read(&mut [0]).expect("the end"), 0, "nothing was written");
        }
        let request = json!({"verb": "pack", "volume": "kept"});
        assert_eq!(server.code(&request), "invalid");
        let mut client = server.connect();
        client.say_with(&request, File::options().write(true).open("/dev/null").expect("opened"));
        assert_eq!(code(&client.hear().expect("an answer")), "refused");
        let path = server.pool.beside("packed.tar");
        client.say_with(&request, File::create(&path).expect("a file"));
        let answer = client.hear().expect("an answer");
        assert_eq!(answer["bytes"], fs::metadata(&path).expect("there").len(), "{answer}");
        assert_eq!(pack(&server, "kept"), fs::read(&path).expect("readable"));
    });
}

#[test]
fn a_reader_that_goes_away_ends_packing_and_frees_the_volume() {
    if !root_only() {
        return;
    }
    on_each_backend(|server| {
        packed(&server, |volume| {
            write(&volume.join("home/large"), &"text".repeat(1 << 20))
        });
        let delete = json!({"verb": "delete", "volume": "kept"});
        let (mut client, mut reader) = begin(&server, "kept");
        reader.read_exact(&mut [0]).expect("it has begun");
        assert_eq!(server.code(&delete), "busy");
        drop(reader);
        assert_eq!(code(&client.hear().expect("an answer")), "refused");
        server.done(&delete);
    });
}

#[test]
fn a_pipe_that_never_waits_for_room_carries_all() {
    if !root_only() {
        return;
    }
    on_each_backend(|server| {
        let whole = packed(&server, |volume| {
            write(&volume.join("home/large"), &"text".repeat(1 << 20))
        });
        let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
        rustix::io::ioctl_fionbio(&writer, true).expect("non-blocking");
        let mut client = server.connect();
        client.say_with(&json!({"verb": "pack", "volume": "kept"}), &writer);
        drop(writer);
        let mut read = Vec::new();
        File::from(reader).read_to_end(&mut read).expect("read");
        assert_eq!(read, whole);
        assert_eq!(client.hear().expect("an answer"), json!({"bytes": whole.len()}));
    });
}

fn tar_of(entries: &[(Header, &str)]) -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    for (header, link) in entries {
        let size = header.size().expect("a size") as usize;
        add(&mut tar, header.clone(), link, &b"text"[..size]);
    }
    tar.into_inner().expect("a tar")
}

type Entries = Vec<(Header, &'static str)>;

fn file(name: &str) -> (Header, &'static str) {
    (header(name, EntryType::Regular, 0o644, 4), "")
}

fn owned(name: &str, id: u64) -> (Header, &'static str) {
    let (mut header, link) = file(name);
    header.set_uid(id);
    header.set_gid(id);
    (header, link)
}

/// Why it is refused, the hostile entries, and honest ones that are much like them.
fn cases() -> Vec<(&'static str, Entries, Entries)> {
    let directory = |name: &str| (header(name, EntryType::Directory, 0o755, 0), "");
    let soft = |name: &str, to: &'static str| (header(name, EntryType::Symlink, 0o777, 0), to);
    let hard = |name: &str, to: &'static str| (header(name, EntryType::Link, 0o644, 0), to);
    let special = |name: &str, kind: EntryType| (header(name, kind, 0o666, 0), "");
    let through = "a hard link goes through a symbolic link";
    vec![
        (
            "neither in root nor in home",
            vec![file("etc/evil")],
            vec![directory("root/etc/"), file("root/etc/fine")],
        ),
        (
            "neither in root nor in home",
            vec![directory("./")],
            vec![directory("./root/")],
        ),
        (
            "the directory of an entry is missing",
            vec![file("root/a/b/c/d/evil")],
            vec![directory("root/a/"), file("root/a/fine")],
        ),
        (
            "not one that a sandbox has",
            vec![owned("root/evil", 200_000)],
            vec![owned("root/fine", 65_535)],
        ),
        ("has `..`", vec![file("root/../evil")], vec![file("root/..fine")]),
        ("absolute", vec![file("/root/evil")], vec![file("./root/fine")]),
        (
            "tree is not a directory",
            vec![soft("root", "home")],
            vec![directory("root")],
        ),
        (
            "goes through a symbolic link",
            vec![soft("root/link", "/home"), file("root/link/evil")],
            vec![directory("root/link/"), file("root/link/fine")],
        ),
        (
            "leads into another tree",
            vec![file("root/a"), hard("home/b", "root/a")],
            vec![file("root/a"), hard("root/b", "root/a")],
        ),
        (
            through,
            vec![
                file("home/a"),
                soft("root/link", "/home"),
                hard("root/b", "root/link/a"),
            ],
            vec![
                directory("root/link/"),
                file("root/link/a"),
                hard("root/b", "root/link/a"),
            ],
        ),
        (
            "hard link's target",
            vec![file("root/a"), hard("root/b", "root/../root/a")],
            vec![file("root/a"), hard("root/b", "root/./a")],
        ),
        (
            "device node",
            vec![special("root/tty", EntryType::Char)],
            vec![file("root/tty")],
        ),
        (
            "device node",
            vec![special("root/disk", EntryType::Block)],
            vec![file("root/disk")],
        ),
        (
            "neither file",
            vec![special("root/fifo", EntryType::Fifo)],
            vec![file("root/fifo")],
        ),
    ]
}

#[test]
fn hostile_volumes_are_refused_beside_honest_ones_and_leave_nothing() {
    if !root_only() {
        return;
    }
    on_each_backend(|server| {
        for (why, hostile, honest) in &cases() {
            let answer = create(&server, &request("new", BASE, MOST), &tar_of(hostile));
            let message = answer["error"]["message"].as_str().unwrap_or_default();
            assert!(code(&answer) == "refused" && message.contains(why), "{why}: {answer}");
            nothing_is_left(&server, "new", why);
            created(&server, "new", BASE, &tar_of(honest));
            server.done(&json!({"verb": "delete", "volume": "new"}));
        }
    });
}

#[test]
fn a_volume_that_breaks_off_anywhere_is_refused() {
    if !root_only() {
        return;
    }
    on_each_backend(|server| {
        let tar = packed(&server, |volume| {
            write(&volume.join("root/one"), &"text".repeat(1000));
            write(&volume.join("home/two"), "text");
        });
        let length = tar.len();
        // The last two: without the end, and with half of it.
        for cut in [0, 512, 600, length / 2, length - 1, length - 1024, length - 512] {
            let answer = create(&server, &request("new", BASE, MOST), &tar[..cut]);
            assert_eq!(code(&answer), "refused", "{cut} of {length}");
            nothing_is_left(&server, "new", "broken off");
        }
        created(&server, "new", BASE, &tar);
    });
}

#[test]
fn files_may_hold_so_much_and_no_more() {
    if !root_only() {
        return;
    }
    on_each_backend(|server| {
        let tar = packed(&server, |volume| {
            write(&volume.join("home/one"), &"text".repeat(1000));
            write(&volume.join("home/two"), &"text".repeat(1000));
            let sparse = File::create(volume.join("home/sparse")).expect("a file");
            sparse.set_len(1 << 30).expect("a length");
        });
        let answer = create(&server, &request("new", BASE, 7999), &tar);
        let message = answer["error"]["message"].as_str().unwrap_or_default();
        assert!(
            code(&answer) == "refused" && message.contains("larger than"),
            "{answer}"
        );
        nothing_is_left(&server, "new", "too large");
        let answer = create(&server, &request("new", BASE, 8000), &tar);
        assert_eq!(answer["bytes"], tar.len(), "{answer}");
        // What is stored of a sparse file is told in one place only.
        let sparse = |stored: u64| {
            let mut header = header("home/sparse", EntryType::GNUSparse, 0o644, 0);
            header.set_size(stored);
            let gnu = header.as_gnu_mut().expect("a GNU header");
            gnu.set_real_size(4);
            gnu.sparse[0].set_offset(0);
            gnu.sparse[0].set_length(4);
            header
        };
        let mut lies = Builder::new(Vec::new());
        lies.append_pax_extensions([("size", &b"4"[..])]).expect("an extension");
        add(&mut lies, sparse(0), "", b"text");
        let answer = create(&server, &request("lies", BASE, 0), &lies.into_inner().expect("a tar"));
        let message = answer["error"]["message"].as_str().unwrap_or_default();
        assert!(code(&answer) == "refused" && message.contains("told twice"), "{answer}");
        let mut honest = Builder::new(Vec::new());
        add(&mut honest, sparse(4), "", b"text");
        created(&server, "honest", BASE, &honest.into_inner().expect("a tar"));
    });
}

#[test]
fn what_takes_room_without_being_a_files_content_is_bounded_by_the_file_system() {
    if !root_only() {
        return;
    }
    on_each_backend(|server| {
        if server.pool.plain {
            return;
        }
        // Each takes 4 KiB of what the file system keeps of itself, and is as long as one may be there.
        let mut tar = Builder::new(Vec::new());
        let to = "x".repeat(3900);
        for nth in 0..25_000 {
            let mut link = header("", EntryType::Symlink, 0o777, 0);
            tar.append_link(&mut link, format!("home/{nth}"), &to).expect("a link");
        }
        let tar = tar.into_inner().expect("a tar");
        let answer = create(&server, &request("new", BASE, 1 << 20), &tar);
        assert_eq!(code(&answer), "no_space", "{answer}");
        nothing_is_left(&server, "new", "too much around it");
        let answer = create(&server, &request("new", BASE, 1 << 30), &tar);
        assert_eq!(answer["bytes"], tar.len(), "{answer}");
    });
}

#[test]
fn the_base_is_asked_for_and_the_trees_are_there_whatever_the_tar_says() {
    if !root_only() {
        return;
    }
    on_each_backend(|server| {
        let tar = tar_of(&[(header("root/file", EntryType::Regular, 0o644, 4), "")]);
        let without = json!({"verb": "create", "volume": "new", "from": "volume"});
        let with = json!({"verb": "create", "volume": "new", "from": "tar", "base": BASE});
        let overlapping = request("new", 1000, MOST);
        for wrong in [without, with, overlapping] {
            assert_eq!(code(&create(&server, &wrong, &tar)), "invalid", "{wrong}");
            nothing_is_left(&server, "new", "invalid");
        }
        created(&server, "new", BASE, &tar);
        let owner = |path: &str| fs::metadata(server.path(path)).expect("there").uid();
        assert_eq!(owner("new/home"), BASE + 1000);
        assert_eq!(owner("new/root"), BASE);
        assert_eq!(owner("new/root/file"), BASE);
        assert_eq!(fs::metadata(server.path("new")).expect("there").mode() & 0o777, 0o711);
        assert_eq!(code(&create(&server, &request("new", BASE, MOST), &tar)), "exists");
    });
}

#[test]
fn a_crash_while_a_volume_is_made_leaves_none() {
    if !root_only() {
        return;
    }
    on_each_backend(|server| {
        let tar = packed(&server, |volume| {
            write(&volume.join("root/large"), &"text".repeat(1 << 20))
        });
        let (reader, writer): (OwnedFd, OwnedFd) = rustix::pipe::pipe().expect("a pipe");
        let mut client = server.connect();
        client.say_with(&request("new", BASE, MOST), &reader);
        drop(reader);
        let mut writer = File::from(writer);
        writer.write_all(&tar[..tar.len() / 2]).expect("fed");
        while !server.path(".new-new/root/large").exists() {
            std::thread::yield_now();
        }
        let server = Server::start(server.kill());
        drop(writer);
        let volumes = server.done(&json!({"verb": "usage"}))["volumes"].take();
        assert_eq!(volumes, json!(["box", "kept"]));
        nothing_is_left(&server, "new", "after a crash");
        created(&server, "new", BASE, &tar);
    });
}
