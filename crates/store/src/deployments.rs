//! Deployments and their journal. The switch itself is one transaction.

use choir_core::deployment::{Kind, Step};
use choir_core::{DeploymentId, WorkspaceId};
use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, params};

use crate::audit::{AuditEvent, append};
use crate::row::{maybe_time, millis, parsed, time};
use crate::workspaces::{WorkspaceView, view};
use crate::{Error, Result, Store};

/// One journalled attempt.
#[derive(Debug, Clone, PartialEq)]
pub struct Deployment {
    pub id: DeploymentId,
    pub workspace: WorkspaceId,
    pub kind: Kind,
    pub step: Step,
    pub reason: Option<String>,
    pub created_at: Timestamp,
    pub finished_at: Option<Timestamp>,
    pub steps: Vec<StepTime>,
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
    /// Journals the intent, unless another deployment of the workspace is open.
    pub async fn begin_deployment(
        &self,
        id: DeploymentId,
        workspace: &WorkspaceId,
        kind: Kind,
        idempotency_key: Option<String>,
        audit: AuditEvent,
    ) -> Result<Begun> {
        let workspace = workspace.clone();
        self.write(move |c| {
            let same: Option<String> = c
                .query_row(
                    "SELECT id FROM deployments WHERE workspace_id = ?1 AND idempotency_key = ?2",
                    params![workspace.as_str(), idempotency_key],
                    |row| row.get(0),
                )
                .optional()?;
            if let Some(same) = same {
                return get(c, &same).map(Begun::Same);
            }
            if let Some(open) = view(c, &workspace)?.open_deployment {
                return Ok(Begun::Open(open));
            }
            c.execute(
                "INSERT INTO deployments (id, workspace_id, kind, step, actor, idempotency_key, created_at)
                 VALUES (?1, ?2, ?3, 'preparing', ?4, ?5, ?6)",
                params![
                    id.as_str(),
                    workspace.as_str(),
                    kind_text(kind),
                    audit.actor,
                    idempotency_key,
                    millis(audit.at)
                ],
            )?;
            journal(c, &id, Step::Preparing, audit.at)?;
            append(c, &audit)?;
            get(c, id.as_str()).map(Begun::New)
        })
        .await
    }

    /// Exchanges the two pointers, raises the epoch, and journals it: all or nothing. `times` are the steps passed
    /// since the deployment began.
    pub async fn switch(&self, id: &DeploymentId, times: Vec<StepTime>, audit: AuditEvent) -> Result<WorkspaceView> {
        let id = id.clone();
        self.write(move |c| {
            let deployment = get(c, id.as_str())?;
            if deployment.finished_at.is_some() {
                return Err(Error::Conflict("this deployment has ended"));
            }
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

    /// Ends a deployment with its last step.
    pub async fn finish_deployment(
        &self,
        id: &DeploymentId,
        step: Step,
        reason: Option<String>,
        audit: AuditEvent,
    ) -> Result<Deployment> {
        let id = id.clone();
        self.write(move |c| {
            set_step(c, &id, step, audit.at)?;
            c.execute(
                "UPDATE deployments SET finished_at = ?2, reason = ?3 WHERE id = ?1",
                params![id.as_str(), millis(audit.at), reason],
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
        kind: match row.get::<_, String>("kind")?.as_str() {
            "swap" => Kind::Swap,
            other => return Err(Error::Corrupt(format!("kind: {other}"))),
        },
        step: step(&row.get::<_, String>("step")?)?,
        reason: row.get("reason")?,
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

fn kind_text(kind: Kind) -> &'static str {
    match kind {
        Kind::Swap => "swap",
    }
}

fn step(text: &str) -> Result<Step> {
    [
        Step::Preparing,
        Step::Verifying,
        Step::Switching,
        Step::Draining,
        Step::Succeeded,
        Step::Failed,
    ]
    .into_iter()
    .find(|s| s.as_str() == text)
    .ok_or_else(|| Error::Corrupt(format!("step: {text}")))
}
