//! Snapshots: read-only copies of volumes, from before they are made until they are gone. It must not know a disk.

use std::collections::HashMap;

use choir_core::deployment::Contents;
use choir_core::snapshot::thin;
use choir_core::{DeploymentId, ReleaseId, SandboxId, Slot, SnapshotId, WorkspaceId};
use jiff::Timestamp;
use rusqlite::{Connection, Row, params};

use crate::audit::{AuditEvent, append};
use crate::deployments::{Deployment, taken_back, undoable};
use crate::row::{maybe_parsed, millis, parsed, time};
use crate::sandboxes::Sandbox;
use crate::workspaces::{open_deployment, view};
use crate::{Error, Result, Store};

/// A copy of what a sandbox held at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Also the volume's name.
    pub id: SnapshotId,
    pub workspace: WorkspaceId,
    pub sandbox: SandboxId,
    /// The slot that the sandbox was in.
    pub slot: Slot,
    pub release: ReleaseId,
    pub taken_for: TakenFor,
    pub state: SnapshotState,
    pub created_at: Timestamp,
}

impl Snapshot {
    /// Whether it is what this slot held before one of these.
    fn is_of(&self, slot: Slot, deployments: &[Deployment]) -> bool {
        let taken_for = |d: &Deployment| self.taken_for == TakenFor::Deployment(d.id.clone());
        self.slot == slot && deployments.iter().any(taken_for)
    }
}

/// Why a snapshot is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TakenFor {
    /// Somebody asked for it, and it stays until somebody deletes it.
    Somebody,
    Schedule,
    /// It is what the slot held before this, or before this was taken back.
    Deployment(DeploymentId),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotState {
    /// Its volume may not be there yet.
    Making,
    Ready,
    /// Its volume may be gone already.
    Deleting,
}

/// Snapshots of one workspace that people asked for.
const MOST_ASKED_FOR: usize = 50;

impl SnapshotState {
    const ALL: [Self; 3] = [Self::Making, Self::Ready, Self::Deleting];

    fn as_str(self) -> &'static str {
        match self {
            Self::Making => "making",
            Self::Ready => "ready",
            Self::Deleting => "deleting",
        }
    }
}

impl Store {
    /// Journals that a slot's volume is about to be copied. A person may have so many.
    pub async fn begin_snapshot(
        &self,
        id: &SnapshotId,
        workspace: &WorkspaceId,
        slot: Slot,
        taken_for: TakenFor,
        audit: AuditEvent,
    ) -> Result<Snapshot> {
        let (id, workspace) = (id.clone(), workspace.clone());
        self.write(move |c| {
            let asked_for = |s: &&Snapshot| s.taken_for == TakenFor::Somebody;
            if taken_for == TakenFor::Somebody && of(c, &workspace)?.iter().filter(asked_for).count() >= MOST_ASKED_FOR
            {
                return Err(Error::Conflict(
                    "this workspace has 50 snapshots that were asked for, which is the most; delete one first",
                ));
            }
            let view = view(c, &workspace)?;
            if view.workspace.deleting {
                return Err(Error::NotFound);
            }
            still_holds(view.slot(slot), &view.slot(slot).release)?;
            begin(c, &id, view.slot(slot), slot, &taken_for, audit.at)?;
            append(c, &audit)?;
            get(c, &id)
        })
        .await
    }

    /// Its volume is there, and is of the release that its row says.
    pub async fn snapshot_made(&self, id: &SnapshotId) -> Result<Snapshot> {
        let id = id.clone();
        self.write(move |c| {
            let made = get(c, &id)?;
            let view = view(c, &made.workspace)?;
            if let Some(sandbox) = Slot::ALL
                .map(|slot| view.slot(slot))
                .into_iter()
                .find(|s| s.id == made.sandbox)
            {
                still_holds(sandbox, &made.release)?;
            }
            set_state(c, &id, SnapshotState::Ready)?;
            get(c, &id)
        })
        .await
    }

    /// Its volume is there. It came from elsewhere, so it matters not what its slot holds by now.
    pub async fn snapshot_received(&self, id: &SnapshotId) -> Result<Snapshot> {
        let id = id.clone();
        self.write(move |c| {
            view(c, &get(c, &id)?.workspace)?;
            set_state(c, &id, SnapshotState::Ready)?;
            get(c, &id)
        })
        .await
    }

    /// All snapshots of a workspace, newest first.
    pub async fn snapshots(&self, workspace: &WorkspaceId) -> Result<Vec<Snapshot>> {
        let workspace = workspace.clone();
        self.read(move |c| of(c, &workspace)).await
    }

    /// When each sandbox's volume was last copied, whatever for.
    pub async fn last_snapshots(&self) -> Result<HashMap<SandboxId, Timestamp>> {
        self.read(|c| {
            let mut statement = c.prepare_cached(
                "SELECT sandbox_id, max(created_at) AS created_at FROM snapshots WHERE state = 'ready' GROUP BY sandbox_id",
            )?;
            let mut rows = statement.query([])?;
            let mut last = HashMap::new();
            while let Some(row) = rows.next()? {
                last.insert(parsed(row, "sandbox_id")?, time(row, "created_at")?);
            }
            Ok(last)
        })
        .await
    }

