//! Whether the audit trail is as it was written. It must not write or mend anything.

use std::fmt;

use rusqlite::{Connection, OptionalExtension, Row};

use super::chain::{self, AuditHead, ChainKey, Link, TailKey};
use super::cut::{self, Cut};
use super::settle::{BEGIN, RESUME, UNPROVEN, range};
use crate::{Error, Result, Store};

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditVerdict {
    /// Rows looked at: all, or those before the first bad one.
    pub rows: u64,
    /// The newest good link.
    pub head: Option<AuditHead>,
    /// Up to which row the trail was pruned; 0 when it never was.
    pub pruned: i64,
    /// First and last rows of each stretch that was written while the master key was missing. They are whole; who wrote
    /// them is not known, since somebody with the file could have added them meanwhile.
    pub sealed: Vec<(i64, i64)>,
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
    /// It has no link.
    Unlinked,
    /// It was not there, or had no good link, when the hypervisor started.
    Unproven,
    /// The trail begins anew with it, although it had begun before.
    BegunAgain,
    /// It comes after rows that were pruned by nobody we know.
    NotPruned,
    /// It is there with another link than the one that was kept elsewhere.
    NotTheHead,
}

impl fmt::Display for BadRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.fault {
            Fault::Changed => "is not as it was written",
            Fault::Missing => "is missing",
            Fault::Unlinked => "has no link",
            Fault::Unproven => "was missing or without a good link at a start of the hypervisor",
            Fault::BegunAgain => "begins the trail a second time",
            Fault::NotPruned => "comes after rows that the hypervisor did not prune",
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
            let cut = cut::read(&snapshot)?.unwrap_or(Cut::NONE);
            Walk::from(key, &cut, kept).over(&snapshot)
        })
        .await
    }
}

/// Goes through the trail row by row, oldest first.
pub(super) struct Walk<'a> {
    key: &'a ChainKey,
    kept: Option<AuditHead>,
    last: i64,
    link: Link,
    /// The tail's key after the last row.
    tail: TailKey,
    /// Whether the row that begins the trail was seen.
    begun: bool,
    /// The stretch under the tail's keys that no row has named yet, and whether it is over.
    sealed: Option<(i64, i64, bool)>,
    /// The last row up to which everything is settled, with its link: the trail may be cut behind it.
    clean: (i64, Link, bool),
    cut_is_ours: bool,
    found: AuditVerdict,
}

impl<'a> Walk<'a> {
    pub(super) fn from(key: &'a ChainKey, cut: &Cut, kept: Option<AuditHead>) -> Self {
        Self {
            key,
            kept,
            last: cut.through,
            link: cut.link,
            tail: key.tail(&cut.link),
            begun: cut.begun,
            sealed: None,
            clean: (cut.through, cut.link, cut.begun),
            cut_is_ours: cut.is_ours(key),
            found: AuditVerdict {
                rows: 0,
                head: None,
                pruned: cut.through,
                sealed: Vec::new(),
                open_intents: 0,
                bad: None,
            },
        }
    }

    fn over(mut self, c: &Connection) -> Result<AuditVerdict> {
        self.found.bad = match self.walk(c, i64::MAX)? {
            Some(bad) => Some(bad),
            None => self.end(c)?,
        };
        if self.found.bad.is_none() {
            if let Some((first, last, _)) = self.sealed {
                self.found.sealed.push((first, last));
            }
            self.found.open_intents = c.query_row(
                "SELECT count(*) FROM audit i WHERE i.outcome = ?1
                 AND NOT EXISTS (SELECT 1 FROM audit o WHERE o.intent = i.id)",
                [super::INTENT],
                |row| row.get(0),
            )?;
        }
        Ok(self.found)
    }

    /// The last row up to `last` behind which the trail may be cut, with its link and whether the trail's beginning is
    /// before; or the first bad row.
    pub(super) fn through(mut self, c: &Connection, last: i64) -> Result<Result<(i64, Link, bool), BadRow>> {
        Ok(match self.walk(c, last)? {
            Some(bad) => Err(bad),
            None => Ok(self.clean),
        })
    }

