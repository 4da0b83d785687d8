//! Releases that people make: of an image that is here, of a sandbox as it is, or of an image archive that they send.
//! It must not know HTTP.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use choir_core::{ReleaseConfig, ReleaseId, Slot, UserId};
use choir_store::{NewRelease, Release, ReleaseState, WorkspaceView};
use futures_util::Stream;
use futures_util::future::BoxFuture;
use tokio::fs::File;
use tokio::io::AsyncWriteExt;
use tokio::sync::{Semaphore, watch};

use super::Releases;
use crate::app::apart;
use crate::error::{ApiError, ApiResult};
use crate::fail;
use crate::reconcile::trial::Tried;
use crate::upload::Upload;

/// Archives that are received and unpacked at the same time, by all users.
const AT_ONCE: usize = 2;
/// What must stay free where archives are received: the database may be there, too.
const SPARE: u64 = 1 << 30;
/// How often, in bytes, it is looked whether it is.
const LOOK_EVERY: u64 = 64 << 20;

/// What somebody wants a release to be.
pub struct Wanted {
    pub name: String,
    pub config: ReleaseConfig,
}

/// Starts a release of this user once, and says why it does not.
pub type Trial = Box<dyn FnOnce(ReleaseId, UserId) -> BoxFuture<'static, Result<Tried, String>> + Send>;

/// What is under way.
pub struct Making {
    uploads: PathBuf,
    /// Bytes, of an archive and of what it unpacks to.
    most: u64,
    places: Arc<Semaphore>,
    /// Rings when a release is made or rejected.
    ended: watch::Sender<()>,
}

impl Making {
    pub fn new(uploads: PathBuf, most: u64) -> Self {
        Self {
            uploads,
            most,
            places: Arc::new(Semaphore::new(AT_ONCE)),
            ended: watch::Sender::new(()),
        }
    }

    pub fn changed(&self) {
        self.ended.send_replace(());
    }

    /// Removes archives that a crash left.
    pub fn clear(&self) {
        if let Err(error) = std::fs::remove_dir_all(&self.uploads)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, "archives of earlier uploads stay");
        }
    }
}

impl Releases {
    /// One that this user can have a slot run.
    pub async fn usable(&self, id: &ReleaseId, user: &UserId) -> ApiResult<Release> {
        let release = self.store.release(id).await?;
        if !release.is_for(user) {
            return Err(ApiError::not_found());
        }
        if !release.is_usable() {
            let message = format!(
                "This release is {}; choose one that is verified.",
                release.state.as_str()
            );
            return Err(ApiError::conflict("release_not_usable", message));
        }
        Ok(release)
    }

    /// A release of an image that is here already, with another config; `None` when there is no such image.
    pub async fn with_config(
        self: &Arc<Self>,
        user: &UserId,
        image: &str,
        wanted: Wanted,
    ) -> ApiResult<Option<Release>> {
        let fits = |r: &Release| r.image_digest == image && r.is_usable() && r.is_for(user);
        let Some(source) = self.store.releases().await?.into_iter().find(fits) else {
            return Ok(None);
        };
        let (releases, user, image) = (self.clone(), user.clone(), image.to_owned());
        let copied = apart(async move {
            let id = releases.begin(&user, wanted).await?;
            releases.copy(&id, &source.id, &image).await
        });
        copied.await.map(Some)
    }

    async fn copy(&self, id: &ReleaseId, source: &ReleaseId, image: &str) -> ApiResult<Release> {
        let made: ApiResult<()> = async {
            self.volumes.snapshot(source.as_str(), id.as_str(), false).await?;
            Ok(self.store.release_imported(id, image).await?)
        }
        .await;
        if let Err(error) = made {
            self.reject(id, &error.to_string()).await;
            return Err(error);
        }
        self.tell(id).await;
        Ok(self.store.release(id).await?)
    }

    /// A release of what the system of a slot is now; what is in its home stays there.
    pub async fn of_slot(
        self: &Arc<Self>,
        view: &WorkspaceView,
        slot: Slot,
        name: String,
        config: Option<ReleaseConfig>,
    ) -> ApiResult<Release> {
        let config = match config {
            Some(config) => config,
            None => self.store.release(&view.slot(slot).release).await?.config,
        };
        let (releases, view) = (self.clone(), view.clone());
        let taken = apart(async move {
            let id = releases.begin(&view.workspace.user, Wanted { name, config }).await?;
            releases.take(&id, &view, slot).await
        });
        taken.await
    }

    async fn take(&self, id: &ReleaseId, view: &WorkspaceView, slot: Slot) -> ApiResult<Release> {
        let sandbox = view.slot(slot);
        let made = async {
            self.volumes.derive(sandbox.id.as_str(), id.as_str()).await?;
            fail::point("release.taken").await.map_err(ApiError::internal)?;
            let now = self.store.workspace(&view.workspace.id).await?;
            let same = |s: &choir_store::Sandbox| s.id == sandbox.id && s.release == sandbox.release;
            let whole = Slot::ALL
                .map(|slot| now.slot(slot))
                .into_iter()
                .any(|s| same(s) && s.refill.is_none());
            if !whole || sandbox.refill.is_some() {
                let message = format!("What {slot} holds is being replaced; try again when that is done.");
                return Err(ApiError::conflict("being_replaced", message));
            }
            self.volumes.seal(id.as_str()).await?;
            self.store.release_taken(id, &view.workspace.user, id.as_str()).await?;
            Ok(())
        };
        if let Err(error) = made.await {
            self.reject(id, &format!("it could not be made of {slot}: {error}"))
                .await;
            return Err(error);
        }
        self.tell(id).await;
        Ok(self.store.release(id).await?)
    }

