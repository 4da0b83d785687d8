//! The audit trail: metadata only, append-only, written in the same transaction as what it tells of. What may not happen
//! unrecorded is an intent first, committed before the action, and an outcome after it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use choir_core::UserId;
use jiff::Timestamp;
use rusqlite::{Connection, params};
use serde::Serialize;

use crate::row::{millis, time};
use crate::{Error, Result, Store};

mod chain;
mod cut;
mod settle;
mod verify;

pub(crate) use chain::Chain;
pub use chain::{AuditHead, NotAHead};
pub use cut::Pruned;
pub use verify::{AuditVerdict, BadRow, Fault};

/// The outcome of an action that is only intended.
const INTENT: &str = "intent";

/// One event to be recorded.
#[derive(Debug, Clone)]
pub struct AuditEvent {
    pub at: Timestamp,
    /// A user id, `system`, or `root` for somebody at the host's console.
    pub actor: String,
    /// Whose event it is: the user who may read it.
    pub user: Option<UserId>,
    /// Dotted, noun first: `session.begin`, `workspace.swap`.
    pub action: &'static str,
    /// What it was done to: an id or a name, never a secret.
    pub subject: String,
    /// `ok`, or a short code of what went wrong.
    pub outcome: &'static str,
}

/// Rings while intents cannot be written.
#[derive(Debug, Clone, Default)]
pub(crate) struct Alarm(Arc<AtomicBool>);

impl Alarm {
    pub(crate) fn note<T>(&self, recorded: Result<T>) -> Result<T> {
        // What the caller asked for wrongly is no failure of the trail.
        let failed = !matches!(recorded, Ok(_) | Err(Error::NotFound | Error::Exists));
        self.0.store(failed, Ordering::Relaxed);
        recorded
    }
}

/// The number of an audit row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct AuditId(i64);

impl fmt::Display for AuditId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One event as it is read back.
#[derive(Debug, Clone, Serialize)]
pub struct AuditRow {
    pub id: i64,
    pub at: Timestamp,
    pub actor: String,
    /// The id of the user who may read it.
    pub user: Option<String>,
    pub action: String,
    pub subject: String,
    /// `intent` while the action is only intended; its outcome is a row of its own.
    pub outcome: String,
    /// Which intent this is the outcome of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub intent: Option<i64>,
    /// How many events this row stands for, where that is not one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub times: Option<u64>,
}

/// Which events to read; newest first.
#[derive(Debug, Clone, Default)]
pub struct AuditFilter {
    /// Only this user's; `None` reads all.
    pub user: Option<UserId>,
    /// Only actions that begin with this.
    pub action: Option<String>,
    /// Only this outcome.
    pub outcome: Option<String>,
    /// Not older than this.
    pub since: Option<Timestamp>,
    /// Older than this.
    pub until: Option<Timestamp>,
    /// Only rows before this id.
    pub before: Option<i64>,
    pub limit: u32,
}

/// Appends within the caller's transaction.
pub(crate) fn append(connection: &Connection, event: &AuditEvent) -> Result<()> {
    Ok(insert(connection, event, None)?)
}

/// Appends one row that stands for several events.
pub(crate) fn append_times(connection: &Connection, event: &AuditEvent, times: u64) -> Result<()> {
    Ok(insert(connection, event, Some(times))?)
}

