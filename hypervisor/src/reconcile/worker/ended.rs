//! The end of a generation: whether it is news, and what is over with it. It must not begin the next one.

use std::sync::Arc;

use choir_core::sandbox::{Desired, Event, Exit, Observed};

use super::Worker;
use super::tell::outcome;

impl Worker {
    pub(super) async fn exited(&mut self, generation: u64, exit: Exit, reason: String) {
        if self.observed.generation() != Some(generation) || self.is_over(generation) {
            return;
        }
        // A container that is being stopped on purpose is told of by its effect.
        if self.effect && matches!(self.observed, Observed::Stopping { .. }) {
            return;
        }
        if matches!(self.observed, Observed::Starting { .. }) && !self.started && !self.effect {
            return;
        }
        self.gone(generation, exit, reason).await;
    }

    /// Whether the end of this generation was heard of already.
    pub(super) fn is_over(&self, generation: u64) -> bool {
        self.leftover == Some(generation)
    }

    /// The container of `generation` has ended.
    pub(super) async fn gone(&mut self, generation: u64, exit: Exit, reason: String) {
        self.started = false;
        self.leftover = Some(generation);
        let restart = std::mem::take(&mut self.restart) || self.refill.is_some();
        if !restart {
            self.place = None;
            self.fleet.make_room();
        }
        self.limits_stale |= std::mem::take(&mut self.limits_owed);
        self.engaged = 0;
        self.oom_kills = Some(0);
        self.says = Arc::default();
        let unasked = self.desired == Desired::Running && !restart;
        let audit = unasked.then(|| self.event("sandbox.exited", outcome(&exit)));
        let event = Event::Exited {
            generation,
            exit,
            reason,
        };
        self.happens(event, audit).await;
        self.fleet.retire(&self.generation_of(generation));
    }
}
