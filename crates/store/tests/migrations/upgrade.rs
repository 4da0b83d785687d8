//! What an upgrade makes of each database that there may be, and what it leaves alone.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use choir_store::Store;
use rusqlite::Connection;

use crate::history::{everything, is_sound, left_by, migrations, rows, schema, tables, text};

/// A grant whose secret was gone already; the fifth migration is there to remove it.
const DANGLING: &str = "grant-dangling";

fn copy_of(database: &Path, schema: usize) -> PathBuf {
    PathBuf::from(format!("{}.schema-{schema}", database.display()))
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[test]
fn every_schema_comes_to_the_present_one_with_every_row_and_a_copy_of_before() {
    let directory = tempfile::tempdir().unwrap();
    let present = migrations().len();
    let new = directory.path().join("new.db");
    drop(Store::open(&new).unwrap());
    let new = Connection::open(new).unwrap();
    for version in 1..=present {
        let path = directory.path().join(format!("{version}.db"));
        let old = left_by(&path, version);
        is_sound(&old);
        let (before, tables) = (everything(&old), tables(&old));
        let kept: Vec<_> = tables
            .iter()
            .map(|(table, columns)| (table, columns, rows(&old, table, columns)))
            .collect();
        drop(old);
        drop(Store::open(&path).unwrap());

        let after = Connection::open(&path).unwrap();
        assert_eq!(schema(&after), present, "from {version}");
        assert_eq!(
            text(&after),
            text(&new),
            "from {version}: not as in a database that was made new"
        );
        is_sound(&after);
        for (table, columns, mut wanted) in kept {
            assert!(!wanted.is_empty(), "schema {version} has no row in {table}");
            wanted.retain(|row| !row.contains(DANGLING));
            assert_eq!(rows(&after, table, columns), wanted, "from {version}: {table}");
        }
        let copy = copy_of(&path, version);
        if version == present {
            assert!(!copy.exists(), "where nothing is changed nothing is copied");
            continue;
        }
        assert_eq!(std::fs::metadata(&copy).unwrap().permissions().mode() & 0o777, 0o600);
        let copy = Connection::open(copy).unwrap();
        assert_eq!(everything(&copy), before, "the copy is what the version before left");
        // The control: a row that is missing is seen.
        after.execute("DELETE FROM recovery_tries", []).unwrap();
        let (table, columns) = tables.get_key_value("recovery_tries").unwrap();
        assert_ne!(rows(&after, table, columns), rows(&copy, table, columns));
    }
}

#[test]
fn a_grant_without_its_secret_ends_with_the_fifth_migration_and_the_others_stay() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("choir.db");
    let grants = |database: &Connection| rows(database, "grants", &["id".to_owned()]).concat();
    let before = grants(&left_by(&path, 4));
    assert!(
        before.contains(DANGLING) && before.contains("grant-standing"),
        "{before}"
    );
    drop(Store::open(&path).unwrap());
    let after = grants(&Connection::open(&path).unwrap());
    assert!(!after.contains(DANGLING) && after.contains("grant-standing"), "{after}");
}

#[test]
fn a_migration_that_fails_changes_nothing_and_is_done_once_it_can_be() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("choir.db");
    let old = left_by(&path, 7);
    // In the way of a statement in the middle of the eighth.
    old.execute_batch("CREATE TABLE new_steps (x)").unwrap();
    let before = everything(&old);
    drop(old);
    assert!(Store::open(&path).is_err());
    let tried = Connection::open(&path).unwrap();
    assert_eq!(everything(&tried), before);
    tried.execute_batch("DROP TABLE new_steps").unwrap();
    let before = everything(&tried);
    drop(tried);

    drop(Store::open(&path).unwrap());
    let after = Connection::open(&path).unwrap();
    assert_eq!(schema(&after), migrations().len());
    is_sound(&after);
    // The copy of the first try has given way to one of what there was in the end.
    assert_eq!(everything(&Connection::open(copy_of(&path, 7)).unwrap()), before);
    assert!(!names(directory.path()).iter().any(|name| name.contains(".part")));
}

#[test]
fn a_database_of_a_newer_version_is_refused_with_what_to_do_and_left_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("choir.db");
    let present = migrations().len();
    let newer = left_by(&path, present);
    newer.pragma_update(None, "user_version", present + 1).unwrap();
    let before = everything(&newer);
    drop(newer);
    let refused = Store::open(&path).unwrap_err().to_string();
    assert!(refused.contains("start the newer binary"), "{refused}");
    assert_eq!(everything(&Connection::open(&path).unwrap()), before);
    assert!(!names(directory.path()).iter().any(|name| name.contains(".schema-")));
    // The control: with the number that it had, it is opened.
    let known = Connection::open(&path).unwrap();
    known.pragma_update(None, "user_version", present).unwrap();
    drop(known);
    drop(Store::open(&path).unwrap());
}
