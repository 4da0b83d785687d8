//! Retention: the oldest rows go, and a record under the chain's key says up to where, so that what is left still
//! verifies. It must not take away a row that is not as it was written, nor an intent that is open.

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, params};

use super::chain::{ChainKey, Link, START};
use super::settle::range;
use super::verify::{BadRow, Walk};
use super::{AuditEvent, INTENT, append};
use crate::row::millis;
use crate::{Error, Result, Store};

/// Up to where the trail was pruned.
pub(super) struct Cut {
    pub(super) through: i64,
    /// The link that the next row continues from.
    pub(super) link: Link,
    /// Whether the row that begins the trail is gone.
    pub(super) begun: bool,
    mac: Link,
}

impl Cut {
    /// Where a trail begins that was never pruned.
    pub(super) const NONE: Self = Self {
        through: 0,
        link: START,
        begun: false,
        mac: START,
    };

    pub(super) fn is_ours(&self, key: &ChainKey) -> bool {
        self.through == 0 || key.cut(self.through, &self.link, self.begun) == self.mac
    }
}

pub(super) fn read(c: &Connection) -> Result<Option<Cut>, rusqlite::Error> {
    c.prepare_cached("SELECT through, link, begun, mac FROM audit_cut")?
        .query_row([], |row| {
            Ok(Cut {
                through: row.get(0)?,
                link: row.get(1)?,
                begun: row.get(2)?,
                mac: row.get(3)?,
            })
        })
        .optional()
}

/// What one step of pruning did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pruned {
    /// How many rows went; 0 when none is old enough, or the master key is missing.
    Rows(u64),
    /// A row is not as it was written: it and all after it stay.
    Bad(BadRow),
}

impl Store {
    /// Takes away the oldest rows, those from before `before`, at most `most` of them, and records that. The newest row
    /// stays, and so does an open intent with all after it.
    pub async fn prune_audit(&self, before: Timestamp, most: u32, at: Timestamp) -> Result<Pruned> {
        let chain = self.chain.clone();
        self.write(move |c| match chain.key() {
            Some(key) => prune(c, key, before, most, at),
            None => Ok(Pruned::Rows(0)),
        })
        .await
    }

    /// Ends all intents that have no outcome with this one; how many there were. Only where nothing can be under way, as
    /// at the start of the only process that has intents.
    pub async fn end_open_intents(&self, at: Timestamp, outcome: &'static str) -> Result<usize> {
        let sql = format!("SELECT i.id FROM {OPEN}");
        let open: Vec<i64> = self
            .read(move |c| {
                let mut statement = c.prepare(&sql)?;
                let rows = statement.query_map(params![INTENT, i64::MAX], |row| row.get(0))?;
                Ok(rows.collect::<Result<_, _>>()?)
            })
            .await?;
        if open.is_empty() {
            return Ok(0);
        }
        self.write(move |c| {
            for intent in &open {
                super::end(c, *intent, at, outcome)?;
            }
            Ok(open.len())
        })
        .await
    }
}

/// Intents before a row without an outcome.
const OPEN: &str =
    "audit i WHERE i.outcome = ?1 AND i.id < ?2 AND NOT EXISTS (SELECT 1 FROM audit o WHERE o.intent = i.id)";

fn prune(c: &Connection, key: &ChainKey, before: Timestamp, most: u32, at: Timestamp) -> Result<Pruned> {
    let cut = read(c)?.unwrap_or(Cut::NONE);
    // Rows that are old enough are at the front; one with a later time, as after a wrong clock, keeps those after it.
    let young: Option<i64> = c
        .prepare_cached("SELECT id FROM audit WHERE at >= ?1 ORDER BY id LIMIT 1")?
        .query_row([millis(before)], |row| row.get(0))
        .optional()?;
    let newest: i64 = c.query_row("SELECT coalesce(max(id), 0) FROM audit", [], |row| row.get(0))?;
    let end = young.unwrap_or(newest).min(cut.through + 1 + i64::from(most));
    let sql = format!("SELECT min(i.id) FROM {OPEN}");
    let open: Option<i64> = c
        .prepare_cached(&sql)?
        .query_row(params![INTENT, end], |row| row.get(0))?;
    let walked = Walk::from(key, &cut, None).through(c, open.unwrap_or(end) - 1)?;
    let (through, link, begun) = match walked {
        Ok(clean) => clean,
        Err(bad) => return Ok(Pruned::Bad(bad)),
    };
    if through <= cut.through {
        return Ok(Pruned::Rows(0));
    }
    append(
        c,
        &AuditEvent {
            at,
            actor: "system".into(),
            user: None,
            action: "audit.prune",
            subject: range(cut.through + 1, through),
            outcome: "ok",
        },
    )?;
    c.prepare_cached(
        "INSERT INTO audit_cut (one, through, link, begun, mac) VALUES (1, ?1, ?2, ?3, ?4)
         ON CONFLICT DO UPDATE SET through = excluded.through, link = excluded.link, begun = excluded.begun,
                                   mac = excluded.mac",
    )?
    .execute(params![through, link, begun, key.cut(through, &link, begun)])?;
    c.prepare_cached("DELETE FROM audit_chain WHERE id <= ?1")?
        .execute([through])?;
    let gone = c
        .prepare_cached("DELETE FROM audit WHERE id <= ?1")?
        .execute([through])?;
    u64::try_from(gone)
        .map(Pruned::Rows)
        .map_err(|_| Error::Corrupt("more rows than there can be".into()))
}
