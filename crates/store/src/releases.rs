//! Releases, and the copy of each that is shifted to one user's ids. It must not know how an image is read.

use choir_core::{IdRange, Name, ReleaseConfig, ReleaseId, Slot, UserId};
use jiff::Timestamp;
use rusqlite::{Connection, Row, params};

use crate::audit::{AuditEvent, append};
use crate::row::{json, maybe_parsed, millis, parsed, time, to_json};
use crate::{Error, Result, Store};

/// An immutable (image digest, config digest) pair.
#[derive(Debug, Clone, PartialEq)]
pub struct Release {
    pub id: ReleaseId,
    pub name: String,
    /// Whose it is; `None` for one of the box.
    pub owner: Option<UserId>,
    /// Empty until the import has read all of it.
    pub image_digest: String,
    pub config: ReleaseConfig,
    pub state: ReleaseState,
    /// Why it was rejected.
    pub reason: Option<String>,
    pub created_at: Timestamp,
}

/// What is about to be made.
#[derive(Debug, Clone)]
pub struct NewRelease {
    pub id: ReleaseId,
    pub name: String,
    pub owner: Option<UserId>,
    pub config: ReleaseConfig,
}

/// A slot that runs a release.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReleaseUse {
    pub release: ReleaseId,
    pub user: UserId,
    pub workspace: Name,
    pub slot: Slot,
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
    /// It came to nothing, or was not what it said.
    Rejected,
    /// Nothing uses it, and its volumes may be gone already.
    Retired,
}

/// Releases that one user may have.
const MOST_OF_A_USER: i64 = 50;

/// A release's volume in one user's id range.
#[derive(Debug, Clone, PartialEq)]
pub struct ReleaseCopy {
    pub volume: String,
    pub ids: IdRange,
    /// Whether all its files have been shifted.
    pub ready: bool,
}

impl Release {
    /// Whether a slot can run it.
    pub fn is_usable(&self) -> bool {
        matches!(self.state, ReleaseState::Candidate | ReleaseState::Verified)
    }

    /// Whether this user may know of it.
    pub fn is_for(&self, user: &UserId) -> bool {
        self.owner.as_ref().is_none_or(|owner| owner == user)
    }
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
    /// Journals that a release is about to be made. A user may have so many.
    pub async fn begin_release(&self, new: NewRelease, audit: AuditEvent) -> Result<()> {
        self.write(move |c| {
            let owner = new.owner.as_ref().map(UserId::as_str);
            let count = "SELECT count(*) FROM releases WHERE owner = ?1 AND state <> 'retired'";
            let own: i64 = c.query_row(count, [owner], |row| row.get(0))?;
            if own >= MOST_OF_A_USER {
                return Err(Error::Conflict(
                    "you have 50 releases, which is the most; delete one that nothing uses first",
                ));
            }
            c.execute(
                "INSERT INTO releases (id, image_digest, name, owner, config, state, created_at)
                 VALUES (?1, '', ?2, ?3, ?4, 'importing', ?5)",
                params![
                    new.id.as_str(),
                    new.name,
                    owner,
                    to_json(&new.config)?,
                    millis(audit.at)
                ],
            )?;
            append(c, &audit)
        })
        .await
    }

    /// The image was read to its end and the volume is complete.
    pub async fn release_imported(&self, id: &ReleaseId, digest: &str) -> Result<()> {
        let (id, digest) = (id.clone(), digest.to_owned());
        self.write(move |c| imported(c, &id, &digest)).await
    }

    /// Its volume is complete, and a sandbox has started from it.
    pub async fn release_tried(&self, id: &ReleaseId, digest: &str) -> Result<()> {
        let (id, digest) = (id.clone(), digest.to_owned());
        self.write(move |c| {
            imported(c, &id, &digest)?;
            verify(c, &id)
        })
        .await
    }

    /// Its volume is complete, and in its owner's ids already, so that it is its own copy for them.
    pub async fn release_taken(&self, id: &ReleaseId, owner: &UserId, digest: &str) -> Result<()> {
        let (id, owner, digest) = (id.clone(), owner.clone(), digest.to_owned());
        self.write(move |c| {
            c.execute(
                "INSERT OR IGNORE INTO release_copies (release_id, user_id, volume, ready) VALUES (?1, ?2, ?1, 1)",
                params![id.as_str(), owner.as_str()],
            )?;
            imported(c, &id, &digest)
        })
        .await
    }

    /// It came to nothing, for this reason.
    pub async fn reject_release(&self, id: &ReleaseId, reason: &str, audit: AuditEvent) -> Result<()> {
        let (id, reason) = (id.clone(), reason.to_owned());
        self.write(move |c| {
            c.execute(
                "UPDATE releases SET state = 'rejected', reason = ?2 WHERE id = ?1 AND state = 'importing'",
                params![id.as_str(), reason],
            )?;
            append(c, &audit)
        })
        .await
    }

