//! The fleet: one worker per sandbox, brought up from the database and from what really runs. It must not know HTTP.

use std::collections::HashMap;
use std::num::NonZero;
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use choir_broker::Authorities;
use choir_core::deployment::Refill;
use choir_core::sandbox::{Desired, Observed};
use choir_core::{Awake, Generation, Own, SandboxId, Slot, UserId, WorkspaceId};
use choir_proxy::Activity;
use choir_proxy::route::BoxFuture;
use choir_runtime::{Notice, Runtime, Volumes};
use choir_store::{AuditEvent, Sandbox, Store, WorkspaceView};
use jiff::Timestamp;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use crate::clock::Clock;
use crate::config::Config;
use crate::events::Events;
use crate::random::{Random, draw};
use crate::releases::Releases;

pub mod admission;
mod adopt;
mod effects;
mod inside;
pub mod launch;
pub mod trial;
mod worker;

use admission::{Admission, Place};
use worker::Worker;

pub use inside::Inside;
pub use worker::{Ask, Policy};

/// What workers need of the rest.
pub struct Services {
    pub config: Arc<Config>,
    pub store: Store,
    pub runtime: Arc<dyn Runtime>,
    pub volumes: Arc<dyn Volumes>,
    pub clock: Arc<dyn Clock>,
    pub random: Arc<dyn Random>,
    pub releases: Arc<Releases>,
    pub events: Arc<Events>,
    /// Whom programs inside believe besides the public authorities; `None` while sealed.
    pub authorities: Option<Arc<Authorities>>,
}

/// Of the processors, the part that starts and removals of containers may have.
const CHANGING: usize = 2;

/// How long after its time a scheduled start is made up for.
const CAUGHT_UP: Duration = Duration::from_mins(2);

/// What is known of a sandbox at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct Status {
    pub desired: Desired,
    pub observed: Observed,
    /// Processes of this generation that ran out of memory.
    pub oom_kills: u64,
    /// What this generation's home says of how to run it.
    pub says: Arc<Own>,
    /// Whether its volume is to get other contents before its next start.
    pub refilling: bool,
}

/// A sandbox's worker, seen from outside.
#[derive(Clone)]
pub struct Handle {
    pub id: SandboxId,
    pub workspace: WorkspaceId,
    pub owner: UserId,
    pub status: watch::Receiver<Status>,
    pub activity: Arc<Activity>,
    policy: Arc<ArcSwap<Policy>>,
    inbox: mpsc::Sender<Ask>,
    admission: Arc<Admission>,
}

/// Why something that was asked of a sandbox is not going to be.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    #[error(transparent)]
    Store(#[from] choir_store::Error),
    #[error("too many sandboxes wait for a place to run in; try again shortly, or stop one that is not needed")]
    Busy,
    #[error("the box is short of memory, so dev waits; try again shortly, or stop what is not needed")]
    ShortOfMemory,
}

/// Why a sandbox that was asked for is not there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WakeError {
    #[error("the sandbox failed to start: {0}")]
    Failed(String),
    #[error("the sandbox is still starting; try again shortly")]
    TooLong,
    #[error("as many sandboxes run as may at once; in line before this one: {0}")]
    InLine(usize),
    #[error("{}", AskError::Busy)]
    Busy,
    #[error("{}", AskError::ShortOfMemory)]
    ShortOfMemory,
    #[error("the sandbox is being deleted")]
    Deleted,
}

/// Something about how proxied traffic ends, which the fleet asks the data plane for.
pub trait DataPlane: Send + Sync {
    /// Whether requests are in flight to this generation.
    fn in_flight(&self, generation: &Generation) -> bool;
    /// Tells websockets and event streams of this generation to come again, and returns once no request is in flight.
    fn drain<'a>(&'a self, generation: &'a Generation) -> BoxFuture<'a, ()>;
    /// The generation has ended: drop its pooled connections.
    fn retire(&self, generation: &Generation);
}

