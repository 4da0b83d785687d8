//! create, snapshot, delete, limit, usage, and who may ask for them.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::{BINARY, Client, Pool, Server, code, on_each_backend, run};
use serde_json::{Value, json};

fn create(server: &Server, id: &str) {
    server.done(&json!({"verb": "create", "volume": id}));
}

fn ids(server: &Server) -> Value {
    server.done(&json!({"verb": "usage"}))["volumes"].take()
}

#[test]
fn a_volume_is_made_copied_listed_and_deleted() {
    on_each_backend(|server| {
        let hello = server.done(&json!({"verb": "hello"}));
        let expected = if server.pool.plain { "plain" } else { "btrfs" };
        assert_eq!(hello["backend"], expected);
        create(&server, "one");
        assert_eq!(fs::metadata(server.path("one/home")).expect("a home").uid(), 1000);
        fs::write(server.path("one/root/file"), "text").expect("a file");
        fs::write(server.path("one/home/mine"), "kept").expect("a file");

        server.done(&json!({"verb": "snapshot", "source": "one", "volume": "two"}));
        server.done(&json!({"verb": "snapshot", "source": "one", "volume": "new", "only": "root"}));
        fs::write(server.path("one/root/file"), "changed").expect("a file");
        let read = |path| fs::read_to_string(server.path(path)).expect("readable");
        assert_eq!(read("two/root/file"), "text");
        assert_eq!(read("two/home/mine"), "kept");
        assert_eq!(read("new/root/file"), "text");
        assert!(!server.path("new/home/mine").exists());
        assert_eq!(fs::metadata(server.path("new/home")).expect("a home").uid(), 1000);

        assert_eq!(ids(&server), json!(["new", "one", "two"]));
        assert_eq!(server.code(&json!({"verb": "create", "volume": "one"})), "exists");
        let again = json!({"verb": "snapshot", "source": "one", "volume": "two"});
        assert_eq!(server.code(&again), "exists");
        let absent = json!({"verb": "snapshot", "source": "none", "volume": "three"});
        assert_eq!(server.code(&absent), "not_found");
        for _ in 0..2 {
            server.done(&json!({"verb": "delete", "volume": "one"}));
        }
        assert_eq!(ids(&server), json!(["new", "two"]));
        assert_eq!(read("two/root/file"), "text");
    });
}

#[test]
fn a_read_only_snapshot_cannot_be_shifted_or_replaced() {
    on_each_backend(|server| {
        create(&server, "one");
        server.done(&json!({"verb": "snapshot", "source": "one", "volume": "kept", "readonly": true}));
        let shift = json!({"verb": "shift", "volume": "kept", "base": 200_000});
        assert_eq!(server.code(&shift), "refused");
        let replace = json!({"verb": "snapshot", "source": "one", "volume": "kept", "replace": "root"});
        assert_eq!(server.code(&replace), "refused");
        if !server.pool.plain {
            let write = fs::write(server.path("kept/root/file"), "text");
            assert_eq!(write.expect_err("read-only").kind(), ErrorKind::ReadOnlyFilesystem);
        }
        server.done(&json!({"verb": "snapshot", "source": "kept", "volume": "copy"}));
        server.done(&json!({"verb": "shift", "volume": "copy", "base": 200_000}));
        server.done(&json!({"verb": "delete", "volume": "kept"}));
    });
}

#[test]
fn a_sealed_volume_that_something_on_the_host_changed_is_not_copied_and_an_untouched_one_is() {
    on_each_backend(|server| {
        create(&server, "release");
        fs::write(server.path("release/root/program"), "good").expect("written");
        server.done(&json!({"verb": "shift", "volume": "release", "base": 200_000}));
        let seal = json!({"verb": "seal", "volume": "release"});
        server.done(&seal);
        let copies = [
            json!({"verb": "snapshot", "source": "release", "volume": "derived", "only": "root"}),
            json!({"verb": "snapshot", "source": "release", "volume": "copied"}),
            json!({"verb": "snapshot", "source": "release", "volume": "sandbox", "replace": "root"}),
        ];
        create(&server, "sandbox");
        for copy in &copies {
            server.done(copy);
        }
        // What a crash had made again is no change.
        server.done(&json!({"verb": "shift", "volume": "release", "base": 200_000}));
        server.done(&seal);
        server.done(&json!({"verb": "delete", "volume": "derived"}));
        server.done(&json!({"verb": "delete", "volume": "copied"}));
        assert_eq!(
            server.code(&json!({"verb": "shift", "volume": "release", "base": 300_000})),
            "refused"
        );
        if server.pool.plain {
            return;
        }
        let written = fs::write(server.path("release/root/program"), "evil");
        assert_eq!(written.expect_err("read-only").kind(), ErrorKind::ReadOnlyFilesystem);
        // As root on the host does it, and covers it up.
        set_readonly(&server, "release/root", false);
        fs::write(server.path("release/root/program"), "evil").expect("written");
        set_readonly(&server, "release/root", true);
        for copy in copies.iter().chain([&seal]) {
            assert_eq!(server.code(copy), "refused", "{copy}");
        }
        assert_eq!(
            fs::read_to_string(server.path("sandbox/root/program")).expect("read"),
            "good"
        );
        server.done(&json!({"verb": "delete", "volume": "release"}));
    });
}