    fn walk(&mut self, c: &Connection, last: i64) -> Result<Option<BadRow>> {
        if !self.cut_is_ours {
            return Ok(bad(self.last + 1, Fault::NotPruned));
        }
        if self
            .kept
            .is_some_and(|kept| kept.id == self.last && kept.mac != self.link)
        {
            return Ok(bad(self.last, Fault::NotTheHead));
        }
        let mut statement = c.prepare(
            "SELECT a.*, l.mac, l.sealed FROM audit a LEFT JOIN audit_chain l ON l.id = a.id WHERE a.id <= ?1 ORDER BY a.id",
        )?;
        let mut rows = statement.query([last])?;
        while let Some(row) = rows.next()? {
            if let Some(bad) = self.step(row)? {
                return Ok(Some(bad));
            }
        }
        Ok(None)
    }

    /// Takes one row; says what is wrong with it, or with what should have come before it.
    fn step(&mut self, row: &Row<'_>) -> Result<Option<BadRow>> {
        let id: i64 = row.get("id")?;
        // Numbers are given without gaps, so a gap says that the break is a row taken out.
        let or_missing = |fault| match id > self.last + 1 {
            true => bad(self.last + 1, Fault::Missing),
            false => bad(id, fault),
        };
        let Some(stored) = row.get::<_, Option<Link>>("mac")? else {
            return Ok(or_missing(Fault::Unlinked));
        };
        let sealed: bool = row.get("sealed")?;
        let expected = match sealed {
            true => self.tail.link(&self.link, row)?,
            false => self.key.link(&self.link, row)?,
        };
        if stored != expected {
            return Ok(or_missing(Fault::Changed));
        }
        if self.kept.is_some_and(|kept| kept.id == id && kept.mac != stored) {
            return Ok(bad(id, Fault::NotTheHead));
        }
        let told = match sealed {
            true => self.sealed_row(id),
            false => self.settled_row(id, row)?,
        };
        if told.is_some() {
            return Ok(told);
        }
        self.tail = match sealed {
            true => self.tail.next(),
            false => self.key.tail(&stored),
        };
        (self.last, self.link) = (id, stored);
        self.found.head = Some(AuditHead { id, mac: stored });
        self.found.rows += 1;
        if self.sealed.is_none() {
            self.clean = (id, stored, self.begun);
        }
        Ok(None)
    }

    fn sealed_row(&mut self, id: i64) -> Option<BadRow> {
        self.sealed = match self.sealed {
            // The stretch before was never named: whoever added it hoped that nobody would notice.
            Some((first, _, true)) => return bad(first, Fault::Unproven),
            Some((first, _, false)) => Some((first, id, false)),
            None => Some((id, id, false)),
        };
        None
    }

    /// A row under the master key: it may say something about those before it.
    fn settled_row(&mut self, id: i64, row: &Row<'_>) -> Result<Option<BadRow>> {
        if let Some((_, _, over)) = &mut self.sealed {
            *over = true;
        }
        let (action, subject): (String, String) = (row.get("action")?, row.get("subject")?);
        if action == BEGIN {
            if self.begun {
                return Ok(bad(id, Fault::BegunAgain));
            }
            self.begun = true;
        }
        if action == RESUME {
            if row.get::<_, String>("outcome")? == UNPROVEN {
                let first = subject.split('-').next().and_then(|first| first.parse().ok());
                return Ok(bad(first.unwrap_or(id), Fault::Unproven));
            }
            if let Some((first, last, _)) = self.sealed.take_if(|(first, last, _)| range(*first, *last) == subject) {
                self.found.sealed.push((first, last));
            }
        }
        Ok(None)
    }

    /// Whether the end is where it was: the tail's key, the kept head, links without rows, and the next number all say.
    fn end(&self, c: &Connection) -> Result<Option<BadRow>> {
        if let Some((first, _, true)) = self.sealed {
            return Ok(bad(first, Fault::Unproven));
        }
        let linked: Option<i64> = c.query_row("SELECT max(id) FROM audit_chain", [], |row| row.get(0))?;
        let given: Option<i64> = c
            .query_row("SELECT seq FROM sqlite_sequence WHERE name = 'audit'", [], |row| {
                row.get(0)
            })
            .optional()?;
        let reach = [linked, given, self.kept.map(|kept| kept.id)];
        let cut = reach.into_iter().flatten().any(|reach| reach > self.last);
        let ends_here = chain::tail(c)?.is_some_and(|tail| tail.id == self.last && tail.key == self.tail);
        Ok(bad(self.last + 1, Fault::Missing).filter(|_| cut || !ends_here))
    }
}

fn bad(id: i64, fault: Fault) -> Option<BadRow> {
    Some(BadRow { id, fault })
}
