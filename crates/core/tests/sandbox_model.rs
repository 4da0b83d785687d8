//! A model of the reconciler over the pure state machine: whatever happens, a sandbox comes to what is wanted.

use choir_core::sandbox::{ATTEMPTS, Action, Desired, Event, Exit, Observed, apply, backoff, next_action};
use jiff::{SignedDuration, Timestamp};
use proptest::prelude::*;

/// What the world does to a sandbox between two steps of the reconciler.
#[derive(Debug, Clone)]
enum Happening {
    Want(Desired),
    AgentReady,
    Exit { oom_killed: bool },
    StaleExit,
    ProbeFailed,
    ProbeOk,
    Pause,
    Thaw,
    Seconds(i64),
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        prop_oneof![Just(Desired::Running), Just(Desired::Stopped), Just(Desired::Deleted)].prop_map(Happening::Want),
        Just(Happening::AgentReady),
        any::<bool>().prop_map(|oom_killed| Happening::Exit { oom_killed }),
        Just(Happening::StaleExit),
        Just(Happening::ProbeFailed),
        Just(Happening::ProbeOk),
        Just(Happening::Pause),
        Just(Happening::Thaw),
        (0i64..400).prop_map(Happening::Seconds),
    ]
}

/// A world in which every effect succeeds at once.
struct World {
    now: Timestamp,
    desired: Desired,
    state: Observed,
    started: bool,
    last_generation: u64,
    given: Vec<u64>,
}

impl World {
    fn new() -> Self {
        let now = Timestamp::from_second(1_000_000).unwrap();
        let state = Observed::Creating { since: now };
        Self {
            now,
            desired: Desired::Stopped,
            state,
            started: false,
            last_generation: 0,
            given: Vec::new(),
        }
    }

    fn event(&mut self, event: Event) {
        // What makes no sense in a state is refused and changes nothing.
        if let Ok(next) = apply(self.state.clone(), event, self.now) {
            self.state = next;
        }
    }

    fn exit(&mut self, oom_killed: bool) {
        if let Some(generation) = self.state.generation() {
            let exit = Exit { code: 1, oom_killed };
            self.started = false;
            self.event(Event::Exited {
                generation,
                exit,
                reason: "it ended".into(),
            });
        }
    }

    /// Carries out one action; false when there is nothing to do now.
    fn step(&mut self) -> bool {
        match next_action(self.desired, &self.state, self.started, self.now) {
            None | Some(Action::Wait(_)) => return false,
            Some(Action::Create) => self.event(Event::Created),
            Some(Action::Start) => {
                self.last_generation += 1;
                self.given.push(self.last_generation);
                self.event(Event::StartAsked {
                    generation: self.last_generation,
                });
                self.started = true;
            }
            Some(Action::Stop) => {
                if self.desired != Desired::Running {
                    self.event(Event::StopAsked);
                }
                self.exit(false);
            }
            Some(Action::Delete) => {
                self.event(Event::DeleteAsked);
                self.event(Event::Gone);
            }
        }
        true
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Want(desired) if self.desired != Desired::Deleted => self.desired = desired,
            Happening::Want(_) => {}
            Happening::AgentReady => {
                if let (Some(generation), true) = (self.state.generation(), self.started) {
                    self.event(Event::AgentReady { generation });
                }
            }
            Happening::Exit { oom_killed } => self.exit(oom_killed),
            Happening::StaleExit => {
                let before = self.state.clone();
                if let Some(generation) = before.generation() {
                    let exit = Exit {
                        code: 0,
                        oom_killed: false,
                    };
                    self.event(Event::Exited {
                        generation: generation + 1000,
                        exit,
                        reason: String::new(),
                    });
                    assert_eq!(before, self.state, "news about another generation changed something");
                }
            }
            Happening::ProbeFailed => self.event(Event::ProbeFailed {
                reason: "no answer".into(),
            }),
            Happening::ProbeOk => self.event(Event::ProbeOk),
            Happening::Pause => self.event(Event::Paused),
            Happening::Thaw => self.event(Event::Thawed),
            Happening::Seconds(s) => self.now = self.now.checked_add(SignedDuration::from_secs(s)).unwrap(),
        }
    }

    /// Lets time pass and agents answer until nothing is left to do.
    fn settle(&mut self) {
        for _ in 0..200 {
            while self.step() {}
            self.happen(Happening::AgentReady);
            match next_action(self.desired, &self.state, self.started, self.now) {
                Some(Action::Wait(until)) => self.now = self.now.max(until),
                None => return,
                Some(_) => {}
            }
        }
        panic!("never came to rest: {:?} wanted {:?}", self.state, self.desired);
    }
}

