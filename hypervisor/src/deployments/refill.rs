//! Cold rollback, deploy, restore and fork: the slot keeps its sandbox, and that gets other contents. The sandbox's worker
//! does it; here it is said, waited for, and taken back if the result is not well. It must not touch a volume.

use std::time::Duration;

use choir_core::deployment::{Contents, Refill, Step};
use choir_core::{ReleaseId, Slot, SnapshotId};
use choir_store::{AuditEvent, Deployment, Ended, WorkspaceView};

use super::{AGAIN, HEALTHY_WITHIN, text};
use crate::app::App;
use crate::fail;
use crate::random::draw;
use crate::reconcile::{AskError, Handle, WakeError};

/// Said of what could not be seen to run.
const WAITS: &str = "its files are in place; it starts as soon as the box has a place for it";
/// How long live may wait for one, in which time nobody can have it go back.
const IN_LINE: Duration = Duration::from_secs(600);
/// How long the contents of a volume may take to be replaced. Without a disk that shares what is equal, all is copied.
const FILLED_WITHIN: Duration = Duration::from_secs(1800);

impl App {
    pub(super) async fn refill(
        &self,
        deployment: &Deployment,
        with: Contents,
        release: ReleaseId,
        asked: &AuditEvent,
    ) -> Result<Ended, String> {
        let view = self.store.workspace(&deployment.workspace).await.map_err(text)?;
        self.has_files(&view, deployment.slot).await.map_err(text)?;
        if self.handle_of(deployment).await?.held_back() {
            return Err(text(AskError::ShortOfMemory));
        }
        if let Contents::Release(release) = &with {
            self.releases.ready_for(release, &view.workspace.user).await?;
        }
        let refill = Refill {
            deployment: deployment.id.clone(),
            keep: SnapshotId::from_random(draw(&*self.random)),
            with,
        };
        let times = vec![self.passed(Step::Switching)];
        self.stepped(asked, deployment, Step::Switching, None);
        let audit = AuditEvent {
            at: self.clock.now(),
            action: "workspace.switch",
            ..asked.clone()
        };
        let after = self
            .store
            .switch_contents(refill.clone(), release, times, audit)
            .await
            .map_err(text)?;
        // Nothing may fail from here on.
        fail::point("contents.switched").await.ok();
        self.begin_refill(&after, deployment, refill).await;
        self.stepped(asked, deployment, Step::Draining, None);
        Ok(self.await_contents(deployment, HEALTHY_WITHIN, asked).await)
    }

    /// Waits until the slot runs well with its new contents, for which it has so long; if it does not, until it has its old
    /// ones back.
    pub(super) async fn await_contents(&self, deployment: &Deployment, within: Duration, asked: &AuditEvent) -> Ended {
        let reason = match self.runs_well(deployment, within, asked).await {
            Ok(reason) => {
                return Ended {
                    step: Step::Succeeded,
                    reason: reason.map(str::to_owned),
                    displaced: None,
                };
            }
            Err(reason) => reason,
        };
        while let Err(error) = self.give_back(deployment, &reason, asked).await {
            tracing::error!(deployment = %deployment.id, %error, "what was there cannot be brought back yet; trying again");
            tokio::time::sleep(AGAIN).await;
        }
        self.await_return(deployment, Some(reason)).await
    }

    async fn give_back(
        &self,
        deployment: &Deployment,
        reason: &str,
        asked: &AuditEvent,
    ) -> Result<(), choir_store::Error> {
        let audit = AuditEvent {
            at: self.clock.now(),
            action: "workspace.return",
            ..asked.clone()
        };
        let keep = SnapshotId::from_random(draw(&*self.random));
        let refill = self.store.return_contents(&deployment.id, &keep, reason, audit).await?;
        fail::point("contents.returning").await.ok();
        self.stepped(asked, deployment, Step::Returning, Some(reason.to_owned()));
        let view = self.store.workspace(&deployment.workspace).await?;
        self.begin_refill(&view, deployment, refill).await;
        Ok(())
    }

    /// Requests wait from here on, and what the hosts mean afterwards is published while they do.
    async fn begin_refill(&self, view: &WorkspaceView, deployment: &Deployment, refill: Refill) {
        if let Some(handle) = self.fleet.handle(&view.slot(deployment.slot).id) {
            handle.refill(refill).await;
        }
        self.publish(view).await;
    }

    /// Waits until the slot has its old contents back and runs.
    pub(super) async fn await_return(&self, deployment: &Deployment, reason: Option<String>) -> Ended {
        let reason = reason.unwrap_or_default();
        let back = match self.handle_of(deployment).await {
            Ok(handle) => match filled(&handle).await {
                Ok(()) => ready(&handle, HEALTHY_WITHIN).await.map(drop),
                Err(error) => Err(error),
            },
            Err(error) => Err(error),
        };
        let reason = match back {
            Ok(()) => reason,
            Err(error) => format!("{reason}; what was there before does not run either: {error}"),
        };
        Ended {
            step: Step::RolledBack,
            reason: Some(reason),
            displaced: None,
        }
    }

    /// What is to be said of it although it is well.
    async fn runs_well(
        &self,
        deployment: &Deployment,
        within: Duration,
        asked: &AuditEvent,
    ) -> Result<Option<&'static str>, String> {
        let handle = self.handle_of(deployment).await?;
        filled(&handle).await?;
        self.stepped(asked, deployment, Step::Starting, None);
        let Some(generation) = ready(&handle, within).await? else {
            return Ok(Some(WAITS));
        };
        let view = self.store.workspace(&deployment.workspace).await.map_err(text)?;
        self.app_is_well(&view, deployment.slot, &generation).await?;
        Ok(None)
    }

    async fn handle_of(&self, deployment: &Deployment) -> Result<Handle, String> {
        let view = self.store.workspace(&deployment.workspace).await.map_err(text)?;
        let handle = self.fleet.handle(&view.slot(deployment.slot).id);
        handle.ok_or_else(|| "the sandbox is gone".to_owned())
    }
}

async fn filled(handle: &Handle) -> Result<(), String> {
    if handle.settle(FILLED_WITHIN, |status| !status.refilling).await.refilling {
        return Err("its files could not be replaced in time; the log says why".to_owned());
    }
    Ok(())
}

/// That it waits for a place to run in says nothing of what it holds; `None` where it waited for too long. That is sooner for
/// dev: as long as its deployment is open, live cannot go back.
async fn ready(handle: &Handle, within: Duration) -> Result<Option<choir_core::Generation>, String> {
    let (mut left, mut patience) = match handle.slot() {
        Slot::Live => (within, within.max(IN_LINE)),
        Slot::Dev => (within, within),
    };
    loop {
        match handle.wake(AGAIN.min(left)).await {
            Err(WakeError::InLine(_)) => {}
            Err(WakeError::Busy | WakeError::ShortOfMemory) => tokio::time::sleep(AGAIN).await,
            Err(WakeError::TooLong) if left > AGAIN => {
                left -= AGAIN;
                continue;
            }
            woken => return woken.map(Some).map_err(text),
        }
        patience = patience.saturating_sub(AGAIN);
        if patience.is_zero() {
            return Ok(None);
        }
    }
}