fn set_readonly(server: &Server, tree: &str, readonly: bool) {
    let value = readonly.to_string();
    let mut btrfs = Command::new("btrfs");
    btrfs
        .args(["property", "set", "-f", "-ts"])
        .arg(server.path(tree))
        .args(["ro", &value]);
    let set = btrfs.output().expect("btrfs-progs are there");
    assert!(set.status.success(), "{set:?}");
}

#[test]
fn ids_that_are_not_one_plain_name_are_refused() {
    on_each_backend(|server| {
        create(&server, "a-good-id-0");
        create(&server, &"x".repeat(64));
        let long = "x".repeat(65);
        let bad = [
            "", ".", "..", "-a", "A", "a/b", "../a", "a\0b", "a b", "a\n", "a_b", "é", ".state", "/etc", &long,
        ];
        for id in bad {
            for verb in ["create", "delete", "usage"] {
                let request = json!({"verb": verb, "volume": id});
                assert_eq!(server.code(&request), "invalid", "{request}");
            }
            let request = json!({"verb": "snapshot", "source": id, "volume": "fine"});
            assert_eq!(server.code(&request), "invalid", "{request}");
        }
        let strange = json!({"verb": "create", "volume": "fine", "path": "/etc"});
        assert_eq!(server.code(&strange), "invalid");
        assert_eq!(ids(&server).as_array().map(Vec::len), Some(2));
    });
}

#[test]
fn a_request_over_64_kib_is_refused_and_many_small_ones_are_answered() {
    let server = Server::start(Pool::plain());
    let mut client = server.connect();
    for _ in 0..100 {
        client.say(b"{\"verb\":\"hello\"}\n");
    }
    for _ in 0..100 {
        assert_eq!(client.hear().expect("an answer")["backend"], "plain");
    }
    client.say(&vec![b' '; 65 * 1024]);
    assert_eq!(code(&client.hear().expect("an answer")), "refused");
    assert_eq!(client.hear(), None);
}

#[test]
fn another_user_is_refused() {
    let me = rustix::process::geteuid().as_raw();
    let server = Server::start_for(Pool::plain(), me + 1);
    let mut client = server.connect();
    let answer = client.ask(&json!({"verb": "create", "volume": "one"}));
    assert_eq!(code(&answer), "refused");
    assert_eq!(client.hear(), None);
    assert!(!server.path("one").exists());
    let server = Server::start_for(Pool::plain(), me);
    create(&server, "one");
}

#[test]
fn its_own_socket_is_private_and_only_one_process_serves_a_directory() {
    let server = Server::start(Pool::plain());
    create(&server, "one");
    let second = Command::new(BINARY)
        .args(["serve", "--plain", "--socket", "/nonexistent/socket", "--dir"])
        .arg(server.pool.dir())
        .output()
        .expect("it runs");
    assert!(String::from_utf8_lossy(&second.stderr).contains("another choir-volumes serves it"));

    let pool = server.kill();
    let socket = pool.beside("own");
    let mut child = Command::new(BINARY)
        .args(["serve", "--plain", "--socket"])
        .arg(&socket)
        .arg("--dir")
        .arg(pool.dir())
        .spawn()
        .expect("it starts");
    while !socket.exists() {
        assert_eq!(child.try_wait().expect("its state"), None);
        std::thread::yield_now();
    }
    assert_eq!(
        fs::metadata(&socket).expect("a socket").permissions().mode() & 0o777,
        0o600
    );
    // Bound a moment before it listens.
    while std::os::unix::net::UnixStream::connect(&socket).is_err() {
        std::thread::yield_now();
    }
    let list = Client::connect(&socket).ask(&json!({"verb": "usage"}));
    assert_eq!(list["volumes"], json!(["one"]));
    child.kill().expect("it can be killed");
    child.wait().expect("it ends");
}

