//! Databases as earlier versions left them, and all that is in one. It must not know how the store migrates.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rusqlite::Connection;
use rusqlite::types::Value;

/// What each schema's version of the program wrote, the first schema's first. Each has the rows that its schema made
/// possible, so that every table of every schema has one.
const ROWS: [&str; 10] = [
    include_str!("rows/0001.sql"),
    include_str!("rows/0002.sql"),
    include_str!("rows/0003.sql"),
    include_str!("rows/0004.sql"),
    include_str!("rows/0005.sql"),
    include_str!("rows/0006.sql"),
    include_str!("rows/0007.sql"),
    include_str!("rows/0008.sql"),
    include_str!("rows/0009.sql"),
    include_str!("rows/0010.sql"),
];

/// The migrations as they are in the source, in order.
pub fn migrations() -> Vec<String> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/migrations");
    let mut files: Vec<PathBuf> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    let all: Vec<_> = files
        .iter()
        .map(|file| std::fs::read_to_string(file).unwrap())
        .collect();
    assert_eq!(all.len(), ROWS.len(), "a new schema needs rows that its version writes");
    all
}

/// A database with this schema and the rows that all versions up to it wrote. What was written is in the write-ahead log
/// until the connection is dropped.
pub fn left_by(path: &Path, schema: usize) -> Connection {
    let private = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    drop(private.unwrap());
    let connection = Connection::open(path).unwrap();
    connection
        .execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = OFF; PRAGMA wal_autocheckpoint = 0;
             PRAGMA foreign_keys = ON;",
        )
        .unwrap();
    for (number, rows) in (1..=schema).zip(ROWS) {
        migrate(&connection, number);
        connection.execute_batch(&format!("BEGIN; {rows} COMMIT;")).unwrap();
    }
    connection
}

/// From the schema before to this one.
pub fn migrate(connection: &Connection, schema: usize) {
    let sql = &migrations()[schema - 1];
    let whole = format!("BEGIN; {sql}\nPRAGMA user_version = {schema}; COMMIT;");
    connection.execute_batch(&whole).unwrap();
}

pub fn schema(connection: &Connection) -> usize {
    connection
        .query_row("PRAGMA user_version", [], |row| row.get(0))
        .unwrap()
}

/// The tables with their columns.
pub fn tables(connection: &Connection) -> BTreeMap<String, Vec<String>> {
    let names = texts(connection, "SELECT name FROM sqlite_schema WHERE type = 'table'");
    names
        .into_iter()
        .map(|table| {
            let columns = texts(connection, &format!("SELECT name FROM pragma_table_info('{table}')"));
            (table, columns)
        })
        .collect()
}

/// These columns of all rows of a table, a row a line, in an order of their own.
pub fn rows(connection: &Connection, table: &str, columns: &[String]) -> Vec<String> {
    let select = format!("SELECT \"{}\" FROM \"{table}\"", columns.join("\", \""));
    let mut statement = connection.prepare(&select).unwrap();
    let lines = statement.query_map([], |row| {
        let values = (0..columns.len()).map(|column| row.get::<_, Value>(column));
        values
            .collect::<rusqlite::Result<Vec<_>>>()
            .map(|values| format!("{values:?}"))
    });
    let mut lines: Vec<String> = lines.unwrap().map(Result::unwrap).collect();
    lines.sort();
    lines
}

/// How the tables, indexes and triggers are made.
pub fn text(connection: &Connection) -> Vec<String> {
    texts(
        connection,
        "SELECT type || ' ' || name || ': ' || coalesce(sql, 'by itself') FROM sqlite_schema ORDER BY type, name",
    )
}

/// All that is in it: the number of its schema, how that is made, and every row.
pub fn everything(connection: &Connection) -> Vec<String> {
    let mut all = vec![schema(connection).to_string()];
    all.extend(text(connection));
    for (table, columns) in tables(connection) {
        let rows = rows(connection, &table, &columns);
        all.extend(rows.iter().map(|row| format!("{table} {row}")));
    }
    all
}

/// Panics where a page, an index or a reference is not as it should be.
pub fn is_sound(connection: &Connection) {
    assert_eq!(texts(connection, "PRAGMA integrity_check"), ["ok"]);
    let mut dangling = connection.prepare("PRAGMA foreign_key_check").unwrap();
    assert!(!dangling.exists([]).unwrap(), "a row names one that is not there");
}

fn texts(connection: &Connection, sql: &str) -> Vec<String> {
    let mut statement = connection.prepare(sql).unwrap();
    let texts = statement.query_map([], |row| row.get(0)).unwrap();
    texts.map(Result::unwrap).collect()
}
