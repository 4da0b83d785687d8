//! Deployments and their journal. The switch itself is one transaction.

use choir_core::deployment::{Contents, Displaced, Kind, Refill, Step, UNDOABLE};
use choir_core::{DeploymentId, ReleaseId, SandboxId, Slot, SnapshotId, WorkspaceId};
use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, params};

use crate::audit::{AuditEvent, append};
use crate::releases::must_be_usable;
use crate::row::{maybe_json, maybe_time, millis, parsed, time, to_json};
use crate::snapshots::{self, SnapshotState, TakenFor};
use crate::workspaces::{WorkspaceView, view};
use crate::{Error, Result, Store};

/// One journalled attempt.
#[derive(Debug, Clone, PartialEq)]
pub struct Deployment {
    pub id: DeploymentId,
    pub workspace: WorkspaceId,
    pub kind: Kind,
    /// The slot that it changes; a swap's is live.
    pub slot: Slot,
    pub step: Step,
    pub reason: Option<String>,
    pub displaced: Option<Displaced>,
    pub created_at: Timestamp,
    pub finished_at: Option<Timestamp>,
    pub steps: Vec<StepTime>,
}

/// What is about to be tried.
#[derive(Debug, Clone)]
pub struct NewDeployment {
    pub id: DeploymentId,
    pub workspace: WorkspaceId,
    pub kind: Kind,
    pub slot: Slot,
    pub idempotency_key: Option<String>,
    /// Why, where nobody asked for it.
    pub reason: Option<String>,
}

/// How a deployment ended.
#[derive(Debug, Clone)]
pub struct Ended {
    pub step: Step,
    pub reason: Option<String>,
    pub displaced: Option<Displaced>,
}

/// When a step began.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepTime {
    pub step: Step,
    pub at: Timestamp,
}

/// What asking for a deployment came to.
#[derive(Debug, Clone, PartialEq)]
pub enum Begun {
    /// It is journalled; the caller carries it out.
    New(Deployment),
    /// The same idempotency key was used before: that deployment.
    Same(Deployment),
    /// Another one is open.
    Open(DeploymentId),
}

impl Store {
    /// The deployment that the same idempotency key began before.
    pub async fn same_deployment(&self, new: &NewDeployment) -> Result<Option<Deployment>> {
        let new = new.clone();
        self.read(move |c| same(c, &new)).await
    }

    /// Journals the intent, unless another deployment of the workspace is open.
    pub async fn begin_deployment(&self, new: NewDeployment, audit: AuditEvent) -> Result<Begun> {
        self.write(move |c| {
            if let Some(same) = same(c, &new)? {
                return Ok(Begun::Same(same));
            }
            let view = view(c, &new.workspace)?;
            if view.workspace.deleting {
                return Err(Error::NotFound);
            }
            if let Some(open) = view.open_deployment {
                return Ok(Begun::Open(open));
            }
            c.execute(
                "INSERT INTO deployments (id, workspace_id, kind, slot, step, actor, idempotency_key, created_at, reason)
                 VALUES (?1, ?2, ?3, ?4, 'preparing', ?5, ?6, ?7, ?8)",
                params![
                    new.id.as_str(),
                    new.workspace.as_str(),
                    new.kind.as_str(),
                    new.slot.as_str(),
                    audit.actor,
                    new.idempotency_key,
                    millis(audit.at),
                    new.reason
                ],
            )?;
            journal(c, &new.id, Step::Preparing, audit.at)?;
            append(c, &audit)?;
            get(c, new.id.as_str()).map(Begun::New)
        })
        .await
    }

