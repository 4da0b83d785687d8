//! One task per sandbox: the only writer of its state. It applies events, and starts one effect at a time towards
//! what is wanted. It must not know requests or users beyond the audit event it is handed.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use choir_core::deployment::Refill;
use choir_core::limits::LimitsPatch;
use choir_core::sandbox::{Action, Desired, Event, Exit, Observed, apply, next_action};
use choir_core::{Awake, Generation, Own, SandboxId, Slot, WorkspaceId};
use choir_proxy::Activity;
use choir_store::{AuditEvent, SandboxChange};
use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot, watch};

use super::admission::{Place, Turn};
use super::effects::{self, Effect, Outcome};
use super::{AskError, Fleet, Status};
use crate::fail;

mod asleep;
mod ended;
pub(super) mod tell;

/// How long a sandbox, and its files, may be left alone, by the policy of the slot it is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Of the workspace, when it was so.
    pub epoch: u64,
    pub slot: Slot,
    pub awake: Awake,
    pub idle_pause: Duration,
    pub idle_stop: Duration,
    pub snapshot_every: Duration,
}

/// What a worker is told or asked.
pub enum Ask {
    /// From now on the sandbox should be this. Answered when it is in the database.
    Desire(Desired, AuditEvent, oneshot::Sender<Result<(), AskError>>),
    /// A request waits for it.
    Wake,
    /// A new generation, though the present one is well.
    Restart(AuditEvent, oneshot::Sender<Result<(), AskError>>),
    /// Other contents for its volume, and a new generation on them.
    Refill(Refill, oneshot::Sender<()>),
    /// Freeze it now.
    Pause,
    /// The box is short of memory: freeze what is ready, stop what is frozen.
    Shed,
    /// Others wait for a place: stop, if it is paused and may be.
    GiveWay,
    /// The policy changed: what idleness asks for is looked at anew.
    Policy,
    /// Limits changed in the database.
    Limits,
    /// The database says that it should be deleted.
    Delete,
    Ready(u64, Arc<Own>),
    Exited(u64, Exit),
    Lost(u64),
    Refused(u64, String),
    Activity {
        generation: u64,
        tasks: u32,
        terminals: u32,
        oom_kills: u64,
    },
    Done(Outcome),
}

/// The state of one worker.
pub struct Worker {
    pub fleet: Arc<Fleet>,
    pub id: SandboxId,
    pub workspace: WorkspaceId,
    pub desired: Desired,
    pub observed: Observed,
    /// Whether the container of a `Starting` state has been started.
    pub started: bool,
    /// A generation that is not in use any more, whose container may still be there.
    pub leftover: Option<u64>,
    pub status: watch::Sender<Status>,
    pub inbox: mpsc::Receiver<Ask>,
    pub own: mpsc::Sender<Ask>,
    pub activity: Arc<Activity>,
    pub policy: Arc<ArcSwap<Policy>>,
    /// Held from before a start until the container has ended, and over a restart.
    pub place: Option<Place>,
    /// Where the place will come, while it is in line for one.
    pub turn: Option<oneshot::Receiver<Place>>,
    pub effect: bool,
    /// Tasks and terminals that run without traffic.
    pub engaged: u32,
    /// Processes of this generation that ran out of memory; `None` while those before an adoption are unknown.
    pub oom_kills: Option<u64>,
    /// What the home of this generation says of how to run it.
    pub says: Arc<Own>,
    /// Restart after the stop that is under way.
    pub restart: bool,
    /// What is to become of its volume before its next start.
    pub refill: Option<Refill>,
    /// The last generation whose agent came to this process's door.
    pub heard: Option<u64>,
    /// A request came while the pause was under way.
    pub thaw_asked: bool,
    /// It is to be frozen once the effect that is under way is done.
    pub pause_asked: bool,
    /// Limits in the database may differ from those in force.
    pub limits_stale: bool,
    /// They could not be put in force: once more before the next start.
    pub limits_owed: bool,
    /// The last minute of its schedule that was heeded.
    pub heeded: Timestamp,
}

