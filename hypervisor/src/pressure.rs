//! When the box runs short of memory, what is not in daily use gives way before `live` suffers: dev slots are frozen, then
//! stopped, the largest first, then what is frozen in live. It must not touch a live slot that runs.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use choir_core::memory::{Gauge, Level, Memory};
use choir_core::sandbox::Observed;
use choir_core::{SandboxId, Slot, WorkspaceId};
use futures_util::future::join_all;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::app::App;
use crate::reconcile::Handle;

/// From one look to the next.
const LOOK: Duration = Duration::from_secs(1);
/// How long one that gives way is waited for before the next one has to.
const GIVES_WAY_WITHIN: Duration = Duration::from_secs(5);
/// How long the runtime may take to say how much a sandbox holds.
const COUNTED_WITHIN: Duration = Duration::from_secs(2);

/// What is remembered from look to look.
pub struct Watch {
    gauge: Gauge,
    /// What was frozen for want of memory, and runs on when there is enough.
    frozen: BTreeSet<SandboxId>,
}

impl Watch {
    pub fn new(reserve: u64) -> Self {
        Self {
            gauge: Gauge::new(reserve),
            frozen: BTreeSet::new(),
        }
    }
}

impl App {
    /// Looks at the box's memory until the hypervisor stops.
    pub async fn mind_memory(self: Arc<Self>, stop: CancellationToken) {
        let mut watch = Watch::new(self.config.sandboxes.memory_reserve);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
            match of_the_box() {
                Ok(seen) => {
                    self.look_at_memory(&mut watch, seen, self.clock.now()).await;
                }
                Err(error) => {
                    tracing::error!(%error, "the kernel does not say how much memory is left; nothing gives way");
                    return;
                }
            }
        }
    }

    /// One look, and one step towards what it asks for.
    pub async fn look_at_memory(&self, watch: &mut Watch, seen: Memory, now: Timestamp) -> Level {
        let level = watch.gauge.look(seen, now);
        let admission = &self.fleet.admission;
        let was_short = admission.is_short_of_memory();
        admission.short_of_memory(level != Level::Fine);
        match level {
            Level::Short => {
                if !was_short {
                    tracing::warn!(
                        available = seen.available,
                        "the box is short of memory; dev slots give way"
                    );
                }
                self.one_gives_way(watch).await;
            }
            Level::Fine if was_short => {
                tracing::info!(available = seen.available, "there is memory again");
                for id in std::mem::take(&mut watch.frozen) {
                    if let Some(handle) = self.fleet.handle(&id) {
                        handle.resume().await;
                    }
                }
            }
            Level::Fine | Level::Recovering => {}
        }
        level
    }

    async fn one_gives_way(&self, watch: &mut Watch) {
        let busy: BTreeSet<WorkspaceId> = match self.store.open_deployments().await {
            Ok(open) => open.into_iter().map(|deployment| deployment.workspace).collect(),
            Err(error) => {
                tracing::error!(%error, "open deployments are unknown; nothing gives way");
                return;
            }
        };
        let mut all = self.fleet.handles();
        all.retain(|handle| !busy.contains(&handle.workspace));
        let of = |slot: Slot, is: fn(&Observed) -> bool| {
            let is = move |handle: &&Handle| handle.slot() == slot && is(&handle.status.borrow().observed);
            all.iter().filter(is).cloned().collect::<Vec<_>>()
        };
        let ready = of(Slot::Dev, |o| matches!(o, Observed::Ready { .. }));
        let steps = [
            ready,
            of(Slot::Dev, |o| matches!(o, Observed::Paused { .. })),
            of(Slot::Live, |o| matches!(o, Observed::Paused { .. })),
        ];
        for (nth, step) in steps.into_iter().enumerate() {
            let Some(handle) = self.largest(step).await else {
                continue;
            };
            let before = handle.status.borrow().observed.name();
            tracing::warn!(sandbox.id = %handle.id, state = before, "gives way, since the box is short of memory");
            if nth == 0 {
                watch.frozen.insert(handle.id.clone());
            } else {
                watch.frozen.remove(&handle.id);
            }
            handle.shed().await;
            let settled = |status: &crate::reconcile::Status| {
                let now = &status.observed;
                now.name() != before && !matches!(now, Observed::Stopping { .. })
            };
            handle.settle(GIVES_WAY_WITHIN, settled).await;
            return;
        }
    }

    /// The one that holds the most memory; of those that nobody counts, the one idle for longest.
    async fn largest(&self, of: Vec<Handle>) -> Option<Handle> {
        let counted = join_all(of.into_iter().map(|handle| async move {
            let memory = match handle.present() {
                Some(generation) => {
                    let stats = self.fleet.services.runtime.stats(&generation);
                    let stats = tokio::time::timeout(COUNTED_WITHIN, stats).await;
                    stats.ok().and_then(Result::ok).map_or(0, |stats| stats.memory)
                }
                None => 0,
            };
            (memory, handle)
        }))
        .await;
        let largest = counted
            .into_iter()
            .max_by_key(|(memory, handle)| (*memory, Reverse(handle.activity.last_ms())));
        largest.map(|(_, handle)| handle)
    }
}

fn of_the_box() -> io::Result<Memory> {
    let meminfo = std::fs::read_to_string("/proc/meminfo")?;
    // A kernel may count no pressure, and may refuse to say.
    let pressure = std::fs::read_to_string("/proc/pressure/memory").ok();
    Memory::parse(&meminfo, pressure.as_deref()).ok_or_else(|| io::Error::other("/proc/meminfo has no MemAvailable"))
}
