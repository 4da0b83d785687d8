//! Snapshots that leave the box and come to it, each as one archive. What leaves is recorded before its first byte; what
//! comes is a snapshot once all of it is there, or nothing. It must not know HTTP, nor what an archive holds.

use std::fmt::Display;
use std::io;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use choir_core::{IdRange, Slot, SnapshotId};
use choir_store::{AuditEvent, Snapshot, TakenFor, WorkspaceView};
use futures_util::stream::{self, BoxStream, Stream, StreamExt};
use http::StatusCode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use super::RETRY_S;
use crate::app::App;
use crate::error::{ApiError, ApiResult};
use crate::random::draw;
use crate::reconcile::launch;
use crate::upload::Upload;

/// What a pipe holds, in bytes.
const PART: usize = 64 << 10;

impl App {
    /// All that a snapshot holds. What breaks off ends with an error; so does it once `ended` fires.
    pub async fn export_snapshot(
        self: &Arc<Self>,
        view: &WorkspaceView,
        id: &SnapshotId,
        ended: CancellationToken,
    ) -> ApiResult<BoxStream<'static, io::Result<Bytes>>> {
        let snapshot = self.store.snapshot(&view.workspace.id, id).await?;
        let turn = self.archive_turn()?;
        let (reader, writer) = io::pipe().map_err(ApiError::internal)?;
        let reader = pipe::Receiver::from_owned_fd(reader.into()).map_err(ApiError::internal)?;
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
            let outcome = if packed.is_ok() { "ok" } else { "failed" };
            let told = app.store.audit_outcome(intent, app.clock.now(), outcome).await;
            if let Err(error) = told {
                tracing::error!(snapshot = %snapshot.id, %error, "how an export ended is not in the audit trail");
            }
            packed
        });
        let parts = stream::try_unfold((reader, packing), move |(mut reader, packing)| {
            let ended = ended.clone();
            async move {
                let mut part = BytesMut::with_capacity(PART);
                let read = tokio::select! {
                    read = reader.read_buf(&mut part) => read?,
                    () = ended.cancelled() => return Err(io::Error::other("who asked for it is signed out")),
                };
                if read > 0 {
                    return Ok(Some((part.freeze(), (reader, packing))));
                }
                // The pipe ends the same way whether all was written or not.
                packing.await.map_err(io::Error::other)?.map_err(io::Error::other)?;
                Ok(None)
            }
        });
        Ok(parts.boxed())
    }

    /// Makes a snapshot of a slot of what somebody sends.
    pub async fn import_snapshot<S, E>(
        self: &Arc<Self>,
        view: &WorkspaceView,
        slot: Slot,
        archive: S,
    ) -> ApiResult<Snapshot>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + 'static,
        E: Display + Send + 'static,
    {
        let turn = self.archive_turn()?;
        let audit = self.event(view, "snapshot.import");
        let (app, view) = (self.clone(), view.clone());
        // Apart, since a caller that goes away must not leave it half made.
        let made = tokio::spawn(async move {
            let _turn = turn;
            app.receive_snapshot(&view, slot, Upload::new(archive), audit).await
        });
        made.await.map_err(ApiError::internal)?
    }

    fn archive_turn(&self) -> ApiResult<OwnedSemaphorePermit> {
        let turn = self.archives.clone().try_acquire_owned();
        turn.map_err(|_| ApiError::too_many(RETRY_S))
    }

    async fn receive_snapshot<S, E>(
        &self,
        view: &WorkspaceView,
        slot: Slot,
        archive: Upload<S>,
        audit: AuditEvent,
    ) -> ApiResult<Snapshot>
    where
        S: Stream<Item = Result<Bytes, E>> + Send,
        E: Display + Send,
    {
        let release = self.releases.config(&view.slot(slot).release).await;
        let release = release.map_err(ApiError::internal)?;
        let most = launch::limits(view, &self.config, &release, &self.says(view, slot)).disk;
        let id = SnapshotId::from_random(draw(&*self.random));
        self.store
            .begin_snapshot(&id, &view.workspace.id, slot, TakenFor::Somebody, audit)
            .await?;
        if let Err(error) = self.unpack_snapshot(&id, view.workspace.ids, most, archive).await {
            self.remove_snapshot(&id).await;
            return Err(error);
        }
        self.record_snapshot(&id).await
    }

    async fn unpack_snapshot<S, E>(&self, id: &SnapshotId, ids: IdRange, most: u64, archive: Upload<S>) -> ApiResult<()>
    where
        S: Stream<Item = Result<Bytes, E>> + Send,
        E: Display + Send,
    {
        let (reader, writer) = io::pipe().map_err(ApiError::internal)?;
        let writer = pipe::Sender::from_owned_fd(writer.into()).map_err(ApiError::internal)?;
        let volumes = &self.fleet.services.volumes;
        let unpacking = volumes.unpack(id.as_str(), reader.into(), ids, most);
        let (poured, unpacked) = tokio::join!(pour(archive, writer, most), unpacking);
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

/// Writes what is sent into a pipe. Who still sends would not hear why it was refused, so what comes once nobody reads the
/// pipe is thrown away, up to so many bytes.
async fn pour<S, E>(mut archive: Upload<S>, pipe: pipe::Sender, most: u64) -> ApiResult<()>
where
    S: Stream<Item = Result<Bytes, E>> + Send,
    E: Display + Send,
{
    let (mut pipe, mut thrown_away) = (Some(pipe), 0);
    while let Some(part) = archive.next().await? {
        if let Some(open) = &mut pipe {
            let written = open.write_all(&part).await;
            match written {
                Ok(()) => continue,
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => pipe = None,
                Err(error) => return Err(ApiError::internal(error)),
            }
        }
        thrown_away += part.len() as u64;
        if thrown_away > most {
            break;
        }
    }
    Ok(())
}
