//! Recovery: codes that work once, the hourly limit of tries, and what follows. It must not know how codes look.

use choir_core::UserId;
use jiff::Timestamp;
use rusqlite::{Connection, params};

use super::invites::{self, InviteKind};
use super::sessions::{self, NewSession, SessionKind};
use super::users::by_name;
use super::{Hash, NewPasskey, User, passkeys};
use crate::audit::{self, AuditEvent};
use crate::row::millis;
use crate::{Error, Result, Store};

/// How many tries are evaluated in `WINDOW_MS` for one name.
const TRIES: u32 = 10;
pub(super) const WINDOW_MS: i64 = 60 * 60 * 1000;

/// One try to recover an account. The session's user is filled in by who is found.
#[derive(Debug, Clone)]
pub enum RecoveryTry {
    /// A name as it was typed, and the keyed hash of a code.
    Code { name: String, hash: Hash },
    /// The hash of a recovery link.
    Link { hash: Hash },
}

/// Parts of the session that a successful try begins.
#[derive(Debug, Clone)]
pub struct RecoverySession {
    pub hash: Hash,
    pub id: String,
    pub user_agent: String,
    pub expires_at: Timestamp,
}

impl Store {
    /// Evaluates one try and, when it is right, uses the code or link up and begins a recovery session. `None` is
    /// every other case, the hourly limit included; for a name nobody has, the same work is done.
    pub async fn recover(&self, with: RecoveryTry, session: RecoverySession, at: Timestamp) -> Result<Option<User>> {
        self.write(move |c| {
            let found = match &with {
                RecoveryTry::Code { name, hash } => by_code(c, name, hash, at)?,
                RecoveryTry::Link { hash } => by_link(c, hash, at)?,
            };
            let Some(user) = found else { return Ok(None) };
            sessions::insert(
                c,
                &NewSession {
                    hash: session.hash,
                    id: session.id,
                    user: user.id.clone(),
                    kind: SessionKind::Recovery,
                    user_agent: session.user_agent,
                    created_at: at,
                    expires_at: session.expires_at,
                    verified_at: None,
                },
            )?;
            append(c, &user.id, "recovery.begin", at)?;
            Ok(Some(user))
        })
        .await
    }

    /// The end of a recovery: a new passkey, every session and token of before dead, one full session.
    pub async fn finish_recovery(
        &self,
        user: UserId,
        new: NewPasskey,
        session: NewSession,
        at: Timestamp,
    ) -> Result<()> {
        self.write(move |c| {
            passkeys::insert(c, &user, &new, at)?;
            c.execute(
                "UPDATE users SET auth_epoch = auth_epoch + 1 WHERE id = ?1",
                [user.as_str()],
            )?;
            c.execute("DELETE FROM sessions WHERE user_id = ?1", [user.as_str()])?;
            c.execute("DELETE FROM tokens WHERE user_id = ?1", [user.as_str()])?;
            sessions::insert(c, &session)?;
            append(c, &user, "recovery.finish", at)
        })
        .await
    }

    /// Puts new codes in the place of all old ones.
    pub async fn replace_recovery_codes(&self, user: UserId, hashes: Vec<Hash>, event: AuditEvent) -> Result<()> {
        self.write(move |c| {
            replace_codes(c, &user, &hashes)?;
            audit::append(c, &event)
        })
        .await
    }

    /// How many of a user's codes were not used.
    pub async fn recovery_codes_left(&self, user: UserId) -> Result<u32> {
        self.read(move |c| {
            let sql = "SELECT count(*) FROM recovery_codes WHERE user_id = ?1 AND used_at IS NULL";
            Ok(c.query_row(sql, [user.as_str()], |row| row.get(0))?)
        })
        .await
    }
}

pub(super) fn replace_codes(c: &Connection, user: &UserId, hashes: &[Hash]) -> Result<()> {
    c.execute("DELETE FROM recovery_codes WHERE user_id = ?1", [user.as_str()])?;
    let mut insert = c.prepare_cached("INSERT INTO recovery_codes (user_id, hash) VALUES (?1, ?2)")?;
    for hash in hashes {
        insert.execute(params![user.as_str(), hash])?;
    }
    Ok(())
}

fn by_code(c: &Connection, name: &str, hash: &Hash, at: Timestamp) -> Result<Option<User>> {
    let tries: u32 = c
        .prepare_cached("SELECT count(*) FROM recovery_tries WHERE name = ?1 AND at > ?2")?
        .query_row(params![name, millis(at) - WINDOW_MS], |row| row.get(0))?;
    if tries >= TRIES {
        return Ok(None);
    }
    c.prepare_cached("INSERT INTO recovery_tries (name, at) VALUES (?1, ?2)")?
        .execute(params![name, millis(at)])?;
    let user = by_name(c, name)?;
    let id = user.as_ref().map_or("", |user| user.id.as_str());
    let used = c
        .prepare_cached("UPDATE recovery_codes SET used_at = ?3 WHERE user_id = ?1 AND hash = ?2 AND used_at IS NULL")?
        .execute(params![id, hash, millis(at)])?;
    match user {
        Some(user) if used == 1 => Ok(Some(user)),
        Some(user) => {
            append_outcome(c, &user.id, "recovery.begin", "refused", at)?;
            Ok(None)
        }
        None => Ok(None),
    }
}

fn by_link(c: &Connection, hash: &Hash, at: Timestamp) -> Result<Option<User>> {
    let Some(invite) = invites::usable(c, hash, at)?.filter(|i| i.kind == InviteKind::Recover) else {
        return Ok(None);
    };
    let id = invite
        .for_user
        .ok_or_else(|| Error::Corrupt("a recovery link for nobody".into()))?;
    invites::consume(c, hash, &id, at)?;
    super::users::by_id(c, &id)
}

fn append(c: &Connection, user: &UserId, action: &'static str, at: Timestamp) -> Result<()> {
    append_outcome(c, user, action, "ok", at)
}

fn append_outcome(
    c: &Connection,
    user: &UserId,
    action: &'static str,
    outcome: &'static str,
    at: Timestamp,
) -> Result<()> {
    let event = AuditEvent {
        at,
        actor: user.to_string(),
        user: Some(user.clone()),
        action,
        subject: user.to_string(),
        outcome,
    };
    audit::append(c, &event)
}
