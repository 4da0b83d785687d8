//! Swap, and the rollback of one whose displaced sandbox is still frozen: both targets proven healthy, the pointers
//! exchanged in one transaction, published, drained, and the one that left live frozen as it is. It must not touch what a
//! sandbox holds.

use std::time::Duration;

use choir_core::deployment::{Displaced, Kind, Step};
use choir_core::sandbox::Observed;
use choir_core::{Awake, Slot};
use choir_store::{AuditEvent, Deployment, Ended, WorkspaceView};

use super::{DRAINED_WITHIN, HEALTHY_WITHIN, text};
use crate::app::{App, SERVICE_RESTART};
use crate::fail;
use crate::reconcile::Handle;

/// How long a websocket may take to end once it was told to.
const CLOSED_WITHIN: Duration = Duration::from_secs(2);
/// Between two looks whether they have.
const LOOK: Duration = Duration::from_millis(5);

impl App {
    pub(super) async fn exchange(
        &self,
        deployment: &Deployment,
        view: &WorkspaceView,
        asked: &AuditEvent,
    ) -> Result<Ended, String> {
        let mut times = vec![self.passed(Step::Verifying)];
        self.stepped(asked, deployment, Step::Verifying, None);
        self.ready_for(deployment.kind, view).await?;
        fail::point("exchange.verified").await?;
        let (live, dev) = tokio::join!(
            self.snapshot_for(deployment, view, Slot::Live),
            self.snapshot_for(deployment, view, Slot::Dev)
        );
        live.and(dev)?;
        fail::point("exchange.kept").await?;
        times.push(self.passed(Step::Switching));
        self.stepped(asked, deployment, Step::Switching, None);
        let audit = AuditEvent {
            at: self.clock.now(),
            action: "workspace.switch",
            ..asked.clone()
        };
        let begun = std::time::Instant::now();
        // Routes are published with the commit, under the table's lock, so that they are never older than it.
        let after = self.store.switch(&deployment.id, times, audit).await.map_err(text)?;
        // Nothing may fail from here on.
        fail::point("exchange.switched").await.ok();
        self.publish(&after).await;
        let took_us = begun.elapsed().as_micros();
        tracing::info!(deployment = %deployment.id, took_us, "switched");
        fail::point("exchange.published").await.ok();
        self.stepped(asked, deployment, Step::Draining, None);
        // Its websockets came through dev's address, which leads elsewhere now.
        if let Some(generation) = self.fleet.handle(&after.live.id).and_then(|handle| handle.ready()) {
            self.forwarder.close_tunnels(&generation, SERVICE_RESTART);
        }
        let displaced = match self.fleet.handle(&after.dev.id) {
            Some(handle) => self.freeze(&handle).await,
            None => None,
        };
        fail::point("exchange.frozen").await.ok();
        // Which slot's part of the processors each gets. Not before: a worker that is at it would not freeze.
        self.fleet.limits_changed(&after).await;
        Ok(Ended {
            step: Step::Succeeded,
            reason: None,
            displaced,
        })
    }

    /// Both sandboxes up and answering, and the app of the one that is to be live well. A rollback asks nothing of what it
    /// takes out of live.
    async fn ready_for(&self, kind: Kind, view: &WorkspaceView) -> Result<(), String> {
        let ready = |slot: Slot| async move {
            let handle = self.fleet.handle(&view.slot(slot).id).ok_or("the sandbox is gone")?;
            let why = |e| format!("{slot} is not healthy: {e}");
            // Going back must not wait for memory that what it takes out of live may be holding.
            let woken = match kind {
                Kind::Rollback => handle.wake_anyhow(HEALTHY_WITHIN).await,
                _ => handle.wake(HEALTHY_WITHIN).await,
            };
            let generation = woken.map_err(why)?;
            handle.activity.touch();
            match slot {
                Slot::Dev => self.app_is_well(view, slot, &generation).await,
                Slot::Live => Ok(()),
            }
        };
        if kind == Kind::Rollback {
            return ready(Slot::Dev).await;
        }
        let (live, dev) = tokio::join!(ready(Slot::Live), ready(Slot::Dev));
        live.and(dev)
    }

    /// Whether the websockets that were told to come again are gone soon.
    async fn websockets_end(&self, left_live: &Handle) -> bool {
        let deadline = tokio::time::Instant::now() + CLOSED_WITHIN;
        while left_live.activity.tunnels() > 0 {
            if tokio::time::Instant::now() >= deadline {
                return false;
            }
            tokio::time::sleep(LOOK).await;
        }
        true
    }

    /// Lets requests under way finish, tells websockets and event streams to come again, and freezes what is left, so
    /// that it stays as it was. What goes on for longer is left running, and what is to be awake always is, too.
    async fn freeze(&self, left_live: &Handle) -> Option<Displaced> {
        let generation = left_live.ready()?;
        let quiet = self.fleet.drain(&generation, DRAINED_WITHIN).await && self.websockets_end(left_live).await;
        if !quiet || left_live.awake() == Awake::Always {
            return None;
        }
        left_live.pause().await;
        let frozen = |status: &crate::reconcile::Status| !matches!(status.observed, Observed::Ready { .. });
        match left_live.settle(HEALTHY_WITHIN, frozen).await.observed {
            // Somebody came through dev's address just before.
            Observed::Paused { .. } if left_live.activity.tunnels() > 0 => {
                let _ = left_live.wake(HEALTHY_WITHIN).await;
                None
            }
            Observed::Paused { generation, since } => Some(Displaced {
                sandbox: left_live.id.clone(),
                generation,
                since,
            }),
            _ => None,
        }
    }
}
