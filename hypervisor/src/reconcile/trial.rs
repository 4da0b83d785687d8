//! A release that nobody knows yet is started once, in a sandbox of no workspace, before anybody's slot runs it. It must
//! not leave anything: what a crash leaves is removed at the next start, as is all that no row speaks of.

use std::time::Duration;

use choir_core::sandbox::READY_WITHIN;
use choir_core::{Generation, Limits, ReleaseId, SandboxId, Slot, UserId};
use choir_runtime::{AgentConfig, Notice, Spec};
use tokio::sync::oneshot;

use super::admission::{Place, Turn};
use super::{Fleet, launch};
use choir_store::ReleaseState;

/// How long a place to run in is waited for.
const PLACE_WITHIN: Duration = Duration::from_secs(120);

/// What a trial waits for: its agent came, or what happened instead.
pub type Verdict = oneshot::Sender<Result<(), String>>;

impl Fleet {
    /// Whether an agent comes out of it, in a container that equals its template.
    pub async fn try_release(&self, release: &ReleaseId, user: &UserId) -> Result<(), String> {
        let sandbox = tried_in(release);
        let _place = self.place_for(&sandbox).await?;
        let copy = self.services.releases.copy_for(release, user).await?;
        let limits = self
            .services
            .config
            .limits()
            .patched(&self.services.releases.config(release).await?.limits);
        let volumes = &self.services.volumes;
        let generation = Generation {
            sandbox: sandbox.clone(),
            number: 1,
        };
        let (tell, told) = oneshot::channel();
        self.trials().insert(sandbox.clone(), Some(tell));
        let tried = async {
            volumes.derive(&copy.volume, sandbox.as_str()).await.map_err(text)?;
            volumes.limit(sandbox.as_str(), limits.disk).await.map_err(text)?;
            let spec = self.bare(&generation, copy.ids, limits);
            self.services.runtime.create(&spec).await.map_err(text)?;
            self.services.runtime.start(&generation).await.map_err(text)?;
            match tokio::time::timeout(READY_WITHIN, told).await {
                Ok(verdict) => verdict.unwrap_or_else(|_| Err("it was given up".to_owned())),
                Err(_) => Err(format!("its agent did not come within {} s", READY_WITHIN.as_secs())),
            }
        };
        let tried = tried.await.map_err(|reason| format!("it does not start: {reason}"));
        let cleared = self.services.runtime.remove(&generation).await.map_err(text);
        let cleared = match cleared {
            Ok(()) => volumes.delete(sandbox.as_str()).await.map_err(text),
            stays => stays,
        };
        self.trials().remove(&sandbox);
        if let Err(reason) = cleared {
            tracing::warn!(%release, reason, "what a release was tried in stays until the next start");
        }
        tried
    }

    /// Removes what a crash left of trials; their containers are gone by now.
    pub async fn clear_trials(&self) -> Result<(), choir_store::Error> {
        for release in self.services.store.releases().await? {
            let tried = tried_in(&release.id);
            if release.state == ReleaseState::Rejected
                && let Err(error) = self.services.volumes.delete(tried.as_str()).await
            {
                tracing::warn!(release = %release.id, %error, "what it was tried in stays");
            }
        }
        Ok(())
    }

    /// Whether this is there because a release is being tried.
    pub fn is_trial(&self, sandbox: &str) -> bool {
        self.trials().keys().any(|id| id.as_str() == sandbox)
    }

    /// Takes a notice about a trial; gives back any other.
    pub(super) fn heard_of_trial(&self, notice: Notice) -> Option<Notice> {
        let (Notice::Ready { generation }
        | Notice::Exited { generation, .. }
        | Notice::Refused { generation, .. }
        | Notice::Lost { generation }
        | Notice::Activity { generation, .. }
        | Notice::Inside { generation, .. }) = &notice;
        let mut trials = self.trials();
        let Some(waiting) = trials.get_mut(&generation.sandbox) else {
            return Some(notice);
        };
        let verdict = match notice {
            Notice::Ready { .. } => Ok(()),
            Notice::Exited { exit, .. } => Err(format!("it ended with exit code {}", exit.code)),
            Notice::Refused { reason, .. } => Err(reason),
            // Nothing in it may reach anything.
            Notice::Lost { .. } | Notice::Activity { .. } | Notice::Inside { .. } => return None,
        };
        if let Some(waiting) = waiting.take() {
            let _ = waiting.send(verdict);
        }
        None
    }

    async fn place_for(&self, sandbox: &SandboxId) -> Result<Place, String> {
        match self.admission.ask(sandbox) {
            Turn::Now(place) => Ok(place),
            Turn::Later(place) => {
                self.make_room();
                let waited = tokio::time::timeout(PLACE_WITHIN, place).await;
                let full = || "as many sandboxes run as may; stop one, and import it again".to_owned();
                waited.ok().and_then(Result::ok).ok_or_else(full)
            }
        }
    }

    /// Nothing of a workspace, and nothing of what the release would start.
    fn bare(&self, generation: &Generation, ids: choir_core::IdRange, limits: Limits) -> Spec {
        let nonce = self.nonce();
        Spec {
            generation: generation.clone(),
            nonce: nonce.clone(),
            ids,
            limits,
            slot: Slot::Dev,
            hostname: "trial".to_owned(),
            agent: AgentConfig {
                sandbox_id: generation.sandbox.to_string(),
                generation: generation.number,
                nonce,
                env: launch::basics(),
                services: [].into(),
                authority: None,
            },
        }
    }
}

/// The sandbox of a release's trial has its letters, so that what a crash leaves of it is known.
pub fn tried_in(release: &ReleaseId) -> SandboxId {
    let letters = release.as_str().trim_start_matches("r-");
    format!("s-{letters}")
        .parse()
        .expect("ids differ by nothing but their prefix")
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}
