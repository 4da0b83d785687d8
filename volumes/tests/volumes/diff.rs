//! diff: which differences between two volumes are told, and how.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use crate::support::{Server, on_each_backend, run};

/// A volume and a read-only copy of it, `kept`, with whatever `fill` puts into its home.
fn copied(server: &Server, fill: impl Fn(&Path)) {
    server.done(&json!({"verb": "create", "volume": "box"}));
    fill(&server.path("box/home"));
    server.done(&json!({"verb": "snapshot", "source": "box", "volume": "kept", "readonly": true}));
}

fn diff(server: &Server) -> Value {
    server.done(&json!({"verb": "diff", "from": "kept", "to": "box"}))
}

fn entry(path: &str, change: &str, before: Option<u64>, after: Option<u64>) -> Value {
    json!({"path": path, "change": change, "before": before, "after": after})
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).expect("a file");
}

fn fifo(path: &Path) {
    run("mkfifo", &[path.to_str().expect("a path")]).expect("a FIFO");
}

#[test]
fn equal_volumes_differ_in_nothing() {
    on_each_backend(|server| {
        copied(&server, |home| {
            fs::create_dir_all(home.join("deep/er")).expect("directories");
            write(&home.join("deep/er/file"), "text");
            symlink("nowhere", home.join("link")).expect("a link");
            fifo(&home.join("fifo"));
        });
        let nothing = json!({
            "added": 0, "removed": 0, "changed": 0, "added_bytes": 0, "removed_bytes": 0, "truncated": false, "entries": [],
        });
        assert_eq!(diff(&server), nothing);
        // The time of a directory does not count.
        write(&server.path("box/home/deep/passing"), "");
        fs::remove_file(server.path("box/home/deep/passing")).expect("removed");
        assert_eq!(diff(&server), nothing);
        let absent = json!({"verb": "diff", "from": "kept", "to": "none"});
        assert_eq!(server.code(&absent), "not_found");
    });
}

#[test]
fn what_was_added_removed_and_changed_is_told_with_sizes_in_the_order_of_the_paths() {
    on_each_backend(|server| {
        copied(&server, |home| {
            fs::create_dir_all(home.join("gone/inner")).expect("directories");
            write(&home.join("gone/inner/file"), "12345");
            for name in ["grown", "mode", "stays", "turns"] {
                write(&home.join(name), "1234567890");
            }
            symlink("one", home.join("link")).expect("a link");
        });
        let home = server.path("box/home");
        fs::remove_dir_all(home.join("gone")).expect("removed");
        write(&home.join("grown"), "twenty bytes of text");
        fs::set_permissions(home.join("mode"), Permissions::from_mode(0o700)).expect("a mode");
        fs::remove_file(home.join("link")).expect("removed");
        symlink("two", home.join("link")).expect("a link");
        fs::remove_file(home.join("turns")).expect("removed");
        fs::create_dir(home.join("turns")).expect("a directory");
        write(&home.join("turns/into"), "123");
        fifo(&home.join("fifo"));
        write(&home.join(OsStr::from_bytes(b"a\xff\n\\b")), "1");
        write(&server.path("box/root/system"), "12");
        let told = diff(&server);
        let expected = json!([
            entry("home/a\\xff\\x0a\\x5cb", "added", None, Some(1)),
            entry("home/fifo", "added", None, Some(0)),
            entry("home/gone", "removed", Some(0), None),
            entry("home/gone/inner", "removed", Some(0), None),
            entry("home/gone/inner/file", "removed", Some(5), None),
            entry("home/grown", "changed", Some(10), Some(20)),
            entry("home/link", "changed", Some(0), Some(0)),
            entry("home/mode", "changed", Some(10), Some(10)),
            entry("home/turns", "changed", Some(10), Some(0)),
            entry("home/turns/into", "added", None, Some(3)),
            entry("root/system", "added", None, Some(2)),
        ]);
        assert_eq!(told["entries"], expected);
        let counts = ["added", "removed", "changed", "added_bytes", "removed_bytes"].map(|name| told[name].clone());
        assert_eq!(counts, [4, 3, 4, 6, 5].map(Value::from));
        assert_eq!(told["truncated"], false);
    });
}

