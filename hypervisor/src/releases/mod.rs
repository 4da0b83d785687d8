//! Releases: importing an image once, copying it once into each user's id range, and their end. It must not know HTTP.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use choir_api::events::{RELEASE, ReleaseChanged};
use choir_core::{ReleaseConfig, ReleaseId, SandboxId, UserId, WorkspaceId};
use choir_runtime::Volumes;
use choir_store::{AuditEvent, NewRelease, Release, ReleaseCopy, ReleaseState, Store};
use tokio::sync::{OnceCell, watch};

use crate::clock::Clock;
use crate::events::Events;
use crate::fail;
use crate::random::{Random, draw};

mod making;
pub mod routes;

use making::Making;
pub use making::Wanted;

/// Releases of the box's own image that stay although nothing uses them: the present one and the one before.
const DEFAULTS_KEPT: usize = 2;

/// How far the default release is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DefaultRelease {
    Importing,
    /// Whoever makes its archive starts the hypervisor again when it is there.
    Missing,
    Ready,
    /// One sentence that says what to do.
    Failed(String),
}

/// All releases of this box.
pub struct Releases {
    store: Store,
    volumes: Arc<dyn Volumes>,
    clock: Arc<dyn Clock>,
    random: Arc<dyn Random>,
    /// Copies made or being made by this process, by volume: many callers cause one shift.
    copies: Mutex<HashMap<String, Arc<OnceCell<()>>>>,
    /// Configs that were read, which never change.
    configs: Mutex<HashMap<ReleaseId, ReleaseConfig>>,
    default: watch::Sender<DefaultRelease>,
    /// Of the archive that is configured, which may be an older one than before.
    current: Mutex<Option<ReleaseId>>,
    making: Making,
    events: Arc<Events>,
}

impl Releases {
    /// `uploads`: where archives are until they are imported, each of which may unpack to `most` bytes.
    pub fn new(
        store: Store,
        volumes: Arc<dyn Volumes>,
        clock: Arc<dyn Clock>,
        random: Arc<dyn Random>,
        uploads: PathBuf,
        most: u64,
        events: Arc<Events>,
    ) -> Arc<Self> {
        let default = watch::Sender::new(DefaultRelease::Importing);
        Arc::new(Self {
            making: Making::new(uploads, most),
            events,
            store,
            volumes,
            clock,
            random,
            copies: Mutex::default(),
            configs: Mutex::default(),
            default,
            current: Mutex::default(),
        })
    }

    /// How far the default release is, for readiness.
    pub fn default_state(&self) -> DefaultRelease {
        self.default.borrow().clone()
    }

    /// Sees to it that the archive is imported: once per file name, which carries the digest of its recipe. An import
    /// that a crash cut short is begun again.
    pub async fn ensure_default(&self, archive: &Path) {
        let result = self.import_default(archive).await;
        let state = match result {
            Ok(current) => {
                *self.current.lock().expect("never poisoned: no panic while held") = Some(current);
                self.retire_old_defaults().await;
                DefaultRelease::Ready
            }
            Err(reason) => {
                tracing::error!(reason, archive = %archive.display(), "the default release could not be imported");
                DefaultRelease::Failed(reason)
            }
        };
        self.default.send_replace(state);
    }

    /// In place of the former, while there is no archive: what was imported before is still good.
    pub async fn do_without(&self, archive: &Path) {
        tracing::warn!(archive = %archive.display(), "the default release is not there");
        let state = match self.newest().await {
            Ok(Some(_)) => DefaultRelease::Ready,
            Ok(None) => DefaultRelease::Missing,
            Err(error) => DefaultRelease::Failed(text(error)),
        };
        self.default.send_replace(state);
    }

