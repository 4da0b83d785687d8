//! Snapshots: taken, compared, sent, received, thinned out and deleted. The row comes before the volume and goes after it.
//! It must not know HTTP.

use std::sync::Arc;
use std::time::Duration;

use choir_core::sandbox::Observed;
use choir_core::snapshot::Diff;
use choir_core::{Slot, SnapshotId, WorkspaceId};
use choir_store::{AuditEvent, Deployment, Snapshot, TakenFor, WorkspaceView};

use crate::app::App;
use crate::error::{ApiError, ApiResult};
use crate::fail;
use crate::random::draw;
use crate::reconcile::Status;

pub mod archive;
pub mod routes;
mod schedule;

/// How long the volume of a new sandbox is waited for.
const MADE_WITHIN: Duration = Duration::from_secs(60);
/// Volumes are walked for many seconds, and only so many users may have that done at once.
pub const DIFFS_AT_ONCE: usize = 2;
const MOST_DIFFERENCES: usize = 1000;
/// When to ask again, where as many are under way.
const RETRY_S: u64 = 5;

impl App {
    /// Takes a snapshot of a slot that somebody asked for.
    pub async fn take_snapshot(self: &Arc<Self>, view: &WorkspaceView, slot: Slot) -> ApiResult<Snapshot> {
        let audit = self.event(view, "snapshot.take");
        let (app, view) = (self.clone(), view.clone());
        // Apart, since a caller that goes away must not leave it half made.
        let taken = tokio::spawn(async move { app.copy_volume(&view, slot, TakenFor::Somebody, audit).await });
        taken.await.map_err(ApiError::internal)?
    }

    /// Takes a snapshot of a slot before a deployment changes it.
    pub(crate) async fn snapshot_for(
        &self,
        deployment: &Deployment,
        view: &WorkspaceView,
        slot: Slot,
    ) -> Result<Snapshot, String> {
        let audit = AuditEvent {
            actor: "system".into(),
            ..self.event(view, "snapshot.take")
        };
        self.copy_volume(view, slot, TakenFor::Deployment(deployment.id.clone()), audit)
            .await
            .map_err(|e| format!("no snapshot of {slot} could be taken: {e}"))
    }

    async fn copy_volume(
        &self,
        view: &WorkspaceView,
        slot: Slot,
        taken_for: TakenFor,
        audit: AuditEvent,
    ) -> ApiResult<Snapshot> {
        self.has_files(view, slot).await?;
        let id = SnapshotId::from_random(draw(&*self.random));
        let snapshot = self
            .store
            .begin_snapshot(&id, &view.workspace.id, slot, taken_for, audit)
            .await?;
        fail::point("snapshot.begun").await.map_err(ApiError::internal)?;
        let volumes = &self.fleet.services.volumes;
        if let Err(error) = volumes.snapshot(snapshot.sandbox.as_str(), id.as_str(), true).await {
            self.remove_snapshot(&id).await;
            return Err(error.into());
        }
        fail::point("snapshot.copied").await.map_err(ApiError::internal)?;
        let made = self.store.snapshot_made(&id).await;
        self.recorded(&id, made).await
    }

    /// Removes the volume that no row speaks of, where there is to be none.
    async fn recorded(&self, id: &SnapshotId, made: choir_store::Result<Snapshot>) -> ApiResult<Snapshot> {
        if matches!(
            made,
            Err(choir_store::Error::NotFound | choir_store::Error::Conflict(_))
        ) {
            // Its workspace was deleted meanwhile, or its slot got other contents.
            self.remove_snapshot(id).await;
        }
        Ok(made?)
    }

    /// Whether the volume of a slot was ever made; the one of a new sandbox is waited for.
    pub(crate) async fn has_files(&self, view: &WorkspaceView, slot: Slot) -> ApiResult<()> {
        let id = &view.slot(slot).id;
        if let Some(handle) = self.fleet.handle(id) {
            let made = |status: &Status| !matches!(status.observed, Observed::Creating { .. });
            handle.settle(MADE_WITHIN, made).await;
        }
        match self.fleet.services.volumes.usage(id.as_str()).await {
            Err(choir_runtime::Error::NotFound) => {
                let message = format!("{slot} has no files yet; start it first.");
                Err(ApiError::conflict("no_files", message))
            }
            found => Ok(found.map(drop)?),
        }
    }

    /// What another snapshot, or a slot now, holds otherwise than a snapshot.
    pub async fn diff_snapshots(
        &self,
        view: &WorkspaceView,
        from: &SnapshotId,
        to: Option<&SnapshotId>,
        slot: Slot,
    ) -> ApiResult<Diff> {
        let of = &view.workspace.id;
        let from = self.store.snapshot(of, from).await?.id.to_string();
        let to = match to {
            Some(to) => self.store.snapshot(of, to).await?.id.to_string(),
            None => {
                self.has_files(view, slot).await?;
                view.slot(slot).id.to_string()
            }
        };
        let turn = self.diffs.clone().try_acquire_owned();
        let turn = turn.map_err(|_| ApiError::too_many(RETRY_S))?;
        let volumes = self.fleet.services.volumes.clone();
        // Apart, since the work goes on when a caller goes away, and counts until it ends.
        let compared = tokio::spawn(async move {
            let _turn = turn;
            volumes.diff(&from, &to, MOST_DIFFERENCES).await
        });
        match compared.await.map_err(ApiError::internal)? {
            Err(choir_runtime::Error::NotFound) => Err(ApiError::not_found()),
            Err(choir_runtime::Error::Busy(_)) => {
                let message = "What is compared was replaced meanwhile; try again.";
                Err(ApiError::conflict("busy", message))
            }
            compared => Ok(compared?),
        }
    }

    pub async fn delete_snapshot(&self, view: &WorkspaceView, id: &SnapshotId) -> ApiResult<()> {
        let snapshot = self.store.snapshot(&view.workspace.id, id).await?;
        let audit = self.event(view, "snapshot.delete");
        self.store.drop_snapshot(&snapshot.id, audit).await?;
        self.remove_snapshot(&snapshot.id).await;
        Ok(())
    }

    /// Deletes what nobody asked for in a workspace and is not worth its room any more.
    pub(crate) async fn thin_snapshots(&self, workspace: &WorkspaceId) {
        match self.store.thin_snapshots(workspace, self.clock.now()).await {
            Ok(spare) => {
                for snapshot in spare {
                    self.remove_snapshot(&snapshot.id).await;
                }
            }
            Err(error) => tracing::warn!(%error, "snapshots could not be thinned out; it is tried again later"),
        }
    }

    /// Removes what a crash left half made or half deleted. Before anything new is made.
    pub async fn clear_snapshots(&self) -> Result<(), choir_store::Error> {
        for snapshot in self.store.unfinished_snapshots().await? {
            self.remove_snapshot(&snapshot.id).await;
        }
        Ok(())
    }

    /// The volume, then the row; what fails is done at the next start.
    async fn remove_snapshot(&self, id: &SnapshotId) {
        let removed = async {
            let volumes = &self.fleet.services.volumes;
            // Where it was only half made, too: what cannot be removed now is tried again later.
            self.store.give_up_snapshot(id).await.map_err(|e| e.to_string())?;
            fail::point("prune.marked").await?;
            volumes.delete(id.as_str()).await.map_err(|e| e.to_string())?;
            fail::point("prune.deleted").await?;
            self.store.forget_snapshot(id).await.map_err(|e| e.to_string())
        };
        if let Err(reason) = removed.await {
            tracing::warn!(snapshot = %id, reason, "a snapshot stays for now");
        }
    }
}
