//! Releases: importing an image once, and copying it once into each user's id range. It must not know HTTP.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use choir_core::{ReleaseConfig, ReleaseId, SandboxId, UserId, WorkspaceId};
use choir_runtime::Volumes;
use choir_store::{Release, ReleaseCopy, ReleaseState, Store};
use tokio::sync::{OnceCell, watch};

use crate::clock::Clock;
use crate::error::ApiResult;
use crate::random::{Random, draw};

pub mod routes;

/// How far the default release is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DefaultRelease {
    Importing,
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
    default: watch::Sender<DefaultRelease>,
}

impl Releases {
    pub fn new(store: Store, volumes: Arc<dyn Volumes>, clock: Arc<dyn Clock>, random: Arc<dyn Random>) -> Arc<Self> {
        let default = watch::Sender::new(DefaultRelease::Importing);
        Arc::new(Self {
            store,
            volumes,
            clock,
            random,
            copies: Mutex::default(),
            default,
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
            Ok(()) => DefaultRelease::Ready,
            Err(reason) => {
                tracing::error!(reason, archive = %archive.display(), "the default release could not be imported");
                DefaultRelease::Failed(reason)
            }
        };
        self.default.send_replace(state);
    }

    async fn import_default(&self, archive: &Path) -> Result<(), String> {
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
            .find(|r| r.name == name);
        let id = match known {
            Some(Release {
                state: ReleaseState::Candidate | ReleaseState::Verified,
                ..
            }) => return Ok(()),
            Some(Release {
                id,
                state: ReleaseState::Importing,
                ..
            }) => {
                self.volumes.delete(id.as_str()).await.map_err(text)?;
                id
            }
            _ => {
                let id = ReleaseId::from_random(draw(&*self.random));
                let config = ReleaseConfig::default();
                self.store
                    .begin_release(&id, &name, &config, self.clock.now())
                    .await
                    .map_err(text)?;
                id
            }
        };
        tracing::info!(release = %id, archive = %archive.display(), "importing the default release");
        let digest = self.volumes.import(id.as_str(), archive).await.map_err(text)?;
        self.store.release_imported(&id, &digest).await.map_err(text)
    }

    /// A release of an image that is here already, with another config; `None` when there is no such image.
    pub async fn with_config(&self, image: &str, config: ReleaseConfig) -> ApiResult<Option<Release>> {
        let usable = |r: &Release| {
            r.image_digest == image && matches!(r.state, ReleaseState::Candidate | ReleaseState::Verified)
        };
        let Some(source) = self.store.releases().await?.into_iter().find(usable) else {
            return Ok(None);
        };
        let id = ReleaseId::from_random(draw(&*self.random));
        self.store
            .begin_release(&id, &source.name, &config, self.clock.now())
            .await?;
        self.volumes.snapshot(source.id.as_str(), id.as_str(), false).await?;
        self.store.release_imported(&id, image).await?;
        Ok(Some(self.store.release(&id).await?))
    }

    /// The release new workspaces start from: the newest that is not rejected, retired or half imported.
    pub async fn newest(&self) -> Result<Option<Release>, choir_store::Error> {
        let usable = |r: &Release| matches!(r.state, ReleaseState::Candidate | ReleaseState::Verified);
        // A config of somebody's own is used where it is asked for by id.
        let plain = |r: &Release| usable(r) && r.config == ReleaseConfig::default();
        Ok(self.store.releases().await?.into_iter().find(plain))
    }

    pub async fn config(&self, id: &ReleaseId) -> Result<ReleaseConfig, String> {
        self.store.release(id).await.map(|r| r.config).map_err(text)
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
            self.volumes
                .snapshot(release.as_str(), &copy.volume, false)
                .await
                .map_err(text)?;
            self.volumes.shift(&copy.volume, copy.ids).await.map_err(text)?;
            self.store.release_copy_ready(&copy.volume).await.map_err(text)
        })
        .await?;
        Ok(copy)
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
            match self.store.release(&id).await?.state {
                ReleaseState::Candidate => self.store.set_release_state(&id, ReleaseState::Verified).await,
                _ => Ok(()),
            }
        };
        if let Err(error) = result.await {
            tracing::warn!(%error, "a release could not be marked verified");
        }
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}