    /// Receives an archive, imports it in the background, and tries it before anybody can run it. Broken off, it leaves a
    /// rejected release that says so.
    pub async fn receive<S, E>(
        self: &Arc<Self>,
        user: &UserId,
        wanted: Wanted,
        archive: S,
        trial: Trial,
    ) -> ApiResult<ReleaseId>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + 'static,
        E: std::fmt::Display + Send + 'static,
    {
        let busy = || {
            let message = "Two images are being imported already; try again when one of them is done.";
            ApiError::unavailable("busy", message).retry_after(30)
        };
        // One more must not hold up those who have begun.
        let place = self.making.places.clone().try_acquire_owned().map_err(|_| busy())?;
        let (releases, user) = (self.clone(), user.clone());
        let receiving = apart(async move {
            let id = releases.begin(&user, wanted).await?;
            let path = releases.making.uploads.join(format!("{id}.tar"));
            if let Err(error) = releases.write_down(&path, archive).await {
                let _ = std::fs::remove_file(&path);
                releases.reject(&id, &error.to_string()).await;
                return Err(error);
            }
            let (making, trial) = (id.clone(), trial(id.clone(), user));
            tokio::spawn(async move {
                releases.import(&making, &path, trial).await;
                drop(place);
            });
            Ok(id)
        });
        receiving.await
    }

    async fn import(&self, id: &ReleaseId, archive: &Path, trial: BoxFuture<'static, Result<Tried, String>>) {
        let digest = self.volumes.import_image(id.as_str(), archive, self.making.most).await;
        let _ = std::fs::remove_file(archive);
        let imported = async {
            let digest = digest.map_err(super::text)?;
            match trial.await? {
                Tried::Started => self.store.release_tried(id, &digest).await,
                Tried::NotYet => self.store.release_imported(id, &digest).await,
            }
            .map_err(super::text)
        };
        match imported.await {
            Ok(()) => self.tell(id).await,
            Err(reason) => self.reject(id, &reason).await,
        }
    }

    async fn write_down<E: std::fmt::Display>(
        &self,
        path: &Path,
        archive: impl Stream<Item = Result<Bytes, E>>,
    ) -> ApiResult<()> {
        tokio::fs::create_dir_all(&self.making.uploads)
            .await
            .map_err(ApiError::internal)?;
        let mut file = File::create(path).await.map_err(ApiError::internal)?;
        let (mut written, mut looked) = (0_u64, None);
        let mut archive = Upload::new(archive);
        while let Some(part) = archive.next().await? {
            written += part.len() as u64;
            if written > self.making.most {
                let message = format!("The archive is over {} bytes, which is the most.", self.making.most);
                return Err(ApiError::new(http::StatusCode::PAYLOAD_TOO_LARGE, "too_large", message));
            }
            if looked.is_none_or(|at| written >= at + LOOK_EVERY) {
                let disk = rustix::fs::fstatvfs(&file).map_err(ApiError::internal)?;
                if disk.f_bavail * disk.f_frsize < SPARE + LOOK_EVERY {
                    let message = "The box has no room for the archive; delete something, or ask who runs it.";
                    return Err(ApiError::unavailable("no_space", message));
                }
                looked = Some(written);
            }
            file.write_all(&part).await.map_err(ApiError::internal)?;
        }
        file.flush().await.map_err(ApiError::internal)
    }

    async fn begin(&self, user: &UserId, wanted: Wanted) -> ApiResult<ReleaseId> {
        let id = self.draw();
        let new = NewRelease {
            id: id.clone(),
            name: wanted.name,
            owner: Some(user.clone()),
            config: wanted.config,
        };
        let audit = self.event(Some(user), "release.create", &id);
        self.store.begin_release(new, audit).await?;
        Ok(id)
    }

    /// Waits until a release is made or rejected, at most `within`; the release then.
    pub async fn made(&self, id: &ReleaseId, within: Duration) -> ApiResult<Release> {
        let mut ended = self.making.ended.subscribe();
        let deadline = tokio::time::Instant::now() + within;
        loop {
            ended.borrow_and_update();
            let release = self.store.release(id).await?;
            let over = release.state != ReleaseState::Importing;
            if over || tokio::time::timeout_at(deadline, ended.changed()).await.is_err() {
                return Ok(release);
            }
        }
    }

    /// Removes a release that nothing uses. One of the box is for those who run it.
    pub async fn delete(&self, user: &UserId, admin: bool, id: &ReleaseId) -> ApiResult<()> {
        let release = self.store.release(id).await?;
        if !release.is_for(user) || release.state == ReleaseState::Retired {
            return Err(ApiError::not_found());
        }
        if release.owner.is_none() && !admin {
            let message = "This release is the box's; only an administrator can delete it.";
            return Err(ApiError::forbidden("not_yours", message));
        }
        if self.newest().await?.is_some_and(|newest| newest.id == *id) {
            let message = "New workspaces start from this release, so it stays.";
            return Err(ApiError::conflict("in_use", message));
        }
        let audit = self.event(Some(user), "release.delete", id);
        self.store.retire_release(id, audit).await?;
        self.remove(id).await;
        Ok(())
    }
}