    async fn import_default(&self, archive: &Path) -> Result<ReleaseId, String> {
        let name = archive
            .file_stem()
            .map(|s| s.to_string_lossy().into_owned())
            .unwrap_or_default();
        let known = self
            .store
            .releases()
            .await
            .map_err(text)?
            .into_iter()
            .find(|r| r.owner.is_none() && r.name == name);
        let id = match known {
            Some(Release {
                id,
                state: ReleaseState::Candidate | ReleaseState::Verified,
                ..
            }) => return Ok(id),
            Some(Release {
                id,
                state: ReleaseState::Importing,
                ..
            }) => {
                self.volumes.delete(id.as_str()).await.map_err(text)?;
                id
            }
            _ => {
                let id = self.draw();
                let new = NewRelease {
                    id: id.clone(),
                    name,
                    owner: None,
                    config: ReleaseConfig::default(),
                };
                let audit = self.event(None, "release.create", &id);
                self.store.begin_release(new, audit).await.map_err(text)?;
                id
            }
        };
        for other in self.store.releases().await.map_err(text)? {
            if other.owner.is_none() && other.state == ReleaseState::Importing && other.id != id {
                self.reject(&other.id, "its import was cut off, and another image is there now")
                    .await;
            }
        }
        tracing::info!(release = %id, archive = %archive.display(), "importing the default release");
        let digest = self.volumes.import(id.as_str(), archive).await.map_err(text)?;
        self.store.release_imported(&id, &digest).await.map_err(text)?;
        Ok(id)
    }

    /// The release new workspaces start from: that of the configured archive, until it is there the newest that is not
    /// rejected, retired or half imported.
    pub async fn newest(&self) -> Result<Option<Release>, choir_store::Error> {
        Ok(self.defaults().await?.into_iter().next())
    }

    /// The usable releases of the box's own image: the present one, then the newest first.
    async fn defaults(&self) -> Result<Vec<Release>, choir_store::Error> {
        let mut all = self.store.releases().await?;
        // A config of somebody's own is used where it is asked for by id.
        all.retain(|r| r.is_usable() && r.owner.is_none() && r.config == ReleaseConfig::default());
        let current = self
            .current
            .lock()
            .expect("never poisoned: no panic while held")
            .clone();
        all.sort_by_key(|r| Some(&r.id) != current.as_ref());
        Ok(all)
    }

    /// Removes those of the box's own image that a newer one has replaced and nothing uses.
    async fn retire_old_defaults(&self) {
        let old = self.defaults().await.unwrap_or_default();
        for release in old.into_iter().skip(DEFAULTS_KEPT) {
            let audit = self.event(None, "release.delete", &release.id);
            // One that something uses stays.
            if self.store.retire_release(&release.id, audit).await.is_ok() {
                self.remove(&release.id).await;
            }
        }
    }