/// All workers.
pub struct Fleet {
    pub services: Services,
    pub admission: Arc<Admission>,
    /// Starts and removals that workers may have under way at once.
    pub(crate) turns: Semaphore,
    handles: RwLock<HashMap<SandboxId, Handle>>,
    /// Sandboxes in which releases are tried, and who waits to hear of it.
    trials: Mutex<HashMap<SandboxId, Option<trial::Verdict>>>,
    data_plane: Arc<dyn DataPlane>,
    /// Monotonic milliseconds, as the activity counters use them.
    ticks: choir_proxy::Clock,
}

impl Handle {
    /// What it should be from now on; returns when that is in the database.
    pub async fn desire(&self, desired: Desired, audit: AuditEvent) -> Result<(), AskError> {
        self.ask(|reply| Ask::Desire(desired, audit, reply)).await
    }

    /// A new generation.
    pub async fn restart(&self, audit: AuditEvent) -> Result<(), AskError> {
        self.ask(|reply| Ask::Restart(audit, reply)).await
    }

    /// Has it deleted, as the database says by now.
    pub async fn delete(&self) {
        let _ = self.inbox.send(Ask::Delete).await;
    }

    /// Has it give its memory back: a ready one is frozen, a frozen one stopped.
    pub(crate) async fn shed(&self) {
        let _ = self.inbox.send(Ask::Shed).await;
    }

    /// Has it run on, if it is frozen.
    pub(crate) async fn resume(&self) {
        let paused = matches!(self.status.borrow().observed, Observed::Paused { .. });
        if paused {
            let _ = self.inbox.send(Ask::Wake).await;
        }
    }

    /// Freezes it, if it is ready.
    pub async fn pause(&self) {
        let _ = self.inbox.send(Ask::Pause).await;
    }

    /// Has its volume get other contents, as the database says by now; from its return on the status says so.
    pub async fn refill(&self, refill: Refill) {
        let (heard, hearing) = oneshot::channel();
        if self.inbox.send(Ask::Refill(refill, heard)).await.is_ok() {
            let _ = hearing.await;
        }
    }

    /// The policy of the slot it is in.
    pub fn awake(&self) -> Awake {
        self.policy.load().awake.clone()
    }

    /// The slot it is in.
    pub(crate) fn slot(&self) -> Slot {
        self.policy.load().slot
    }

    /// How long the last copy of its volume may be old, while it runs.
    pub(crate) fn snapshot_every(&self) -> Duration {
        self.policy.load().snapshot_every
    }

    /// Whether it waits for the box to have memory again before it may run.
    pub(crate) fn held_back(&self) -> bool {
        self.slot() == Slot::Dev && self.admission.is_short_of_memory()
    }

    async fn ask(&self, make: impl FnOnce(oneshot::Sender<Result<(), AskError>>) -> Ask) -> Result<(), AskError> {
        let (reply, answer) = oneshot::channel();
        self.inbox
            .send(make(reply))
            .await
            .map_err(|_| choir_store::Error::NotFound)?;
        answer.await.map_err(|_| choir_store::Error::NotFound)?
    }

    /// What its home says of how to run it, as far as it is known: of the generation that is there.
    pub fn says(&self) -> Arc<Own> {
        self.status.borrow().says.clone()
    }

    /// How many are in line before it, where it waits for a place to run in.
    pub fn in_line(&self) -> Option<usize> {
        self.admission.before(&self.id)
    }

    /// The generation whose container is there now, if any.
    pub fn present(&self) -> Option<Generation> {
        let number = self.status.borrow().observed.generation()?;
        Some(Generation {
            sandbox: self.id.clone(),
            number,
        })
    }

    /// Whether somebody must ask for it before it is ready. What is on its way is not woken by a request, it is waited for.
    pub fn sleeps(&self) -> bool {
        let status = self.status.borrow();
        status.desired != Desired::Running || matches!(status.observed, Observed::Paused { .. })
    }

    /// The generation that is ready now, without waiting; none once its volume is to get other contents.
    pub fn ready(&self) -> Option<Generation> {
        let status = self.status.borrow();
        match status.observed {
            Observed::Ready { generation, .. } if !status.refilling => Some(Generation {
                sandbox: self.id.clone(),
                number: generation,
            }),
            _ => None,
        }
    }

