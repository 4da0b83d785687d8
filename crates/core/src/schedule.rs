//! Times that come again, as crontab(5) writes them, in a time zone. It must not know what happens then.

use std::cmp::Ordering;

use croner::Cron;
use croner::errors::CronError;
use croner::parser::{CronParser, Seconds, Year};
use croner::time::{CivilDateTime, CronDateTime, Resolution, Weekday};
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

/// The minutes that `cron` names, by the clocks of `tz`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// Minute, hour, day of the month, month, day of the week: `0 8 * * 1-5`.
    pub cron: String,
    /// IANA name.
    pub tz: String,
}

impl Schedule {
    /// Whether it can be read; else one sentence.
    pub fn validate(&self) -> Result<(), String> {
        self.read().map(|_| ())
    }

    /// The first minute it names after `after`. A time that the clocks skip counts when they go on, one that comes
    /// twice counts the first time. `None` where there is none within years, or it cannot be read.
    pub fn next_after(&self, after: Timestamp) -> Option<Timestamp> {
        let (cron, zone) = self.read().ok()?;
        let mut from = Wall(zone.to_datetime(after));
        loop {
            let found = cron.find_next_occurrence(&from, false).ok()?;
            let at = zone.to_timestamp(found.0).ok()?;
            // Clocks that were put back show times that were named before.
            if at > after {
                return Some(at);
            }
            from = found;
        }
    }

    /// Whether it names the minute that `now` is in.
    pub fn names(&self, now: Timestamp) -> bool {
        let Ok((cron, zone)) = self.read() else { return false };
        let now = zone.to_datetime(now);
        let minute = now.date().at(now.hour(), now.minute(), 0, 0);
        cron.is_time_matching(&Wall(minute)).unwrap_or(false)
    }

    fn read(&self) -> Result<(Cron, TimeZone), String> {
        let parser = CronParser::builder()
            .seconds(Seconds::Disallowed)
            .year(Year::Disallowed)
            .build();
        let cron = parser.parse(&self.cron).map_err(|error| {
            format!(
                "`cron` {:?} cannot be read ({error}); write it like `0 8 * * 1-5`",
                self.cron
            )
        })?;
        let zone = TimeZone::get(&self.tz)
            .map_err(|_| format!("`tz` {:?} is not an IANA time zone such as `Europe/Berlin`", self.tz))?;
        Ok((cron, zone))
    }
}

/// What a clock on the wall shows.
#[derive(Debug, Clone, Copy)]
struct Wall(DateTime);

impl CronDateTime for Wall {
    fn to_civil(&self) -> CivilDateTime {
        let part = |n: i8| u32::from(n.unsigned_abs());
        let (date, time) = (self.0.date(), self.0.time());
        CivilDateTime::from_ymd_hms_opt(
            i32::from(date.year()),
            part(date.month()),
            part(date.day()),
            part(time.hour()),
            part(time.minute()),
            part(time.second()),
        )
        .expect("what is on a clock is so in both libraries")
    }

    fn civil_weekday(&self) -> Weekday {
        Weekday::from_days_from_sunday(u32::from(self.0.weekday().to_sunday_zero_offset().unsigned_abs()))
    }

    fn resolve_civil(&self, civil: CivilDateTime) -> Result<Resolution<Self>, CronError> {
        let part = |n: u32| i8::try_from(n).map_err(|_| CronError::InvalidDate);
        let year = i16::try_from(civil.year()).map_err(|_| CronError::InvalidDate)?;
        DateTime::new(
            year,
            part(civil.month())?,
            part(civil.day())?,
            part(civil.hour())?,
            part(civil.minute())?,
            part(civil.second())?,
            0,
        )
        .map(|at| Resolution::Single(Self(at)))
        .map_err(|_| CronError::InvalidDate)
    }

    fn checked_add_seconds(&self, seconds: i64) -> Option<Self> {
        self.0.checked_add(SignedDuration::from_secs(seconds)).ok().map(Self)
    }

    fn cmp_instant(&self, other: &Self) -> Ordering {
        self.0.cmp(&other.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::ToSpan as _;
    use proptest::prelude::*;

    fn schedule(cron: &str, tz: &str) -> Schedule {
        Schedule {
            cron: cron.to_owned(),
            tz: tz.to_owned(),
        }
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn the_clocks_of_the_zone_count() {
        let weekdays = schedule("0 8 * * 1-5", "Europe/Vienna");
        // A Friday in winter, then a Monday in summer.
        assert_eq!(
            weekdays.next_after(at("2026-01-02T07:00:00Z")),
            Some(at("2026-01-05T07:00:00Z"))
        );
        assert_eq!(
            weekdays.next_after(at("2026-07-06T05:59:59Z")),
            Some(at("2026-07-06T06:00:00Z"))
        );
        assert!(weekdays.names(at("2026-07-06T06:00:59Z")));
        assert!(!weekdays.names(at("2026-07-06T06:01:00Z")));
        assert!(!weekdays.names(at("2026-07-05T06:00:00Z")));
    }

    #[test]
    fn a_skipped_time_comes_when_the_clocks_go_on_and_a_doubled_one_once() {
        let early = schedule("30 2 * * *", "Europe/Vienna");
        assert_eq!(
            early.next_after(at("2026-03-28T22:00:00Z")),
            Some(at("2026-03-29T01:30:00Z"))
        );
        let first = early.next_after(at("2026-10-24T22:00:00Z")).unwrap();
        assert_eq!(first, at("2026-10-25T00:30:00Z"));
        assert_eq!(early.next_after(first), Some(at("2026-10-26T01:30:00Z")));
    }

    #[test]
    fn what_cannot_be_read_or_never_comes_says_so() {
        for (cron, tz) in [
            ("", "UTC"),
            ("0 8 * *", "UTC"),
            ("0 0 8 * * 1", "UTC"),
            ("61 * * * *", "UTC"),
            ("0 8 * * *", "Mars/Base"),
        ] {
            assert!(schedule(cron, tz).validate().is_err(), "{cron} {tz}");
        }
        assert_eq!(
            schedule("0 0 31 2 *", "UTC").next_after(at("2026-01-01T00:00:00Z")),
            None
        );
    }

    proptest! {
        #[test]
        fn the_next_time_is_later_is_named_and_none_between_is(
            minute in 0u8..60, hour in 0u8..24, from in 1_700_000_000i64..1_900_000_000,
            zone in prop::sample::select(vec!["UTC", "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe"]),
        ) {
            let daily = schedule(&format!("{minute} {hour} * * *"), zone);
            let from = Timestamp::from_second(from).unwrap();
            let next = daily.next_after(from).unwrap();
            prop_assert!(next > from && next <= from + 49.hours());
            // What a clock skips has no minute of its own.
            let skipped = !daily.names(next);
            prop_assert!(!skipped || zone != "UTC" && zone != "Asia/Kolkata");
            for hours in 0..48 {
                let between = from + hours.hours() + 1.minute();
                prop_assert!(!(daily.names(between) && between + 1.minute() < next), "{between} was left out");
            }
        }
    }
}