    /// The oldest snapshots that the schedule took, of all workspaces, at most so many.
    pub async fn oldest_scheduled(&self, most: u32) -> Result<Vec<Snapshot>> {
        self.read(move |c| {
            let mut statement = c.prepare_cached(
                "SELECT * FROM snapshots WHERE scheduled = 1 AND state = 'ready' ORDER BY created_at, rowid LIMIT ?1",
            )?;
            collect(statement.query([most])?)
        })
        .await
    }

    /// One snapshot of this workspace that is there.
    pub async fn snapshot(&self, workspace: &WorkspaceId, id: &SnapshotId) -> Result<Snapshot> {
        let (workspace, id) = (workspace.clone(), id.clone());
        self.read(move |c| {
            let found = get(c, &id)?;
            if found.workspace == workspace && found.state == SnapshotState::Ready {
                Ok(found)
            } else {
                Err(Error::NotFound)
            }
        })
        .await
    }

    /// What a slot was before a deployment.
    pub async fn snapshot_before(&self, deployment: &DeploymentId, slot: Slot) -> Result<Snapshot> {
        let deployment = deployment.clone();
        self.read(move |c| of_deployment(c, &deployment, slot)).await
    }

    /// Marks a snapshot for deletion, unless something may still need it.
    pub async fn drop_snapshot(&self, id: &SnapshotId, audit: AuditEvent) -> Result<()> {
        let id = id.clone();
        self.write(move |c| {
            if needed(c, &get(c, &id)?.workspace)?.contains(&id) {
                return Err(Error::Conflict(
                    "a rollback may still need this snapshot; it can be deleted after five further deployments",
                ));
            }
            set_state(c, &id, SnapshotState::Deleting)?;
            append(c, &audit)
        })
        .await
    }

    /// Marks what nobody asked for and is not worth its room any more, and gives all that is marked.
    pub async fn thin_snapshots(&self, workspace: &WorkspaceId, now: Timestamp) -> Result<Vec<Snapshot>> {
        let workspace = workspace.clone();
        self.write(move |c| {
            let mut needed = needed(c, &workspace)?;
            let all = of(c, &workspace)?;
            // Nothing else brings back what was in dev; for as many as live can go back, though somebody may delete it.
            let displaced = undoable(c, &workspace, Slot::Dev)?;
            needed.extend(
                all.iter()
                    .filter(|s| s.is_of(Slot::Dev, &displaced))
                    .map(|s| s.id.clone()),
            );
            // Nor what was written until a deployment was taken back.
            for slot in Slot::ALL {
                let taken_back = taken_back(c, &workspace, slot)?;
                let kept = all.iter().filter(|s| s.is_of(slot, &taken_back));
                needed.extend(kept.map(|s| s.id.clone()));
            }
            for slot in Slot::ALL {
                let spare = |s: &&Snapshot| {
                    s.slot == slot
                        && s.state == SnapshotState::Ready
                        && s.taken_for != TakenFor::Somebody
                        && !needed.contains(&s.id)
                };
                let spare: Vec<_> = all.iter().filter(spare).map(|s| (s.id.clone(), s.created_at)).collect();
                for id in thin(&spare, now) {
                    set_state(c, id, SnapshotState::Deleting)?;
                }
            }
            let mut marked = of(c, &workspace)?;
            marked.retain(|s| s.state == SnapshotState::Deleting);
            Ok(marked)
        })
        .await
    }

    /// Snapshots that no deployment under way is about to finish: cut short while they were made, or being deleted.
    pub async fn unfinished_snapshots(&self) -> Result<Vec<Snapshot>> {
        self.read(|c| {
            let mut statement = c.prepare_cached(
                "SELECT * FROM snapshots WHERE state = 'deleting' OR state = 'making'
                 AND id NOT IN (SELECT json_extract(refill, '$.keep') FROM sandboxes WHERE refill IS NOT NULL)",
            )?;
            collect(statement.query([])?)
        })
        .await
    }

    /// Marks a snapshot of which nothing is to stay.
    pub async fn give_up_snapshot(&self, id: &SnapshotId) -> Result<()> {
        let id = id.clone();
        self.write(move |c| set_state(c, &id, SnapshotState::Deleting)).await
    }

    /// Forgets a snapshot whose volume is gone.
    pub async fn forget_snapshot(&self, id: &SnapshotId) -> Result<()> {
        let id = id.clone();
        self.write(move |c| {
            c.execute("DELETE FROM snapshots WHERE id = ?1", [id.as_str()])?;
            Ok(())
        })
        .await
    }
}

