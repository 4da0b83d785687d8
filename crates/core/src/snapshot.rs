//! When a snapshot is due by itself, which are worth their room, and what differs between two. It must not know how one is
//! taken or compared.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::sandbox::Observed;

const HOUR_S: i64 = 3600;
const DAY_S: i64 = 24 * HOUR_S;
const HOURS: i64 = 24;
const DAYS: i64 = 7;

/// Whether what a sandbox holds should be kept now: the last copy is at least `every` old, and the sandbox has run since.
/// One that was never kept is due as soon as it runs. A zero is never.
pub fn due(observed: &Observed, last: Option<Timestamp>, every: Duration, now: Timestamp) -> bool {
    let long_ago =
        last.is_none_or(|at| now.duration_since(at) >= every.try_into().unwrap_or(jiff::SignedDuration::MAX));
    // Times of snapshots are kept in milliseconds.
    let since_then = |since: &Timestamp, at: Timestamp| since.as_millisecond() > at.as_millisecond();
    let changed = match observed {
        Observed::Ready { .. } | Observed::Unhealthy { .. } | Observed::Stopping { .. } => true,
        Observed::Paused { since, .. } => last.is_none_or(|at| since_then(since, at)),
        // Without an exit, and never kept, it has not run yet.
        Observed::Stopped { since, exit } => last.map_or(exit.is_some(), |at| since_then(since, at)),
        // Its volume may not be there, or is about to change.
        _ => false,
    };
    !every.is_zero() && long_ago && changed
}

/// Of snapshots taken at these times, newest first, those that may go: what is left is the newest of each of the last 24
/// hours and of each of the last 7 days.
pub fn thin<T>(newest_first: &[(T, Timestamp)], now: Timestamp) -> Vec<&T> {
    let (mut hours, mut days) = (BTreeSet::new(), BTreeSet::new());
    let mut gone = Vec::new();
    for (one, at) in newest_first {
        let age = now.as_second() - at.as_second();
        let of_its_hour = age < HOURS * HOUR_S && hours.insert(at.as_second().div_euclid(HOUR_S));
        let of_its_day = age < DAYS * DAY_S && days.insert(at.as_second().div_euclid(DAY_S));
        if !(of_its_hour || of_its_day) {
            gone.push(one);
        }
    }
    gone
}

/// What differs between what a sandbox held at two moments.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diff {
    pub added: u64,
    pub removed: u64,
    pub changed: u64,
    /// In the files that were added.
    pub added_bytes: u64,
    pub removed_bytes: u64,
    /// Not all is in `entries`, or, of very many files, not all was compared.
    pub truncated: bool,
    pub entries: Vec<Differs>,
}

/// One path that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Differs {
    /// As inside the sandbox; bytes that are not UTF-8, control characters and backslashes are `\xNN`.
    pub path: String,
    pub change: Change,
    /// Bytes of a file, 0 of anything else, nothing where it was not there.
    pub before: Option<u64>,
    pub after: Option<u64>,
}

/// How a path differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    Added,
    Removed,
    /// Another type, mode, owner, size, time or target; contents are not read.
    Changed,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn a_snapshot_every_ten_minutes_leaves_one_an_hour_and_one_a_day() {
        let now = at(1_800_000_000);
        let taken: Vec<(i64, Timestamp)> = (0..10 * DAY_S / 600)
            .map(|nth| (nth, at(1_800_000_000 - nth * 600)))
            .collect();
        let gone: BTreeSet<i64> = thin(&taken, now).into_iter().copied().collect();
        let kept: Vec<i64> = (0..).take(taken.len()).filter(|n| !gone.contains(n)).collect();
        // 24 hours may touch 25 of the clock, and 7 days 8 of the calendar, of which the first one or two have theirs.
        assert!((24 + 5..=25 + 8).contains(&kept.len()), "{kept:?}");
        assert_eq!(kept[0], 0, "the newest stays");
        assert!(kept.iter().all(|nth| nth * 600 < 7 * DAY_S), "{kept:?}");
    }

    #[test]
    fn a_sandbox_is_kept_once_an_interval_and_only_if_it_ran_since() {
        let every = Duration::from_secs(3600);
        let ready = Observed::Ready {
            generation: 1,
            since: at(0),
            attempt: 0,
        };
        let stopped = |second| Observed::Stopped {
            exit: None,
            since: at(second),
        };
        assert!(due(&ready, None, every, at(1)));
        assert!(!due(&ready, Some(at(0)), every, at(3599)));
        assert!(due(&ready, Some(at(0)), every, at(3600)));
        assert!(!due(&ready, Some(at(0)), Duration::ZERO, at(100_000)));
        assert!(due(&stopped(10), Some(at(5)), every, at(4000)));
        assert!(!due(&stopped(10), Some(at(20)), every, at(40_000)));
        assert!(!due(&stopped(10), None, every, at(40_000)));
        assert!(!due(&Observed::Creating { since: at(0) }, None, every, at(40_000)));
    }

    proptest! {
        #[test]
        fn thinning_again_changes_nothing(mut ages in prop::collection::vec(0..9 * DAY_S, 0..200)) {
            ages.sort_unstable();
            let now = at(1_800_000_000);
            let all: Vec<(usize, Timestamp)> = ages.iter().enumerate().map(|(n, age)| (n, at(1_800_000_000 - age))).collect();
            let gone: BTreeSet<usize> = thin(&all, now).into_iter().copied().collect();
            let left: Vec<_> = all.into_iter().filter(|(n, _)| !gone.contains(n)).collect();
            prop_assert!(thin(&left, now).is_empty());
            prop_assert!(left.len() <= 25 + 8);
        }
    }
}
