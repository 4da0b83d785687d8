//! Passkeys as opaque JSON. It must not know what is in it, only that a use may replace it.

use choir_core::UserId;
use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, params};
use serde::Serialize;

use super::Hash;
use super::sessions::{self, NewSession};
use crate::audit::{self, AuditEvent};
use crate::row::{maybe_time, millis, parsed, time};
use crate::{Error, Result, Store};

/// A passkey to be written down.
#[derive(Debug, Clone)]
pub struct NewPasskey {
    /// Credential id, base64url.
    pub id: String,
    pub name: String,
    /// Public key, counter and flags as JSON.
    pub credential: String,
}

/// A passkey as it is stored.
#[derive(Debug, Clone, Serialize)]
pub struct Passkey {
    pub id: String,
    #[serde(skip)]
    pub user: UserId,
    pub name: String,
    #[serde(skip)]
    pub credential: String,
    pub created_at: Timestamp,
    pub last_used_at: Option<Timestamp>,
}

/// A successful assertion: what to write so that an older state of the same passkey is refused next time.
#[derive(Debug, Clone)]
pub struct PasskeyUse {
    pub id: String,
    /// The credential as it was when the assertion was checked.
    pub before: String,
    pub after: String,
}

impl Store {
    pub async fn passkey(&self, id: String) -> Result<Option<Passkey>> {
        self.read(move |c| {
            c.prepare_cached("SELECT * FROM passkeys WHERE id = ?1")?
                .query_row([id], |row| Ok(passkey(row)))
                .optional()?
                .transpose()
        })
        .await
    }

    /// A user's passkeys, oldest first.
    pub async fn passkeys(&self, user: UserId) -> Result<Vec<Passkey>> {
        self.read(move |c| {
            let mut statement =
                c.prepare_cached("SELECT * FROM passkeys WHERE user_id = ?1 ORDER BY created_at, id")?;
            let mut rows = statement.query([user.as_str()])?;
            let mut found = Vec::new();
            while let Some(row) = rows.next()? {
                found.push(passkey(row)?);
            }
            Ok(found)
        })
        .await
    }

    /// Adds one to a user who proved to be there.
    pub async fn add_passkey(&self, user: UserId, new: NewPasskey, event: AuditEvent) -> Result<()> {
        self.write(move |c| {
            insert(c, &user, &new, event.at)?;
            audit::append(c, &event)
        })
        .await
    }

    /// Removes one of several. `NotFound` when the user has none with this id; `Conflict` when it is the last.
    pub async fn delete_passkey(&self, user: UserId, id: String, event: AuditEvent) -> Result<()> {
        self.write(move |c| {
            let deleted = c.execute(
                "DELETE FROM passkeys WHERE id = ?1 AND user_id = ?2",
                params![id, user.as_str()],
            )?;
            if deleted == 0 {
                return Err(Error::NotFound);
            }
            let left: u32 = c.query_row(
                "SELECT count(*) FROM passkeys WHERE user_id = ?1",
                [user.as_str()],
                |row| row.get(0),
            )?;
            if left == 0 {
                return Err(Error::Conflict(
                    "this is the last passkey; add another one before you remove it",
                ));
            }
            audit::append(c, &event)
        })
        .await
    }

    /// A login: the passkey was used, a session begins, and the one the browser had before ends. `Conflict` when the
    /// same passkey was used at the same moment.
    pub async fn login(
        &self,
        used: PasskeyUse,
        session: NewSession,
        replaces: Option<Hash>,
        event: AuditEvent,
    ) -> Result<()> {
        self.write(move |c| {
            note_use(c, &used, event.at)?;
            if let Some(hash) = replaces {
                sessions::delete(c, &hash)?;
            }
            sessions::insert(c, &session)?;
            audit::append_or_log(c, &event);
            Ok(())
        })
        .await
    }

    /// A step-up: the passkey was used, and the session's cookie is replaced. `NotFound` when the session ended.
    pub async fn step_up(&self, used: PasskeyUse, old: Hash, new: Hash, event: AuditEvent) -> Result<()> {
        self.write(move |c| {
            note_use(c, &used, event.at)?;
            let changed = c
                .prepare_cached("UPDATE sessions SET hash = ?2, verified_at = ?3, last_seen_at = ?3 WHERE hash = ?1")?
                .execute(params![old, new, millis(event.at)])?;
            if changed == 0 {
                return Err(Error::NotFound);
            }
            audit::append(c, &event)
        })
        .await
    }
}

pub(super) fn insert(c: &Connection, user: &UserId, new: &NewPasskey, at: Timestamp) -> Result<()> {
    c.prepare_cached("INSERT INTO passkeys (id, user_id, name, credential, created_at) VALUES (?1, ?2, ?3, ?4, ?5)")?
        .execute(params![new.id, user.as_str(), new.name, new.credential, millis(at)])?;
    Ok(())
}

fn note_use(c: &Connection, used: &PasskeyUse, at: Timestamp) -> Result<()> {
    let changed = c
        .prepare_cached("UPDATE passkeys SET credential = ?3, last_used_at = ?4 WHERE id = ?1 AND credential = ?2")?
        .execute(params![used.id, used.before, used.after, millis(at)])?;
    if changed == 1 {
        Ok(())
    } else {
        Err(Error::Conflict("this passkey was used at the same moment; try again"))
    }
}

fn passkey(row: &Row<'_>) -> Result<Passkey> {
    Ok(Passkey {
        id: row.get("id")?,
        user: parsed(row, "user_id")?,
        name: row.get("name")?,
        credential: row.get("credential")?,
        created_at: time(row, "created_at")?,
        last_used_at: maybe_time(row, "last_used_at")?,
    })
}
