//! Every row of an instance's database, for comparing before and after. It must not know what the rows mean.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, ensure};
use rusqlite::types::ValueRef;
use rusqlite::{Connection, OpenFlags, Transaction};

/// When something was last used, which changes by looking; every other column is compared.
const TIMES_OF_USE: [(&str, &str); 2] = [("sessions", "last_seen_at"), ("tokens", "last_used_at")];

/// Rows by table, each as `column=value, …`, sorted.
#[derive(Debug, PartialEq, Eq)]
pub struct Dump(BTreeMap<String, Vec<String>>);

impl Dump {
    /// Everything in a database as of one moment.
    pub fn of(path: &Path) -> Result<Self> {
        let mut connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        let moment = connection.transaction()?;
        let tables: Vec<String> = {
            let mut asked = moment.prepare("SELECT name FROM sqlite_schema WHERE type = 'table'")?;
            asked.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?
        };
        ensure!(tables.len() > 10, "{} has only {tables:?}", path.display());
        let mut dump = BTreeMap::new();
        for table in tables {
            let rows = rows(&moment, &table)?;
            dump.insert(table, rows);
        }
        Ok(Self(dump))
    }

    /// Fails with the rows that only one of the two has.
    pub fn same_as(&self, before: &Self) -> Result<()> {
        for (table, rows) in &self.0 {
            let earlier = before.0.get(table).map(Vec::as_slice).unwrap_or_default();
            let new: Vec<_> = rows.iter().filter(|row| !earlier.contains(row)).collect();
            let gone: Vec<_> = earlier.iter().filter(|row| !rows.contains(row)).collect();
            ensure!(
                new.is_empty() && gone.is_empty(),
                "{table} changed:\nnew: {new:#?}\ngone: {gone:#?}"
            );
        }
        ensure!(self == before, "a table or a duplicate row came or went");
        Ok(())
    }
}

fn rows(moment: &Transaction<'_>, table: &str) -> Result<Vec<String>> {
    let mut asked = moment.prepare(&format!("SELECT * FROM \"{table}\""))?;
    let columns: Vec<String> = asked.column_names().map(str::to_owned).collect();
    let mut found = asked.query([])?;
    let mut rows = Vec::new();
    while let Some(row) = found.next()? {
        let mut shown = Vec::new();
        for (index, column) in columns.iter().enumerate() {
            if !TIMES_OF_USE.contains(&(table, column)) {
                shown.push(format!("{column}={}", show(row.get_ref(index)?)));
            }
        }
        rows.push(shown.join(", "));
    }
    rows.sort();
    Ok(rows)
}

fn show(value: ValueRef<'_>) -> String {
    match value {
        ValueRef::Text(text) => String::from_utf8_lossy(text).into_owned(),
        other => format!("{other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dump_after(change: &str) -> Dump {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("db");
        let tables: String = (0..11).map(|i| format!("CREATE TABLE t{i} (a, b BLOB);")).collect();
        let connection = Connection::open(&path).unwrap();
        connection
            .execute_batch(&format!(
                "{tables} CREATE TABLE sessions (id, last_seen_at);
                 INSERT INTO sessions VALUES ('s', 1); INSERT INTO t0 VALUES (1, x'00');"
            ))
            .unwrap();
        connection.execute_batch(change).unwrap();
        Dump::of(&path).unwrap()
    }

    #[test]
    fn one_changed_value_in_any_table_is_seen() {
        let before = dump_after("");
        dump_after("").same_as(&before).unwrap();
        for change in [
            "UPDATE t0 SET b = x'01'",
            "UPDATE t0 SET a = '1'",
            "INSERT INTO t10 VALUES (NULL, NULL)",
            "INSERT INTO t0 SELECT * FROM t0",
            "DELETE FROM t0",
            "DROP TABLE t3",
        ] {
            assert!(dump_after(change).same_as(&before).is_err(), "{change}");
        }
    }

    #[test]
    fn a_time_of_use_is_no_change() {
        dump_after("UPDATE sessions SET last_seen_at = 2")
            .same_as(&dump_after(""))
            .unwrap();
    }
}
