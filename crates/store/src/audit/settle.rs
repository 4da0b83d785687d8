//! What is found at the end of the trail when the master key is there again: rows written while it was missing are
//! named in a row of their own, and so is an end that does not prove who wrote it. It must not change any row.

use jiff::Timestamp;
use rusqlite::{Connection, params};

use super::chain::{self, ChainKey, Link, START};
use super::{AuditEvent, cut, insert};
use crate::{Result, Store};

/// The trail begins, or began without a tail.
pub(super) const BEGIN: &str = "audit.begin";
/// The trail goes on under the master key.
pub(super) const RESUME: &str = "audit.resume";
/// Of [`RESUME`]: the rows it names may be anybody's.
pub(super) const UNPROVEN: &str = "unproven";

impl Store {
    /// Says in the trail how it was found, where that needs saying. At each start with the master key, before anything
    /// else is written; does nothing without it.
    pub async fn settle_audit(&self, at: Timestamp) -> Result<()> {
        let chain = self.chain.clone();
        self.write(move |c| match chain.key() {
            Some(key) => {
                settle(c, key, Some(at))?;
                Ok(chain::link_all(c, key)?)
            }
            None => Ok(()),
        })
        .await
    }
}

/// With a time, rows without a link are nobody's; without one they are those of the commit under way.
pub(super) fn settle(c: &Connection, key: &ChainKey, at: Option<Timestamp>) -> Result<(), rusqlite::Error> {
    let newest = chain::newest(c)?;
    let head = chain::head(c)?;
    let (action, subject, outcome) = match chain::tail(c)? {
        None => (BEGIN, format!("after row {newest}"), "ok"),
        Some(tail) => {
            let linked = head.map_or(0, |head| head.id);
            let run = SealedRun::read(c, key)?;
            let fits = run.good && tail.id == linked && tail.key == run.tail;
            if !fits || (at.is_some() && newest > linked) {
                let first = if run.good { linked + 1 } else { run.first };
                (RESUME, range(first, newest.max(tail.id)), UNPROVEN)
            } else if run.first <= linked {
                (RESUME, range(run.first, linked), "ok")
            } else {
                return Ok(());
            }
        }
    };
    if outcome == UNPROVEN {
        tracing::error!(
            rows = subject,
            "audit rows were taken away, or are not proven to be ours; see `audit verify`"
        );
    }
    let event = AuditEvent {
        at: at.map_or_else(|| newest_time(c), Ok)?,
        actor: "system".into(),
        user: None,
        action,
        subject,
        outcome,
    };
    insert(c, &event, None)
}

/// How a range of rows is written down.
pub(super) fn range(first: i64, last: i64) -> String {
    format!("{first}-{last}")
}

/// The rows at the end that are linked under the tail's keys.
struct SealedRun {
    first: i64,
    /// Whether each link is right.
    good: bool,
    /// The tail's key after the last one.
    tail: chain::TailKey,
}

impl SealedRun {
    fn read(c: &Connection, key: &ChainKey) -> Result<Self, rusqlite::Error> {
        let before = "SELECT id, mac FROM audit_chain WHERE sealed = 0 ORDER BY id DESC LIMIT 1";
        let mut before = c.prepare_cached(before)?;
        let mut found = before.query([])?;
        let (from, mut link): (i64, Link) = match found.next()? {
            Some(row) => (row.get(0)?, row.get(1)?),
            None => cut::read(c)?.map_or((0, START), |cut| (cut.through, cut.link)),
        };
        let mut run = Self {
            first: from + 1,
            good: true,
            tail: key.tail(&link),
        };
        let mut statement = c.prepare_cached(
            "SELECT a.*, l.mac FROM audit_chain l JOIN audit a ON a.id = l.id WHERE l.id > ?1 ORDER BY l.id",
        )?;
        let mut rows = statement.query(params![from])?;
        while let Some(row) = rows.next()? {
            let stored: Link = row.get("mac")?;
            run.good &= run.tail.link(&link, row)? == stored;
            link = stored;
            run.tail = run.tail.next();
        }
        Ok(run)
    }
}

fn newest_time(c: &Connection) -> Result<Timestamp, rusqlite::Error> {
    let ms: i64 = c.query_row(
        "SELECT coalesce(max(at), 0) FROM audit WHERE id = (SELECT max(id) FROM audit)",
        [],
        |row| row.get(0),
    )?;
    Ok(Timestamp::from_millisecond(ms).unwrap_or_default())
}
