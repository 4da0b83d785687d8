//! Snapshots that leave the box and come to it, each as one archive. What leaves is recorded before its first byte; what
//! comes is a snapshot once all of it is there, or nothing. It must not know HTTP, nor what an archive holds.

use std::collections::HashSet;
use std::fmt::Display;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use choir_core::{IdRange, Slot, SnapshotId, UserId};
use choir_store::{AuditId, Snapshot, TakenFor, WorkspaceView};
use futures_util::stream::{self, Stream};
use http::StatusCode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::RETRY_S;
use crate::app::{App, apart};
use crate::error::{ApiError, ApiResult};
use crate::random::draw;
use crate::reconcile::launch;
use crate::upload::{Patience, Upload};

/// What a pipe holds, in bytes.
const PART: usize = 64 << 10;
/// How long what comes after it was refused is thrown away, so that who sends it hears why.
const THROWN_AWAY: Duration = Duration::from_secs(30);
/// Users whose archives may be on their way at once.
const USERS_AT_ONCE: usize = 4;

/// Whose archives are on their way, out of the box or to it: of each user one.
#[derive(Default)]
pub struct Carrying(Mutex<HashSet<UserId>>);

struct Turn {
    carrying: Arc<Carrying>,
    user: UserId,
}

impl Carrying {
    fn turn(self: &Arc<Self>, user: &UserId) -> ApiResult<Turn> {
        let mut users = self.users();
        if users.len() >= USERS_AT_ONCE || !users.insert(user.clone()) {
            return Err(ApiError::too_many(RETRY_S));
        }
        Ok(Turn {
            carrying: self.clone(),
            user: user.clone(),
        })
    }

    fn users(&self) -> MutexGuard<'_, HashSet<UserId>> {
        self.0.lock().expect("never poisoned: no panic while held")
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.carrying.users().remove(&self.user);
    }
}

/// What goes out; `None` once that was all.
type Parts = mpsc::Sender<Option<Bytes>>;

