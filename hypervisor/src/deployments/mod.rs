//! Swap: prove both targets healthy, exchange the pointers in one transaction, publish, drain. It must not know HTTP.

use std::sync::Arc;
use std::time::Duration;

use choir_core::deployment::{Kind, Step};
use choir_core::{DeploymentId, Slot, WorkspaceId};
use choir_store::{AuditEvent, Begun, Deployment, StepTime, WorkspaceView};

use crate::app::App;
use crate::error::ApiError;
use crate::random::draw;

pub mod routes;

/// The websocket close code that asks clients to come again (IANA registry of RFC 6455 codes).
const SERVICE_RESTART: u16 = 1012;
/// How long both targets may take to become healthy.
const HEALTHY_WITHIN: Duration = Duration::from_secs(30);

impl App {
    /// Begins a swap and carries it out in the background. The same idempotency key gives the first one back.
    pub async fn begin_swap(
        self: &Arc<Self>,
        view: &WorkspaceView,
        idempotency_key: Option<String>,
        audit: AuditEvent,
    ) -> Result<Deployment, ApiError> {
        let id = DeploymentId::from_random(draw(&*self.random));
        let begun = self
            .store
            .begin_deployment(id, &view.workspace.id, Kind::Swap, idempotency_key, audit.clone())
            .await?;
        match begun {
            Begun::Same(deployment) => Ok(deployment),
            Begun::Open(open) => Err(ApiError::conflict(
                "deployment_open",
                format!("deployment {open} of this workspace is still open; wait until it has ended"),
            )
            .with("deployment", open.as_str())),
            Begun::New(deployment) => {
                let (app, started, view) = (self.clone(), deployment.clone(), view.clone());
                tokio::spawn(async move { app.carry_out(started, view, audit).await });
                Ok(deployment)
            }
        }
    }

    async fn carry_out(self: Arc<Self>, deployment: Deployment, view: WorkspaceView, asked: AuditEvent) {
        let result = self.swap(&deployment, &view, &asked).await;
        let (step, reason, outcome) = match result {
            Ok(()) => (Step::Succeeded, None, "ok"),
            Err(reason) => (Step::Failed, Some(reason), "failed"),
        };
        self.end(&deployment.id, step, reason, AuditEvent { outcome, ..asked })
            .await;
    }

    async fn swap(&self, deployment: &Deployment, view: &WorkspaceView, asked: &AuditEvent) -> Result<(), String> {
        let mut times = vec![StepTime {
            step: Step::Verifying,
            at: self.clock.now(),
        }];
        self.both_ready(view).await?;
        times.push(StepTime {
            step: Step::Switching,
            at: self.clock.now(),
        });
        let at = self.clock.now();
        let audit = AuditEvent {
            at,
            action: "workspace.switch",
            ..asked.clone()
        };
        // Routes are published with the commit, under the table's lock, so that they are never older than it.
        let after = self
            .store
            .switch(&deployment.id, times, audit)
            .await
            .map_err(|e| e.to_string())?;
        self.publish(&after).await;
        self.drain(&view.live.id, &view.dev.id);
        Ok(())
    }

    /// Both sandboxes up and answering with the generation they should be.
    async fn both_ready(&self, view: &WorkspaceView) -> Result<(), String> {
        let ready = |slot: Slot| async move {
            let handle = self.fleet.handle(&view.slot(slot).id).ok_or("the sandbox is gone")?;
            handle
                .wake(HEALTHY_WITHIN)
                .await
                .map_err(|e| format!("{slot} is not healthy: {e}"))
        };
        let (live, dev) = tokio::join!(ready(Slot::Live), ready(Slot::Dev));
        live.and(dev).map(drop)
    }

    /// Websockets opened before the switch are told to come again, to the other sandbox.
    fn drain(&self, live: &choir_core::SandboxId, dev: &choir_core::SandboxId) {
        for id in [live, dev] {
            if let Some(generation) = self.fleet.handle(id).and_then(|h| h.ready()) {
                self.forwarder.close_tunnels(&generation, SERVICE_RESTART);
            }
        }
    }

    async fn end(&self, id: &DeploymentId, step: Step, reason: Option<String>, audit: AuditEvent) {
        let audit = AuditEvent {
            at: self.clock.now(),
            action: "workspace.swap_ended",
            ..audit
        };
        match self.store.finish_deployment(id, step, reason.clone(), audit).await {
            Ok(_) => tracing::info!(deployment = %id, step = step.as_str(), reason, "deployment ended"),
            // It stays open in the journal; the next start ends it by the same rule.
            Err(error) => tracing::error!(deployment = %id, %error, "the end of a deployment could not be recorded"),
        }
        self.deployment_ended.send_replace(());
    }

    /// Ends what a crash left open: undone before the switch was committed, rolled forward after.
    pub async fn recover_deployments(&self) -> Result<(), choir_store::Error> {
        for deployment in self.store.open_deployments().await? {
            let step = deployment.step.recovered();
            let failed = step == Step::Failed;
            let reason =
                failed.then(|| "the hypervisor was restarted before the switch; nothing was changed".to_owned());
            let audit = AuditEvent {
                at: self.clock.now(),
                actor: "system".into(),
                user: Some(self.store.workspace(&deployment.workspace).await?.workspace.user),
                action: "workspace.swap_recovered",
                subject: deployment.workspace.to_string(),
                outcome: if failed { "failed" } else { "ok" },
            };
            self.store
                .finish_deployment(&deployment.id, step, reason, audit)
                .await?;
        }
        Ok(())
    }

    /// Waits until a deployment has ended, at most `within`; the deployment then.
    pub async fn await_deployment(
        &self,
        workspace: &WorkspaceId,
        id: &DeploymentId,
        within: Duration,
    ) -> Result<Deployment, choir_store::Error> {
        let mut ended = self.deployment_ended.subscribe();
        let deadline = tokio::time::Instant::now() + within;
        loop {
            ended.borrow_and_update();
            let deployment = self.store.deployment(workspace, id).await?;
            if deployment.finished_at.is_some() {
                return Ok(deployment);
            }
            if tokio::time::timeout_at(deadline, ended.changed()).await.is_err() {
                return Ok(deployment);
            }
        }
    }
}