#[test]
fn it_says_what_is_missing_when_it_cannot_start() {
    let said = |pool: &Pool| {
        let output = Command::new(BINARY)
            .args(["serve", "--socket", "/nonexistent/socket", "--dir"])
            .arg(pool.dir())
            .output()
            .expect("it runs");
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(said(&Pool::plain()).contains("is not on btrfs"));
}

#[test]
fn it_keeps_only_the_capabilities_it_needs() {
    let server = Server::start(Pool::plain());
    server.done(&json!({"verb": "hello"}));
    let status = fs::read_to_string(format!("/proc/{}/status", server.pid())).expect("its status");
    let field = |name: &str| {
        let line = status.lines().find(|l| l.starts_with(name)).expect("a field");
        u64::from_str_radix(line.rsplit('\t').next().expect("a value"), 16).expect("a number")
    };
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SYS_CHROOT, SYS_ADMIN, SETFCAP.
    let wanted = [0, 1, 3, 4, 18, 21, 31].iter().fold(0_u64, |set, bit| set | 1 << bit);
    assert_eq!(field("CapEff:") & !wanted, 0);
    assert_eq!(field("NoNewPrivs:"), 1);
    if rustix::process::geteuid().is_root() {
        assert_eq!(field("CapBnd:") & !wanted, 0);
        assert_eq!(field("CapEff:"), wanted);
    }
}

#[test]
fn a_replaced_root_is_never_absent_and_the_home_stays() {
    on_each_backend(|server| {
        for id in ["old", "new", "box"] {
            create(&server, id);
            fs::write(server.path(&format!("{id}/root/version")), id).expect("a file");
        }
        fs::write(server.path("box/home/mine"), "kept").expect("a file");
        let (version, stop) = (server.path("box/root/version"), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut reads = 0_u32;
                while !stop.load(Ordering::SeqCst) {
                    let text = fs::read_to_string(&version).expect("always there");
                    assert!(["old", "new", "box"].contains(&text.as_str()), "{text}");
                    reads += 1;
                }
                reads
            });
            for source in ["new", "old", "new", "old", "new"] {
                server.done(&json!({"verb": "snapshot", "source": source, "volume": "box", "replace": "root"}));
                assert_eq!(fs::read_to_string(&version).expect("readable"), source);
            }
            stop.store(true, Ordering::SeqCst);
            assert!(reader.join().expect("no read failed") > 0);
        });
        assert_eq!(fs::read_to_string(server.path("box/home/mine")).expect("kept"), "kept");
        assert!(!server.path("box/root.new").exists());
        let absent = json!({"verb": "snapshot", "source": "new", "volume": "none", "replace": "root"});
        assert_eq!(server.code(&absent), "not_found");
    });
}

#[test]
fn what_a_crash_left_is_cleared() {
    on_each_backend(|server| {
        for id in ["new", "box", "half", "gone"] {
            create(&server, id);
        }
        // What a stop in the middle of replace, create and delete leaves.
        server.done(&json!({"verb": "snapshot", "source": "new", "volume": "spare"}));
        fs::rename(server.path("spare/root"), server.path("box/root.new")).expect("moved");
        fs::rename(server.path("half"), server.path(".new-half")).expect("moved");
        fs::rename(server.path("gone"), server.path(".gone-gone")).expect("moved");
        server.done(&json!({"verb": "snapshot", "source": "new", "volume": "box", "replace": "root"}));
        server.done(&json!({"verb": "create", "volume": "half"}));
        server.done(&json!({"verb": "delete", "volume": "gone"}));
        for left in ["box/root.new", ".new-half", ".gone-gone"] {
            assert!(!server.path(left).exists(), "{left}");
        }
        fs::rename(server.path("spare/home"), server.path("box/root.new")).expect("moved");
        fs::rename(server.path("half"), server.path(".new-other")).expect("moved");
        let server = Server::start(server.kill());
        assert_eq!(ids(&server), json!(["box", "new", "spare"]));
        for left in ["box/root.new", ".new-other"] {
            assert!(!server.path(left).exists(), "{left}");
        }
    });
}

fn fill(server: &Server, path: &str, mebibytes: usize) -> Result<(), ErrorKind> {
    let bytes: Vec<u8> = (0..mebibytes << 20).map(|n| ((n * 2_654_435_761) >> 7) as u8).collect();
    let outcome = fs::File::create(server.path(path))
        .and_then(|file| std::io::Write::write_all(&mut &file, &bytes).and(file.sync_all()));
    server.commit();
    outcome.map_err(|e| e.kind())
}

fn usage(server: &Server, id: &str) -> Value {
    server.done(&json!({"verb": "usage", "volume": id}))
}

#[test]
fn a_limit_holds_for_root_and_home_together_and_deleting_frees() {
    for full in [false, true] {
        let Some(pool) = Pool::btrfs(full) else { return };
        holds_together_and_is_freed(&Server::start(pool));
    }
}

