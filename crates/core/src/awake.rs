//! When a slot should be awake: the policy, and what idleness does to it.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::schedule::Schedule;

/// When a slot runs.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Awake {
    /// Always; started at boot, never paused for idleness.
    Always,
    /// When somebody asks; paused, then stopped, when nobody does.
    #[default]
    OnDemand,
    /// Started at these minutes and kept up during them, else on demand.
    #[serde(untagged)]
    At(Schedule),
}

/// What idleness asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Idle {
    /// Nothing until then.
    Until(Timestamp),
    Pause,
    Stop,
}

/// What to do with a sandbox last active at `active`, and paused or not.
///
/// `pause` and `stop` count from the last activity; a zero switches that step off.
pub fn idle(awake: &Awake, active: Timestamp, paused: bool, pause: Duration, stop: Duration, now: Timestamp) -> Idle {
    if *awake == Awake::Always {
        return Idle::Until(Timestamp::MAX);
    }
    let due = |by: Duration| {
        if by.is_zero() {
            Timestamp::MAX
        } else {
            active.checked_add(by).unwrap_or(Timestamp::MAX)
        }
    };
    let (pause_at, stop_at) = (due(pause), due(stop));
    if now >= stop_at {
        Idle::Stop
    } else if !paused && now >= pause_at {
        Idle::Pause
    } else if paused {
        Idle::Until(stop_at)
    } else {
        Idle::Until(pause_at.min(stop_at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(s: i64) -> Timestamp {
        Timestamp::from_second(s).unwrap()
    }

    proptest! {
        #[test]
        fn an_idle_sandbox_is_paused_then_stopped_and_never_before_its_time(
            pause in 0u64..100, stop in 0u64..100, idle_for in 0i64..200, paused: bool,
        ) {
            let (p, s) = (Duration::from_secs(pause), Duration::from_secs(stop));
            let got = idle(&Awake::OnDemand, at(1000), paused, p, s, at(1000 + idle_for));
            let past = |by: u64| by > 0 && idle_for >= by as i64;
            let want_stop = past(stop);
            prop_assert_eq!(got == Idle::Stop, want_stop);
            prop_assert_eq!(got == Idle::Pause, !want_stop && !paused && past(pause));
            if let Idle::Until(t) = got { prop_assert!(t > at(1000 + idle_for)); }
        }

        #[test]
        fn an_always_slot_is_never_put_to_sleep(idle_for in 0i64..1_000_000) {
            let second = Duration::from_secs(1);
            let got = idle(&Awake::Always, at(0), false, second, second, at(idle_for));
            prop_assert_eq!(got, Idle::Until(Timestamp::MAX));
        }
    }
}
