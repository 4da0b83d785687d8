//! Workspaces and what their slots point at. It must not know how a sandbox is run.

use choir_core::sandbox::{Desired, Observed};
use choir_core::{DeploymentId, IdRange, Name, ReleaseId, SandboxId, Slot, UserId, WorkspaceId, WorkspaceSettings};
use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, params};

use crate::audit::{AuditEvent, append};
use crate::releases::must_be_usable;
use crate::row::{json, millis, parsed, time, to_json};
use crate::sandboxes::{self, Sandbox, desired_text};
use crate::{Error, Result, Store};

/// A user's pair of sandboxes.
#[derive(Debug, Clone, PartialEq)]
pub struct Workspace {
    pub id: WorkspaceId,
    pub user: UserId,
    pub user_name: Name,
    /// The owner's host ids.
    pub ids: IdRange,
    pub name: Name,
    pub settings: WorkspaceSettings,
    /// Raised by every change of settings or of what a slot means.
    pub epoch: u64,
    pub deleting: bool,
    pub created_at: Timestamp,
}

/// A workspace with what its slots mean now, read at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkspaceView {
    pub workspace: Workspace,
    pub live: Sandbox,
    pub dev: Sandbox,
    pub open_deployment: Option<DeploymentId>,
}

impl WorkspaceView {
    pub fn slot(&self, slot: Slot) -> &Sandbox {
        match slot {
            Slot::Live => &self.live,
            Slot::Dev => &self.dev,
        }
    }
}

/// What a new workspace is made from.
#[derive(Debug, Clone)]
pub struct NewWorkspace {
    pub id: WorkspaceId,
    pub user: UserId,
    pub name: Name,
    pub release: ReleaseId,
    pub live: SandboxId,
    pub dev: SandboxId,
    /// Of both.
    pub desired: Desired,
    pub at: Timestamp,
}

const COLUMNS: &str = "w.id, w.user_id, u.name AS user_name, u.id_range, w.name, w.settings, w.epoch, w.deleting, \
                       w.created_at FROM workspaces w JOIN users u ON u.id = w.user_id";

impl Store {
    /// Makes a workspace and its two sandboxes, all at once. `Exists` when the user has one of this name.
    pub async fn create_workspace(&self, new: NewWorkspace, audit: AuditEvent) -> Result<WorkspaceView> {
        self.write(move |c| {
            must_be_usable(c, &new.release)?;
            c.execute(
                "INSERT INTO workspaces (id, user_id, name, settings, created_at) VALUES (?1, ?2, ?3, ?4, ?5)",
                params![
                    new.id.as_str(),
                    new.user.as_str(),
                    new.name.as_str(),
                    to_json(&WorkspaceSettings::default())?,
                    millis(new.at)
                ],
            )?;
            for (slot, sandbox) in [(Slot::Live, &new.live), (Slot::Dev, &new.dev)] {
                c.execute(
                    "INSERT INTO sandboxes (id, workspace_id, release_id, desired, observed, created_at)
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                    params![
                        sandbox.as_str(),
                        new.id.as_str(),
                        new.release.as_str(),
                        desired_text(new.desired),
                        to_json(&Observed::Creating { since: new.at })?,
                        millis(new.at)
                    ],
                )?;
                c.execute(
                    "INSERT INTO slots (workspace_id, slot, sandbox_id) VALUES (?1, ?2, ?3)",
                    params![new.id.as_str(), slot.as_str(), sandbox.as_str()],
                )?;
            }
            append(c, &audit)?;
            view(c, &new.id)
        })
        .await
    }

    /// All workspaces, those being deleted included; for the start of the hypervisor.
    pub async fn all_workspaces(&self) -> Result<Vec<WorkspaceView>> {
        self.read(|c| views(c, "", [])).await
    }

    /// A user's workspaces by name, those being deleted left out.
    pub async fn workspaces_of(&self, user: &UserId) -> Result<Vec<WorkspaceView>> {
        let user = user.to_string();
        self.read(move |c| views(c, "WHERE w.user_id = ?1 AND w.deleting = 0", [user]))
            .await
    }

    /// One workspace by its owner and name.
    pub async fn workspace_named(&self, user: &UserId, name: &Name) -> Result<WorkspaceView> {
        let (user, name) = (user.to_string(), name.to_string());
        self.read(move |c| {
            views(
                c,
                "WHERE w.user_id = ?1 AND w.name = ?2 AND w.deleting = 0",
                [user, name],
            )?
            .pop()
            .ok_or(Error::NotFound)
        })
        .await
    }

    pub async fn workspace(&self, id: &WorkspaceId) -> Result<WorkspaceView> {
        let id = id.clone();
        self.read(move |c| view(c, &id)).await
    }

