//! What others learn of a sandbox: its status, events, and rows of the audit trail. It must not change a state.

use choir_api::events::{SANDBOX, SandboxChanged};
use choir_core::sandbox::{Exit, Observed};
use choir_store::AuditEvent;

use super::Worker;
use crate::reconcile::Status;

/// What the audit trail says of an end that nobody asked for.
pub fn outcome(exit: &Exit) -> &'static str {
    if exit.oom_killed { "out_of_memory" } else { "exited" }
}

impl Worker {
    pub(super) fn publish(&self) {
        let status = Status {
            desired: self.desired,
            observed: self.observed.clone(),
            oom_kills: self.oom_kills.unwrap_or(0),
            says: self.says.clone(),
            refilling: self.refill.is_some(),
        };
        let before = self.status.send_replace(status);
        let told = |observed: &Observed| SandboxChanged {
            workspace: self.workspace.clone(),
            sandbox: self.id.clone(),
            state: observed.name().to_owned(),
            generation: observed.generation(),
            reason: observed.reason(),
        };
        let now = told(&self.observed);
        if let Some(owner) = self.fleet.owner_of(&self.id).filter(|_| told(&before.observed) != now) {
            self.fleet.services.events.tell(&owner, SANDBOX, &now);
        }
    }

    pub(super) fn event(&self, action: &'static str, outcome: &'static str) -> AuditEvent {
        AuditEvent {
            at: self.fleet.now(),
            actor: "system".into(),
            user: self.fleet.owner_of(&self.id),
            action,
            subject: self.id.to_string(),
            outcome,
        }
    }

    pub(super) async fn audit(&self, action: &'static str, outcome: &'static str) {
        if let Err(error) = self.fleet.services.store.audit(self.event(action, outcome)).await {
            tracing::error!(sandbox.id = %self.id, %error, action, "an event could not be recorded");
        }
    }
}
