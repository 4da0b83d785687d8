//! How values are kept in columns: times as milliseconds, structures as JSON, ids as their text.

use std::str::FromStr;

use jiff::Timestamp;
use rusqlite::Row;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Error, Result};

pub(crate) fn millis(at: Timestamp) -> i64 {
    at.as_millisecond()
}

pub(crate) fn time(row: &Row<'_>, column: &str) -> Result<Timestamp> {
    time_from(row.get(column)?)
}

pub(crate) fn maybe_time(row: &Row<'_>, column: &str) -> Result<Option<Timestamp>> {
    row.get::<_, Option<i64>>(column)?.map(time_from).transpose()
}

fn time_from(ms: i64) -> Result<Timestamp> {
    Timestamp::from_millisecond(ms).map_err(|e| Error::Corrupt(e.to_string()))
}

pub(crate) fn to_json<T: Serialize>(value: &T) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::Corrupt(e.to_string()))
}

pub(crate) fn json<T: DeserializeOwned>(row: &Row<'_>, column: &str) -> Result<T> {
    serde_json::from_str(&row.get::<_, String>(column)?).map_err(|e| Error::Corrupt(format!("{column}: {e}")))
}

pub(crate) fn maybe_json<T: DeserializeOwned>(row: &Row<'_>, column: &str) -> Result<Option<T>> {
    row.get::<_, Option<String>>(column)?
        .map(|text| serde_json::from_str(&text).map_err(|e| Error::Corrupt(format!("{column}: {e}"))))
        .transpose()
}

pub(crate) fn parsed<T: FromStr>(row: &Row<'_>, column: &str) -> Result<T>
where
    T::Err: std::fmt::Display,
{
    row.get::<_, String>(column)?
        .parse()
        .map_err(|e| Error::Corrupt(format!("{column}: {e}")))
}

pub(crate) fn maybe_parsed<T: FromStr>(row: &Row<'_>, column: &str) -> Result<Option<T>>
where
    T::Err: std::fmt::Display,
{
    row.get::<_, Option<String>>(column)?
        .map(|text| text.parse().map_err(|e| Error::Corrupt(format!("{column}: {e}"))))
        .transpose()
}
