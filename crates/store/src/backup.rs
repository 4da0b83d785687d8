//! Copies of the whole database as one file, and making one that was put back safe to serve from. It must not know of
//! encryption, nor where copies are kept.

use std::path::Path;

use rusqlite::{Connection, OpenFlags};

use crate::audit::{self, AuditEvent};
use crate::connection::{create_private, migrate};
use crate::row::millis;
use crate::{Error, Result, Store};

impl Store {
    /// Writes the database as of one commit into a new file at `to` (mode 0600) and checks it; writes go on meanwhile,
    /// other reads through this handle wait. What stands at `to` after an error is not a copy.
    pub async fn copy_to(&self, to: &Path) -> Result<()> {
        let to = to.to_owned();
        self.read(move |c| copy(c, &to)).await
    }
}

/// Writes the whole database into a new file at `to` (mode 0600) and checks it.
pub(crate) fn copy(of: &Connection, to: &Path) -> Result<()> {
    create_private(to)?;
    let path = to
        .to_str()
        .ok_or(Error::Conflict("the path of the copy is not UTF-8"))?;
    of.execute("VACUUM INTO ?1", [path])?;
    check(&open_copy(to)?)
}

/// Makes a copy that was put back safe to serve from: checks it, ends all sessions and tokens of before, and records
/// `event`. It is one file afterwards, as before.
pub fn admit_copy(path: &Path, event: &AuditEvent) -> Result<()> {
    let mut copy = open_copy(path)?;
    check(&copy)?;
    migrate(&mut copy)?;
    let change = copy.transaction()?;
    change.execute("UPDATE users SET auth_epoch = auth_epoch + 1", [])?;
    settle_deployments(&change, event)?;
    audit::append(&change, event)?;
    audit::Chain::default().extend(&change)?;
    change.commit()?;
    Ok(())
}

/// What was under way when the copy was made is long over on the disks, which are no part of it: done again, it would
/// replace what came since.
fn settle_deployments(copy: &Connection, event: &AuditEvent) -> Result<()> {
    let open: Vec<(String, String)> = copy
        .prepare(
            "SELECT d.workspace_id, w.user_id FROM deployments d JOIN workspaces w ON w.id = d.workspace_id
             WHERE d.finished_at IS NULL",
        )?
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<rusqlite::Result<_>>()?;
    copy.execute(
        // One whose pointers are exchanged, or whose contents are in place, has taken effect.
        "UPDATE deployments SET finished_at = ?1, reason = 'the backup was made while it was under way',
             step = CASE WHEN step IN ('draining', 'starting') AND NOT EXISTS
                 (SELECT 1 FROM sandboxes s WHERE json_extract(s.refill, '$.deployment') = deployments.id)
                 THEN 'succeeded' ELSE 'failed' END
         WHERE finished_at IS NULL",
        [millis(event.at)],
    )?;
    for (workspace, user) in open {
        let user = user.parse().map_err(|e| Error::Corrupt(format!("user_id: {e}")))?;
        let ended = AuditEvent {
            user: Some(user),
            action: "workspace.deployment_ended",
            subject: workspace,
            outcome: "failed",
            ..event.clone()
        };
        audit::append(copy, &ended)?;
    }
    copy.execute("UPDATE sandboxes SET refill = NULL", [])?;
    // One that was not finished after all is what `fsck` finds missing.
    copy.execute("UPDATE snapshots SET state = 'ready' WHERE state = 'making'", [])?;
    Ok(())
}

fn open_copy(path: &Path) -> Result<Connection> {
    let copy = Connection::open_with_flags(
        path,
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX,
    )?;
    copy.execute_batch("PRAGMA trusted_schema = OFF; PRAGMA secure_delete = ON; PRAGMA foreign_keys = ON")?;
    Ok(copy)
}

/// Every page, index and reference, unlike the quick check at each start.
fn check(copy: &Connection) -> Result<()> {
    let verdict: String = copy.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
    let dangling = copy.prepare("PRAGMA foreign_key_check")?.exists([])?;
    if verdict == "ok" && !dangling {
        return Ok(());
    }
    let what = if dangling {
        "a row names one that is not there"
    } else {
        verdict.as_str()
    };
    Err(Error::Corrupt(format!("the copy of the database is damaged ({what})")))
}