    /// Puts a patch on top of the settings and raises the epoch. Read and written in one transaction, so that two
    /// patches at once both count.
    pub async fn patch_settings(
        &self,
        id: &WorkspaceId,
        patch: WorkspaceSettings,
        audit: AuditEvent,
    ) -> Result<WorkspaceView> {
        let id = id.clone();
        self.write(move |c| {
            let before = view(c, &id)?;
            let after = before.workspace.settings.merged(patch);
            c.execute(
                "UPDATE workspaces SET settings = ?2, epoch = epoch + 1 WHERE id = ?1",
                params![id.as_str(), to_json(&after)?],
            )?;
            append(c, &audit)?;
            view(c, &id)
        })
        .await
    }

    /// Marks a workspace and its sandboxes for deletion. Refused while a deployment is open.
    pub async fn delete_workspace(&self, id: &WorkspaceId, audit: AuditEvent) -> Result<WorkspaceView> {
        let id = id.clone();
        self.write(move |c| {
            if view(c, &id)?.open_deployment.is_some() {
                return Err(Error::Conflict(
                    "a deployment of this workspace is open; wait until it has ended",
                ));
            }
            c.execute(
                "UPDATE workspaces SET deleting = 1, epoch = epoch + 1 WHERE id = ?1",
                [id.as_str()],
            )?;
            c.execute(
                "UPDATE sandboxes SET desired = 'deleted' WHERE workspace_id = ?1",
                [id.as_str()],
            )?;
            append(c, &audit)?;
            view(c, &id)
        })
        .await
    }

    /// Removes the rows of a workspace whose sandboxes are all gone; true when it did.
    pub async fn forget_workspace(&self, id: &WorkspaceId) -> Result<bool> {
        let id = id.clone();
        self.write(move |c| {
            let left: i64 = c.query_row(
                "SELECT count(*) FROM sandboxes WHERE workspace_id = ?1 AND observed <> ?2",
                params![id.as_str(), to_json(&Observed::Deleted)?],
                |row| row.get(0),
            )?;
            if left > 0 {
                return Ok(false);
            }
            c.execute("DELETE FROM slots WHERE workspace_id = ?1", [id.as_str()])?;
            c.execute("DELETE FROM sandboxes WHERE workspace_id = ?1", [id.as_str()])?;
            Ok(c.execute("DELETE FROM workspaces WHERE id = ?1 AND deleting = 1", [id.as_str()])? == 1)
        })
        .await
    }

    /// What a sandbox should be from now on.
    pub async fn set_desired(&self, sandbox: &SandboxId, desired: Desired, audit: Option<AuditEvent>) -> Result<()> {
        let id = sandbox.clone();
        self.write(move |c| {
            let changed = c.execute(
                "UPDATE sandboxes SET desired = ?2 WHERE id = ?1 AND desired <> 'deleted'",
                params![id.as_str(), sandboxes::desired_text(desired)],
            )?;
            if changed == 0 {
                return Err(Error::NotFound);
            }
            audit.iter().try_for_each(|event| append(c, event))
        })
        .await
    }
}

pub(crate) fn view(c: &Connection, id: &WorkspaceId) -> Result<WorkspaceView> {
    views(c, "WHERE w.id = ?1", [id.as_str()])?.pop().ok_or(Error::NotFound)
}

pub(crate) fn views<P: rusqlite::Params>(c: &Connection, condition: &str, params: P) -> Result<Vec<WorkspaceView>> {
    let mut statement = c.prepare_cached(&format!("SELECT {COLUMNS} {condition} ORDER BY u.name, w.name"))?;
    let mut rows = statement.query(params)?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        let workspace = workspace(row)?;
        found.push(WorkspaceView {
            live: sandboxes::in_slot(c, &workspace.id, Slot::Live)?,
            dev: sandboxes::in_slot(c, &workspace.id, Slot::Dev)?,
            open_deployment: open_deployment(c, &workspace.id)?,
            workspace,
        });
    }
    Ok(found)
}

fn workspace(row: &Row<'_>) -> Result<Workspace> {
    Ok(Workspace {
        id: parsed(row, "id")?,
        user: parsed(row, "user_id")?,
        user_name: parsed(row, "user_name")?,
        ids: IdRange::nth(row.get("id_range")?).ok_or_else(|| Error::Corrupt("id_range".into()))?,
        name: parsed(row, "name")?,
        settings: json(row, "settings")?,
        epoch: row.get("epoch")?,
        deleting: row.get("deleting")?,
        created_at: time(row, "created_at")?,
    })
}

pub(crate) fn open_deployment(c: &Connection, workspace: &WorkspaceId) -> Result<Option<DeploymentId>> {
    let id: Option<String> = c
        .prepare_cached("SELECT id FROM deployments WHERE workspace_id = ?1 AND finished_at IS NULL")?
        .query_row([workspace.as_str()], |row| row.get(0))
        .optional()?;
    id.map(|text| text.parse().map_err(|e| Error::Corrupt(format!("deployments.id: {e}"))))
        .transpose()
}
