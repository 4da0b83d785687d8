//! A process that dies while it migrates. The kernel kills it at the write that would make a file longer than it may be,
//! so that every write of a migration is once the one at which it dies.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use choir_store::Store;
use rusqlite::Connection;

use crate::history::{everything, is_sound, left_by, migrate, migrations, schema};

/// Names the database to the process that is killed.
const DATABASE: &str = "CHOIR_TEST_DATABASE";
/// Has that process run the statements of the second migration one by one.
const APART: &str = "CHOIR_TEST_APART";
/// SIGXFSZ.
const FILE_TOO_LONG: i32 = 25;
/// What a limit counts in.
const BLOCK: u64 = 512;
/// Less than a page with its head in the log, so that no write is missed.
const STEP: u64 = 8;
/// Room for the index of the log, without which nothing begins.
const LEAST: u64 = 80;

/// The process that is killed: told of a database it opens that, else one of its own.
#[test]
fn a_process_that_opens_a_database_brings_it_to_the_present_schema() {
    let own = tempfile::tempdir().unwrap();
    let told = std::env::var_os(DATABASE).map(PathBuf::from);
    let path = told.unwrap_or_else(|| {
        let path = own.path().join("choir.db");
        drop(left_by(&path, 1));
        path
    });
    if std::env::var_os(APART).is_some() {
        let connection = Connection::open(&path).unwrap();
        connection.execute_batch(&migrations()[1]).unwrap();
        return;
    }
    let store = Store::open(&path).unwrap();
    assert_eq!(schema(&Connection::open(&path).unwrap()), migrations().len());
    drop(store);
}

/// Whether the process lived, whose files may be this long.
fn survives(database: &Path, blocks: u64, how: &[(&str, &str)]) -> bool {
    let limited = format!("ulimit -c 0 && ulimit -f {blocks} && exec \"$@\"");
    let test = "killed::a_process_that_opens_a_database_brings_it_to_the_present_schema";
    let output = Command::new("sh")
        .args(["-c", &limited, "sh"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(DATABASE, database)
        .envs(how.iter().copied())
        .output()
        .unwrap();
    let lived = output.status.success();
    assert!(lived || output.status.signal() == Some(FILE_TOO_LONG), "{output:?}");
    lived
}

/// The database and its log as they lie on the disk, in a directory of their own.
fn as_it_lies(database: &Path) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let copy = directory.path().join("choir.db");
    for suffix in ["", "-wal"] {
        let named = |path: &Path| {
            let mut name = OsString::from(path);
            name.push(suffix);
            PathBuf::from(name)
        };
        // A log that was emptied at the end is not there.
        if named(database).exists() {
            std::fs::copy(named(database), named(&copy)).unwrap();
        }
    }
    (directory, copy)
}

/// A database of the first schema that is in its log alone, and how long that is.
fn first_schema(directory: &Path) -> (PathBuf, Connection, u64) {
    let path = directory.join("choir.db");
    let connection = left_by(&path, 1);
    let log = std::fs::metadata(directory.join("choir.db-wal")).unwrap().len();
    (path, connection, log)
}

#[test]
fn killed_at_any_write_it_is_one_whole_schema_and_the_next_start_comes_to_the_present_one() {
    let directory = tempfile::tempdir().unwrap();
    let (path, first, log) = first_schema(directory.path());
    let present = migrations().len();
    let reference = tempfile::tempdir().unwrap();
    let reference = left_by(&reference.path().join("choir.db"), 1);
    let mut whole = vec![everything(&reference)];
    for version in 2..=present {
        migrate(&reference, version);
        whole.push(everything(&reference));
    }
    let mut found = BTreeSet::new();
    let mut blocks = LEAST;
    loop {
        let (killed, database) = as_it_lies(&path);
        let lived = survives(&database, blocks, &[]);
        let (_look, copy) = as_it_lies(&database);
        let seen = Connection::open(&copy).unwrap();
        let version = schema(&seen);
        assert_eq!(everything(&seen), whole[version - 1], "with {blocks} blocks");
        drop(Store::open(&database).unwrap());
        let after = Connection::open(&database).unwrap();
        assert_eq!(&everything(&after), whole.last().unwrap(), "with {blocks} blocks");
        is_sound(&after);
        let names = std::fs::read_dir(killed.path()).unwrap();
        for name in names.map(|entry| entry.unwrap().file_name().into_string().unwrap()) {
            assert!(!name.contains(".part"), "{name} is left over with {blocks} blocks");
        }
        if lived {
            break;
        }
        // Until the log is reached, it is the copy of before that is cut short.
        if blocks * BLOCK >= log {
            found.insert(version);
        }
        let near = (blocks + 8 * STEP) * BLOCK >= log;
        blocks += if near { STEP } else { 8 * STEP };
    }
    drop(first);
    let each: BTreeSet<_> = (1..present).collect();
    assert!(found.is_superset(&each), "it died within the migrations from {found:?}");
}

/// The control: the same kill finds statements that are not one transaction.
#[test]
fn statements_that_each_commit_leave_half_a_schema_when_they_are_killed() {
    let directory = tempfile::tempdir().unwrap();
    let (path, first, log) = first_schema(directory.path());
    let before = everything(&first).len();
    let mut blocks = log / BLOCK;
    let mut sizes = BTreeSet::new();
    loop {
        let (_killed, database) = as_it_lies(&path);
        let lived = survives(&database, blocks, &[(APART, "1")]);
        sizes.insert(everything(&Connection::open(&database).unwrap()).len());
        if lived {
            break;
        }
        blocks += STEP;
    }
    assert!(sizes.contains(&before), "killed early, nothing is there");
    assert!(sizes.len() > 2, "between nothing and all there is something: {sizes:?}");
}