proptest! {
    #[test]
    fn whatever_happens_a_sandbox_comes_to_what_is_wanted(happenings in prop::collection::vec(happening(), 0..60)) {
        let mut world = World::new();
        for happening in happenings {
            world.happen(happening);
            world.step();
        }
        world.settle();
        let ok = match world.desired {
            Desired::Running => matches!(world.state, Observed::Ready { .. } | Observed::Paused { .. }),
            Desired::Stopped => matches!(world.state, Observed::Stopped { .. } | Observed::Failed { .. }),
            Desired::Deleted => world.state == Observed::Deleted,
        };
        prop_assert!(ok, "{:?} wanted {:?}", world.state, world.desired);
    }

    #[test]
    fn a_generation_number_is_never_given_out_twice(happenings in prop::collection::vec(happening(), 0..80)) {
        let mut world = World::new();
        for happening in happenings {
            world.happen(happening);
            world.step();
        }
        let mut numbers = world.given.clone();
        numbers.dedup();
        prop_assert_eq!(&numbers, &world.given);
        prop_assert!(world.given.is_sorted());
    }

    #[test]
    fn a_deleted_sandbox_never_comes_back(happenings in prop::collection::vec(happening(), 0..40)) {
        let mut world = World::new();
        world.happen(Happening::Want(Desired::Deleted));
        world.settle();
        for happening in happenings {
            world.happen(happening);
            world.step();
            prop_assert_eq!(&world.state, &Observed::Deleted);
        }
    }
}

#[test]
fn a_sandbox_that_dies_at_every_start_is_left_failed_after_the_budget() {
    let mut world = World::new();
    world.happen(Happening::Want(Desired::Running));
    for _ in 0..100 {
        while world.step() {}
        if let Observed::Failed { .. } = world.state {
            assert_eq!(world.given.len() as u32, ATTEMPTS);
            return;
        }
        if world.started {
            world.exit(false);
        } else {
            world.now = world.now.checked_add(SignedDuration::from_secs(31)).unwrap();
        }
    }
    panic!("it was started {} times", world.given.len());
}

/// Starts it and lets it die when it was ready for so long, until it is left failed or 20 times; how often it started.
fn starts_of_one_that_dies_after(ready: SignedDuration) -> usize {
    let mut world = World::new();
    world.happen(Happening::Want(Desired::Running));
    while world.given.len() < 20 {
        match next_action(world.desired, &world.state, world.started, world.now) {
            Some(Action::Wait(until)) if !world.started => world.now = until,
            _ => while world.step() {},
        }
        if let Observed::Failed { .. } = world.state {
            break;
        }
        if world.started {
            world.happen(Happening::AgentReady);
            world.now = world.now.checked_add(ready).unwrap();
            world.happen(Happening::ProbeFailed);
            world.exit(false);
        }
    }
    world.given.len()
}

#[test]
fn a_sandbox_that_dies_soon_after_it_was_ready_is_left_failed_too() {
    assert_eq!(
        starts_of_one_that_dies_after(SignedDuration::from_secs(5)),
        ATTEMPTS as usize
    );
}

#[test]
fn a_sandbox_that_was_ready_for_a_minute_has_its_attempts_back() {
    assert_eq!(starts_of_one_that_dies_after(SignedDuration::from_secs(60)), 20);
}

#[test]
fn an_agent_that_never_answers_is_stopped_at_its_deadline() {
    let mut world = World::new();
    world.happen(Happening::Want(Desired::Running));
    while world.step() {}
    let Some(Action::Wait(until)) = next_action(world.desired, &world.state, world.started, world.now) else {
        panic!("it does not wait for the agent")
    };
    assert_eq!(
        next_action(world.desired, &world.state, world.started, until),
        Some(Action::Stop)
    );
}

#[test]
fn the_wait_between_starts_grows_and_ends_at_half_a_minute() {
    let waits: Vec<u64> = (1..=10).map(|n| backoff(n).as_millis() as u64).collect();
    assert_eq!(waits, [0, 500, 1000, 2000, 4000, 8000, 16000, 30000, 30000, 30000]);
}

#[test]
fn a_sandbox_whose_volume_could_not_be_made_is_not_started_but_made_again() {
    let mut world = World::new();
    let failed = |world: &mut World| {
        world.event(Event::CreateFailed {
            reason: "the disk is full".into(),
        });
        assert!(
            matches!(world.state, Observed::Failed { attempt: 0, .. }),
            "{:?}",
            world.state
        );
    };
    failed(&mut world);
    let action = |world: &World| next_action(world.desired, &world.state, false, world.now);
    let Some(Action::Wait(until)) = action(&world) else {
        panic!("{:?}", action(&world))
    };
    // Nobody has asked for it to run.
    world.now = until;
    assert_eq!(action(&world), Some(Action::Create));
    failed(&mut world);
    world.desired = Desired::Running;
    world.event(Event::StartAsked { generation: 1 });
    assert!(
        matches!(world.state, Observed::Failed { .. }),
        "it has nothing to start from"
    );
    world.event(Event::StopAsked);
    assert_eq!(action(&world), Some(Action::Create), "who asks does not wait");
    world.event(Event::Created);
    assert_eq!(action(&world), Some(Action::Start));
}
