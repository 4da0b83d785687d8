//! Sandboxes: what is wanted, what was last seen, and generation numbers that only grow.

use choir_core::deployment::Refill;
use choir_core::sandbox::{Desired, Observed};
use choir_core::{ReleaseId, SandboxId, Slot, WorkspaceId};
use rusqlite::{Connection, Row, params};

use crate::audit::{AuditEvent, append};
use crate::row::{json, maybe_json, parsed, to_json};
use crate::{Error, Result, Store};

/// One isolated computer as the database knows it.
#[derive(Debug, Clone, PartialEq)]
pub struct Sandbox {
    pub id: SandboxId,
    pub workspace: WorkspaceId,
    pub release: ReleaseId,
    pub desired: Desired,
    pub observed: Observed,
    /// The last generation number given out; 0 before the first start.
    pub generation: u64,
    /// That generation's nonce.
    pub nonce: String,
    /// What is to become of its volume before its next start.
    pub refill: Option<Refill>,
}

/// What was seen, with the audit event that goes with it.
#[derive(Debug, Clone)]
pub struct SandboxChange {
    pub id: SandboxId,
    pub observed: Observed,
    pub audit: Option<AuditEvent>,
}

impl Store {
    /// Gives out the next generation number with its nonce, before its container is made.
    pub async fn begin_generation(&self, sandbox: &SandboxId, nonce: &str) -> Result<u64> {
        let (id, nonce) = (sandbox.clone(), nonce.to_owned());
        self.write(move |c| {
            Ok(c.prepare_cached(
                "UPDATE sandboxes SET generation = generation + 1, nonce = ?2 WHERE id = ?1 RETURNING generation",
            )?
            .query_row(params![id.as_str(), nonce], |row| row.get(0))?)
        })
        .await
    }

    /// Records what was seen.
    pub async fn observe(&self, change: SandboxChange) -> Result<()> {
        self.write(move |c| {
            c.prepare_cached("UPDATE sandboxes SET observed = ?2 WHERE id = ?1")?
                .execute(params![change.id.as_str(), to_json(&change.observed)?])?;
            change.audit.iter().try_for_each(|event| append(c, event))
        })
        .await
    }
}

pub(crate) fn in_slot(c: &Connection, workspace: &WorkspaceId, slot: Slot) -> Result<Sandbox> {
    let mut statement = c.prepare_cached(
        "SELECT s.id, s.workspace_id, s.release_id, s.desired, s.observed, s.generation, s.nonce,
                s.refill
         FROM sandboxes s JOIN slots t ON t.sandbox_id = s.id WHERE t.workspace_id = ?1 AND t.slot = ?2",
    )?;
    let mut rows = statement.query(params![workspace.as_str(), slot.as_str()])?;
    sandbox(rows.next()?.ok_or(Error::NotFound)?)
}

fn sandbox(row: &Row<'_>) -> Result<Sandbox> {
    Ok(Sandbox {
        id: parsed(row, "id")?,
        workspace: parsed(row, "workspace_id")?,
        release: parsed(row, "release_id")?,
        desired: desired(&row.get::<_, String>("desired")?)?,
        observed: json(row, "observed")?,
        generation: row.get("generation")?,
        nonce: row.get("nonce")?,
        refill: maybe_json(row, "refill")?,
    })
}

pub(crate) fn desired_text(desired: Desired) -> &'static str {
    match desired {
        Desired::Running => "running",
        Desired::Stopped => "stopped",
        Desired::Deleted => "deleted",
    }
}

fn desired(text: &str) -> Result<Desired> {
    match text {
        "running" => Ok(Desired::Running),
        "stopped" => Ok(Desired::Stopped),
        "deleted" => Ok(Desired::Deleted),
        other => Err(Error::Corrupt(format!("desired: {other}"))),
    }
}
