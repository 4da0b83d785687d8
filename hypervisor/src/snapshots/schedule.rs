//! Snapshots that nobody asked for: one an hour of what ran, thinned out, and given up where the disk gets full. It must
//! not know HTTP.

use std::sync::Arc;
use std::time::Duration;

use choir_core::snapshot::due;
use choir_store::{AuditEvent, TakenFor};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::app::App;
use crate::error::ApiResult;
use crate::reconcile::Handle;

/// From one look to the next.
const LOOK: Duration = Duration::from_secs(60);
/// Of the disk, how much is to be free for one more to be taken.
const ROOMY_PERCENT: u64 = 20;
/// Below that, the oldest go.
const FULL_PERCENT: u64 = 10;
/// How many go at once. The disk takes a while to have their room.
const GO_AT_ONCE: u32 = 10;

impl App {
    /// Takes what is due until the hypervisor stops.
    pub async fn keep_snapshots(self: Arc<Self>, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
            if let Err(error) = self.scheduled_snapshots(self.clock.now()).await {
                tracing::warn!(%error, "snapshots that are due could not be taken; it is tried again");
            }
        }
    }

    /// One look: what is due is taken, and what is not worth its room goes.
    pub async fn scheduled_snapshots(self: &Arc<Self>, now: Timestamp) -> ApiResult<()> {
        let space = self.fleet.services.volumes.space().await?;
        let free_percent = u128::from(space.free) * 100 / u128::from(space.total.max(1));
        if free_percent < u128::from(FULL_PERCENT) {
            for oldest in self.store.oldest_scheduled(GO_AT_ONCE).await? {
                tracing::warn!(snapshot = %oldest.id, free_percent, "the disk gets full; an old snapshot goes");
                let view = self.store.workspace(&oldest.workspace).await?;
                let audit = AuditEvent {
                    actor: "system".into(),
                    ..self.event(&view, "snapshot.delete")
                };
                match self.store.drop_snapshot(&oldest.id, audit).await {
                    Ok(()) => self.remove_snapshot(&oldest.id).await,
                    // Somebody is putting it into a slot just now.
                    Err(choir_store::Error::Conflict(_) | choir_store::Error::NotFound) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        if free_percent < u128::from(ROOMY_PERCENT) {
            return Ok(());
        }
        let last = self.store.last_snapshots().await?;
        for handle in self.fleet.handles() {
            let observed = handle.status.borrow().observed.clone();
            if due(&observed, last.get(&handle.id).copied(), handle.snapshot_every(), now)
                && let Err(error) = self.scheduled_snapshot(&handle).await
            {
                tracing::warn!(sandbox.id = %handle.id, %error, "no snapshot was taken; it is tried again");
            }
        }
        Ok(())
    }

    async fn scheduled_snapshot(self: &Arc<Self>, handle: &Handle) -> ApiResult<()> {
        let view = self.store.workspace(&handle.workspace).await?;
        let audit = AuditEvent {
            actor: "system".into(),
            ..self.event(&view, "snapshot.take")
        };
        let slot = handle.slot();
        if view.slot(slot).id != handle.id {
            // It is being swapped just now.
            return Ok(());
        }
        self.copy_volume(&view, slot, TakenFor::Schedule, audit).await?;
        self.thin_snapshots(&view.workspace.id).await;
        Ok(())
    }
}
