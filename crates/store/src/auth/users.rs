//! Users, and the one transaction that makes one. It must not know how a passkey or an invite is checked.

use choir_core::{IdRange, Name, UserId};
use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::invites::{self, InviteKind};
use super::{Hash, NewPasskey, NewSession, passkeys, recovery, sessions, words};
use crate::audit::{self, AuditEvent};
use crate::row::{millis, parsed, time};
use crate::{Error, Result, Store};

words!(
    /// What a user may do on this box.
    Role, "a role", { Admin = "admin", Member = "member" }
);

/// A person with an account on this box.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub id: UserId,
    pub name: Name,
    pub display_name: String,
    pub role: Role,
    pub id_range: IdRange,
    pub created_at: Timestamp,
}

/// Everything that comes into being with a new user.
#[derive(Debug)]
pub struct Registration {
    pub at: Timestamp,
    pub id: UserId,
    pub name: Name,
    pub display_name: String,
    /// Hash of the claim or invite. `None` is for a box with open registration, and never makes the first user.
    pub invite: Option<Hash>,
    pub passkey: NewPasskey,
    pub recovery_codes: Vec<Hash>,
    pub session: NewSession,
}

impl Store {
    /// Makes the user with passkey, codes and first session, and uses the invite up, all or nothing. `NotFound`: the
    /// invite is not (or no longer) good for this; `Exists`: the name or the passkey is taken.
    pub async fn register(&self, new: Registration) -> Result<User> {
        self.write(move |c| register(c, &new)).await
    }

    pub async fn has_users(&self) -> Result<bool> {
        self.read(|c| Ok(count(c)? > 0)).await
    }

    pub async fn users(&self) -> Result<Vec<User>> {
        self.read(|c| {
            let mut statement = c.prepare_cached("SELECT * FROM users ORDER BY name")?;
            let mut rows = statement.query([])?;
            let mut found = Vec::new();
            while let Some(row) = rows.next()? {
                found.push(user(row)?);
            }
            Ok(found)
        })
        .await
    }

    pub async fn user_by_id(&self, id: UserId) -> Result<Option<User>> {
        self.read(move |c| by_id(c, &id)).await
    }

    pub async fn user_by_name(&self, name: Name) -> Result<Option<User>> {
        self.read(move |c| by_name(c, name.as_str())).await
    }
}

fn register(c: &Connection, new: &Registration) -> Result<User> {
    let role = role_for(c, new)?;
    if by_name(c, new.name.as_str())?.is_some() {
        return Err(Error::Exists);
    }
    // Users are never deleted, so the next number was never given out.
    let range: u32 = c.query_row("SELECT coalesce(max(id_range) + 1, 0) FROM users", [], |row| row.get(0))?;
    c.prepare_cached(
        "INSERT INTO users (id, name, display_name, role, id_range, created_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
    )?
    .execute(params![
        new.id.as_str(),
        new.name.as_str(),
        new.display_name,
        role.as_str(),
        range,
        millis(new.at)
    ])?;
    passkeys::insert(c, &new.id, &new.passkey, new.at)?;
    recovery::replace_codes(c, &new.id, &new.recovery_codes)?;
    if let Some(hash) = &new.invite {
        invites::consume(c, hash, &new.id, new.at)?;
    }
    sessions::insert(c, &new.session)?;
    audit::append(
        c,
        &AuditEvent {
            at: new.at,
            actor: new.id.to_string(),
            user: Some(new.id.clone()),
            action: "user.register",
            subject: new.id.to_string(),
            outcome: "ok",
        },
    )?;
    by_id(c, &new.id)?.ok_or(Error::NotFound)
}

/// A claim is good for the first user only, and nothing else is.
fn role_for(c: &Connection, new: &Registration) -> Result<Role> {
    let first = count(c)? == 0;
    let Some(hash) = &new.invite else {
        return if first { Err(Error::NotFound) } else { Ok(Role::Member) };
    };
    let invite = invites::usable(c, hash, new.at)?.ok_or(Error::NotFound)?;
    match (invite.kind, first) {
        (InviteKind::Claim, true) | (InviteKind::Invite, false) => Ok(invite.role),
        _ => Err(Error::NotFound),
    }
}

fn count(c: &Connection) -> Result<u32> {
    Ok(c.query_row("SELECT count(*) FROM users", [], |row| row.get(0))?)
}

pub(super) fn by_id(c: &Connection, id: &UserId) -> Result<Option<User>> {
    one(c, "id", id.as_str())
}

pub(super) fn by_name(c: &Connection, name: &str) -> Result<Option<User>> {
    one(c, "name", name)
}

fn one(c: &Connection, column: &'static str, value: &str) -> Result<Option<User>> {
    let mut statement = c.prepare_cached(&format!("SELECT * FROM users WHERE {column} = ?1"))?;
    statement
        .query_row([value], |row| Ok(user(row)))
        .optional()?
        .transpose()
}

/// Reads the columns of `users`.
pub(super) fn user(row: &Row<'_>) -> Result<User> {
    let number: u32 = row.get("id_range")?;
    Ok(User {
        id: parsed(row, "id")?,
        name: parsed(row, "name")?,
        display_name: row.get("display_name")?,
        role: parsed(row, "role")?,
        id_range: IdRange::nth(number).ok_or_else(|| Error::Corrupt(format!("id range {number}")))?,
        created_at: time(row, "created_at")?,
    })
}
