//! Which snapshots are worth their room. It must not know how one is taken.

use std::collections::BTreeSet;

use jiff::Timestamp;

const HOUR_S: i64 = 3600;
const DAY_S: i64 = 24 * HOUR_S;
const HOURS: i64 = 24;
const DAYS: i64 = 7;

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