    /// Exchanges the two pointers, raises the epoch, and journals it: all or nothing. `times` are the steps passed
    /// since the deployment began.
    pub async fn switch(&self, id: &DeploymentId, times: Vec<StepTime>, audit: AuditEvent) -> Result<WorkspaceView> {
        let id = id.clone();
        self.write(move |c| {
            let deployment = open(c, &id)?;
            let before = view(c, &deployment.workspace)?;
            let mut point =
                c.prepare_cached("UPDATE slots SET sandbox_id = ?3 WHERE workspace_id = ?1 AND slot = ?2")?;
            let workspace = deployment.workspace.as_str();
            // One sandbox has one slot, always: the row must go before the other may take its place.
            c.execute(
                "DELETE FROM slots WHERE workspace_id = ?1 AND slot = 'dev'",
                [workspace],
            )?;
            point.execute(params![workspace, "live", before.dev.id.as_str()])?;
            c.execute(
                "INSERT INTO slots (workspace_id, slot, sandbox_id) VALUES (?1, 'dev', ?2)",
                params![workspace, before.live.id.as_str()],
            )?;
            c.execute("UPDATE workspaces SET epoch = epoch + 1 WHERE id = ?1", [workspace])?;
            for passed in times {
                journal(c, &id, passed.step, passed.at)?;
            }
            set_step(c, &id, Step::Draining, audit.at)?;
            append(c, &audit)?;
            view(c, &deployment.workspace)
        })
        .await
    }

    /// Says what the deployment's slot is to hold from now on, and under which release; and that the slot is to run.
    /// What the slot holds is kept as the snapshot that `refill` names.
    pub async fn switch_contents(
        &self,
        refill: Refill,
        release: ReleaseId,
        times: Vec<StepTime>,
        audit: AuditEvent,
    ) -> Result<WorkspaceView> {
        self.write(move |c| {
            let deployment = open(c, &refill.deployment)?;
            let before = view(c, &deployment.workspace)?;
            let sandbox = before.slot(deployment.slot);
            if sandbox.refill.is_some() {
                return Err(Error::Conflict(
                    "what the slot is to hold is still being put in place; the log says what hinders it",
                ));
            }
            match &refill.with {
                Contents::Snapshot(source) => snapshots::must_be_there(c, source)?,
                Contents::Release(source) => must_be_usable(c, source)?,
            }
            snapshots::begin(
                c,
                &refill.keep,
                sandbox,
                deployment.slot,
                &TakenFor::Deployment(deployment.id.clone()),
                audit.at,
            )?;
            fill(c, &sandbox.id, &refill, &release)?;
            for passed in times {
                journal(c, &deployment.id, passed.step, passed.at)?;
            }
            set_step(c, &deployment.id, Step::Draining, audit.at)?;
            append(c, &audit)?;
            view(c, &deployment.workspace)
        })
        .await
    }

    /// The volume holds what it was to hold.
    pub async fn refilled(&self, sandbox: &SandboxId, refill: &Refill, at: Timestamp) -> Result<()> {
        let (sandbox, refill) = (sandbox.clone(), refill.clone());
        self.write(move |c| {
            c.execute(
                "UPDATE sandboxes SET refill = NULL WHERE id = ?1 AND refill = ?2",
                params![sandbox.as_str(), to_json(&refill)?],
            )?;
            snapshots::set_state(c, &refill.keep, SnapshotState::Ready)?;
            if get(c, refill.deployment.as_str())?.step == Step::Draining {
                set_step(c, &refill.deployment, Step::Starting, at)?;
            }
            Ok(())
        })
        .await
    }

    /// The deployment came to nothing for this reason: its slot is to hold again what it held before. What it holds by now
    /// is kept as the snapshot `keep`, since people may have written to it.
    pub async fn return_contents(
        &self,
        id: &DeploymentId,
        keep: &SnapshotId,
        reason: &str,
        audit: AuditEvent,
    ) -> Result<Refill> {
        let (id, keep, reason) = (id.clone(), keep.clone(), reason.to_owned());
        self.write(move |c| {
            let deployment = open(c, &id)?;
            let view = view(c, &deployment.workspace)?;
            let sandbox = view.slot(deployment.slot);
            let before = snapshots::of_deployment(c, &id, deployment.slot)?;
            let keep = match &sandbox.refill {
                // The new contents were never there, or never whole.
                Some(pending) => pending.keep.clone(),
                None => {
                    snapshots::begin(
                        c,
                        &keep,
                        sandbox,
                        deployment.slot,
                        &TakenFor::Deployment(id.clone()),
                        audit.at,
                    )?;
                    keep
                }
            };
            let refill = Refill {
                deployment: id.clone(),
                keep,
                with: Contents::Snapshot(before.id),
            };
            fill(c, &sandbox.id, &refill, &before.release)?;
            c.execute(
                "UPDATE deployments SET reason = ?2 WHERE id = ?1",
                params![id.as_str(), reason],
            )?;
            set_step(c, &id, Step::Returning, audit.at)?;
            append(c, &audit)?;
            Ok(refill)
        })
        .await
    }

