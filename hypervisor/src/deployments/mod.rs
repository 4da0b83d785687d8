//! What changes a slot as a whole: swap, rollback, deploy, restore and fork. Each is journalled, carried out in the
//! background, and finished or undone after a crash. It must not know HTTP.

use std::sync::Arc;
use std::time::Duration;

use choir_api::events::{DEPLOYMENT, DeploymentStepped};
use choir_core::deployment::{Contents, Displaced, Kind, Step};
use choir_core::sandbox::Observed;
use choir_core::{DeploymentId, ReleaseId, Slot, SnapshotId, WorkspaceId};
use choir_store::{AuditEvent, Begun, Deployment, Ended, NewDeployment, StepTime, WorkspaceView};

use crate::app::{App, apart};
use crate::error::{ApiError, ApiResult};
use crate::fail;
use crate::random::draw;

mod exchange;
mod guard;
mod health;
mod refill;
pub mod routes;

/// How long a sandbox may take to become healthy.
const HEALTHY_WITHIN: Duration = Duration::from_secs(30);
/// The same after a restart of the hypervisor, or of the box, when many start at once.
const RESTARTED_WITHIN: Duration = Duration::from_secs(300);
/// Between two tries of what must not be given up.
const AGAIN: Duration = Duration::from_secs(1);
/// How long requests under way may take to finish before their sandbox is frozen or stopped.
pub const DRAINED_WITHIN: Duration = Duration::from_secs(10);

/// What a person asks for.
#[derive(Debug, Clone)]
pub enum Wish {
    Swap,
    /// Undo this deployment of live and all after it; the last one where none is named.
    Rollback(Option<DeploymentId>),
    Deploy(Slot, ReleaseId),
    Restore(Slot, SnapshotId),
    /// A copy of this snapshot into dev; of live as it is where none is named.
    Fork(Option<SnapshotId>),
}

/// How it was asked for.
struct Ask {
    key: Option<String>,
    /// Why, where nobody asked.
    because: Option<String>,
    audit: AuditEvent,
}

/// How it is done.
enum Plan {
    Exchange,
    Refill(Contents, ReleaseId),
    /// A refill of dev with a snapshot of live that is yet to be taken.
    CopyLive,
}

/// What a rollback would undo now.
pub struct Undo {
    pub deployment: Deployment,
    /// Whether the sandbox that it displaced is still frozen as it was.
    pub warm: bool,
}

impl Wish {
    fn kind(&self) -> Kind {
        match self {
            Self::Swap => Kind::Swap,
            Self::Rollback(_) => Kind::Rollback,
            Self::Deploy(..) => Kind::Deploy,
            Self::Restore(..) => Kind::Restore,
            Self::Fork(_) => Kind::Fork,
        }
    }

    fn slot(&self) -> Slot {
        match self {
            Self::Swap | Self::Rollback(_) => Slot::Live,
            Self::Deploy(slot, _) | Self::Restore(slot, _) => *slot,
            Self::Fork(_) => Slot::Dev,
        }
    }
}

impl App {
    /// Begins a deployment and carries it out in the background. The same idempotency key gives the first one back.
    pub async fn begin_deployment(
        self: &Arc<Self>,
        view: &WorkspaceView,
        wish: Wish,
        idempotency_key: Option<String>,
    ) -> ApiResult<Deployment> {
        let ask = Ask {
            key: idempotency_key,
            because: None,
            audit: self.event(view, asked_for(wish.kind())),
        };
        self.begin(view, wish, ask).await
    }

    async fn begin(self: &Arc<Self>, view: &WorkspaceView, wish: Wish, ask: Ask) -> ApiResult<Deployment> {
        let audit = ask.audit;
        let new = NewDeployment {
            id: DeploymentId::from_random(draw(&*self.random)),
            workspace: view.workspace.id.clone(),
            kind: wish.kind(),
            slot: wish.slot(),
            idempotency_key: ask.key,
            reason: ask.because,
        };
        if let Some(same) = self.store.same_deployment(&new).await? {
            return Ok(same);
        }
        if let Some(open) = &view.open_deployment {
            return Err(still_open(open));
        }
        self.plan(view, &wish).await?;
        let app = self.clone();
        apart(async move { app.commit_and_carry_out(new, wish, audit).await }).await
    }

    async fn commit_and_carry_out(
        self: Arc<Self>,
        new: NewDeployment,
        wish: Wish,
        audit: AuditEvent,
    ) -> ApiResult<Deployment> {
        match self.store.begin_deployment(new, audit.clone()).await? {
            Begun::Same(deployment) => Ok(deployment),
            Begun::Open(open) => Err(still_open(&open)),
            Begun::New(deployment) => {
                let (app, begun) = (self.clone(), deployment.clone());
                tokio::spawn(async move { app.carry_out(begun, wish, audit).await });
                Ok(deployment)
            }
        }
    }