#[test]
fn a_change_of_time_is_told_and_contents_are_not_read() {
    on_each_backend(|server| {
        let then = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        let put = |path: &Path, text: &str, time| {
            write(path, text);
            let file = File::options().write(true).open(path).expect("a file");
            file.set_modified(time).expect("a time");
        };
        copied(&server, |home| {
            put(&home.join("same"), "one", then);
            put(&home.join("later"), "one", then);
        });
        put(&server.path("box/home/same"), "two", then);
        put(&server.path("box/home/later"), "one", then + Duration::from_nanos(1000));
        let expected = json!([entry("home/later", "changed", Some(3), Some(3))]);
        assert_eq!(diff(&server)["entries"], expected);
    });
}

#[test]
fn beyond_the_most_entries_all_is_counted_and_the_first_are_told() {
    on_each_backend(|server| {
        copied(&server, |_| {});
        for nth in 0..1100 {
            write(&server.path(&format!("box/home/{nth:04}")), "12");
        }
        for (most, told) in [(json!(3), 3), (json!(0), 0), (json!(5000), 1000)] {
            let answer = server.done(&json!({"verb": "diff", "from": "kept", "to": "box", "most": most}));
            let entries = answer["entries"].as_array().expect("entries");
            assert_eq!(entries.len(), told);
            assert_eq!(answer["added"], 1100);
            assert_eq!(answer["added_bytes"], 2200);
            assert_eq!(answer["truncated"], true);
            if let Some(last) = entries.last() {
                assert_eq!(last["path"], format!("home/{:04}", told - 1));
            }
        }
    });
}

#[test]
fn below_128_directories_nothing_is_compared() {
    on_each_backend(|server| {
        copied(&server, |_| {});
        fs::create_dir_all(server.path("box/home").join("d/".repeat(200))).expect("directories");
        let answer = diff(&server);
        assert_eq!(answer["added"], 128);
        assert_eq!(answer["truncated"], true);
    });
}

#[test]
fn long_paths_make_an_answer_of_fewer_entries_not_a_longer_one() {
    on_each_backend(|server| {
        copied(&server, |_| {});
        let mut here = server.path("box/home");
        for _ in 0..30 {
            here.push("\\".repeat(100));
            fs::create_dir(&here).expect("a directory");
        }
        for nth in 0..200 {
            write(&here.join(nth.to_string()), "");
        }
        let answer = diff(&server);
        assert_eq!(answer["added"], 230);
        assert_eq!(answer["truncated"], true);
        assert!(answer.to_string().len() < 2 << 20);
        assert!(answer["entries"].as_array().is_some_and(|e| e.len() > 30));
    });
}

#[test]
fn links_out_of_a_volume_are_not_followed() {
    on_each_backend(|server| {
        let outside = server.pool.beside("outside");
        fs::create_dir(&outside).expect("a directory");
        write(&outside.join("secret"), "text");
        copied(&server, |_| {});
        symlink(&outside, server.path("box/home/link")).expect("a link");
        let expected = json!([entry("home/link", "added", None, Some(0))]);
        assert_eq!(diff(&server)["entries"], expected);
    });
}

#[test]
fn subvolumes_that_a_user_nested_are_left_out() {
    on_each_backend(|server| {
        if server.pool.plain {
            return;
        }
        let nest =
            |path: &Path| run("btrfs", &["subvolume", "create", path.to_str().expect("a path")]).expect("nested");
        copied(&server, |home| {
            nest(&home.join("before"));
        });
        nest(&server.path("box/home/after"));
        write(&server.path("box/home/after/file"), "text");
        assert_eq!(diff(&server)["entries"], json!([]));
    });
}