    /// Wakes it if need be and waits until it is ready. Many callers cause one start.
    pub async fn wake(&self, within: Duration) -> Result<Generation, WakeError> {
        match self.ready() {
            Some(generation) => Ok(generation),
            None if self.held_back() => Err(WakeError::ShortOfMemory),
            None => self.wake_anyhow(within).await,
        }
    }

    /// Wakes what is about to become live, also where the box is short of memory for others.
    pub(crate) async fn wake_anyhow(&self, within: Duration) -> Result<Generation, WakeError> {
        if let Some(generation) = self.ready() {
            return Ok(generation);
        }
        let mut status = self.status.clone();
        if status.borrow().desired == Desired::Stopped && self.admission.is_full() {
            return Err(WakeError::Busy);
        }
        if self.inbox.send(Ask::Wake).await.is_err() {
            return Err(WakeError::Deleted);
        }
        let wait = status.wait_for(|s| match s.observed {
            Observed::Ready { .. } | Observed::Failed { .. } => !s.refilling,
            Observed::Deleting { .. } | Observed::Deleted => true,
            _ => s.desired == Desired::Deleted,
        });
        match tokio::time::timeout(within, wait).await {
            Err(_) => Err(self.in_line().map_or(WakeError::TooLong, WakeError::InLine)),
            Ok(Err(_)) => Err(WakeError::Deleted),
            Ok(Ok(status)) => match &status.observed {
                Observed::Ready { generation, .. } => Ok(Generation {
                    sandbox: self.id.clone(),
                    number: *generation,
                }),
                Observed::Failed { reason, .. } => Err(WakeError::Failed(reason.clone())),
                _ => Err(WakeError::Deleted),
            },
        }
    }

    /// Waits until `done` says so of its status, at most `within`; the status then.
    pub async fn settle(&self, within: Duration, done: impl FnMut(&Status) -> bool) -> Status {
        let mut status = self.status.clone();
        let _ = tokio::time::timeout(within, status.wait_for(done)).await;
        status.borrow().clone()
    }
}

impl Fleet {
    pub fn new(services: Services, data_plane: Arc<dyn DataPlane>, ticks: choir_proxy::Clock) -> Arc<Self> {
        let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
        let admission = Admission::new(services.config.sandboxes.max_running);
        Arc::new(Self {
            services,
            admission,
            turns: Semaphore::new((processors / CHANGING).max(1)),
            handles: RwLock::default(),
            trials: Mutex::default(),
            data_plane,
            ticks,
        })
    }

    /// A worker for a sandbox that was just made.
    pub fn add(self: &Arc<Self>, view: &WorkspaceView, sandbox: &Sandbox) {
        let present = Present {
            observed: sandbox.observed.clone(),
            started: false,
            leftover: None,
            place: None,
            limits_stale: false,
        };
        let seat = self.seat(view, sandbox);
        self.spawn(sandbox, seat, present);
    }

    /// Where a worker will be heard, and can be asked from now on.
    fn seat(self: &Arc<Self>, view: &WorkspaceView, sandbox: &Sandbox) -> Seat {
        let (own, inbox) = mpsc::channel(256);
        let (status, seen) = watch::channel(Status {
            desired: sandbox.desired,
            // Until the worker begins. What the database says was so for another process.
            observed: Observed::Stopped {
                exit: None,
                since: self.now(),
            },
            oom_kills: 0,
            says: Arc::default(),
            refilling: sandbox.refill.is_some(),
        });
        let activity = Activity::new(self.ticks.clone());
        let policy = Arc::new(ArcSwap::from_pointee(self.policy(view, sandbox)));
        let handle = Handle {
            id: sandbox.id.clone(),
            workspace: sandbox.workspace.clone(),
            owner: view.workspace.user.clone(),
            status: seen,
            activity: activity.clone(),
            policy: policy.clone(),
            inbox: own.clone(),
            admission: self.admission.clone(),
        };
        self.handles
            .write()
            .expect("never poisoned: no panic while held")
            .insert(sandbox.id.clone(), handle);
        Seat {
            own,
            inbox,
            status,
            activity,
            policy,
        }
    }