impl Worker {
    /// Runs until the sandbox is deleted or the hypervisor ends.
    pub async fn run(mut self) {
        loop {
            self.act().await;
            if self.observed == Observed::Deleted {
                self.fleet.forget(&self.id, &self.workspace).await;
                return;
            }
            let until = self.wait_until();
            let turn = async {
                match self.turn.as_mut() {
                    Some(turn) => turn.await,
                    None => std::future::pending().await,
                }
            };
            let ask = tokio::select! {
                ask = self.inbox.recv() => ask,
                place = turn => {
                    self.turn = None;
                    self.place = place.ok();
                    continue;
                }
                () = tokio::time::sleep_until(until) => None,
            };
            match ask {
                Some(ask) => self.hear(ask).await,
                None if self.inbox.is_closed() => return,
                None => self.look_at_the_clock().await,
            }
        }
    }

    async fn hear(&mut self, ask: Ask) {
        match ask {
            Ask::Desire(desired, audit, reply) => {
                let result = self.desire(desired, Some(audit)).await;
                let _ = reply.send(result);
            }
            Ask::Wake => {
                self.wake().await;
            }
            Ask::Restart(audit, reply) => {
                let result = self.desire(Desired::Running, Some(audit)).await;
                self.restart = result.is_ok() && self.observed.generation().is_some();
                let _ = reply.send(result);
                if self.restart {
                    self.happened(Event::StopAsked).await;
                }
            }
            Ask::Refill(refill, heard) => {
                self.refill(refill);
                let _ = heard.send(());
            }
            Ask::Pause if self.effect => self.pause_asked = true,
            Ask::Pause => self.pause().await,
            Ask::Shed => self.shed().await,
            Ask::GiveWay => self.give_way("sandbox.give_way").await,
            // Another schedule begins with the minute that it is set in.
            Ask::Policy => self.heeded = asleep::before_this_minute(self.fleet.now()),
            Ask::Limits => self.limits_stale = true,
            Ask::Delete => {
                self.desired = Desired::Deleted;
                self.publish();
            }
            Ask::Ready(generation, own) => self.ready(generation, own).await,
            Ask::Exited(generation, exit) => self.exited(generation, exit, "it ended by itself".into()).await,
            Ask::Refused(generation, reason) => {
                self.audit("sandbox.refused", "killed").await;
                self.exited(
                    generation,
                    Exit {
                        code: 137,
                        oom_killed: false,
                    },
                    reason,
                )
                .await;
            }
            Ask::Lost(generation) if self.observed.generation() == Some(generation) => {
                if matches!(self.observed, Observed::Ready { .. }) {
                    self.happened(Event::ProbeFailed {
                        reason: "its agent is out of reach".into(),
                    })
                    .await;
                }
            }
            Ask::Lost(_) => {}
            Ask::Activity {
                generation,
                tasks,
                terminals,
                oom_kills,
            } => {
                if self.observed.generation() == Some(generation) {
                    self.engaged = tasks.saturating_add(terminals);
                    self.activity.touch();
                    self.count_oom_kills(oom_kills).await;
                }
            }
            Ask::Done(outcome) => {
                self.effect = false;
                self.done(outcome).await;
            }
        }
    }

    async fn desire(&mut self, desired: Desired, audit: Option<AuditEvent>) -> Result<(), AskError> {
        let always = self.policy.load().awake == Awake::Always;
        let anew = desired == Desired::Running && self.desired == Desired::Stopped;
        if anew && !always && self.fleet.admission.is_full() {
            return Err(AskError::Busy);
        }
        let asleep = matches!(self.observed, Observed::Paused { .. }) || self.observed.generation().is_none();
        if desired == Desired::Running && asleep && !always && self.held_back() {
            return Err(AskError::ShortOfMemory);
        }
        self.fleet.services.store.set_desired(&self.id, desired, audit).await?;
        fail::point("desire.recorded").await.ok();
        self.desired = desired;
        match (desired, &self.observed) {
            (Desired::Running, Observed::Paused { .. }) => self.thaw(),
            // A person who asks does not wait for the back-off of earlier failures.
            (Desired::Running, Observed::Failed { attempt: 0, .. }) => {
                self.observed = Observed::Creating {
                    since: self.fleet.now(),
                };
            }
            (Desired::Running, Observed::Failed { .. }) => {
                self.observed = Observed::Stopped {
                    exit: None,
                    since: self.fleet.now(),
                };
            }
            (Desired::Stopped, o) if o.generation().is_some() || matches!(o, Observed::Failed { .. }) => {
                self.happened(Event::StopAsked).await;
            }
            _ => {}
        }
        // Not before: whoever waits for a start must not see the failure before it.
        self.publish();
        Ok(())
    }

