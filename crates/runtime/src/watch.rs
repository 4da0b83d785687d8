//! Notices that containers ended: Podman's event stream, and a sweep after each time it was lost, so that no exit is
//! missed. It must not decide what an exit means.

use std::sync::Arc;
use std::time::Duration;

use choir_core::sandbox::Exit;
use http_body_util::BodyExt;
use tokio::time::Instant;

use crate::libpod::Event;
use crate::podman::{Known, Shared, generation};
use crate::{Error, Result, Seen};

/// A sweep happens at least this often, for events the service lost.
const SWEEP: Duration = Duration::from_secs(30);
/// The first one, when Podman has begun to listen for us: what ends in between is seen twice rather than never.
const SETTLE: Duration = Duration::from_millis(300);
/// Before the n-th attempt to reach the service again.
const BACKOFF: [Duration; 4] = [
    Duration::from_millis(100),
    Duration::from_millis(500),
    Duration::from_secs(2),
    Duration::from_secs(5),
];
/// Events are small; a longer line is none.
const MAX_LINE: usize = 64 << 10;

/// Runs until it is aborted.
pub(crate) async fn exits(shared: Arc<Shared>) {
    let mut failures = 0;
    loop {
        match follow(&shared, &mut failures).await {
            Ok(()) => tracing::info!("Podman closed its event stream; it is opened again"),
            Err(e) => tracing::warn!(error = %e, "Podman's events cannot be followed"),
        }
        tokio::time::sleep(BACKOFF[failures.min(BACKOFF.len() - 1)]).await;
        failures += 1;
    }
}

async fn follow(shared: &Arc<Shared>, failures: &mut usize) -> Result<()> {
    let mut sweeps = tokio::time::interval_at(Instant::now() + SETTLE, SWEEP);
    let opening = shared.client.deaths();
    tokio::pin!(opening);
    // Podman 4 sends even the head of the answer only with the first event.
    let mut body = loop {
        tokio::select! {
            body = &mut opening => break body?,
            _ = sweeps.tick() => {
                sweep(shared).await?;
                *failures = 0;
            }
        }
    };
    let mut line = Vec::new();
    loop {
        let frame = tokio::select! {
            frame = body.frame() => frame,
            _ = sweeps.tick() => {
                sweep(shared).await?;
                continue;
            }
        };
        let data = match frame {
            None => return Ok(()),
            Some(frame) => frame.map_err(|e| Error::Unavailable(e.to_string()))?.into_data(),
        };
        for byte in data.unwrap_or_default() {
            if byte == b'\n' {
                died(shared, &line).await;
                line.clear();
            } else if line.len() < MAX_LINE {
                line.push(byte);
            } else {
                return Err(Error::Protocol("its events do not end".into()));
            }
        }
    }
}

async fn died(shared: &Arc<Shared>, line: &[u8]) {
    let Ok(event) = serde_json::from_slice::<Event>(line) else {
        return;
    };
    let labels = &event.actor.attributes;
    let Some(known) = generation(labels).and_then(|g| shared.get(&g)) else {
        return;
    };
    let code = labels
        .get("containerExitCode")
        .and_then(|c| c.parse().ok())
        .unwrap_or(255);
    let exit = match look(shared, &known).await {
        Ok(Some(exit)) => exit,
        _ => Exit {
            code,
            oom_killed: false,
        },
    };
    shared.note_exit(&known, exit).await;
}

/// Looks at every container that should be running.
async fn sweep(shared: &Arc<Shared>) -> Result<()> {
    let open: Vec<Arc<Known>> = shared
        .all()
        .values()
        .filter(|known| {
            let progress = known.progress();
            progress.started && !progress.ended
        })
        .cloned()
        .collect();
    for known in open {
        if let Some(exit) = look(shared, &known).await? {
            shared.note_exit(&known, exit).await;
        }
    }
    Ok(())
}

async fn look(shared: &Shared, known: &Known) -> Result<Option<Exit>> {
    match shared.look(&known.container.name).await {
        Ok(Seen::Exited(exit)) => Ok(Some(exit)),
        Ok(_) => Ok(None),
        // Somebody removed it, by force: that is how such a process ends.
        Err(Error::NotFound) => Ok(Some(Exit {
            code: 137,
            oom_killed: false,
        })),
        Err(e) => Err(e),
    }
}
