//! Sessions of browsers, and the cookies of sandbox hosts that hang on them. It must not know cookies or idle rules.

use choir_core::UserId;
use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::users::user;
use super::{Hash, User, words};
use crate::audit::{self, AuditEvent};
use crate::row::{maybe_time, millis, parsed, time};
use crate::{Error, Result, Store};

words!(
    /// What a session may do: everything, or register one passkey.
    SessionKind, "a kind of session", { Full = "full", Recovery = "recovery" }
);

/// A session to be written down.
#[derive(Debug, Clone)]
pub struct NewSession {
    pub hash: Hash,
    pub id: String,
    pub user: UserId,
    pub kind: SessionKind,
    pub user_agent: String,
    pub created_at: Timestamp,
    /// Its absolute end.
    pub expires_at: Timestamp,
    pub verified_at: Option<Timestamp>,
}

/// A session as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    pub hash: Hash,
    pub id: String,
    pub kind: SessionKind,
    pub user_agent: String,
    pub created_at: Timestamp,
    pub last_seen_at: Timestamp,
    pub expires_at: Timestamp,
    pub verified_at: Option<Timestamp>,
}

const WITH_USER: &str = "SELECT s.hash AS s_hash, s.id AS s_id, s.kind AS s_kind, s.user_agent, s.last_seen_at,
    s.created_at AS s_created_at, s.expires_at, s.verified_at, u.*
    FROM sessions s JOIN users u ON u.id = s.user_id AND u.auth_epoch = s.auth_epoch";

impl Store {
    /// The session with this hash and its user, whatever its age; `None` also when the user's epoch has moved on.
    pub async fn session(&self, hash: Hash) -> Result<Option<(Session, User)>> {
        self.read(move |c| {
            c.prepare_cached(&format!("{WITH_USER} WHERE s.hash = ?1"))?
                .query_row([hash], |row| Ok(with_user(row)))
                .optional()?
                .transpose()
        })
        .await
    }

    /// A user's sessions, the last used first.
    pub async fn sessions(&self, of: UserId) -> Result<Vec<Session>> {
        self.read(move |c| {
            let mut statement =
                c.prepare_cached(&format!("{WITH_USER} WHERE u.id = ?1 ORDER BY s.last_seen_at DESC"))?;
            let mut rows = statement.query([of.as_str()])?;
            let mut found = Vec::new();
            while let Some(row) = rows.next()? {
                found.push(with_user(row)?.0);
            }
            Ok(found)
        })
        .await
    }

    /// Notes when a session was last used; never moves it back.
    pub async fn touch_session(&self, id: String, at: Timestamp) -> Result<()> {
        self.write(move |c| {
            c.prepare_cached("UPDATE sessions SET last_seen_at = ?2 WHERE id = ?1 AND last_seen_at < ?2")?
                .execute(params![id, millis(at)])?;
            Ok(())
        })
        .await
    }

    /// Ends one of a user's sessions. `NotFound` when the user has none with this id.
    pub async fn end_session(&self, of: UserId, id: String, event: AuditEvent) -> Result<()> {
        self.write(move |c| {
            match c.execute(
                "DELETE FROM sessions WHERE id = ?1 AND user_id = ?2",
                params![id, of.as_str()],
            )? {
                0 => Err(Error::NotFound),
                _ => {
                    audit::append_or_log(c, &event);
                    Ok(())
                }
            }
        })
        .await
    }

    /// Ends all of a user's sessions but the one with this id.
    pub async fn end_other_sessions(&self, of: UserId, keep: String, event: AuditEvent) -> Result<()> {
        self.write(move |c| {
            c.execute(
                "DELETE FROM sessions WHERE user_id = ?1 AND id <> ?2",
                params![of.as_str(), keep],
            )?;
            audit::append_or_log(c, &event);
            Ok(())
        })
        .await
    }

    /// Forgets what nothing can use any more: sessions and tokens past their end or idle since before `idle_before`,
    /// links past their end, and tries older than an hour.
    pub async fn sweep_auth(&self, now: Timestamp, idle_before: Timestamp) -> Result<()> {
        self.write(move |c| {
            let now = millis(now);
            c.execute(
                "DELETE FROM sessions WHERE expires_at <= ?1 OR last_seen_at <= ?2",
                params![now, millis(idle_before)],
            )?;
            c.execute("DELETE FROM tokens WHERE expires_at <= ?1", [now])?;
            c.execute("DELETE FROM invites WHERE expires_at <= ?1 AND used_at IS NULL", [now])?;
            c.execute(
                "DELETE FROM recovery_tries WHERE at <= ?1",
                [now - super::recovery::WINDOW_MS],
            )?;
            Ok(())
        })
        .await
    }

    /// Writes down the cookie of one sandbox host. `NotFound` when the session ended.
    pub async fn add_host_session(&self, hash: Hash, session_id: String, host: String, at: Timestamp) -> Result<()> {
        self.write(move |c| {
            let added = c
                .prepare_cached(
                    "INSERT INTO host_sessions (hash, session_id, host, created_at)
                     SELECT ?1, id, ?3, ?4 FROM sessions WHERE id = ?2",
                )?
                .execute(params![hash, session_id, host, millis(at)])?;
            if added == 1 { Ok(()) } else { Err(Error::NotFound) }
        })
        .await
    }

    /// The session behind the cookie of one sandbox host.
    pub async fn host_session(&self, hash: Hash, host: String) -> Result<Option<(Session, User)>> {
        self.read(move |c| {
            c.prepare_cached(&format!(
                "{WITH_USER} JOIN host_sessions h ON h.session_id = s.id WHERE h.hash = ?1 AND h.host = ?2"
            ))?
            .query_row(params![hash, host], |row| Ok(with_user(row)))
            .optional()?
            .transpose()
        })
        .await
    }
}

pub(super) fn insert(c: &Connection, new: &NewSession) -> Result<()> {
    c.prepare_cached(
        "INSERT INTO sessions
           (hash, id, user_id, kind, auth_epoch, user_agent, created_at, last_seen_at, expires_at, verified_at)
         SELECT ?1, ?2, id, ?4, auth_epoch, ?5, ?6, ?6, ?7, ?8 FROM users WHERE id = ?3",
    )?
    .execute(params![
        new.hash,
        new.id,
        new.user.as_str(),
        new.kind.as_str(),
        new.user_agent,
        millis(new.created_at),
        millis(new.expires_at),
        new.verified_at.map(millis)
    ])?;
    Ok(())
}

pub(super) fn delete(c: &Connection, hash: &Hash) -> Result<()> {
    c.prepare_cached("DELETE FROM sessions WHERE hash = ?1")?
        .execute([hash])?;
    Ok(())
}

fn with_user(row: &Row<'_>) -> Result<(Session, User)> {
    let session = Session {
        hash: row.get("s_hash")?,
        id: row.get("s_id")?,
        kind: parsed(row, "s_kind")?,
        user_agent: row.get("user_agent")?,
        created_at: time(row, "s_created_at")?,
        last_seen_at: time(row, "last_seen_at")?,
        expires_at: time(row, "expires_at")?,
        verified_at: maybe_time(row, "verified_at")?,
    };
    Ok((session, user(row)?))
}