    /// The database says so already, and that it should run.
    fn refill(&mut self, refill: Refill) {
        if self.desired != Desired::Deleted {
            self.desired = Desired::Running;
        }
        self.refill = Some(refill);
        self.publish();
    }

    /// Whether it was heard.
    async fn wake(&mut self) -> bool {
        self.activity.touch();
        match (&self.observed, self.desired) {
            (_, Desired::Deleted) => {}
            (Observed::Paused { .. }, _) => self.thaw(),
            (_, Desired::Stopped) => {
                let audit = self.event("sandbox.wake", "ok");
                if let Err(error) = self.desire(Desired::Running, Some(audit)).await {
                    tracing::warn!(sandbox.id = %self.id, %error, "a wake came to nothing");
                    return false;
                }
            }
            _ => {}
        }
        true
    }

    /// Brings the frozen processes back; at once, or as soon as the pause that is under way is done.
    fn thaw(&mut self) {
        self.thaw_asked = true;
        if let (false, Observed::Paused { generation, .. }) = (self.effect, &self.observed) {
            let generation = *generation;
            self.thaw_asked = false;
            self.begin(Effect::Thaw(generation));
        }
    }

    /// Its processes run again. An agent that this process never heard must come to the door first.
    async fn thawed(&mut self) {
        let frozen = self.observed.generation();
        let event = match frozen.filter(|g| self.heard != Some(*g)) {
            Some(generation) => Event::StartAsked { generation },
            None => Event::Thawed,
        };
        self.happened(event).await;
    }

    async fn ready(&mut self, generation: u64, own: Arc<Own>) {
        self.heard = Some(generation);
        if self.observed.generation() == Some(generation) {
            if let Some(reason) = own.refusal() {
                tracing::info!(sandbox.id = %self.id, reason, "its choir.toml is not in effect");
            }
            self.limits_stale |= own.config().is_some_and(|own| own.limits != LimitsPatch::default());
            self.says = own;
        }
        let event = match self.observed {
            Observed::Unhealthy { .. } => Event::ProbeOk,
            // An adopted paused sandbox answers only after its thaw.
            Observed::Paused { .. } => return,
            _ => Event::AgentReady { generation },
        };
        self.activity.touch();
        self.happened(event).await;
        self.fleet.seen_running(&self.workspace, &self.id);
    }

    async fn count_oom_kills(&mut self, now: u64) {
        let before = self.oom_kills.replace(now);
        if before != Some(now) {
            self.publish();
        }
        // Once a generation: what the agent reports, others inside could report, too.
        if before == Some(0) && now > 0 {
            tracing::warn!(sandbox.id = %self.id, "a process ran out of memory and was killed");
            self.audit("sandbox.process_killed", "out_of_memory").await;
        }
    }