    /// What a rollback would undo, if there is anything.
    pub async fn undo(&self, view: &WorkspaceView) -> Result<Option<Undo>, choir_store::Error> {
        let last = self.store.undoable(&view.workspace.id).await?.into_iter().next();
        Ok(last.map(|deployment| Undo {
            warm: self.is_warm(view, deployment.displaced.as_ref()),
            deployment,
        }))
    }

    /// Whether dev is the sandbox that was displaced, and has not run since.
    fn is_warm(&self, view: &WorkspaceView, displaced: Option<&Displaced>) -> bool {
        let handle = self.fleet.handle(&view.dev.id);
        let (Some(displaced), Some(handle)) = (displaced, handle) else {
            return false;
        };
        let frozen = Observed::Paused {
            generation: displaced.generation,
            since: displaced.since,
        };
        displaced.sandbox == view.dev.id && handle.status.borrow().observed == frozen
    }

    async fn plan(&self, view: &WorkspaceView, wish: &Wish) -> ApiResult<Plan> {
        match wish {
            Wish::Swap => Ok(Plan::Exchange),
            Wish::Rollback(to) => self.plan_rollback(view, to.as_ref()).await,
            Wish::Deploy(_, release) => {
                let release = self.releases.usable(release, &view.workspace.user).await?;
                Ok(Plan::Refill(Contents::Release(release.id.clone()), release.id))
            }
            Wish::Restore(_, id) | Wish::Fork(Some(id)) => {
                let snapshot = self.store.snapshot(&view.workspace.id, id).await?;
                Ok(Plan::Refill(Contents::Snapshot(snapshot.id), snapshot.release))
            }
            Wish::Fork(None) => Ok(Plan::CopyLive),
        }
    }

    async fn plan_rollback(&self, view: &WorkspaceView, to: Option<&DeploymentId>) -> ApiResult<Plan> {
        let undoable = self.store.undoable(&view.workspace.id).await?;
        let nth = to.map_or(Some(0), |to| undoable.iter().position(|d| d.id == *to));
        let Some((nth, undone)) = nth.and_then(|nth| Some((nth, undoable.get(nth)?))) else {
            let message = match to {
                None => "Nothing has changed live yet, so there is nothing to roll back.".to_owned(),
                Some(to) => format!(
                    "{to} is not one of the last five deployments of live that succeeded; `choir deployments` lists them."
                ),
            };
            return Err(ApiError::conflict("nothing_to_undo", message));
        };
        if nth == 0 && self.is_warm(view, undone.displaced.as_ref()) {
            return Ok(Plan::Exchange);
        }
        let before = self.store.snapshot_before(&undone.id, Slot::Live).await?;
        Ok(Plan::Refill(Contents::Snapshot(before.id), before.release))
    }

    async fn carry_out(self: Arc<Self>, deployment: Deployment, wish: Wish, asked: AuditEvent) {
        let done = self.attempt(&deployment, &wish, &asked).await;
        let ended = done.unwrap_or_else(|reason| Ended {
            step: Step::Failed,
            reason: Some(reason),
            displaced: None,
        });
        self.end(&deployment, ended, asked).await;
    }

    /// An error is why nothing was changed.
    async fn attempt(&self, deployment: &Deployment, wish: &Wish, asked: &AuditEvent) -> Result<Ended, String> {
        fail::point("deployment.begun").await?;
        self.stepped(asked, deployment, deployment.step, None);
        // Only from here on is no other deployment under way.
        let view = self.store.workspace(&deployment.workspace).await.map_err(text)?;
        match self.plan(&view, wish).await.map_err(text)? {
            Plan::Exchange => self.exchange(deployment, &view, asked).await,
            Plan::Refill(with, release) => self.refill(deployment, with, release, asked).await,
            Plan::CopyLive => {
                let copy = self.snapshot_for(deployment, &view, Slot::Live).await?;
                self.refill(deployment, Contents::Snapshot(copy.id), copy.release, asked)
                    .await
            }
        }
    }