    /// Ends a deployment with its last step.
    pub async fn finish_deployment(&self, id: &DeploymentId, ended: Ended, audit: AuditEvent) -> Result<Deployment> {
        let id = id.clone();
        self.write(move |c| {
            set_step(c, &id, ended.step, audit.at)?;
            let displaced = ended.displaced.as_ref().map(to_json).transpose()?;
            c.execute(
                "UPDATE deployments SET finished_at = ?2, reason = coalesce(?3, reason), displaced = ?4 WHERE id = ?1",
                params![id.as_str(), millis(audit.at), ended.reason, displaced],
            )?;
            append(c, &audit)?;
            get(c, id.as_str())
        })
        .await
    }

    pub async fn deployment(&self, workspace: &WorkspaceId, id: &DeploymentId) -> Result<Deployment> {
        let (workspace, id) = (workspace.clone(), id.clone());
        self.read(move |c| {
            get(c, id.as_str()).and_then(|d| {
                if d.workspace == workspace {
                    Ok(d)
                } else {
                    Err(Error::NotFound)
                }
            })
        })
        .await
    }

    /// A workspace's deployments, newest first, those before `before` only.
    pub async fn deployments(
        &self,
        workspace: &WorkspaceId,
        before: Option<Timestamp>,
        limit: u32,
    ) -> Result<Vec<Deployment>> {
        let workspace = workspace.clone();
        self.read(move |c| {
            let mut statement = c.prepare_cached(
                "SELECT id FROM deployments WHERE workspace_id = ?1 AND (?2 IS NULL OR created_at < ?2)
                 ORDER BY created_at DESC, id DESC LIMIT ?3",
            )?;
            let ids: Vec<String> = statement
                .query_map(params![workspace.as_str(), before.map(millis), limit], |row| row.get(0))?
                .collect::<rusqlite::Result<_>>()?;
            ids.iter().map(|id| get(c, id)).collect()
        })
        .await
    }

    /// The last deployments of live that succeeded and of which it is known what live was before, newest first: those that
    /// can be undone.
    pub async fn undoable(&self, workspace: &WorkspaceId) -> Result<Vec<Deployment>> {
        let workspace = workspace.clone();
        self.read(move |c| undoable(c, &workspace, Slot::Live)).await
    }

    /// Deployments a crash left open, of all workspaces.
    pub async fn open_deployments(&self) -> Result<Vec<Deployment>> {
        self.read(|c| {
            let mut statement = c.prepare_cached("SELECT id FROM deployments WHERE finished_at IS NULL")?;
            let ids: Vec<String> = statement
                .query_map([], |row| row.get(0))?
                .collect::<rusqlite::Result<_>>()?;
            ids.iter().map(|id| get(c, id)).collect()
        })
        .await
    }
}

/// The last that changed a slot and succeeded, newest first, of which there is still what it held before.
pub(crate) fn undoable(c: &Connection, workspace: &WorkspaceId, slot: Slot) -> Result<Vec<Deployment>> {
    last(c, workspace, slot, Step::Succeeded)
}

/// The last of a slot that were taken back, newest first, of which there is still what the slot held.
pub(crate) fn taken_back(c: &Connection, workspace: &WorkspaceId, slot: Slot) -> Result<Vec<Deployment>> {
    last(c, workspace, slot, Step::RolledBack)
}

fn last(c: &Connection, workspace: &WorkspaceId, slot: Slot, step: Step) -> Result<Vec<Deployment>> {
    let mut statement = c.prepare_cached(
        "SELECT d.id FROM deployments d WHERE d.workspace_id = ?1 AND d.slot = ?2 AND d.step = ?4 AND EXISTS (
             SELECT 1 FROM snapshots s WHERE s.deployment_id = d.id AND s.slot = d.slot AND s.state = 'ready')
         ORDER BY d.rowid DESC LIMIT ?3",
    )?;
    let ids: Vec<String> = statement
        .query_map(
            params![workspace.as_str(), slot.as_str(), UNDOABLE, step.as_str()],
            |row| row.get(0),
        )?
        .collect::<rusqlite::Result<_>>()?;
    ids.iter().map(|id| get(c, id)).collect()
}

