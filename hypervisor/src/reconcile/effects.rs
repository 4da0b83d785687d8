//! What a worker does to the world, one function each. All are idempotent: after a crash they are simply done again.

use std::sync::Arc;
use std::time::Duration;

use choir_core::deployment::{Contents, Refill};
use choir_core::sandbox::{Exit, STOP_GRACE};
use choir_core::{Door, Generation, Own, SandboxId, Slot, WorkspaceId};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{Fleet, launch};
use crate::deployments::DRAINED_WITHIN;
use crate::fail;

/// An agent that is not frozen has said something by then.
const ANSWERED_WITHIN: Duration = Duration::from_secs(5);
/// Before what failed is tried again.
const AGAIN: Duration = Duration::from_secs(1);
/// How long one keeps others from their turns. What takes longer waits for something, and works no more.
const TURN: Duration = Duration::from_secs(1);

/// One thing to do for a sandbox.
pub enum Effect {
    Create,
    Start(u64, String),
    /// Once what is in flight has finished, if it is said so.
    Stop(u64, bool),
    Refill(Refill),
    Pause(u64),
    Thaw(u64),
    Remove(u64),
    /// With the generation that runs, if one does.
    Limit(Option<u64>),
    Delete,
}

/// What came of it; errors are sentences.
pub enum Outcome {
    Created(Result<(), String>),
    Started(u64, Result<(), String>),
    Stopped(u64, Exit),
    Refilled(Refill, Result<(), String>),
    Paused(Result<(), String>),
    /// It is frozen, and the container service does not know that: nothing will thaw it.
    Frozen(String),
    Thawed(Result<(), String>),
    Removed(Result<(), String>),
    Limited(Result<(), String>),
    Deleted(Result<(), String>),
}

/// Carries out one effect.
pub async fn run(fleet: Arc<Fleet>, id: SandboxId, workspace: WorkspaceId, effect: Effect) -> Outcome {
    let generation = |number| Generation {
        sandbox: id.clone(),
        number,
    };
    let runtime = &fleet.services.runtime;
    match effect {
        Effect::Create => Outcome::Created(create(&fleet, &id, &workspace).await),
        Effect::Start(number, nonce) => {
            Outcome::Started(number, start(&fleet, &workspace, &generation(number), nonce).await)
        }
        Effect::Stop(number, drained) => {
            if drained {
                fleet.drain(&generation(number), DRAINED_WITHIN).await;
            }
            Outcome::Stopped(number, stop(&fleet, &generation(number)).await)
        }
        Effect::Refill(to) => {
            let done = paced(refill(&fleet, &id, &workspace, &to).await).await;
            Outcome::Refilled(to, done)
        }
        Effect::Pause(number) => {
            let paused = pause(&fleet, &generation(number)).await;
            fail::point("pause.frozen").await.ok();
            paused
        }
        Effect::Thaw(number) => {
            let thawed = runtime.unpause(&generation(number)).await.map_err(text);
            fail::point("thaw.thawed").await.ok();
            Outcome::Thawed(thawed)
        }
        Effect::Remove(number) => {
            let generation = generation(number);
            let removed = in_turn(&fleet, runtime.remove(&generation)).await.map_err(text);
            let removed = paced(removed).await;
            fail::point("remove.removed").await.ok();
            Outcome::Removed(removed)
        }
        Effect::Limit(number) => Outcome::Limited(limit(&fleet, &id, &workspace, number.map(generation)).await),
        Effect::Delete => Outcome::Deleted(paced(delete(&fleet, &id, &workspace).await).await),
    }
}

/// For what is begun again as soon as it has failed: who refuses is not asked without pause.
async fn paced(done: Result<(), String>) -> Result<(), String> {
    if done.is_err() {
        tokio::time::sleep(AGAIN).await;
    }
    done
}

/// Freezes it. What the service did not tell, because it was killed over it, is found out from the agent.
async fn pause(fleet: &Fleet, generation: &Generation) -> Outcome {
    let runtime = &fleet.services.runtime;
    let Err(error) = runtime.pause(generation).await else {
        return Outcome::Paused(Ok(()));
    };
    tokio::time::sleep(AGAIN).await;
    if answers(fleet, generation).await {
        return Outcome::Paused(Err(error.to_string()));
    }
    loop {
        match runtime.inspect(generation).await {
            Ok(choir_runtime::Seen::Paused) => return Outcome::Paused(Ok(())),
            Ok(choir_runtime::Seen::Running) => return Outcome::Frozen(error.to_string()),
            // Its end is told of.
            Ok(_) => return Outcome::Paused(Err(error.to_string())),
            Err(_) => tokio::time::sleep(AGAIN).await,
        }
    }
}

/// Whether its agent says anything at all.
async fn answers(fleet: &Fleet, generation: &Generation) -> bool {
    let asked = async {
        let mut stream = fleet.services.runtime.open(generation, Door::Agent).await.ok()?;
        let question = b"GET /health HTTP/1.1\r\nHost: sandbox\r\nConnection: close\r\n\r\n";
        stream.write_all(question).await.ok()?;
        stream.read_u8().await.ok()
    };
    let answered = tokio::time::timeout(ANSWERED_WITHIN, asked).await;
    answered.is_ok_and(|byte| byte.is_some())
}

