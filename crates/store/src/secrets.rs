//! Sealed secrets and the keys they are sealed under. It must not know how they are sealed, nor any plaintext.

use choir_core::{SecretName, UserId};
use jiff::{SignedDuration, Timestamp};
use rusqlite::{Connection, OptionalExtension, Row, params};

use crate::audit::{self, AuditEvent};
use crate::grants::{self, Grant};
use crate::row::{maybe_time, millis, parsed, time};
use crate::{Error, Result, Store};

/// Names a key; says nothing of it.
pub type KeyIdBytes = [u8; 8];

/// A key, sealed under a master key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SealedKey {
    /// The master key's id.
    pub kek: KeyIdBytes,
    pub sealed: Vec<u8>,
}

/// A user's key, sealed under a master key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataKey {
    pub id: KeyIdBytes,
    pub user: UserId,
    pub key: SealedKey,
}

/// A secret as it is listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Secret {
    pub name: SecretName,
    /// Grows by one with each new value.
    pub version: u64,
    /// Whether a sandbox with a grant may ask for the value itself.
    pub reveal: bool,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    /// To the minute.
    pub last_used_at: Option<Timestamp>,
}

/// A secret with its sealed value, and the key that this is sealed under.
#[derive(Debug, Clone)]
pub struct SealedSecret {
    pub id: String,
    pub secret: Secret,
    pub sealed: Vec<u8>,
    pub data_key: DataKey,
}

/// What must be known to seal a new value.
#[derive(Debug, Clone)]
pub struct SecretPlace {
    /// The id and version of the value that is there now.
    pub present: Option<(String, u64)>,
    pub data_key: Option<DataKey>,
    /// The master key that a new data key is to be sealed under; none before the first start.
    pub kek: Option<KeyIdBytes>,
}

/// A sealed value to be written down.
#[derive(Debug, Clone)]
pub struct NewSecret {
    pub id: String,
    pub user: UserId,
    pub name: SecretName,
    /// One more than the version that is there; 1 where there is none.
    pub version: u64,
    pub reveal: bool,
    pub sealed: Vec<u8>,
    pub at: Timestamp,
}

/// How exact `last_used_at` is, so that a busy secret does not write at every use.
const USED_WITHIN: SignedDuration = SignedDuration::from_mins(1);

/// How many secrets a user may have.
const MOST_SECRETS: u32 = 1000;

impl Store {
    /// The box's own key; `None` before the first start.
    pub async fn key_check(&self) -> Result<Option<SealedKey>> {
        self.read(key_check).await
    }