fn same(c: &Connection, new: &NewDeployment) -> Result<Option<Deployment>> {
    let id: Option<String> = c
        .prepare_cached("SELECT id FROM deployments WHERE workspace_id = ?1 AND idempotency_key = ?2")?
        .query_row(params![new.workspace.as_str(), new.idempotency_key], |row| row.get(0))
        .optional()?;
    id.map(|id| get(c, &id)).transpose()
}

/// The deployment, which must not have ended.
fn open(c: &Connection, id: &DeploymentId) -> Result<Deployment> {
    let deployment = get(c, id.as_str())?;
    match deployment.finished_at {
        None => Ok(deployment),
        Some(_) => Err(Error::Conflict("this deployment has ended")),
    }
}

/// A sandbox's volume is to become this, under another release; its hosts may mean another port then.
fn fill(c: &Connection, sandbox: &SandboxId, refill: &Refill, release: &ReleaseId) -> Result<()> {
    c.execute(
        "UPDATE sandboxes SET refill = ?2, release_id = ?3, desired = 'running' WHERE id = ?1 AND desired <> 'deleted'",
        params![sandbox.as_str(), to_json(refill)?, release.as_str()],
    )?;
    c.execute(
        "UPDATE workspaces SET epoch = epoch + 1
         WHERE id = (SELECT workspace_id FROM sandboxes WHERE id = ?1)",
        [sandbox.as_str()],
    )?;
    Ok(())
}

fn get(c: &Connection, id: &str) -> Result<Deployment> {
    let mut statement = c.prepare_cached("SELECT * FROM deployments WHERE id = ?1")?;
    let mut rows = statement.query([id])?;
    let mut found = deployment(rows.next()?.ok_or(Error::NotFound)?)?;
    let mut statement =
        c.prepare_cached("SELECT step, at FROM deployment_steps WHERE deployment_id = ?1 ORDER BY ordinal")?;
    let mut rows = statement.query([id])?;
    while let Some(row) = rows.next()? {
        found.steps.push(StepTime {
            step: step(&row.get::<_, String>("step")?)?,
            at: time(row, "at")?,
        });
    }
    Ok(found)
}

fn deployment(row: &Row<'_>) -> Result<Deployment> {
    Ok(Deployment {
        id: parsed(row, "id")?,
        workspace: parsed(row, "workspace_id")?,
        kind: kind(&row.get::<_, String>("kind")?)?,
        slot: parsed(row, "slot")?,
        step: step(&row.get::<_, String>("step")?)?,
        reason: row.get("reason")?,
        displaced: maybe_json(row, "displaced")?,
        created_at: time(row, "created_at")?,
        finished_at: maybe_time(row, "finished_at")?,
        steps: Vec::new(),
    })
}

fn set_step(c: &Connection, id: &DeploymentId, step: Step, at: Timestamp) -> Result<()> {
    c.execute(
        "UPDATE deployments SET step = ?2 WHERE id = ?1",
        params![id.as_str(), step.as_str()],
    )?;
    journal(c, id, step, at)
}

fn journal(c: &Connection, id: &DeploymentId, step: Step, at: Timestamp) -> Result<()> {
    c.execute(
        "INSERT OR IGNORE INTO deployment_steps (deployment_id, step, at) VALUES (?1, ?2, ?3)",
        params![id.as_str(), step.as_str(), millis(at)],
    )?;
    Ok(())
}

fn kind(text: &str) -> Result<Kind> {
    let found = Kind::ALL.into_iter().find(|k| k.as_str() == text);
    found.ok_or_else(|| Error::Corrupt(format!("kind: {text}")))
}

fn step(text: &str) -> Result<Step> {
    let found = Step::ALL.into_iter().find(|s| s.as_str() == text);
    found.ok_or_else(|| Error::Corrupt(format!("step: {text}")))
}
