//! Taking over what an earlier process left running. It must not start or stop a sandbox.

use std::collections::HashMap;
use std::sync::Arc;

use choir_core::sandbox::{Desired, Exit, Observed};
use choir_core::{SandboxId, Slot};
use choir_runtime::{Found, Seen};
use choir_store::{AuditEvent, Sandbox, SandboxChange, WorkspaceView};
use jiff::Timestamp;

use super::worker::tell::outcome;
use super::{Fleet, Present, launch};

impl Fleet {
    /// Takes over what runs, removes what should not be there, and starts a worker for each sandbox. Containers are
    /// adopted by label and nonce only; whatever else listens anywhere is not ours.
    pub async fn adopt(self: &Arc<Self>, views: &[WorkspaceView], listed: Vec<Found>) {
        let mut found: HashMap<SandboxId, Vec<Found>> = HashMap::new();
        for container in listed {
            found
                .entry(container.generation.sandbox.clone())
                .or_default()
                .push(container);
        }
        for view in views {
            for slot in Slot::ALL {
                let sandbox = view.slot(slot);
                let containers = found.remove(&sandbox.id).unwrap_or_default();
                self.take_over(view, sandbox, containers).await;
            }
        }
        for stray in found.into_values().flatten() {
            tracing::warn!(generation = %stray.generation, "a container without a sandbox is removed");
            if let Err(error) = self.services.runtime.remove(&stray.generation).await {
                tracing::error!(generation = %stray.generation, %error, "it stays; see `choir-hypervisor fsck`");
            }
        }
    }

    async fn take_over(self: &Arc<Self>, view: &WorkspaceView, sandbox: &Sandbox, containers: Vec<Found>) {
        let mut observed = match &sandbox.observed {
            kept @ (Observed::Creating { .. } | Observed::Failed { .. } | Observed::Deleting { .. }) => kept.clone(),
            Observed::Stopped { exit, since } => Observed::Stopped {
                exit: exit.clone(),
                since: *since,
            },
            _ => Observed::Stopped {
                exit: None,
                since: self.now(),
            },
        };
        let (mut started, mut leftover, mut place) = (false, None, None);
        // Before anything is adopted: its agent may come to the door at once, and that is told once.
        let seat = self.seat(view, sandbox);
        for container in containers {
            let number = container.generation.number;
            let present = number == sandbox.generation && container.nonce == sandbox.nonce;
            let alive = matches!(container.seen, Seen::Running | Seen::Paused);
            let adopted = present && alive && {
                let spec = launch::spec(
                    &self.services,
                    &sandbox.workspace,
                    &container.generation,
                    container.nonce,
                )
                .await;
                match spec {
                    Ok(spec) => self.services.runtime.adopt(&spec).await.map_err(|e| e.to_string()),
                    Err(reason) => Err(reason),
                }
                .inspect_err(|reason| tracing::warn!(sandbox.id = %sandbox.id, reason, "not adopted; it is replaced"))
                .is_ok()
            };
            if adopted {
                let now = self.now();
                observed = match container.seen {
                    Seen::Paused => Observed::Paused {
                        generation: number,
                        since: frozen_since(&sandbox.observed, number).unwrap_or(now),
                    },
                    _ => Observed::Starting {
                        generation: number,
                        attempt: 1,
                        since: now,
                        not_before: now,
                        because: None,
                    },
                };
                started = true;
                place = Some(self.admission.take());
            } else if present && leftover.is_none() && !alive {
                if let Seen::Exited(exit) = &container.seen {
                    observed = Observed::Stopped {
                        exit: Some(exit.clone()),
                        since: self.now(),
                    };
                    self.died_unseen(view, sandbox, exit, &observed).await;
                }
                leftover = Some(number);
            } else if let Err(error) = self.services.runtime.remove(&container.generation).await {
                tracing::warn!(sandbox.id = %sandbox.id, %error, "an old container stays");
            }
        }
        let present = Present {
            observed,
            started,
            leftover,
            place,
            // A crash may have come between the commit of new limits and their taking effect.
            limits_stale: true,
        };
        self.spawn(sandbox, seat, present);
    }

    /// Records the end of what was to run on, as would have been done by who had seen it. Once: it is not what is recorded
    /// then.
    async fn died_unseen(&self, view: &WorkspaceView, sandbox: &Sandbox, exit: &Exit, observed: &Observed) {
        let ended = match &sandbox.observed {
            // Its end was seen, and is the reason for another start.
            Observed::Starting { because, .. } => because.is_some(),
            Observed::Stopping { .. } => true,
            other => other.generation() != Some(sandbox.generation),
        };
        if ended || sandbox.desired != Desired::Running {
            return;
        }
        let event = AuditEvent {
            at: self.now(),
            actor: "system".into(),
            user: Some(view.workspace.user.clone()),
            action: "sandbox.exited",
            subject: sandbox.id.to_string(),
            outcome: outcome(exit),
        };
        let change = SandboxChange {
            id: sandbox.id.clone(),
            observed: observed.clone(),
            audit: Some(event),
        };
        if let Err(error) = self.services.store.observe(change).await {
            tracing::error!(sandbox.id = %sandbox.id, %error, "its death could not be recorded");
        }
    }
}

/// Since when a generation that is frozen has been so: a restart of the hypervisor does not begin it anew.
fn frozen_since(recorded: &Observed, frozen: u64) -> Option<Timestamp> {
    match recorded {
        Observed::Paused { generation, since } if *generation == frozen => Some(*since),
        _ => None,
    }
}
