//! Links that let somebody register or recover: one use, an end, a kind. It must not know what a link looks like.

use choir_core::UserId;
use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, params};
use serde::Serialize;

use super::{Hash, Role, words};
use crate::audit::{self, AuditEvent};
use crate::row::{maybe_time, millis, parsed, time};
use crate::{Error, Result, Store};

words!(
    /// What a link is good for.
    InviteKind, "a kind of invite", { Claim = "claim", Invite = "invite", Recover = "recover" }
);

/// A link to be written down.
#[derive(Debug, Clone)]
pub struct NewInvite {
    pub hash: Hash,
    pub id: String,
    pub kind: InviteKind,
    pub role: Role,
    /// Whom a recovery link is for.
    pub for_user: Option<UserId>,
    pub created_by: Option<UserId>,
    pub created_at: Timestamp,
    pub expires_at: Timestamp,
}

/// A link as it is listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Invite {
    pub id: String,
    pub kind: InviteKind,
    pub role: Role,
    #[serde(skip)]
    pub for_user: Option<UserId>,
    pub created_at: Timestamp,
    pub expires_at: Timestamp,
    pub used_at: Option<Timestamp>,
}

impl Store {
    /// Writes an invite or a recovery link down.
    pub async fn add_invite(&self, new: NewInvite, event: AuditEvent) -> Result<()> {
        self.write(move |c| {
            insert(c, &new)?;
            audit::append(c, &event)
        })
        .await
    }

    /// Puts this claim in the place of every earlier one, unless there is a user: then `false`, and nothing is done.
    pub async fn replace_claim(&self, new: NewInvite, event: AuditEvent) -> Result<bool> {
        self.write(move |c| {
            let users: u32 = c.query_row("SELECT count(*) FROM users", [], |row| row.get(0))?;
            if users > 0 {
                return Ok(false);
            }
            c.execute("DELETE FROM invites WHERE kind = 'claim'", [])?;
            insert(c, &new)?;
            audit::append(c, &event)?;
            Ok(true)
        })
        .await
    }

    /// The unused, unexpired link with this hash.
    pub async fn usable_invite(&self, hash: Hash, now: Timestamp) -> Result<Option<Invite>> {
        self.read(move |c| usable(c, &hash, now)).await
    }

    /// Invites, newest first.
    pub async fn invites(&self) -> Result<Vec<Invite>> {
        self.read(|c| {
            let mut statement =
                c.prepare_cached("SELECT * FROM invites WHERE kind = 'invite' ORDER BY created_at DESC LIMIT 200")?;
            let mut rows = statement.query([])?;
            let mut found = Vec::new();
            while let Some(row) = rows.next()? {
                found.push(invite(row)?);
            }
            Ok(found)
        })
        .await
    }

    /// Takes an invite back. `NotFound` when there is none with this id.
    pub async fn delete_invite(&self, id: String, event: AuditEvent) -> Result<()> {
        self.write(
            move |c| match c.execute("DELETE FROM invites WHERE id = ?1 AND kind = 'invite'", [id])? {
                0 => Err(Error::NotFound),
                _ => audit::append(c, &event),
            },
        )
        .await
    }
}

pub(super) fn usable(c: &Connection, hash: &Hash, now: Timestamp) -> Result<Option<Invite>> {
    c.prepare_cached("SELECT * FROM invites WHERE hash = ?1 AND used_at IS NULL AND expires_at > ?2")?
        .query_row(params![hash, millis(now)], |row| Ok(invite(row)))
        .optional()?
        .transpose()
}

/// Uses the link up. `NotFound` when somebody was faster.
pub(super) fn consume(c: &Connection, hash: &Hash, by: &UserId, at: Timestamp) -> Result<()> {
    let changed = c
        .prepare_cached("UPDATE invites SET used_at = ?2, used_by = ?3 WHERE hash = ?1 AND used_at IS NULL")?
        .execute(params![hash, millis(at), by.as_str()])?;
    if changed == 1 { Ok(()) } else { Err(Error::NotFound) }
}

fn insert(c: &Connection, new: &NewInvite) -> Result<()> {
    c.prepare_cached(
        "INSERT INTO invites (hash, id, kind, role, for_user, created_by, created_at, expires_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
    )?
    .execute(params![
        new.hash,
        new.id,
        new.kind.as_str(),
        new.role.as_str(),
        new.for_user.as_ref().map(UserId::as_str),
        new.created_by.as_ref().map(UserId::as_str),
        millis(new.created_at),
        millis(new.expires_at)
    ])?;
    Ok(())
}

fn invite(row: &Row<'_>) -> Result<Invite> {
    let for_user: Option<String> = row.get("for_user")?;
    Ok(Invite {
        id: row.get("id")?,
        kind: parsed(row, "kind")?,
        role: parsed(row, "role")?,
        for_user: for_user
            .map(|id| id.parse().map_err(|_| Error::Corrupt(id)))
            .transpose()?,
        created_at: time(row, "created_at")?,
        expires_at: time(row, "expires_at")?,
        used_at: maybe_time(row, "used_at")?,
    })
}
