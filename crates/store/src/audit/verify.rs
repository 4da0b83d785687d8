//! Whether the audit trail is as it was written. It must not write or mend anything.

use std::fmt;

use rusqlite::{Connection, OptionalExtension};

use super::chain::{AuditHead, ChainKey, Link, START};
use crate::{Error, Result, Store};

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditVerdict {
    /// Rows looked at: all, or those before the first bad one.
    pub rows: u64,
    /// The newest good link.
    pub head: Option<AuditHead>,
    /// How many rows at the end have no link, because they were written while the key was missing: nothing is known
    /// about those.
    pub unlinked: u64,
    /// Intents without an outcome: what was done is not known, as after a crash.
    pub open_intents: u64,
    pub bad: Option<BadRow>,
}

/// The first row that is not as it was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadRow {
    pub id: i64,
    pub fault: Fault,
}

/// What is wrong with a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It is not what its link says, or came to another place.
    Changed,
    /// It is not there.
    Missing,
    /// Its link was taken away.
    Unlinked,
    /// It is there with another link than the one that was kept elsewhere.
    NotTheHead,
}

impl fmt::Display for BadRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.fault {
            Fault::Changed => "is not as it was written",
            Fault::Missing => "is missing",
            Fault::Unlinked => "has lost its link",
            Fault::NotTheHead => "is not the one that the given head names",
        };
        write!(f, "audit row {} {what}", self.id)
    }
}

impl Store {
    /// Checks every row against the chain under the key that was set, and, where a head was kept elsewhere, that the
    /// trail still reaches it. Other reads wait meanwhile, so this is for a process of its own.
    pub async fn verify_audit(&self, kept: Option<AuditHead>) -> Result<AuditVerdict> {
        let chain = self.chain.clone();
        self.read(move |c| {
            let key = chain
                .key()
                .ok_or(Error::Conflict("the key of the audit trail is missing"))?;
            // One transaction, so that a hypervisor that goes on writing changes nothing under way.
            let snapshot = c.unchecked_transaction()?;
            Walk::new(key, kept).over(&snapshot)
        })
        .await
    }
}

struct Walk<'a> {
    key: &'a ChainKey,
    kept: Option<AuditHead>,
    last: i64,
    link: Link,
    /// The first row without a link; only rows at the end may be so.
    unlinked_from: Option<i64>,
    found: AuditVerdict,
}

impl<'a> Walk<'a> {
    fn new(key: &'a ChainKey, kept: Option<AuditHead>) -> Self {
        Self {
            key,
            kept,
            last: 0,
            link: START,
            unlinked_from: None,
            found: AuditVerdict {
                rows: 0,
                head: None,
                unlinked: 0,
                open_intents: 0,
                bad: None,
            },
        }
    }

    fn over(mut self, c: &Connection) -> Result<AuditVerdict> {
        let mut statement =
            c.prepare("SELECT a.*, l.mac FROM audit a LEFT JOIN audit_chain l ON l.id = a.id ORDER BY a.id")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let id: i64 = row.get("id")?;
            let stored: Option<Link> = row.get("mac")?;
            if let Some(fault) = self.step(id, stored, self.key.link(&self.link, row)?) {
                self.found.bad = Some(fault);
                return Ok(self.found);
            }
        }
        self.found.bad = self.end(c)?;
        self.found.open_intents = c.query_row(
            "SELECT count(*) FROM audit i WHERE i.outcome = ?1 AND i.id NOT IN
             (SELECT intent FROM audit WHERE intent IS NOT NULL)",
            [super::INTENT],
            |row| row.get(0),
        )?;
        Ok(self.found)
    }

    /// Takes one row; says what is wrong with it, or with what should have come before it.
    fn step(&mut self, id: i64, stored: Option<Link>, expected: Link) -> Option<BadRow> {
        let bad = |id, fault| Some(BadRow { id, fault });
        match stored {
            Some(_) if self.unlinked_from.is_some() => {
                return self.unlinked_from.and_then(|id| bad(id, Fault::Unlinked));
            }
            // Numbers are given without gaps, so a gap says that the break is a row taken out.
            Some(link) if link != expected && id > self.last + 1 => return bad(self.last + 1, Fault::Missing),
            Some(link) if link != expected => return bad(id, Fault::Changed),
            Some(link) => {
                self.link = link;
                self.found.head = Some(AuditHead { id, mac: link });
            }
            None => {
                self.unlinked_from.get_or_insert(id);
                self.found.unlinked += 1;
            }
        }
        if self.kept.is_some_and(|kept| kept.id == id && Some(kept.mac) != stored) {
            return bad(id, Fault::NotTheHead);
        }
        self.last = id;
        self.found.rows += 1;
        None
    }

    /// Whether rows were cut off the end: the kept head, links without rows, and the next number all reach further.
    fn end(&self, c: &Connection) -> Result<Option<BadRow>> {
        let linked: Option<i64> = c.query_row("SELECT max(id) FROM audit_chain", [], |row| row.get(0))?;
        let given: Option<i64> = c
            .query_row("SELECT seq FROM sqlite_sequence WHERE name = 'audit'", [], |row| {
                row.get(0)
            })
            .optional()?;
        let reach = [linked, given, self.kept.map(|kept| kept.id)]
            .into_iter()
            .flatten()
            .max();
        Ok(reach.filter(|reach| *reach > self.last).map(|_| BadRow {
            id: self.last + 1,
            fault: Fault::Missing,
        }))
    }
}
