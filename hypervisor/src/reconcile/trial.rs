//! A release that nobody knows yet is started once, in a sandbox of no workspace, before anybody's slot runs it. It must
//! not leave anything: what a crash leaves is removed at the next start, as is all that no row speaks of.

use std::time::Duration;

use choir_core::sandbox::READY_WITHIN;
use choir_core::{Generation, IdRange, Limits, ReleaseId, SandboxId, Slot, UserId};
use choir_runtime::{AgentConfig, Notice, Spec};
use choir_store::{ReleaseCopy, ReleaseState};
use tokio::sync::oneshot;

use super::admission::{Place, Turn};
use super::{Fleet, launch};

/// How long a place to run in is waited for.
const PLACE_WITHIN: Duration = Duration::from_secs(120);

/// What a trial waits for: its agent came, or what happened instead.
pub type Verdict = oneshot::Sender<Result<(), String>>;

/// What came of a trial, where the release is not to blame for anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tried {
    Started,
    /// It could not be tried, and nothing says that it would not start.
    NotYet,
}

impl Fleet {
    /// Whether an agent comes out of it, in a container that equals its template; else why not.
    pub async fn try_release(&self, release: &ReleaseId, user: &UserId) -> Result<Tried, String> {
        let sandbox = tried_in(release);
        let not_yet = |why: &str| {
            tracing::warn!(%release, why, "a release could not be tried");
            Ok(Tried::NotYet)
        };
        let Some(_place) = self.place_for(&sandbox).await else {
            return not_yet("as many sandboxes run as may");
        };
        let releases = &self.services.releases;
        let (copy, config) = match (releases.copy_for(release, user).await, releases.config(release).await) {
            (Ok(copy), Ok(config)) => (copy, config),
            (Err(why), _) | (_, Err(why)) => return not_yet(&why),
        };
        let limits = self.services.config.limits().patched(&config.limits);
        let generation = Generation { sandbox, number: 1 };
        let (tell, told) = oneshot::channel();
        self.trials().insert(generation.sandbox.clone(), Some(tell));
        let tried = match self.start_bare(&generation, &copy, limits).await {
            Ok(()) => match tokio::time::timeout(READY_WITHIN, told).await {
                Ok(Ok(verdict)) => verdict.map(|()| Tried::Started),
                Ok(Err(_)) => not_yet("nobody listens any more"),
                Err(_) => Err(format!("its agent did not come within {} s", READY_WITHIN.as_secs())),
            },
            Err(choir_runtime::Error::Unavailable(why)) => not_yet(&why),
            Err(error) => Err(error.to_string()),
        };
        self.clear_up(&generation).await;
        tried.map_err(|reason| format!("it does not start: {reason}"))
    }

    async fn start_bare(
        &self,
        generation: &Generation,
        copy: &ReleaseCopy,
        limits: Limits,
    ) -> choir_runtime::Result<()> {
        let (volumes, runtime) = (&self.services.volumes, &self.services.runtime);
        let volume = generation.sandbox.as_str();
        volumes.derive(&copy.volume, volume).await?;
        volumes.limit(volume, limits.disk).await?;
        runtime.create(&self.bare(generation, copy.ids, limits)).await?;
        runtime.start(generation).await
    }

    async fn clear_up(&self, generation: &Generation) {
        let cleared = async {
            self.services.runtime.remove(generation).await?;
            self.services.volumes.delete(generation.sandbox.as_str()).await
        };
        if let Err(error) = cleared.await {
            tracing::warn!(%generation, %error, "what a release was tried in stays until the next start");
        }
        self.trials().remove(&generation.sandbox);
    }

    /// Removes what a crash left of trials; their containers are gone by now.
    pub async fn clear_trials(&self) -> Result<(), choir_store::Error> {
        for release in self.services.store.releases().await? {
            let tried = tried_in(&release.id);
            // Whatever came of it; what is being made is looked at when that has ended.
            if release.state != ReleaseState::Importing
                && release.owner.is_some()
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
        let (Notice::Ready { generation, .. }
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

    async fn place_for(&self, sandbox: &SandboxId) -> Option<Place> {
        match self.admission.ask(sandbox) {
            Turn::Now(place) => Some(place),
            Turn::Later(place) => {
                self.make_room();
                tokio::time::timeout(PLACE_WITHIN, place).await.ok()?.ok()
            }
        }
    }

    /// Nothing of a workspace, and nothing of what the release would start.
    fn bare(&self, generation: &Generation, ids: IdRange, limits: Limits) -> Spec {
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
                unheeded: None,
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
