//! The guard after a swap: live is watched for a while, and rolled back by itself where it does worse than its workspace
//! allows. It must not know how a rollback is carried out.

use std::sync::Arc;
use std::time::Duration;

use choir_core::deployment::{Kind, Step};
use choir_core::settings::Guard;
use choir_core::{DeploymentId, Slot, WorkspaceId};
use choir_proxy::route::Tally;
use choir_store::{AuditEvent, Deployment};

use super::{AGAIN, Ask, Wish, text};
use crate::app::App;
use crate::reconcile::Handle;

/// How long a rollback of its own is waited for.
const ENDED_WITHIN: Duration = Duration::from_secs(300);
/// Rollbacks that are tried: what does not come back now needs a person.
const TRIES: usize = 5;
/// Later deployments that are looked at.
const SEEN: u32 = 20;
/// Between two looks.
const LOOK: Duration = Duration::from_millis(250);

impl App {
    /// Goes on watching live after the swaps that were just done when this process was started.
    pub async fn resume_guards(self: &Arc<Self>) {
        for view in self.store.all_workspaces().await.unwrap_or_default() {
            match self.store.undoable(&view.workspace.id).await {
                Ok(done) => {
                    if let Some(last) = done.first() {
                        self.watch(last, self.live_so_far(&view.workspace.id).await);
                    }
                }
                Err(error) => tracing::error!(%error, "a guard is not resumed"),
            }
        }
    }

    /// What is live, and how it has answered until now.
    pub(super) async fn live_so_far(&self, workspace: &WorkspaceId) -> Option<(Handle, Tally)> {
        let view = self.store.workspace(workspace).await.ok()?;
        let handle = self.fleet.handle(&view.live.id)?;
        let so_far = handle.activity.tally();
        Some((handle, so_far))
    }

    /// Watches live, if this was a swap of a workspace with a guard and not too long ago.
    pub(super) fn watch(self: &Arc<Self>, done: &Deployment, live: Option<(Handle, Tally)>) {
        if let (Kind::Swap, Step::Succeeded, Some((live, before))) = (done.kind, done.step, live) {
            let (app, done) = (self.clone(), done.clone());
            tokio::spawn(async move { app.guard(&done, &live, &before).await });
        }
    }

    async fn guard(self: &Arc<Self>, done: &Deployment, live: &Handle, before: &Tally) {
        let Ok(view) = self.store.workspace(&done.workspace).await else {
            return;
        };
        let ago = done.finished_at.map(|at| self.clock.now().duration_since(at));
        let ago = ago.and_then(|ago| Duration::try_from(ago).ok()).unwrap_or_default();
        let Some(guard) = view
            .workspace
            .settings
            .guard
            .filter(|g| Duration::from_secs(g.watch_s) > ago)
        else {
            return;
        };
        let by = tokio::time::Instant::now() + Duration::from_secs(guard.watch_s).saturating_sub(ago);
        for _ in 0..TRIES {
            let worse = tokio::time::timeout_at(by, self.does_worse(done, live, before));
            let Ok(Ok(Some(reason))) = worse.await else {
                return;
            };
            match self.take_back(&done.workspace, &done.id, reason).await {
                // Whatever came of it is another deployment, which ends the watch unless nothing changed.
                Ok(begun) => drop(self.await_deployment(&done.workspace, &begun.id, ENDED_WITHIN).await),
                Err(why) => tracing::warn!(deployment = %done.id, why, "the guard cannot roll back yet; trying again"),
            }
            tokio::time::sleep(AGAIN).await;
        }
        tracing::error!(deployment = %done.id, "the guard gives up; roll back by hand");
    }

    /// Waits until live does worse than the guard allows; `None` once there is nothing to judge: something else was done
    /// to live, or the guard was taken away.
    async fn does_worse(
        &self,
        swap: &Deployment,
        live: &Handle,
        before: &Tally,
    ) -> Result<Option<String>, choir_store::Error> {
        loop {
            let view = self.store.workspace(&swap.workspace).await?;
            let Some(guard) = view.workspace.settings.guard.filter(|g| g.watch_s > 0) else {
                return Ok(None);
            };
            if self.was_changed_since(swap).await? {
                return Ok(None);
            }
            let reason = worse(&live.activity.tally().since(before), &guard);
            // What is under way may make it good, or is what makes it bad.
            if reason.is_some() && view.open_deployment.is_none() {
                return Ok(reason);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Whether a later deployment touched live. One that ended without a change did not.
    async fn was_changed_since(&self, swap: &Deployment) -> Result<bool, choir_store::Error> {
        let all = self.store.deployments(&swap.workspace, None, SEEN).await?;
        let later = all.iter().take_while(|d| d.id != swap.id);
        Ok(later
            .filter(|d| d.slot == Slot::Live)
            .any(|d| d.finished_at.is_some() && d.step != Step::Failed))
    }

    async fn take_back(
        self: &Arc<Self>,
        workspace: &WorkspaceId,
        swap: &DeploymentId,
        reason: String,
    ) -> Result<Deployment, String> {
        tracing::warn!(deployment = %swap, reason, "the guard rolls a swap back");
        let view = self.store.workspace(workspace).await.map_err(text)?;
        let wish = Wish::Rollback(Some(swap.clone()));
        let ask = Ask {
            key: None,
            because: Some(reason),
            audit: AuditEvent {
                actor: "system".into(),
                ..self.event(&view, "workspace.rollback")
            },
        };
        self.begin(&view, wish, ask).await.map_err(text)
    }
}

/// Why it may not stay, if there is a reason.
fn worse(seen: &Tally, guard: &Guard) -> Option<String> {
    let all = seen.requests();
    if all < guard.min_requests {
        return None;
    }
    let failed = seen.failures;
    if failed * 100 > all * u64::from(guard.max_error_percent) {
        return Some(format!("after the swap {failed} of {all} requests failed"));
    }
    let p95 = seen.p95_ms();
    let most = guard.max_p95_ms.filter(|most| p95 >= *most)?;
    Some(format!(
        "after the swap one in twenty answers took {p95} ms or more, and {most} ms are allowed"
    ))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use choir_proxy::Activity;

    use super::*;

    const GUARD: Guard = Guard {
        watch_s: 60,
        max_error_percent: 10,
        max_p95_ms: Some(100),
        min_requests: 10,
    };

    #[test]
    fn nothing_is_judged_before_enough_requests_and_a_share_of_failures_is_allowed() {
        let activity = Activity::new(Arc::new(|| 0));
        let note = |times: usize, failed: bool| (0..times).for_each(|_| activity.answered(0, failed));
        note(9, true);
        assert_eq!(worse(&activity.tally(), &GUARD), None);
        note(81, false);
        assert_eq!(worse(&activity.tally(), &GUARD), None, "one in ten may fail");
        note(1, true);
        assert_eq!(
            worse(&activity.tally(), &GUARD).unwrap(),
            "after the swap 10 of 91 requests failed"
        );
    }

    #[test]
    fn answers_that_take_too_long_are_worse_and_a_few_slow_ones_are_not() {
        let slow = |fast: usize, slow: usize| {
            let activity = Activity::new(Arc::new(|| 1000));
            (0..fast).for_each(|_| activity.answered(990, false));
            (0..slow).for_each(|_| activity.answered(0, false));
            worse(&activity.tally(), &GUARD)
        };
        assert_eq!(slow(95, 5), None);
        assert_eq!(
            slow(94, 6).unwrap(),
            "after the swap one in twenty answers took 512 ms or more, and 100 ms are allowed"
        );
    }
}