fn insert(connection: &Connection, event: &AuditEvent, times: Option<u64>) -> Result<(), rusqlite::Error> {
    connection
        .prepare_cached(
            "INSERT INTO audit (at, actor, user_id, action, subject, outcome, times) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )?
        .execute(params![
            millis(event.at),
            event.actor,
            event.user.as_ref().map(UserId::as_str),
            event.action,
            event.subject,
            event.outcome,
            times
        ])?;
    Ok(())
}

/// Appends, within the caller's transaction, what is about to be done.
pub(crate) fn append_intent(connection: &Connection, event: AuditEvent) -> Result<AuditId> {
    let outcome = INTENT;
    append(connection, &AuditEvent { outcome, ..event })?;
    Ok(AuditId(connection.last_insert_rowid()))
}

/// Ends an intent that has not ended.
fn end(connection: &Connection, intent: i64, at: Timestamp, outcome: &'static str) -> Result<()> {
    let added = connection
        .prepare_cached(
            "INSERT INTO audit (at, actor, user_id, action, subject, outcome, intent)
             SELECT ?2, actor, user_id, action, subject, ?3, id FROM audit WHERE id = ?1 AND outcome = ?4",
        )?
        .execute(params![intent, millis(at), outcome, INTENT])?;
    if added == 0 { Err(Error::NotFound) } else { Ok(()) }
}

/// Appends; where the trail cannot be written, the event goes to the log and the caller goes on. Only for signing in and
/// for ending sessions: neither may depend on the trail, since both are needed to mend what is wrong.
pub(crate) fn append_or_log(connection: &Connection, event: &AuditEvent) {
    if let Err(error) = append(connection, event) {
        let AuditEvent {
            actor,
            action,
            subject,
            outcome,
            ..
        } = event;
        tracing::error!(%error, actor, action, subject, outcome, "not in the audit trail, which cannot be written");
    }
}

impl Store {
    /// Records an event that changes nothing else.
    pub async fn audit(&self, event: AuditEvent) -> Result<()> {
        self.write(move |c| append(c, &event)).await
    }

    /// Records, before it is done, what is about to be done; it may be done once this has answered, and not when this
    /// fails. The event's own outcome is not used. End it with [`Self::audit_outcome`].
    pub async fn audit_intent(&self, event: AuditEvent) -> Result<AuditId> {
        let recorded = self.write(move |c| append_intent(c, event));
        self.alarm.note(recorded.await)
    }

    /// Records how an intent ended, as a row of its own. `NotFound` when there is no such intent, `Exists` when it has
    /// ended already.
    pub async fn audit_outcome(&self, intent: AuditId, at: Timestamp, outcome: &'static str) -> Result<()> {
        let recorded = self.write(move |c| end(c, intent.0, at, outcome));
        self.alarm.note(recorded.await)
    }

    /// Whether the last intent or outcome could not be written, so that what needs one is not done.
    pub fn audit_is_failing(&self) -> bool {
        self.alarm.0.load(Ordering::Relaxed)
    }

    /// Newest first.
    pub async fn audit_rows(&self, filter: AuditFilter) -> Result<Vec<AuditRow>> {
        self.read(move |c| {
            let mut statement = c.prepare_cached(
                "SELECT id, at, actor, user_id, action, subject, outcome, intent, times FROM audit
                 WHERE (?1 IS NULL OR user_id = ?1) AND (?2 IS NULL OR substr(action, 1, length(?2)) = ?2)
                   AND (?3 IS NULL OR at >= ?3) AND (?4 IS NULL OR id < ?4)
                   AND (?6 IS NULL OR at < ?6) AND (?7 IS NULL OR outcome = ?7)
                 ORDER BY id DESC LIMIT ?5",
            )?;
            let mut rows = statement.query(params![
                filter.user.as_ref().map(UserId::as_str),
                filter.action,
                filter.since.map(millis),
                filter.before,
                filter.limit,
                filter.until.map(millis),
                filter.outcome
            ])?;
            let mut found = Vec::new();
            while let Some(row) = rows.next()? {
                found.push(AuditRow {
                    id: row.get("id")?,
                    at: time(row, "at")?,
                    actor: row.get("actor")?,
                    user: row.get("user_id")?,
                    action: row.get("action")?,
                    subject: row.get("subject")?,
                    outcome: row.get("outcome")?,
                    intent: row.get("intent")?,
                    times: row.get("times")?,
                });
            }
            Ok(found)
        })
        .await
    }
}