    /// Removes what a crash left half made or half deleted. Before anything new is made.
    pub async fn clear(&self) -> Result<(), choir_store::Error> {
        self.making.clear();
        for release in self.store.releases().await? {
            match release.state {
                ReleaseState::Importing if release.owner.is_some() => {
                    let reason = "the hypervisor was restarted while this was made; make it again";
                    self.reject(&release.id, reason).await;
                }
                ReleaseState::Retired => self.remove(&release.id).await,
                // The helper may have gone on with it after we gave it up.
                ReleaseState::Rejected => {
                    let _ = self.volumes.delete(release.id.as_str()).await;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// It came to nothing: its volume goes, and the row says why.
    async fn reject(&self, id: &ReleaseId, reason: &str) {
        tracing::warn!(release = %id, reason, "a release is rejected");
        // Its owner's copy, too, where it was tried.
        for volume in self.store.release_volumes(id).await.unwrap_or_default() {
            if let Err(error) = self.volumes.delete(&volume).await {
                tracing::warn!(release = %id, %error, "what was made of it stays");
            }
        }
        let owner = self.store.release(id).await.ok().and_then(|release| release.owner);
        let audit = AuditEvent {
            outcome: "rejected",
            ..self.event(owner.as_ref(), "release.made", id)
        };
        if let Err(error) = self.store.reject_release(id, reason, audit).await {
            tracing::error!(release = %id, %error, "a release stays half made until the next start");
        }
        self.tell(id).await;
    }

    /// Tells those who wait for it, and its owner, what has become of a release.
    async fn tell(&self, id: &ReleaseId) {
        self.making.changed();
        if let Ok(release) = self.store.release(id).await
            && let Some(owner) = &release.owner
        {
            let changed = ReleaseChanged {
                id: id.clone(),
                state: release.state.as_str().to_owned(),
            };
            self.events.tell(owner, RELEASE, &changed);
        }
    }

    /// The volumes of a retired release, then its row; what fails is done at the next start.
    async fn remove(&self, id: &ReleaseId) {
        let removed = async {
            fail::point("release.retired").await?;
            for volume in self.store.release_volumes(id).await.map_err(text)? {
                self.volumes.delete(&volume).await.map_err(text)?;
            }
            self.configs().remove(id);
            fail::point("release.cleared").await?;
            self.store.forget_release(id).await.map_err(text)
        };
        if let Err(reason) = removed.await {
            tracing::warn!(release = %id, reason, "a release stays for now");
        }
    }

    fn draw(&self) -> ReleaseId {
        ReleaseId::from_random(draw(&*self.random))
    }

    /// Somebody's, or the box's own.
    fn event(&self, user: Option<&UserId>, action: &'static str, id: &ReleaseId) -> AuditEvent {
        AuditEvent {
            at: self.clock.now(),
            actor: user.map_or("system", UserId::as_str).to_owned(),
            user: user.cloned(),
            action,
            subject: id.to_string(),
            outcome: "ok",
        }
    }

    pub async fn config(&self, id: &ReleaseId) -> Result<ReleaseConfig, String> {
        let known = self.configs().get(id).cloned();
        if let Some(config) = known {
            return Ok(config);
        }
        let config = self.store.release(id).await.map_err(text)?.config;
        self.configs().insert(id.clone(), config.clone());
        Ok(config)
    }

    fn configs(&self) -> MutexGuard<'_, HashMap<ReleaseId, ReleaseConfig>> {
        self.configs.lock().expect("never poisoned: no panic while held")
    }

    /// The release's volume in the user's id range, made and shifted if this is the first use.
    pub async fn copy_for(&self, release: &ReleaseId, user: &UserId) -> Result<ReleaseCopy, String> {
        let copy = self.store.release_copy(release, user).await.map_err(text)?;
        if copy.ready {
            return Ok(copy);
        }
        let cell = {
            let mut copies = self.copies.lock().expect("never poisoned: no panic while held");
            copies.entry(copy.volume.clone()).or_default().clone()
        };
        cell.get_or_try_init(|| async {
            let (source, volumes) = (release.as_str(), &self.volumes);
            volumes.seal(source).await.map_err(text)?;
            volumes.snapshot(source, &copy.volume, false).await.map_err(text)?;
            volumes.shift(&copy.volume, copy.ids).await.map_err(text)?;
            volumes.seal(&copy.volume).await.map_err(text)?;
            self.store.release_copy_ready(&copy.volume).await.map_err(text)
        })
        .await?;
        Ok(copy)
    }

    /// Has everything there that a slot needs to run a release, or says why it cannot.
    pub async fn ready_for(&self, release: &ReleaseId, user: &UserId) -> Result<(), String> {
        let copy = self.copy_for(release, user).await?;
        self.volumes.seal(&copy.volume).await.map_err(text)
    }

    /// A sandbox became ready: its release is verified, if it was a candidate.
    pub async fn verified_by(&self, workspace: &WorkspaceId, sandbox: &SandboxId) {
        let result = async {
            let view = self.store.workspace(workspace).await?;
            let id = if view.live.id == *sandbox {
                view.live.release
            } else {
                view.dev.release
            };
            self.store.verify_release(&id).await
        };
        if let Err(error) = result.await {
            tracing::warn!(%error, "a release could not be marked verified");
        }
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}