impl App {
    /// All that a snapshot holds. What breaks off ends with an error; so does it once `ended` fires.
    pub async fn export_snapshot(
        self: &Arc<Self>,
        view: &WorkspaceView,
        id: &SnapshotId,
        ended: CancellationToken,
    ) -> ApiResult<impl Stream<Item = io::Result<Bytes>> + Send + 'static> {
        let snapshot = self.store.snapshot(&view.workspace.id, id).await?;
        let turn = self.carrying.turn(&view.workspace.user)?;
        let (reader, writer) = io::pipe().map_err(ApiError::internal)?;
        let mut reader = pipe::Receiver::from_owned_fd(reader.into()).map_err(ApiError::internal)?;
        let intent = self.store.audit_intent(self.event(view, "snapshot.export")).await?;
        let app = self.clone();
        // Apart, since it ends after a caller who goes away, and counts and is recorded until it does.
        let packing = tokio::spawn(async move {
            let _turn = turn;
            let volumes = &app.fleet.services.volumes;
            let packed = volumes.pack(snapshot.id.as_str(), writer.into()).await;
            if let Err(error) = &packed {
                tracing::warn!(snapshot = %snapshot.id, %error, "an archive was not sent to its end");
            }
            app.record_outcome(intent, packed.is_ok()).await;
            packed
        });
        let mut first = BytesMut::with_capacity(PART);
        if reader.read_buf(&mut first).await.map_err(ApiError::internal)? == 0 {
            return Err(match packing.await.map_err(ApiError::internal)? {
                Err(choir_runtime::Error::Refused(why)) => ApiError::conflict("cannot_pack", why),
                Err(choir_runtime::Error::NotFound) => ApiError::not_found(),
                Err(error) => error.into(),
                Ok(()) => ApiError::internal("an archive of nothing"),
            });
        }
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            tokio::select! {
                () = send(first.freeze(), reader, packing, sender) => {}
                () = ended.cancelled() => {}
            }
        });
        Ok(stream::unfold(receiver, |mut receiver| async move {
            match receiver.recv().await {
                Some(part) => Some((Ok(part?), receiver)),
                None => Some((Err(io::Error::other("it broke off")), receiver)),
            }
        }))
    }

    async fn record_outcome(&self, intent: AuditId, done: bool) {
        let outcome = if done { "ok" } else { "failed" };
        let recorded = self.store.audit_outcome(intent, self.clock.now(), outcome).await;
        if let Err(error) = recorded {
            tracing::error!(%error, "how an archive ended is not in the audit trail");
        }
    }

    /// Makes a snapshot of a slot of what somebody sends.
    pub async fn import_snapshot<S, E>(
        self: &Arc<Self>,
        view: &WorkspaceView,
        slot: Slot,
        archive: S,
        ended: CancellationToken,
    ) -> ApiResult<Snapshot>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + 'static,
        E: Display + Send + 'static,
    {
        let turn = self.carrying.turn(&view.workspace.user)?;
        let intent = self.store.audit_intent(self.event(view, "snapshot.import")).await?;
        let (app, view) = (self.clone(), view.clone());
        let made = apart(async move {
            let _turn = turn;
            let made = app.receive_snapshot(&view, slot, Upload::new(archive), ended).await;
            app.record_outcome(intent, made.is_ok()).await;
            made
        });
        made.await
    }

    async fn receive_snapshot<S, E>(
        &self,
        view: &WorkspaceView,
        slot: Slot,
        archive: Upload<S>,
        ended: CancellationToken,
    ) -> ApiResult<Snapshot>
    where
        S: Stream<Item = Result<Bytes, E>> + Send,
        E: Display + Send,
    {
        let release = self.releases.config(&view.slot(slot).release).await;
        let release = release.map_err(ApiError::internal)?;
        let most = launch::limits(view, &self.config, &release, &self.says(view, slot)).disk;
        let id = SnapshotId::from_random(draw(&*self.random));
        let audit = self.event(view, "snapshot.take");
        self.store
            .begin_snapshot(&id, &view.workspace.id, slot, TakenFor::Somebody, audit)
            .await?;
        let unpacking = self.unpack_snapshot(&id, view.workspace.ids, most, archive, ended);
        if let Err(error) = unpacking.await {
            self.remove_snapshot(&id).await;
            return Err(error);
        }
        // The slot may hold something else by now: this is not of it.
        let made = self.store.snapshot_received(&id).await;
        self.recorded(&id, made).await
    }

    async fn unpack_snapshot<S, E>(
        &self,
        id: &SnapshotId,
        ids: IdRange,
        most: u64,
        archive: Upload<S>,
        ended: CancellationToken,
    ) -> ApiResult<()>
    where
        S: Stream<Item = Result<Bytes, E>> + Send,
        E: Display + Send,
    {
        let (reader, writer) = io::pipe().map_err(ApiError::internal)?;
        let writer = pipe::Sender::from_owned_fd(writer.into()).map_err(ApiError::internal)?;
        let volumes = &self.fleet.services.volumes;
        let unpacking = volumes.unpack(id.as_str(), reader.into(), ids, most);
        let pouring = async {
            tokio::select! {
                poured = pour(archive, writer) => poured,
                () = ended.cancelled() => Err(ApiError::unauthenticated()),
            }
        };
        let (poured, unpacked) = tokio::join!(pouring, unpacking);
        // What broke off is no whole archive, wherever it did.
        poured?;
        match unpacked {
            Err(choir_runtime::Error::Refused(why)) => Err(ApiError::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "rejected",
                format!("The archive was refused: {}.", why.trim_end_matches('.')),
            )),
            unpacked => Ok(unpacked?),
        }
    }
}

/// Hands on what is packed as long as somebody takes it; to the end, if it was packed to the end.
async fn send(
    mut part: Bytes,
    mut reader: pipe::Receiver,
    packing: JoinHandle<choir_runtime::Result<()>>,
    parts: Parts,
) {
    let mut patience = Patience::default();
    while !part.is_empty() {
        let length = part.len();
        let Some(Ok(())) = patience.wait(parts.send(Some(part))).await else {
            return;
        };
        patience.passed(length);
        let mut next = BytesMut::with_capacity(PART);
        if reader.read_buf(&mut next).await.is_err() {
            return;
        }
        part = next.freeze();
    }
    // The pipe ends the same way whether all was written or not.
    if matches!(packing.await, Ok(Ok(()))) {
        let _ = parts.send(None).await;
    }
}

/// Writes what is sent into a pipe. Who still sends would not hear why it was refused, so some of what comes once nobody
/// reads the pipe is thrown away.
async fn pour<S, E>(mut archive: Upload<S>, mut pipe: pipe::Sender) -> ApiResult<()>
where
    S: Stream<Item = Result<Bytes, E>> + Send,
    E: Display + Send,
{
    while let Some(part) = archive.next().await? {
        match pipe.write_all(&part).await {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                let rest = async {
                    while archive.next().await?.is_some() {}
                    Ok(())
                };
                return tokio::time::timeout(THROWN_AWAY, rest).await.unwrap_or(Ok(()));
            }
            Err(error) => return Err(ApiError::internal(error)),
        }
    }
    Ok(())
}