fn holds_together_and_is_freed(server: &Server) {
    create(server, "box");
    assert_eq!(fill(server, "box/home/free", 60), Ok(()), "without a limit");
    fs::remove_file(server.path("box/home/free")).expect("removed");
    server.commit();
    let limit = json!({"verb": "limit", "volume": "box", "bytes": 50 << 20});
    assert_eq!(server.done(&limit), json!({"enforced": true}));

    assert_eq!(fill(server, "box/home/big", 60), Err(ErrorKind::QuotaExceeded));
    let counted = usage(server, "box");
    assert!(counted["bytes"].as_u64().expect("bytes") <= 50 << 20, "{counted}");
    assert_eq!(counted["limit"], 50 << 20);
    assert_eq!(fill(server, "box/root/more", 10), Err(ErrorKind::QuotaExceeded));
    fs::remove_file(server.path("box/home/big")).expect("removed");
    server.commit();
    usage(server, "box");
    assert_eq!(fill(server, "box/root/more", 10), Ok(()));

    server.done(&json!({"verb": "limit", "volume": "box", "bytes": null}));
    assert_eq!(fill(server, "box/home/big", 60), Ok(()));
    assert_eq!(usage(server, "box")["limit"], Value::Null);
}

#[test]
fn limits_and_counts_survive_snapshots_replacement_and_a_restart() {
    for full in [false, true] {
        let Some(pool) = Pool::btrfs(full) else { return };
        survive(Server::start(pool));
    }
}

#[test]
fn a_limit_is_not_evaded_by_copies_of_copies() {
    let Some(pool) = Pool::btrfs(false) else { return };
    let server = Server::start(pool);
    create(&server, "box");
    for nth in 0..3 {
        server.done(&json!({"verb": "limit", "volume": "box", "bytes": 50 << 20}));
        assert_eq!(fill(&server, &format!("box/home/part{nth}"), 15), Ok(()), "{nth}");
        server.done(&json!({"verb": "snapshot", "source": "box", "volume": format!("kept{nth}"), "readonly": true}));
        server.done(&json!({"verb": "delete", "volume": "box"}));
        server.done(&json!({"verb": "snapshot", "source": format!("kept{nth}"), "volume": "box"}));
    }
    server.done(&json!({"verb": "limit", "volume": "box", "bytes": 50 << 20}));
    let counted = usage(&server, "box")["bytes"].as_u64().expect("bytes");
    assert!((45 << 20..46 << 20).contains(&counted), "{counted}");
    assert_eq!(fill(&server, "box/home/more", 15), Err(ErrorKind::QuotaExceeded));
}

fn survive(server: Server) {
    create(&server, "rel");
    assert_eq!(fill(&server, "rel/root/system", 30), Ok(()));
    server.done(&json!({"verb": "snapshot", "source": "rel", "volume": "box", "only": "root"}));
    server.done(&json!({"verb": "limit", "volume": "box", "bytes": 50 << 20}));
    server.done(&json!({"verb": "snapshot", "source": "box", "volume": "kept", "readonly": true}));
    server.done(&json!({"verb": "snapshot", "source": "rel", "volume": "box", "replace": "root"}));
    server.done(&json!({"verb": "delete", "volume": "kept"}));
    let counted = usage(&server, "box");
    let bytes = counted["bytes"].as_u64().expect("bytes");
    assert!((30 << 20..31 << 20).contains(&bytes), "{counted}");
    assert!(counted["exclusive"].as_u64().expect("bytes") < 1 << 20, "{counted}");

    let server = Server::start(server.kill());
    assert_eq!(usage(&server, "box")["limit"], 50 << 20);
    assert_eq!(fill(&server, "box/home/big", 25), Err(ErrorKind::QuotaExceeded));
    fs::remove_file(server.path("box/home/big")).expect("removed");
    assert_eq!(fill(&server, "box/home/fits", 15), Ok(()));
    server.done(&json!({"verb": "snapshot", "source": "box", "volume": "fork"}));
    assert_eq!(usage(&server, "fork")["limit"], Value::Null);
    assert_eq!(fill(&server, "fork/home/big", 60), Ok(()));
}

#[test]
fn plain_directories_say_that_a_limit_is_not_enforced() {
    let server = Server::start(Pool::plain());
    create(&server, "box");
    let limit = json!({"verb": "limit", "volume": "box", "bytes": 1});
    assert_eq!(server.done(&limit), json!({"enforced": false}));
    assert_eq!(usage(&server, "box")["enforced"], false);
}

#[test]
fn a_volume_with_subvolumes_nested_by_its_user_is_deleted_whole() {
    let Some(pool) = Pool::btrfs(false) else { return };
    let server = Server::start(pool);
    create(&server, "box");
    for nested in ["box/home/a", "box/home/a/b"] {
        let path = server.path(nested);
        run("btrfs", &["subvolume", "create", path.to_str().expect("a path")]).expect("nested");
    }
    server.done(&json!({"verb": "delete", "volume": "box"}));
    assert_eq!(ids(&server), json!([]));
    assert!(!server.path(".gone-box").exists());
}
