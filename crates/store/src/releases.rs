//! Releases, and the copy of each that is shifted to one user's ids. It must not know how an image is read.

use choir_core::{IdRange, ReleaseConfig, ReleaseId, UserId};
use jiff::Timestamp;
use rusqlite::{Row, params};

use crate::row::{json, millis, parsed, time, to_json};
use crate::{Error, Result, Store};

/// An immutable (image digest, config digest) pair.
#[derive(Debug, Clone, PartialEq)]
pub struct Release {
    pub id: ReleaseId,
    pub name: String,
    /// Empty until the import has read the whole archive.
    pub image_digest: String,
    pub config: ReleaseConfig,
    pub state: ReleaseState,
    pub created_at: Timestamp,
}

/// How far a release may be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReleaseState {
    /// Its volume is not complete.
    Importing,
    /// Imported, not yet seen running.
    Candidate,
    /// A sandbox became ready from it.
    Verified,
    Rejected,
    Retired,
}

/// A release's volume in one user's id range.
#[derive(Debug, Clone, PartialEq)]
pub struct ReleaseCopy {
    pub volume: String,
    pub ids: IdRange,
    /// Whether all its files have been shifted.
    pub ready: bool,
}

impl ReleaseState {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Importing => "importing",
            Self::Candidate => "candidate",
            Self::Verified => "verified",
            Self::Rejected => "rejected",
            Self::Retired => "retired",
        }
    }
}

impl Store {
    /// Journals that an image is about to be imported.
    pub async fn begin_release(&self, id: &ReleaseId, name: &str, config: &ReleaseConfig, at: Timestamp) -> Result<()> {
        let (id, name, config) = (id.clone(), name.to_owned(), to_json(config)?);
        self.write(move |c| {
            c.execute(
                "INSERT INTO releases (id, image_digest, name, config, state, created_at)
                 VALUES (?1, '', ?2, ?3, 'importing', ?4)",
                params![id.as_str(), name, config, millis(at)],
            )?;
            Ok(())
        })
        .await
    }

    /// The archive was read to its end and the volume is complete.
    pub async fn release_imported(&self, id: &ReleaseId, digest: &str) -> Result<()> {
        let (id, digest) = (id.clone(), digest.to_owned());
        self.write(move |c| {
            c.execute(
                "UPDATE releases SET image_digest = ?2, state = 'candidate' WHERE id = ?1 AND state = 'importing'",
                params![id.as_str(), digest],
            )?;
            Ok(())
        })
        .await
    }

    pub async fn set_release_state(&self, id: &ReleaseId, state: ReleaseState) -> Result<()> {
        let id = id.clone();
        self.write(move |c| {
            c.execute(
                "UPDATE releases SET state = ?2 WHERE id = ?1",
                params![id.as_str(), state.as_str()],
            )?;
            Ok(())
        })
        .await
    }

    /// All releases, newest first.
    pub async fn releases(&self) -> Result<Vec<Release>> {
        self.read(|c| {
            let mut statement = c.prepare_cached("SELECT * FROM releases ORDER BY created_at DESC, id")?;
            let mut rows = statement.query([])?;
            let mut found = Vec::new();
            while let Some(row) = rows.next()? {
                found.push(release(row)?);
            }
            Ok(found)
        })
        .await
    }

    pub async fn release(&self, id: &ReleaseId) -> Result<Release> {
        let id = id.clone();
        self.read(move |c| {
            let mut statement = c.prepare_cached("SELECT * FROM releases WHERE id = ?1")?;
            let mut rows = statement.query([id.as_str()])?;
            release(rows.next()?.ok_or(Error::NotFound)?)
        })
        .await
    }

    /// The user's copy of a release, journalled as not ready if it was never asked for before.
    pub async fn release_copy(&self, release: &ReleaseId, user: &UserId) -> Result<ReleaseCopy> {
        let (release, user) = (release.clone(), user.clone());
        self.write(move |c| {
            let range: u32 = c.query_row("SELECT id_range FROM users WHERE id = ?1", [user.as_str()], |r| {
                r.get(0)
            })?;
            c.execute(
                "INSERT OR IGNORE INTO release_copies (release_id, user_id, volume, ready) VALUES (?1, ?2, ?3, 0)",
                params![release.as_str(), user.as_str(), format!("{release}-u{range}")],
            )?;
            let (volume, ready) = c.query_row(
                "SELECT volume, ready FROM release_copies WHERE release_id = ?1 AND user_id = ?2",
                params![release.as_str(), user.as_str()],
                |row| Ok((row.get(0)?, row.get(1)?)),
            )?;
            let ids = IdRange::nth(range).ok_or_else(|| Error::Corrupt("id_range".into()))?;
            Ok(ReleaseCopy { volume, ids, ready })
        })
        .await
    }

    pub async fn release_copy_ready(&self, volume: &str) -> Result<()> {
        let volume = volume.to_owned();
        self.write(move |c| {
            c.execute("UPDATE release_copies SET ready = 1 WHERE volume = ?1", [volume])?;
            Ok(())
        })
        .await
    }
}

fn release(row: &Row<'_>) -> Result<Release> {
    Ok(Release {
        id: parsed(row, "id")?,
        name: row.get("name")?,
        image_digest: row.get("image_digest")?,
        config: json(row, "config")?,
        state: match row.get::<_, String>("state")?.as_str() {
            "importing" => ReleaseState::Importing,
            "candidate" => ReleaseState::Candidate,
            "verified" => ReleaseState::Verified,
            "rejected" => ReleaseState::Rejected,
            "retired" => ReleaseState::Retired,
            other => return Err(Error::Corrupt(format!("releases.state: {other}"))),
        },
        created_at: time(row, "created_at")?,
    })
}