    fn spawn(self: &Arc<Self>, sandbox: &Sandbox, seat: Seat, present: Present) {
        seat.status
            .send_modify(|status| status.observed = present.observed.clone());
        let worker = Worker {
            fleet: self.clone(),
            id: sandbox.id.clone(),
            workspace: sandbox.workspace.clone(),
            desired: sandbox.desired,
            observed: present.observed,
            started: present.started,
            leftover: present.leftover,
            status: seat.status,
            inbox: seat.inbox,
            own: seat.own,
            activity: seat.activity,
            policy: seat.policy,
            place: present.place,
            turn: None,
            effect: false,
            engaged: 0,
            oom_kills: (!present.started).then_some(0),
            says: Arc::default(),
            restart: false,
            refill: sandbox.refill.clone(),
            heard: None,
            thaw_asked: false,
            pause_asked: false,
            limits_stale: present.limits_stale,
            limits_owed: false,
            // A minute that passed while the hypervisor restarted still counts.
            heeded: self.now() - CAUGHT_UP,
        };
        tokio::spawn(worker.run());
    }

    pub fn handle(&self, id: &SandboxId) -> Option<Handle> {
        self.handles
            .read()
            .expect("never poisoned: no panic while held")
            .get(id)
            .cloned()
    }

    /// All handles; for counting.
    pub fn handles(&self) -> Vec<Handle> {
        self.handles
            .read()
            .expect("never poisoned: no panic while held")
            .values()
            .cloned()
            .collect()
    }

    /// Hands the policy of their slots to both sandboxes of a workspace, unless they have a later one.
    pub async fn policy_changed(&self, view: &WorkspaceView) {
        for slot in Slot::ALL {
            let sandbox = view.slot(slot);
            if let Some(handle) = self.handle(&sandbox.id) {
                let policy = Arc::new(self.policy(view, sandbox));
                handle.policy.rcu(|present| match present.epoch > policy.epoch {
                    true => present.clone(),
                    false => policy.clone(),
                });
                let _ = handle.inbox.send(Ask::Policy).await;
            }
        }
    }

    /// Has the sandbox that has been paused for longest give its place to the first in line, if somebody is. Called
    /// again when it has ended, for the next one.
    pub(crate) fn make_room(&self) {
        if !self.admission.is_waited_for() {
            return;
        }
        let paused = |handle: &Handle| {
            matches!(handle.status.borrow().observed, Observed::Paused { .. })
                && handle.policy.load().awake != Awake::Always
        };
        let handles = self.handles();
        let longest = handles
            .iter()
            .filter(|handle| paused(handle))
            .min_by_key(|handle| handle.activity.last_ms());
        if let Some(handle) = longest {
            // One with a full inbox is busy, not idle.
            let _ = handle.inbox.try_send(Ask::GiveWay);
        }
    }

    /// Has both sandboxes of a workspace take the limits that the database says by now.
    pub async fn limits_changed(&self, view: &WorkspaceView) {
        for slot in Slot::ALL {
            if let Some(handle) = self.handle(&view.slot(slot).id) {
                let _ = handle.inbox.send(Ask::Limits).await;
            }
        }
    }

    fn policy(&self, view: &WorkspaceView, sandbox: &Sandbox) -> Policy {
        let settings = &view.workspace.settings;
        let config = &self.services.config;
        let slot = if view.live.id == sandbox.id {
            Slot::Live
        } else {
            Slot::Dev
        };
        Policy {
            epoch: view.workspace.epoch,
            slot,
            awake: settings
                .awake
                .as_ref()
                .map_or(&config.sandboxes.awake, |a| a.get(slot))
                .clone(),
            idle_pause: settings.idle_pause_s.map_or(config.idle_pause(), Duration::from_secs),
            idle_stop: settings.idle_stop_s.map_or(config.idle_stop(), Duration::from_secs),
            snapshot_every: settings
                .snapshot_every_s
                .map_or(config.snapshot_every(), Duration::from_secs),
        }
    }