async fn create(fleet: &Fleet, id: &SandboxId, workspace: &WorkspaceId) -> Result<(), String> {
    let view = fleet.services.store.workspace(workspace).await.map_err(text)?;
    let sandbox = if view.live.id == *id { &view.live } else { &view.dev };
    let copy = fleet
        .services
        .releases
        .copy_for(&sandbox.release, &view.workspace.user)
        .await?;
    let limits = launch::limits(
        &view,
        &fleet.services.config,
        &fleet.services.releases.config(&sandbox.release).await?,
        &Own::Silent,
    );
    let volumes = &fleet.services.volumes;
    volumes.derive(&copy.volume, id.as_str()).await.map_err(text)?;
    fail::point("create.derived").await?;
    volumes.limit(id.as_str(), limits.disk).await.map_err(text)
}

async fn start(fleet: &Fleet, workspace: &WorkspaceId, generation: &Generation, nonce: String) -> Result<(), String> {
    let starting = async {
        fail::point("start.recorded").await?;
        let spec = launch::spec(&fleet.services, workspace, generation, nonce).await?;
        fleet.services.runtime.create(&spec).await.map_err(text)?;
        fail::point("start.created").await?;
        fleet.services.runtime.start(generation).await.map_err(text)?;
        fail::point("start.started").await
    };
    in_turn(fleet, starting).await
}

/// Has the container service do what takes a processor's time when it is its turn: what runs has to answer meanwhile. A stop
/// takes none: it mostly waits, and others wait for it.
async fn in_turn<T>(fleet: &Fleet, work: impl Future<Output = T>) -> T {
    // It is never closed.
    let turn = fleet.turns.acquire().await;
    let mut work = std::pin::pin!(work);
    match tokio::time::timeout(TURN, &mut work).await {
        Ok(done) => done,
        Err(_) => {
            drop(turn);
            work.await
        }
    }
}

/// Ends the container. A service that does not answer is asked again until it does: a container that might still
/// run is not called stopped.
async fn stop(fleet: &Fleet, generation: &Generation) -> Exit {
    let runtime = &fleet.services.runtime;
    let mut wait = Duration::from_millis(200);
    loop {
        match runtime.stop(generation, STOP_GRACE).await {
            Ok(exit) => {
                fail::point("stop.stopped").await.ok();
                return exit;
            }
            Err(choir_runtime::Error::NotFound) => {
                return Exit {
                    code: 0,
                    oom_killed: false,
                };
            }
            Err(error) => tracing::warn!(%generation, %error, "a container could not be stopped; trying again"),
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(Duration::from_secs(10));
    }
}

/// Keeps what the volume holds, puts other contents in its place, and says so. No container of the sandbox is there.
async fn refill(fleet: &Fleet, id: &SandboxId, workspace: &WorkspaceId, to: &Refill) -> Result<(), String> {
    let volumes = &fleet.services.volumes;
    let (own, keep) = (id.as_str(), to.keep.as_str());
    fail::point("refill.begun").await?;
    match volumes.snapshot(own, keep, true).await {
        // An earlier try came this far.
        Err(choir_runtime::Error::NotFound) => volumes.usage(keep).await.map(drop).map_err(text)?,
        kept => kept.map_err(text)?,
    }
    fail::point("refill.kept").await?;
    match &to.with {
        Contents::Snapshot(snapshot) => {
            // What is there goes only for something that is there.
            volumes.usage(snapshot.as_str()).await.map_err(text)?;
            volumes.delete(own).await.map_err(text)?;
            fail::point("refill.deleted").await?;
            volumes.snapshot(snapshot.as_str(), own, false).await.map_err(text)?;
        }
        Contents::Release(release) => {
            let view = fleet.services.store.workspace(workspace).await.map_err(text)?;
            let copy = fleet.services.releases.copy_for(release, &view.workspace.user).await?;
            volumes.replace_root(&copy.volume, id).await.map_err(text)?;
        }
    }
    limit(fleet, id, workspace, None).await?;
    fail::point("refill.filled").await?;
    let at = fleet.now();
    fleet.services.store.refilled(id, to, at).await.map_err(text)?;
    fail::point("refill.recorded").await
}

async fn delete(fleet: &Fleet, id: &SandboxId, workspace: &WorkspaceId) -> Result<(), String> {
    let runtime = &fleet.services.runtime;
    for found in runtime.list().await.map_err(text)? {
        if found.generation.sandbox == *id {
            in_turn(fleet, runtime.remove(&found.generation)).await.map_err(text)?;
        }
    }
    let (volumes, store) = (&fleet.services.volumes, &fleet.services.store);
    for snapshot in store.snapshots(workspace).await.map_err(text)? {
        if snapshot.sandbox == *id {
            volumes.delete(snapshot.id.as_str()).await.map_err(text)?;
            store.forget_snapshot(&snapshot.id).await.map_err(text)?;
        }
    }
    volumes.delete(id.as_str()).await.map_err(text)
}

/// Puts the limits of the database into effect: on the disk always, on the container where one runs.
async fn limit(
    fleet: &Fleet,
    id: &SandboxId,
    workspace: &WorkspaceId,
    generation: Option<Generation>,
) -> Result<(), String> {
    let view = fleet.services.store.workspace(workspace).await.map_err(text)?;
    let slot = if view.live.id == *id { Slot::Live } else { Slot::Dev };
    let release = fleet.services.releases.config(&view.slot(slot).release).await?;
    let own = fleet.handle(id).map(|handle| handle.says()).unwrap_or_default();
    let limits = launch::limits(&view, &fleet.services.config, &release, &own);
    fleet
        .services
        .volumes
        .limit(id.as_str(), limits.disk)
        .await
        .map_err(text)?;
    match generation {
        Some(generation) => fleet
            .services
            .runtime
            .limit(&generation, &limits, slot)
            .await
            .map_err(text),
        None => Ok(()),
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}
