//! What the clock asks of a sandbox: when to look again, its schedule, and being put to sleep. It must not know what an
//! event makes of a state.

use std::time::Duration;

use choir_core::awake::{Idle, idle};
use choir_core::sandbox::{Action, Desired, Event, Observed, next_action};
use choir_core::{Awake, Slot};
use jiff::Timestamp;
use tokio::time::Instant;

use super::Worker;
use crate::reconcile::effects::Effect;

impl Worker {
    pub(super) fn wait_until(&self) -> Instant {
        let now = self.fleet.now();
        let far = Duration::from_secs(3600);
        let wait = match next_action(self.desired, &self.observed, self.started, now) {
            _ if self.effect || self.turn.is_some() => far,
            Some(Action::Wait(until)) => until.duration_since(now).unsigned_abs(),
            // An effect failed and left the state as it was: try again shortly.
            Some(_) => Duration::from_secs(1),
            None if self.leftover.is_some() => Duration::from_secs(1),
            None => match self.idleness() {
                Some(Idle::Until(until)) => until.duration_since(now).unsigned_abs().min(far),
                // It could not be done.
                Some(_) => Duration::from_secs(1),
                None => far,
            },
        };
        let scheduled = self
            .next_scheduled()
            // What is over could not be heeded.
            .map_or(far, |at| {
                at.duration_since(now).try_into().unwrap_or(Duration::from_secs(1))
            });
        let wait = wait.min(scheduled);
        Instant::now() + wait.max(Duration::from_millis(1))
    }

    /// What idleness asks for, where the sandbox is up and nothing runs in it.
    fn idleness(&self) -> Option<Idle> {
        let paused = matches!(self.observed, Observed::Paused { .. });
        if self.effect || !(paused || matches!(self.observed, Observed::Ready { .. })) {
            return None;
        }
        let policy = self.policy.load();
        let now = self.fleet.now();
        let busy = self.engaged > 0 && !paused
            || matches!(&policy.awake, Awake::At(schedule) if schedule.names(now))
            || self
                .observed
                .generation()
                .is_some_and(|g| self.fleet.in_flight(&self.generation_of(g)));
        let active = if busy {
            now
        } else {
            self.fleet.last_active(&self.activity)
        };
        Some(idle(
            &policy.awake,
            active,
            paused,
            policy.idle_pause,
            policy.idle_stop,
            now,
        ))
    }

    fn next_scheduled(&self) -> Option<Timestamp> {
        match &self.policy.load().awake {
            Awake::At(schedule) => schedule.next_after(self.heeded),
            Awake::Always | Awake::OnDemand => None,
        }
    }

    /// Wakes it where its schedule says so, then looks whether it is idle.
    pub(super) async fn look_at_the_clock(&mut self) {
        let now = self.fleet.now();
        if self.next_scheduled().is_some_and(|at| at <= now) {
            if self.wake().await {
                self.heeded = now;
            }
            return;
        }
        match self.idleness() {
            Some(Idle::Pause) => self.pause().await,
            Some(Idle::Stop) => {
                let audit = self.event("sandbox.idle_stop", "ok");
                if let Err(error) = self.desire(Desired::Stopped, Some(audit)).await {
                    tracing::error!(sandbox.id = %self.id, %error, "an idle stop could not be recorded");
                }
            }
            _ => {}
        }
    }

    /// Says it is paused first, so that a request that comes now waits for the thaw instead of a frozen process.
    pub(super) async fn pause(&mut self) {
        if self.effect || !matches!(self.observed, Observed::Ready { .. }) {
            return;
        }
        // What runs in it has been frozen since now, however long ago somebody came.
        if self.engaged > 0 {
            self.activity.touch();
        }
        self.happened(Event::Paused).await;
        if let Some(generation) = self.observed.generation() {
            self.begin(Effect::Pause(generation));
        }
    }

    /// Whether it waits for the box to have memory again.
    pub(super) fn held_back(&self) -> bool {
        self.policy.load().slot == Slot::Dev && self.fleet.admission.is_short_of_memory()
    }

    /// Gives memory back, step by step. What is to be awake always runs again as soon as there is enough.
    pub(super) async fn shed(&mut self) {
        if self.effect {
            return;
        }
        match &self.observed {
            Observed::Ready { .. } => {
                self.audit("sandbox.shed", "paused").await;
                self.pause().await;
            }
            Observed::Paused { .. } if self.policy.load().awake == Awake::Always => {
                self.audit("sandbox.shed", "stopped").await;
                self.happened(Event::StopAsked).await;
            }
            Observed::Paused { .. } => self.give_way("sandbox.shed").await,
            _ => {}
        }
    }

    pub(super) async fn give_way(&mut self, why: &'static str) {
        if self.effect || !matches!(self.observed, Observed::Paused { .. }) || self.policy.load().awake == Awake::Always
        {
            return;
        }
        let audit = self.event(why, "stopped");
        if let Err(error) = self.desire(Desired::Stopped, Some(audit)).await {
            tracing::error!(sandbox.id = %self.id, %error, "a sandbox that should give way could not be stopped");
        }
    }
}

pub(super) fn before_this_minute(now: Timestamp) -> Timestamp {
    let into = now.as_millisecond().rem_euclid(60_000) + 1;
    now - Duration::from_millis(into.unsigned_abs())
}
