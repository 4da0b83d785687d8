//! Who may run: at most so many sandboxes at once, the others in line, and a bound on the line; and whether the box has
//! memory for more. It must not know what a sandbox is beyond its id, or how one is started.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use choir_core::SandboxId;
use tokio::sync::oneshot;

/// Sandboxes that may wait for a place; asking for one more is refused, so that nobody waits without end.
pub const LONGEST_LINE: usize = 128;

/// The places for running sandboxes, and the line for them.
pub struct Admission {
    most: usize,
    now: Mutex<Now>,
    short_of_memory: AtomicBool,
}

#[derive(Default)]
struct Now {
    taken: usize,
    /// First come, first served. Whoever dropped its receiver has left the line.
    line: VecDeque<(SandboxId, oneshot::Sender<Place>)>,
}

/// A place for one running sandbox; dropping it gives it to the first in line.
pub struct Place {
    /// Taken out where a place that nobody took is handed on.
    of: Option<Arc<Admission>>,
}

/// What came of asking for a place.
pub enum Turn {
    Now(Place),
    /// The place comes here; dropping this leaves the line.
    Later(oneshot::Receiver<Place>),
}

impl Admission {
    /// `most` sandboxes at once.
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            now: Mutex::default(),
            short_of_memory: AtomicBool::new(false),
        })
    }

    /// A place now, or a turn at the end of the line.
    pub fn ask(self: &Arc<Self>, id: &SandboxId) -> Turn {
        let mut now = self.now();
        if now.taken < self.most {
            now.taken += 1;
            return Turn::Now(self.place());
        }
        let (turn, place) = oneshot::channel();
        now.line.push_back((id.clone(), turn));
        Turn::Later(place)
    }

    /// A place for what runs already, though it may be one too many.
    pub fn take(self: &Arc<Self>) -> Place {
        self.now().taken += 1;
        self.place()
    }

    /// How many are in line before this one; `None` if it is not in line.
    pub fn before(&self, id: &SandboxId) -> Option<usize> {
        self.now().line.iter().position(|(waiting, _)| waiting == id)
    }

    /// Whether somebody is in line.
    pub fn is_waited_for(&self) -> bool {
        !self.now().line.is_empty()
    }

    /// Whether the line is as long as it may get.
    pub fn is_full(&self) -> bool {
        self.now().line.len() >= LONGEST_LINE
    }

    /// Whether what nobody uses daily is to wait until there is memory again.
    pub fn is_short_of_memory(&self) -> bool {
        self.short_of_memory.load(Ordering::Relaxed)
    }

    pub fn short_of_memory(&self, short: bool) {
        self.short_of_memory.store(short, Ordering::Relaxed);
    }

    fn place(self: &Arc<Self>) -> Place {
        Place { of: Some(self.clone()) }
    }

    fn give_back(self: &Arc<Self>) {
        let mut now = self.now();
        now.taken -= 1;
        while now.taken < self.most
            && let Some((_, turn)) = now.line.pop_front()
        {
            match turn.send(self.place()) {
                Ok(()) => now.taken += 1,
                // It has left the line: the place is still here, so its drop must not give it back again.
                Err(mut unwanted) => drop(unwanted.of.take()),
            }
        }
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        let mut now = self.now.lock().expect("never poisoned: no panic while held");
        now.line.retain(|(_, turn)| !turn.is_closed());
        now
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(admission) = self.of.take() {
            admission.give_back();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn id(n: u8) -> SandboxId {
        SandboxId::from_random([n; 16])
    }

    fn later(turn: Turn) -> oneshot::Receiver<Place> {
        match turn {
            Turn::Later(place) => place,
            Turn::Now(_) => panic!("there was no place"),
        }
    }

    #[test]
    fn a_place_that_is_given_back_goes_to_the_first_in_line_that_still_waits() {
        let admission = Admission::new(1);
        let Turn::Now(first) = admission.ask(&id(0)) else {
            panic!("the first gets a place at once")
        };
        let gone = later(admission.ask(&id(1)));
        let mut second = later(admission.ask(&id(2)));
        let mut third = later(admission.ask(&id(3)));
        assert_eq!(admission.before(&id(3)), Some(2));
        drop(gone);
        assert_eq!(admission.before(&id(3)), Some(1));
        drop(first);
        let place = second.try_recv().expect("the second is next");
        assert!(third.try_recv().is_err());
        drop(place);
        assert!(third.try_recv().is_ok());
    }

    #[test]
    fn a_place_that_was_sent_and_not_taken_is_not_lost() {
        let admission = Admission::new(1);
        let Turn::Now(first) = admission.ask(&id(0)) else {
            panic!("the first gets a place at once")
        };
        let never_looked = later(admission.ask(&id(1)));
        let mut next = later(admission.ask(&id(2)));
        drop(first);
        drop(never_looked);
        assert!(next.try_recv().is_ok());
    }

    #[test]
    fn what_was_running_beyond_the_limit_lets_nobody_in_until_it_is_below() {
        let admission = Admission::new(1);
        let (one, two) = (admission.take(), admission.take());
        let mut waits = later(admission.ask(&id(0)));
        drop(one);
        assert!(waits.try_recv().is_err());
        drop(two);
        assert!(waits.try_recv().is_ok());
    }

    proptest! {
        /// Each step lets one ask (0 to 9), leave (10 to 19) or look for its place (20 to 29).
        #[test]
        fn never_more_than_the_limit_run_and_the_line_moves_in_order(most in 1usize..4, steps in prop::collection::vec(0u8..30, 0..80)) {
            let admission = Admission::new(most);
            let mut running: Vec<(u8, Place)> = Vec::new();
            let mut line: Vec<(u8, oneshot::Receiver<Place>)> = Vec::new();
            for step in steps {
                let who = step % 10;
                let known = running.iter().any(|(n, _)| *n == who) || line.iter().any(|(n, _)| *n == who);
                match step / 10 {
                    0 if !known => match admission.ask(&id(who)) {
                        Turn::Now(place) => running.push((who, place)),
                        Turn::Later(place) => line.push((who, place)),
                    },
                    1 => {
                        running.retain(|(n, _)| *n != who);
                        line.retain(|(n, _)| *n != who);
                    }
                    _ => {}
                }
                while let Some((n, place)) = line.first_mut().and_then(|(n, turn)| Some((*n, turn.try_recv().ok()?))) {
                    line.remove(0);
                    running.push((n, place));
                }
                prop_assert!(line.iter_mut().all(|(_, turn)| turn.try_recv().is_err()), "somebody jumped the line");
                prop_assert!(running.len() <= most);
                prop_assert!(line.is_empty() || running.len() == most, "a place stands empty while some wait");
                for (at, (n, _)) in line.iter().enumerate() {
                    prop_assert_eq!(admission.before(&id(*n)), Some(at));
                }
            }
        }
    }
}