    async fn done(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Created(Ok(())) => self.happened(Event::Created).await,
            Outcome::Created(Err(reason)) => self.happened(Event::CreateFailed { reason }).await,
            Outcome::Started(number, Ok(())) => {
                if self.observed.generation() == Some(number) && !self.is_over(number) {
                    self.started = true;
                    if matches!(self.observed, Observed::Starting { .. }) {
                        // The agent's deadline counts from here, not from the wait for its turn to start.
                        self.happened(Event::StartAsked { generation: number }).await;
                    }
                }
            }
            Outcome::Started(number, Err(reason)) if !self.is_over(number) => {
                self.gone(
                    number,
                    Exit {
                        code: -1,
                        oom_killed: false,
                    },
                    reason,
                )
                .await;
            }
            Outcome::Started(_, Err(_)) => {}
            Outcome::Stopped(generation, exit) => {
                let reason = match &self.observed {
                    Observed::Starting { .. } => "it did not become ready in time".to_owned(),
                    Observed::Unhealthy { reason, .. } => reason.clone(),
                    _ => "it was stopped".to_owned(),
                };
                // One whose end was heard before it was asked to stop waits for its end, too.
                if !self.is_over(generation) || matches!(self.observed, Observed::Stopping { .. }) {
                    self.gone(generation, exit, reason).await;
                }
                self.restart = false;
            }
            Outcome::Removed(Ok(())) => self.leftover = None,
            Outcome::Removed(Err(reason)) => tracing::warn!(sandbox.id = %self.id, reason, "a container stays"),
            Outcome::Limited(Err(reason)) => {
                tracing::warn!(sandbox.id = %self.id, reason, "new limits take effect at the next start");
                self.limits_owed = true;
            }
            Outcome::Limited(Ok(())) => {}
            // A request came just before it was frozen.
            Outcome::Paused(Ok(())) if self.is_asked() && !self.held_back() => self.thaw(),
            Outcome::Paused(Ok(())) if self.fleet.admission.is_waited_for() && !self.thaw_asked => {
                self.give_way("sandbox.give_way").await
            }
            Outcome::Paused(Ok(())) => {}
            Outcome::Paused(Err(reason)) => {
                tracing::warn!(sandbox.id = %self.id, reason, "a sandbox could not be paused");
                self.happened(Event::Thawed).await;
            }
            Outcome::Frozen(reason) => {
                tracing::warn!(sandbox.id = %self.id, reason, "a sandbox is frozen for good; it is replaced");
                self.happened(Event::StopAsked).await;
            }
            Outcome::Thawed(Ok(())) => self.thawed().await,
            Outcome::Thawed(Err(reason)) => {
                tracing::warn!(sandbox.id = %self.id, reason, "a sandbox could not be thawed; it is replaced");
                self.happened(Event::StopAsked).await;
            }
            Outcome::Refilled(refill, Ok(())) => {
                if self.refill == Some(refill) {
                    self.refill = None;
                }
                // What failed was something else than what is there now.
                if matches!(self.observed, Observed::Failed { .. }) {
                    self.happened(Event::StopAsked).await;
                }
                self.publish();
            }
            Outcome::Refilled(_, Err(reason)) => {
                tracing::warn!(sandbox.id = %self.id, reason, "its files could not be replaced; trying again");
            }
            Outcome::Deleted(Ok(())) => self.happened(Event::Gone).await,
            Outcome::Deleted(Err(reason)) => tracing::warn!(sandbox.id = %self.id, reason, "a sandbox stays"),
        }
    }

    /// Whether a request is in flight to the generation that is there.
    fn is_asked(&self) -> bool {
        let generation = self.observed.generation();
        generation.is_some_and(|g| self.fleet.in_flight(&self.generation_of(g)))
    }

    /// Starts what brings the sandbox nearer to what is wanted, one thing at a time.
    async fn act(&mut self) {
        if self.effect {
            return;
        }
        if std::mem::take(&mut self.thaw_asked) && matches!(self.observed, Observed::Paused { .. }) {
            self.thaw();
            return;
        }
        if std::mem::take(&mut self.pause_asked) && matches!(self.observed, Observed::Ready { .. }) {
            self.pause().await;
            return;
        }
        if self.desired != Desired::Running && self.observed.generation().is_none() {
            (self.place, self.turn) = (None, None);
        }
        let now = self.fleet.now();
        if let Some(leftover) = self
            .leftover
            .filter(|g| self.observed.generation() != Some(*g) || !self.started)
            && !matches!(self.observed, Observed::Stopping { .. } | Observed::Deleting { .. })
        {
            self.begin(Effect::Remove(leftover));
            return;
        }
        if let Some(refill) = self.refill.clone().filter(|_| self.desired != Desired::Deleted) {
            match &self.observed {
                Observed::Creating { .. } | Observed::Deleting { .. } | Observed::Deleted => {}
                present if present.generation().is_some() => self.happened(Event::StopAsked).await,
                _ => {
                    self.begin(Effect::Refill(refill));
                    return;
                }
            }
        }
        // Before it runs again is early enough. A volume is made with the limits of that moment.
        let runs = self.desired == Desired::Running && !matches!(self.observed, Observed::Creating { .. });
        if runs && std::mem::take(&mut self.limits_stale) {
            self.begin(Effect::Limit(self.observed.generation().filter(|_| self.started)));
            return;
        }
        match next_action(self.desired, &self.observed, self.started, now) {
            None | Some(Action::Wait(_)) => {}
            Some(Action::Create) => self.begin(Effect::Create),
            // Looked at again every second. Whoever is in line behind it is let by.
            Some(Action::Start) if self.held_back() => (self.place, self.turn) = (None, None),
            Some(Action::Start) if self.place.is_some() => self.start().await,
            Some(Action::Start) => self.stand_in_line().await,
            Some(Action::Stop) => {
                let Some(generation) = self.observed.generation() else {
                    return;
                };
                self.begin(Effect::Stop(generation, self.refill.is_some()));
            }
            Some(Action::Delete) => {
                self.happened(Event::DeleteAsked).await;
                self.begin(Effect::Delete);
            }
        }
    }

    /// Asks for a place, once.
    async fn stand_in_line(&mut self) {
        if self.turn.is_some() {
            return;
        }
        match self.fleet.admission.ask(&self.id) {
            Turn::Now(place) => {
                self.place = Some(place);
                self.start().await;
            }
            Turn::Later(place) => {
                self.turn = Some(place);
                self.fleet.make_room();
            }
        }
    }

    /// Gives out the next generation number, in the database before anything carries it.
    async fn start(&mut self) {
        let nonce = self.fleet.nonce();
        match self.fleet.services.store.begin_generation(&self.id, &nonce).await {
            Ok(number) => {
                self.happened(Event::StartAsked { generation: number }).await;
                self.begin(Effect::Start(number, nonce));
            }
            Err(error) => tracing::error!(sandbox.id = %self.id, %error, "a start could not be recorded"),
        }
    }

    fn begin(&mut self, effect: Effect) {
        self.effect = true;
        let run = effects::run(self.fleet.clone(), self.id.clone(), self.workspace.clone(), effect);
        let own = self.own.clone();
        // Detached: a caller that goes away does not cancel a start.
        tokio::spawn(async move {
            let outcome = run.await;
            let _ = own.send(Ask::Done(outcome)).await;
        });
    }

    async fn happened(&mut self, event: Event) {
        self.happens(event, None).await;
    }

    /// With the row of the audit trail that belongs to it, where one does.
    async fn happens(&mut self, event: Event, audit: Option<AuditEvent>) {
        let now = self.fleet.now();
        match apply(self.observed.clone(), event, now) {
            Ok(next) if next == self.observed => {}
            Ok(next) => {
                tracing::info!(sandbox.id = %self.id, from = self.observed.name(), to = next.name(),
                    reason = next.reason(), "sandbox state");
                self.observed = next;
                // What has a row of its own is told of once that is there.
                let at_once = audit.is_none();
                if at_once {
                    self.publish();
                }
                let change = SandboxChange {
                    id: self.id.clone(),
                    observed: self.observed.clone(),
                    audit,
                };
                if let Err(error) = self.fleet.services.store.observe(change).await {
                    tracing::error!(sandbox.id = %self.id, %error, "a state could not be recorded");
                }
                if !at_once {
                    self.publish();
                }
            }
            Err(error) => tracing::debug!(sandbox.id = %self.id, %error, "an event came late"),
        }
    }

    fn generation_of(&self, number: u64) -> Generation {
        Generation {
            sandbox: self.id.clone(),
            number,
        }
    }
}