    /// Hands the runtime's notices to the workers until the runtime ends.
    pub async fn listen(self: Arc<Self>, mut notices: mpsc::Receiver<Notice>, inside: Inside) {
        while let Some(notice) = notices.recv().await {
            let Some(notice) = self.heard_of_trial(notice) else {
                continue;
            };
            let (generation, ask) = match notice {
                Notice::Ready { generation, own } => (generation.clone(), Ask::Ready(generation.number, own)),
                Notice::Exited { generation, exit } => (generation.clone(), Ask::Exited(generation.number, exit)),
                Notice::Lost { generation } => (generation.clone(), Ask::Lost(generation.number)),
                Notice::Refused { generation, reason } => (generation.clone(), Ask::Refused(generation.number, reason)),
                Notice::Activity {
                    generation,
                    tasks,
                    terminals,
                    oom_kills,
                } => (
                    generation.clone(),
                    Ask::Activity {
                        generation: generation.number,
                        tasks,
                        terminals,
                        oom_kills,
                    },
                ),
                Notice::Inside {
                    generation,
                    kind,
                    stream,
                } => {
                    if let Some(handle) = self.handle(&generation.sandbox) {
                        let _ = inside.send((generation, kind, inside::used(stream, &handle.activity)));
                    }
                    continue;
                }
            };
            if let Some(handle) = self.handle(&generation.sandbox) {
                let _ = handle.inbox.send(ask).await;
            }
        }
    }

    fn trials(&self) -> MutexGuard<'_, HashMap<SandboxId, Option<trial::Verdict>>> {
        self.trials.lock().expect("never poisoned: no panic while held")
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.services.clock.now()
    }

    pub(crate) fn nonce(&self) -> String {
        data_encoding::HEXLOWER.encode(&draw::<32>(&*self.services.random))
    }

    pub(crate) fn owner_of(&self, id: &SandboxId) -> Option<UserId> {
        self.handle(id).map(|h| h.owner)
    }

    pub(crate) fn in_flight(&self, generation: &Generation) -> bool {
        self.data_plane.in_flight(generation)
    }

    /// Lets requests under way in a generation finish; false when they take longer.
    pub(crate) async fn drain(&self, generation: &Generation, within: Duration) -> bool {
        tokio::time::timeout(within, self.data_plane.drain(generation))
            .await
            .is_ok()
    }

    pub(crate) fn retire(&self, generation: &Generation) {
        self.data_plane.retire(generation);
    }

    /// When something last went in or out, on the wall clock.
    pub(crate) fn last_active(&self, activity: &Activity) -> Timestamp {
        let ago = (self.ticks)().saturating_sub(activity.last_ms());
        self.now()
            .checked_sub(Duration::from_millis(ago))
            .unwrap_or(Timestamp::MIN)
    }

    /// A sandbox became ready, which is what verifies its release.
    pub(crate) fn seen_running(self: &Arc<Self>, workspace: &WorkspaceId, sandbox: &SandboxId) {
        let (fleet, workspace, sandbox) = (self.clone(), workspace.clone(), sandbox.clone());
        tokio::spawn(async move { fleet.services.releases.verified_by(&workspace, &sandbox).await });
    }

    /// A sandbox is gone for good; when it was the last of its workspace, that is gone, too.
    pub(crate) async fn forget(&self, id: &SandboxId, workspace: &WorkspaceId) {
        self.handles
            .write()
            .expect("never poisoned: no panic while held")
            .remove(id);
        if let Err(error) = self.services.store.forget_workspace(workspace).await {
            tracing::error!(%error, "a deleted workspace could not be forgotten");
        }
    }
}

/// A worker's ends of what its handle holds the others of.
struct Seat {
    own: mpsc::Sender<Ask>,
    inbox: mpsc::Receiver<Ask>,
    status: watch::Sender<Status>,
    activity: Arc<Activity>,
    policy: Arc<ArcSwap<Policy>>,
}

/// What is there when a worker begins.
struct Present {
    observed: Observed,
    started: bool,
    leftover: Option<u64>,
    place: Option<Place>,
    limits_stale: bool,
}
