//! API tokens: a name, scopes, an end, a hash. It must not know what a scope permits.

use choir_core::UserId;
use jiff::Timestamp;
use rusqlite::{OptionalExtension, Row, params};
use serde::Serialize;

use super::users::user;
use super::{Hash, User};
use crate::audit::{self, AuditEvent};
use crate::row::{json, maybe_time, millis, time, to_json};
use crate::{Error, Result, Store};

/// A token to be written down.
#[derive(Debug, Clone)]
pub struct NewToken {
    pub hash: Hash,
    pub id: String,
    pub user: UserId,
    pub name: String,
    pub scopes: Vec<String>,
    pub created_at: Timestamp,
    pub expires_at: Timestamp,
}

/// A token as it is listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Token {
    pub id: String,
    pub name: String,
    pub scopes: Vec<String>,
    pub created_at: Timestamp,
    pub expires_at: Timestamp,
    pub last_used_at: Option<Timestamp>,
}

const WITH_USER: &str = "SELECT t.id AS t_id, t.name AS t_name, t.scopes, t.created_at AS t_created_at, t.expires_at,
    t.last_used_at, u.* FROM tokens t JOIN users u ON u.id = t.user_id AND u.auth_epoch = t.auth_epoch";

impl Store {
    pub async fn add_token(&self, new: NewToken, event: AuditEvent) -> Result<()> {
        self.write(move |c| {
            let added = c
                .prepare_cached(
                    "INSERT INTO tokens (hash, id, user_id, name, scopes, auth_epoch, created_at, expires_at)
                     SELECT ?1, ?2, id, ?4, ?5, auth_epoch, ?6, ?7 FROM users WHERE id = ?3",
                )?
                .execute(params![
                    new.hash,
                    new.id,
                    new.user.as_str(),
                    new.name,
                    to_json(&new.scopes)?,
                    millis(new.created_at),
                    millis(new.expires_at)
                ])?;
            if added == 1 {
                audit::append(c, &event)
            } else {
                Err(Error::NotFound)
            }
        })
        .await
    }

    /// The unexpired token with this hash and its user.
    pub async fn token(&self, hash: Hash, now: Timestamp) -> Result<Option<(Token, User)>> {
        self.read(move |c| {
            c.prepare_cached(&format!("{WITH_USER} WHERE t.hash = ?1 AND t.expires_at > ?2"))?
                .query_row(params![hash, millis(now)], |row| Ok(with_user(row)))
                .optional()?
                .transpose()
        })
        .await
    }

    /// A user's unexpired tokens, newest first.
    pub async fn tokens(&self, of: UserId, now: Timestamp) -> Result<Vec<Token>> {
        self.read(move |c| {
            let sql = format!("{WITH_USER} WHERE u.id = ?1 AND t.expires_at > ?2 ORDER BY t.created_at DESC, t.id");
            let mut statement = c.prepare_cached(&sql)?;
            let mut rows = statement.query(params![of.as_str(), millis(now)])?;
            let mut found = Vec::new();
            while let Some(row) = rows.next()? {
                found.push(with_user(row)?.0);
            }
            Ok(found)
        })
        .await
    }

    pub async fn touch_token(&self, hash: Hash, at: Timestamp) -> Result<()> {
        self.write(move |c| {
            c.prepare_cached("UPDATE tokens SET last_used_at = ?2 WHERE hash = ?1")?
                .execute(params![hash, millis(at)])?;
            Ok(())
        })
        .await
    }

    /// Ends one of a user's tokens. `NotFound` when the user has none with this id.
    pub async fn delete_token(&self, of: UserId, id: String, event: AuditEvent) -> Result<()> {
        self.write(move |c| {
            match c.execute(
                "DELETE FROM tokens WHERE id = ?1 AND user_id = ?2",
                params![id, of.as_str()],
            )? {
                0 => Err(Error::NotFound),
                _ => audit::append(c, &event),
            }
        })
        .await
    }
}

fn with_user(row: &Row<'_>) -> Result<(Token, User)> {
    let token = Token {
        id: row.get("t_id")?,
        name: row.get("t_name")?,
        scopes: json(row, "scopes")?,
        created_at: time(row, "t_created_at")?,
        expires_at: time(row, "expires_at")?,
        last_used_at: maybe_time(row, "last_used_at")?,
    };
    Ok((token, user(row)?))
}