    /// Marks a release for removal, unless something may still need it.
    pub async fn retire_release(&self, id: &ReleaseId, audit: AuditEvent) -> Result<()> {
        let id = id.clone();
        self.write(move |c| {
            for (sql, used) in [
                (
                    "SELECT EXISTS (SELECT 1 FROM sandboxes WHERE release_id = ?1)",
                    "a slot runs this release; deploy another one there first",
                ),
                (
                    "SELECT EXISTS (SELECT 1 FROM snapshots WHERE release_id = ?1)",
                    "a snapshot is of this release, and restoring it would need that; delete the snapshot first",
                ),
                (
                    "SELECT EXISTS (SELECT 1 FROM releases WHERE id = ?1 AND state = 'importing')",
                    "this release is still being made; wait until that has ended",
                ),
            ] {
                if c.query_row(sql, [id.as_str()], |row| row.get(0))? {
                    return Err(Error::Conflict(used));
                }
            }
            let retired = c.execute("UPDATE releases SET state = 'retired' WHERE id = ?1", [id.as_str()])?;
            if retired == 0 {
                return Err(Error::NotFound);
            }
            append(c, &audit)
        })
        .await
    }

    /// The volumes of a release: its own, and the copies for users.
    pub async fn release_volumes(&self, id: &ReleaseId) -> Result<Vec<String>> {
        let id = id.clone();
        self.read(move |c| {
            let mut statement =
                c.prepare_cached("SELECT ?1 UNION SELECT volume FROM release_copies WHERE release_id = ?1")?;
            let volumes = statement.query_map([id.as_str()], |row| row.get(0))?;
            Ok(volumes.collect::<rusqlite::Result<_>>()?)
        })
        .await
    }

    /// Forgets a retired release whose volumes are gone.
    pub async fn forget_release(&self, id: &ReleaseId) -> Result<()> {
        let id = id.clone();
        self.write(move |c| {
            c.execute("DELETE FROM release_copies WHERE release_id = ?1", [id.as_str()])?;
            c.execute(
                "DELETE FROM releases WHERE id = ?1 AND state = 'retired'",
                [id.as_str()],
            )?;
            Ok(())
        })
        .await
    }

    /// Every slot with what it runs.
    pub async fn release_uses(&self) -> Result<Vec<ReleaseUse>> {
        self.read(|c| {
            let mut statement = c.prepare_cached(
                "SELECT b.release_id, w.user_id, w.name AS workspace, s.slot FROM slots s
                 JOIN sandboxes b ON b.id = s.sandbox_id JOIN workspaces w ON w.id = s.workspace_id
                 ORDER BY w.name, s.slot DESC",
            )?;
            let mut rows = statement.query([])?;
            let mut found = Vec::new();
            while let Some(row) = rows.next()? {
                found.push(ReleaseUse {
                    release: parsed(row, "release_id")?,
                    user: parsed(row, "user_id")?,
                    workspace: parsed(row, "workspace")?,
                    slot: parsed(row, "slot")?,
                });
            }
            Ok(found)
        })
        .await
    }

    /// It was seen running. One that was a candidate is verified from then on.
    pub async fn verify_release(&self, id: &ReleaseId) -> Result<()> {
        let id = id.clone();
        self.write(move |c| verify(c, &id)).await
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

fn verify(c: &Connection, id: &ReleaseId) -> Result<()> {
    c.execute(
        "UPDATE releases SET state = 'verified' WHERE id = ?1 AND state = 'candidate'",
        [id.as_str()],
    )?;
    Ok(())
}

fn imported(c: &Connection, id: &ReleaseId, digest: &str) -> Result<()> {
    c.execute(
        "UPDATE releases SET image_digest = ?2, state = 'candidate' WHERE id = ?1 AND state = 'importing'",
        params![id.as_str(), digest],
    )?;
    Ok(())
}

/// A slot may become of this release: nothing has removed it meanwhile.
pub(crate) fn must_be_usable(c: &Connection, id: &ReleaseId) -> Result<()> {
    let sql = "SELECT EXISTS (SELECT 1 FROM releases WHERE id = ?1 AND state IN ('candidate', 'verified'))";
    if c.prepare_cached(sql)?.query_row([id.as_str()], |row| row.get(0))? {
        return Ok(());
    }
    Err(Error::Conflict("the release was deleted meanwhile"))
}

fn release(row: &Row<'_>) -> Result<Release> {
    Ok(Release {
        id: parsed(row, "id")?,
        name: row.get("name")?,
        owner: maybe_parsed(row, "owner")?,
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
        reason: row.get("reason")?,
        created_at: time(row, "created_at")?,
    })
}