    /// The box's own key; the first time, what `make` gives is written down. No two processes get to make one.
    pub async fn key_check_or<E: Send + 'static>(
        &self,
        make: impl FnOnce() -> Result<SealedKey, E> + Send + 'static,
    ) -> Result<Result<SealedKey, E>> {
        self.write(move |c| {
            if let Some(key) = key_check(c)? {
                return Ok(Ok(key));
            }
            let made = make();
            if let Ok(key) = &made {
                c.execute(
                    "INSERT INTO key_check (one, kek_id, sealed) VALUES (1, ?1, ?2)",
                    params![key.kek, key.sealed],
                )?;
            }
            Ok(made)
        })
        .await
    }

    /// Replaces the box's own key as sealed under `from`. From then on new data keys are sealed under the new master
    /// key. `NotFound` when it is no longer under `from`. The old form is gone from database and log when this returns.
    pub async fn reseal_key_check(&self, from: KeyIdBytes, key: SealedKey, event: AuditEvent) -> Result<()> {
        self.write(move |c| {
            match c.execute(
                "UPDATE key_check SET kek_id = ?2, sealed = ?3 WHERE kek_id = ?1",
                params![from, key.kek, key.sealed],
            )? {
                0 => Err(Error::NotFound),
                _ => audit::append(c, &event),
            }
        })
        .await?;
        self.truncate_log().await;
        Ok(())
    }

    /// Writes a user's key down; false when the user has one, or new ones belong under another master key by now.
    pub async fn add_data_key(&self, new: DataKey) -> Result<bool> {
        self.write(move |c| {
            let added = c.execute(
                "INSERT INTO data_keys (id, user_id, kek_id, sealed)
                 SELECT ?1, ?2, kek_id, ?4 FROM key_check WHERE kek_id = ?3 ON CONFLICT DO NOTHING",
                params![new.id, new.user.as_str(), new.key.kek, new.key.sealed],
            )?;
            Ok(added == 1)
        })
        .await
    }

    /// Up to `most` data keys that are not sealed under `kek`.
    pub async fn data_keys_not_under(&self, kek: KeyIdBytes, most: u32) -> Result<Vec<DataKey>> {
        self.read(move |c| {
            let mut statement = c.prepare_cached(
                "SELECT id AS key_id, user_id, kek_id, sealed FROM data_keys WHERE kek_id != ?1 ORDER BY id LIMIT ?2",
            )?;
            let mut rows = statement.query(params![kek, most])?;
            let mut found = Vec::new();
            while let Some(row) = rows.next()? {
                found.push(data_key(row, "sealed")?);
            }
            Ok(found)
        })
        .await
    }

    /// Replaces data keys by the same ones sealed under another master key; those deleted meanwhile stay deleted. Their
    /// old forms are gone from database and log when this returns.
    pub async fn reseal_data_keys(&self, keys: Vec<DataKey>) -> Result<()> {
        self.write(move |c| {
            let mut statement = c.prepare_cached("UPDATE data_keys SET kek_id = ?2, sealed = ?3 WHERE id = ?1")?;
            for key in &keys {
                statement.execute(params![key.id, key.key.kek, key.key.sealed])?;
            }
            Ok(())
        })
        .await?;
        self.truncate_log().await;
        Ok(())
    }

    /// What is there under this name, and which keys are to seal what comes.
    pub async fn secret_place(&self, of: UserId, name: SecretName) -> Result<SecretPlace> {
        self.read(move |c| {
            let present = c
                .prepare_cached("SELECT id, version FROM secrets WHERE user_id = ?1 AND name = ?2")?
                .query_row(params![of.as_str(), name.as_str()], |row| {
                    Ok((row.get(0)?, row.get(1)?))
                })
                .optional()?;
            let data_key = c
                .prepare_cached("SELECT id AS key_id, user_id, kek_id, sealed FROM data_keys WHERE user_id = ?1")?
                .query_row([of.as_str()], |row| Ok(data_key(row, "sealed")))
                .optional()?
                .transpose()?;
            let kek = c
                .prepare_cached("SELECT kek_id FROM key_check")?
                .query_row([], |row| row.get(0))
                .optional()?;
            Ok(SecretPlace { present, data_key, kek })
        })
        .await
    }

    /// Writes a value down in the place of the version before it; false when another came in between. The old
    /// ciphertext is gone from the database and its log when this returns.
    pub async fn put_secret(&self, new: NewSecret, event: AuditEvent) -> Result<bool> {
        let replaces = new.version > 1;
        let written = self.write(move |c| put(c, &new, &event)).await?;
        if written && replaces {
            self.truncate_log().await;
        }
        Ok(written)
    }

    /// A user's secrets by name.
    pub async fn secrets(&self, of: UserId) -> Result<Vec<Secret>> {
        self.read(move |c| {
            let mut statement = c.prepare_cached("SELECT * FROM secrets WHERE user_id = ?1 ORDER BY name")?;
            let mut rows = statement.query([of.as_str()])?;
            let mut found = Vec::new();
            while let Some(row) = rows.next()? {
                found.push(secret(row)?);
            }
            Ok(found)
        })
        .await
    }

    /// One of a user's secrets, without its value. `NotFound` when the user has none of this name.
    pub async fn secret(&self, of: UserId, name: SecretName) -> Result<Secret> {
        self.read(move |c| {
            c.prepare_cached("SELECT * FROM secrets WHERE user_id = ?1 AND name = ?2")?
                .query_row(params![of.as_str(), name.as_str()], |row| Ok(secret(row)))?
        })
        .await
    }

    /// One of a user's secrets with its sealed value. `NotFound` when the user has none of this name.
    pub async fn sealed_secret(&self, of: UserId, name: SecretName) -> Result<SealedSecret> {
        self.read(move |c| {
            c.prepare_cached(
                "SELECT s.*, k.id AS key_id, k.kek_id, k.sealed AS key_sealed
                 FROM secrets s JOIN data_keys k USING (user_id) WHERE s.user_id = ?1 AND s.name = ?2",
            )?
            .query_row(params![of.as_str(), name.as_str()], |row| {
                Ok(secret(row).and_then(|secret| {
                    Ok(SealedSecret {
                        id: row.get("id")?,
                        secret,
                        sealed: row.get("sealed")?,
                        data_key: data_key(row, "key_sealed")?,
                    })
                }))
            })?
        })
        .await
    }

    /// Deletes a secret and ends its grants, each with a row of its own, so that none comes back with another secret of
    /// this name; those grants. The ciphertext is gone from the database when this returns, and from its log unless
    /// another process reads it. `NotFound` when the user has none of this name.
    pub async fn delete_secret(&self, of: UserId, name: SecretName, event: AuditEvent) -> Result<Vec<Grant>> {
        let ended = self
            .write(move |c| {
                match c.execute(
                    "DELETE FROM secrets WHERE user_id = ?1 AND name = ?2",
                    params![of.as_str(), name.as_str()],
                )? {
                    0 => Err(Error::NotFound),
                    _ => audit::append(c, &event),
                }?;
                grants::end_of_secret(c, &of, &name, &event)
            })
            .await?;
        self.truncate_log().await;
        Ok(ended)
    }

    /// Notes that a secret was used.
    pub async fn touch_secret(&self, of: UserId, name: SecretName, at: Timestamp) -> Result<()> {
        self.write(move |c| {
            c.prepare_cached(
                "UPDATE secrets SET last_used_at = ?3
                 WHERE user_id = ?1 AND name = ?2 AND (last_used_at IS NULL OR last_used_at <= ?4)",
            )?
            .execute(params![
                of.as_str(),
                name.as_str(),
                millis(at),
                millis(at - USED_WITHIN)
            ])?;
            Ok(())
        })
        .await
    }
}

