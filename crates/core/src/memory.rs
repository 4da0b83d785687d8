//! Whether the box has memory left for what people do not look at. It must not know what is done about it.

use std::time::Duration;

use jiff::Timestamp;

/// What the kernel says at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Bytes that can be had without swapping: `MemAvailable` of `/proc/meminfo`.
    pub available: u64,
    /// How long all work has stood still for want of memory since the start of the box: `full total` of
    /// `/proc/pressure/memory`. `None` where the kernel does not count it.
    pub stalled: Option<Duration>,
}

/// What to do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Everything may run.
    Fine,
    /// There is enough again, but not for long yet: nothing is taken away, and nothing is let in.
    Recovering,
    /// Something must give its memory back.
    Short,
}

/// For how long there must have been enough before what was held back runs again.
pub const CALM_FOR: Duration = Duration::from_secs(10);
/// Of the time between two looks, how much may be lost to waiting for memory, where little is left.
const STALLED_PERCENT: u128 = 20;
/// Little is left below that many times the reserve: a sandbox that thrashes at its own limit is not the box's want.
const LITTLE: u64 = 3;

/// How much more than the reserve, at most, is enough again.
const MORE: u64 = 256 << 20;

/// Judges what is seen from look to look. `reserve` bytes are to be available always; 0 never finds it short.
#[derive(Debug)]
pub struct Gauge {
    reserve: u64,
    before: Option<(Timestamp, Duration)>,
    short_at: Option<Timestamp>,
}

impl Gauge {
    pub fn new(reserve: u64) -> Self {
        Self {
            reserve,
            before: None,
            short_at: None,
        }
    }

    pub fn look(&mut self, seen: Memory, now: Timestamp) -> Level {
        let stalls = self.stalls(seen, now) && seen.available < self.reserve.saturating_mul(LITTLE);
        if seen.available < self.reserve || stalls {
            self.short_at = Some(now);
            return Level::Short;
        }
        let Some(short_at) = self.short_at else {
            return Level::Fine;
        };
        // A little more than what is short, so that it does not go to and fro.
        if seen.available < self.reserve.saturating_add(MORE.min(self.reserve / 4)) {
            self.short_at = Some(now);
        } else if now.duration_since(short_at).unsigned_abs() >= CALM_FOR {
            self.short_at = None;
            return Level::Fine;
        }
        Level::Recovering
    }

    fn stalls(&mut self, seen: Memory, now: Timestamp) -> bool {
        let Some(stalled) = seen.stalled else {
            return false;
        };
        let Some((at, before)) = self.before.replace((now, stalled)) else {
            return false;
        };
        let passed = now.duration_since(at).unsigned_abs().as_micros();
        stalled.saturating_sub(before).as_micros() * 100 >= passed * STALLED_PERCENT && passed > 0
    }
}

impl Memory {
    /// From the text of `/proc/meminfo` and, where there is one, of `/proc/pressure/memory`.
    pub fn parse(meminfo: &str, pressure: Option<&str>) -> Option<Self> {
        let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        let full = pressure.and_then(|text| text.lines().find_map(|line| line.strip_prefix("full ")));
        let total = full.and_then(|line| line.split(' ').find_map(|field| field.strip_prefix("total=")));
        Some(Self {
            available: kibibytes.saturating_mul(1024),
            stalled: total.and_then(|text| text.parse().ok()).map(Duration::from_micros),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RESERVE: u64 = 1000;

    fn at(ms: i64) -> Timestamp {
        Timestamp::from_millisecond(1_800_000_000_000 + ms).unwrap()
    }

    fn seen(available: u64, stalled_ms: u64) -> Memory {
        Memory {
            available,
            stalled: Some(Duration::from_millis(stalled_ms)),
        }
    }

    #[test]
    fn what_the_kernel_writes_is_read_with_and_without_pressure() {
        let meminfo = "MemTotal:        8000000 kB\nMemFree:          100 kB\nMemAvailable:    4000 kB\n";
        let pressure =
            "some avg10=1.00 avg60=0.50 avg300=0.10 total=77\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=42\n";
        let read = Memory::parse(meminfo, Some(pressure)).unwrap();
        assert_eq!(
            (read.available, read.stalled),
            (4_096_000, Some(Duration::from_micros(42)))
        );
        assert_eq!(Memory::parse(meminfo, None).unwrap().stalled, None);
        assert_eq!(
            Memory::parse(meminfo, Some("some avg10=0.00 total=1\n"))
                .unwrap()
                .stalled,
            None
        );
        assert_eq!(Memory::parse("MemTotal: 1 kB\n", None), None);
    }

    #[test]
    fn below_the_reserve_it_is_short_until_there_was_enough_for_a_while() {
        let mut gauge = Gauge::new(RESERVE);
        assert_eq!(gauge.look(seen(1001, 0), at(0)), Level::Fine);
        assert_eq!(gauge.look(seen(999, 0), at(1000)), Level::Short);
        assert_eq!(gauge.look(seen(5000, 0), at(2000)), Level::Recovering);
        assert_eq!(gauge.look(seen(5000, 0), at(10_999)), Level::Recovering);
        assert_eq!(gauge.look(seen(5000, 0), at(11_000)), Level::Fine);
        assert_eq!(gauge.look(seen(5000, 0), at(11_001)), Level::Fine);
    }

    #[test]
    fn barely_enough_is_not_calm() {
        let mut gauge = Gauge::new(RESERVE);
        gauge.look(seen(999, 0), at(0));
        for second in 1..60 {
            assert_eq!(gauge.look(seen(1249, 0), at(second * 1000)), Level::Recovering);
        }
    }

    #[test]
    fn standing_still_counts_where_little_is_left_and_nowhere_else() {
        for (available, level) in [(2999, Level::Short), (3000, Level::Fine)] {
            let mut gauge = Gauge::new(RESERVE);
            assert_eq!(
                gauge.look(seen(available, 7000), at(0)),
                Level::Fine,
                "only what passes counts"
            );
            assert_eq!(gauge.look(seen(available, 7199), at(1000)), Level::Fine);
            assert_eq!(gauge.look(seen(available, 7399), at(2000)), level);
        }
    }

    proptest! {
        #[test]
        fn without_a_reserve_it_is_never_short(looks in prop::collection::vec((0u64..5000, 0u64..5000), 1..50)) {
            let mut gauge = Gauge::new(0);
            for (nth, (available, stalled)) in looks.into_iter().enumerate() {
                prop_assert_eq!(gauge.look(seen(available, stalled), at(nth as i64 * 1000)), Level::Fine);
            }
        }

        #[test]
        fn it_is_fine_again_only_after_a_calm_while(looks in prop::collection::vec(0u64..3000, 1..80)) {
            let mut gauge = Gauge::new(RESERVE);
            let mut short: Option<i64> = None;
            for (nth, available) in looks.into_iter().enumerate() {
                let now = nth as i64 * 1000;
                let level = gauge.look(Memory { available, stalled: None }, at(now));
                prop_assert_eq!(level == Level::Short, available < RESERVE);
                if level == Level::Short {
                    short = Some(now);
                }
                if level == Level::Fine && let Some(at) = short.take() {
                    prop_assert!(now - at >= 10_000);
                }
            }
        }
    }
}
