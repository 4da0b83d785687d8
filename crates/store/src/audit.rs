//! The audit trail: metadata only, append-only, written in the same transaction as what it tells of.

use choir_core::UserId;
use jiff::Timestamp;
use rusqlite::{Connection, params};
use serde::Serialize;

use crate::row::{millis, time};
use crate::{Result, Store};

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

/// One event as it is read back.
#[derive(Debug, Clone, Serialize)]
pub struct AuditRow {
    pub id: i64,
    pub at: Timestamp,
    pub actor: String,
    pub action: String,
    pub subject: String,
    pub outcome: String,
}

/// Which events to read; newest first.
#[derive(Debug, Clone, Default)]
pub struct AuditFilter {
    /// Only this user's; `None` reads all.
    pub user: Option<UserId>,
    /// Only actions that begin with this.
    pub action: Option<String>,
    pub since: Option<Timestamp>,
    /// Only rows before this id.
    pub before: Option<i64>,
    pub limit: u32,
}

/// Appends within the caller's transaction.
pub(crate) fn append(connection: &Connection, event: &AuditEvent) -> Result<()> {
    connection
        .prepare_cached(
            "INSERT INTO audit (at, actor, user_id, action, subject, outcome) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        )?
        .execute(params![
            millis(event.at),
            event.actor,
            event.user.as_ref().map(UserId::as_str),
            event.action,
            event.subject,
            event.outcome
        ])?;
    Ok(())
}

impl Store {
    /// Records an event that changes nothing else.
    pub async fn audit(&self, event: AuditEvent) -> Result<()> {
        self.write(move |c| append(c, &event)).await
    }

    pub async fn audit_rows(&self, filter: AuditFilter) -> Result<Vec<AuditRow>> {
        self.read(move |c| {
            let mut statement = c.prepare_cached(
                "SELECT id, at, actor, action, subject, outcome FROM audit
                 WHERE (?1 IS NULL OR user_id = ?1) AND (?2 IS NULL OR substr(action, 1, length(?2)) = ?2)
                   AND (?3 IS NULL OR at >= ?3) AND (?4 IS NULL OR id < ?4)
                 ORDER BY id DESC LIMIT ?5",
            )?;
            let mut rows = statement.query(params![
                filter.user.as_ref().map(UserId::as_str),
                filter.action,
                filter.since.map(millis),
                filter.before,
                filter.limit
            ])?;
            let mut found = Vec::new();
            while let Some(row) = rows.next()? {
                found.push(AuditRow {
                    id: row.get("id")?,
                    at: time(row, "at")?,
                    actor: row.get("actor")?,
                    action: row.get("action")?,
                    subject: row.get("subject")?,
                    outcome: row.get("outcome")?,
                });
            }
            Ok(found)
        })
        .await
    }
}