fn still_holds(sandbox: &Sandbox, release: &ReleaseId) -> Result<()> {
    if sandbox.refill.is_some() || sandbox.release != *release {
        return Err(Error::Conflict(
            "what this slot holds is being replaced; take the snapshot when that is done",
        ));
    }
    Ok(())
}

/// What a deployment under way is made from or keeps, and what live was before each deployment that can be undone.
fn needed(c: &Connection, workspace: &WorkspaceId) -> Result<Vec<SnapshotId>> {
    let view = view(c, workspace)?;
    let undoable = undoable(c, workspace, Slot::Live)?;
    let open = open_deployment(c, workspace)?;
    let mut needed = Vec::new();
    for slot in Slot::ALL {
        if let Some(refill) = &view.slot(slot).refill {
            needed.push(refill.keep.clone());
            if let Contents::Snapshot(id) = &refill.with {
                needed.push(id.clone());
            }
        }
    }
    for snapshot in of(c, workspace)? {
        let is_open = |open| snapshot.taken_for == TakenFor::Deployment(open);
        if open.clone().is_some_and(is_open) || snapshot.is_of(Slot::Live, &undoable) {
            needed.push(snapshot.id);
        }
    }
    Ok(needed)
}

pub(crate) fn begin(
    c: &Connection,
    id: &SnapshotId,
    sandbox: &Sandbox,
    slot: Slot,
    taken_for: &TakenFor,
    at: Timestamp,
) -> Result<()> {
    let deployment = match taken_for {
        TakenFor::Deployment(id) => Some(id),
        TakenFor::Somebody | TakenFor::Schedule => None,
    };
    c.execute(
        "INSERT INTO snapshots (id, workspace_id, sandbox_id, slot, release_id, deployment_id, state, created_at, scheduled)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, 'making', ?7, ?8)",
        params![
            id.as_str(),
            sandbox.workspace.as_str(),
            sandbox.id.as_str(),
            slot.as_str(),
            sandbox.release.as_str(),
            deployment.map(DeploymentId::as_str),
            millis(at),
            *taken_for == TakenFor::Schedule,
        ],
    )?;
    Ok(())
}

pub(crate) fn set_state(c: &Connection, id: &SnapshotId, state: SnapshotState) -> Result<()> {
    c.execute(
        "UPDATE snapshots SET state = ?2 WHERE id = ?1",
        params![id.as_str(), state.as_str()],
    )?;
    Ok(())
}

pub(crate) fn must_be_there(c: &Connection, id: &SnapshotId) -> Result<()> {
    match get(c, id)?.state {
        SnapshotState::Ready => Ok(()),
        _ => Err(Error::Conflict("the snapshot was deleted meanwhile")),
    }
}

/// What a slot was before a deployment.
pub(crate) fn of_deployment(c: &Connection, deployment: &DeploymentId, slot: Slot) -> Result<Snapshot> {
    let mut statement =
        c.prepare_cached("SELECT * FROM snapshots WHERE deployment_id = ?1 AND slot = ?2 ORDER BY rowid")?;
    let found = collect(statement.query(params![deployment.as_str(), slot.as_str()])?)?;
    found.into_iter().next().ok_or(Error::NotFound)
}

fn get(c: &Connection, id: &SnapshotId) -> Result<Snapshot> {
    let mut statement = c.prepare_cached("SELECT * FROM snapshots WHERE id = ?1")?;
    let mut rows = statement.query([id.as_str()])?;
    snapshot(rows.next()?.ok_or(Error::NotFound)?)
}

fn of(c: &Connection, workspace: &WorkspaceId) -> Result<Vec<Snapshot>> {
    let mut statement =
        c.prepare_cached("SELECT * FROM snapshots WHERE workspace_id = ?1 ORDER BY created_at DESC, rowid DESC")?;
    collect(statement.query([workspace.as_str()])?)
}

pub(crate) fn all(c: &Connection) -> Result<Vec<Snapshot>> {
    let mut statement = c.prepare_cached("SELECT * FROM snapshots ORDER BY created_at")?;
    collect(statement.query([])?)
}

fn collect(mut rows: rusqlite::Rows<'_>) -> Result<Vec<Snapshot>> {
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.push(snapshot(row)?);
    }
    Ok(found)
}

fn snapshot(row: &Row<'_>) -> Result<Snapshot> {
    let state: String = row.get("state")?;
    let known = SnapshotState::ALL.into_iter().find(|s| s.as_str() == state);
    Ok(Snapshot {
        id: parsed(row, "id")?,
        workspace: parsed(row, "workspace_id")?,
        sandbox: parsed(row, "sandbox_id")?,
        slot: parsed(row, "slot")?,
        release: parsed(row, "release_id")?,
        taken_for: match maybe_parsed(row, "deployment_id")? {
            Some(deployment) => TakenFor::Deployment(deployment),
            None if row.get("scheduled")? => TakenFor::Schedule,
            None => TakenFor::Somebody,
        },
        state: known.ok_or_else(|| Error::Corrupt(format!("state: {state}")))?,
        created_at: time(row, "created_at")?,
    })
}