fn put(c: &Connection, new: &NewSecret, event: &AuditEvent) -> Result<bool> {
    let at = millis(new.at);
    let written = if new.version == 1 {
        let count: u32 = c
            .prepare_cached("SELECT count(*) FROM secrets WHERE user_id = ?1")?
            .query_row([new.user.as_str()], |row| row.get(0))?;
        if count >= MOST_SECRETS {
            return Err(Error::Conflict(
                "you have 1000 secrets, which is the most; delete one first",
            ));
        }
        c.prepare_cached(
            "INSERT INTO secrets (id, user_id, name, version, reveal, sealed, created_at, updated_at)
             VALUES (?1, ?2, ?3, 1, ?4, ?5, ?6, ?6) ON CONFLICT DO NOTHING",
        )?
        .execute(params![
            new.id,
            new.user.as_str(),
            new.name.as_str(),
            new.reveal,
            new.sealed,
            at
        ])?
    } else {
        c.prepare_cached(
            "UPDATE secrets SET version = ?2, reveal = ?3, sealed = ?4, updated_at = ?5
             WHERE id = ?1 AND version = ?2 - 1",
        )?
        .execute(params![new.id, new.version, new.reveal, new.sealed, at])?
    };
    if written == 1 {
        audit::append(c, event)?;
    }
    Ok(written == 1)
}

fn secret(row: &Row<'_>) -> Result<Secret> {
    Ok(Secret {
        name: parsed(row, "name")?,
        version: row.get("version")?,
        reveal: row.get("reveal")?,
        created_at: time(row, "created_at")?,
        updated_at: time(row, "updated_at")?,
        last_used_at: maybe_time(row, "last_used_at")?,
    })
}

fn key_check(c: &Connection) -> Result<Option<SealedKey>> {
    c.prepare_cached("SELECT kek_id, sealed FROM key_check")?
        .query_row([], |row| Ok(sealed_key(row)))
        .optional()?
        .transpose()
}

fn sealed_key(row: &Row<'_>) -> Result<SealedKey> {
    Ok(SealedKey {
        kek: row.get("kek_id")?,
        sealed: row.get("sealed")?,
    })
}

fn data_key(row: &Row<'_>, sealed: &str) -> Result<DataKey> {
    Ok(DataKey {
        id: row.get("key_id")?,
        user: parsed(row, "user_id")?,
        key: SealedKey {
            kek: row.get("kek_id")?,
            sealed: row.get(sealed)?,
        },
    })
}