    async fn end(self: &Arc<Self>, deployment: &Deployment, ended: Ended, audit: AuditEvent) {
        let audit = AuditEvent {
            at: self.clock.now(),
            action: "workspace.deployment_ended",
            outcome: match ended.step {
                Step::Succeeded => "ok",
                Step::RolledBack => "rolled_back",
                _ => "failed",
            },
            ..audit
        };
        fail::point("deployment.ending").await.ok();
        let (id, step, reason) = (&deployment.id, ended.step.as_str(), ended.reason.clone());
        let live = self.live_so_far(&deployment.workspace).await;
        let recorded = loop {
            match self.store.finish_deployment(id, ended.clone(), audit.clone()).await {
                // A full disk has room again some day, and what was wrong with the trail is mended.
                Err(error @ (choir_store::Error::Full(_) | choir_store::Error::Sqlite(_))) => {
                    tracing::error!(deployment = %id, %error, "the end of a deployment cannot be recorded; trying again");
                    tokio::time::sleep(AGAIN).await;
                }
                recorded => break recorded,
            }
        };
        match recorded {
            Ok(ended) => {
                tracing::info!(deployment = %id, step, reason, "deployment ended");
                self.stepped(&audit, &ended, ended.step, ended.reason.clone());
                self.watch(&ended, live);
            }
            // It stays open in the journal; the next start ends it by the same rule.
            Err(error) => tracing::error!(deployment = %id, %error, "the end of a deployment could not be recorded"),
        }
        self.deployment_ended.send_replace(());
        fail::point("deployment.ended").await.ok();
        self.thin_snapshots(&deployment.workspace).await;
    }

    /// Tells the workspace's owner how far a deployment is.
    fn stepped(&self, asked: &AuditEvent, deployment: &Deployment, step: Step, reason: Option<String>) {
        let now = DeploymentStepped {
            workspace: deployment.workspace.clone(),
            id: deployment.id.clone(),
            kind: deployment.kind,
            slot: deployment.slot,
            step,
            reason,
        };
        if let Some(owner) = &asked.user {
            self.events().tell(owner, DEPLOYMENT, &now);
        }
    }

    fn passed(&self, step: Step) -> StepTime {
        StepTime {
            step,
            at: self.clock.now(),
        }
    }

    /// Ends what a crash left open: undone before the switch was committed. Gives what is to be rolled forward once the
    /// sandboxes are taken over.
    pub async fn recover_deployments(self: &Arc<Self>) -> Result<Vec<Deployment>, choir_store::Error> {
        let mut ahead = Vec::new();
        for deployment in self.store.open_deployments().await? {
            if deployment.step.is_switched() {
                ahead.push(deployment);
                continue;
            }
            let reason = "the hypervisor was restarted before the switch; nothing was changed";
            let ended = Ended {
                step: Step::Failed,
                reason: Some(reason.to_owned()),
                displaced: None,
            };
            let (app, audit) = (self.clone(), self.recovery(&deployment).await?);
            let ending = tokio::spawn(async move { app.end(&deployment, ended, audit).await });
            // A full disk must not keep the hypervisor from its start.
            let _ = tokio::time::timeout(AGAIN, ending).await;
        }
        Ok(ahead)
    }

    /// Finishes a deployment whose switch an earlier process committed.
    pub async fn roll_forward(self: Arc<Self>, deployment: Deployment) {
        let rolled = async {
            let view = self.store.workspace(&deployment.workspace).await?;
            // Looked at after the sandbox, whose worker may have come further since: a refill that is done says so here.
            let deployment = self.store.deployment(&deployment.workspace, &deployment.id).await?;
            let audit = self.recovery(&deployment).await?;
            let refills = view
                .slot(deployment.slot)
                .refill
                .as_ref()
                .is_some_and(|r| r.deployment == deployment.id);
            let ended = match deployment.step {
                Step::Returning => self.await_return(&deployment, deployment.reason.clone()).await,
                Step::Draining if !refills => Ended {
                    step: Step::Succeeded,
                    reason: None,
                    displaced: None,
                },
                _ => self.await_contents(&deployment, RESTARTED_WITHIN, &audit).await,
            };
            self.end(&deployment, ended, audit).await;
            Ok::<_, choir_store::Error>(())
        };
        if let Err(error) = rolled.await {
            tracing::error!(deployment = %deployment.id, %error, "a deployment stays open until the next start");
        }
    }

    async fn recovery(&self, deployment: &Deployment) -> Result<AuditEvent, choir_store::Error> {
        let view = self.store.workspace(&deployment.workspace).await?;
        Ok(AuditEvent {
            actor: "system".into(),
            ..self.event(&view, "workspace.deployment_recovered")
        })
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

fn still_open(open: &DeploymentId) -> ApiError {
    ApiError::conflict(
        "deployment_open",
        format!("deployment {open} of this workspace is still open; wait until it has ended"),
    )
    .with("deployment", open.as_str())
}

fn asked_for(kind: Kind) -> &'static str {
    match kind {
        Kind::Swap => "workspace.swap",
        Kind::Rollback => "workspace.rollback",
        Kind::Deploy => "workspace.deploy",
        Kind::Restore => "workspace.restore",
        Kind::Fork => "workspace.fork",
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}
