//! Bounds how much of the audit trail a sandbox can fill by what needs no secret: the first of several identical events
//! has its row at once, the others become one row with their number, and who is refused ever different things is counted
//! only. It must not hear of any use of a secret: each of those is a row of its own.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

use choir_store::AuditEvent;
use jiff::{SignedDuration, Timestamp};

/// Identical events so soon after the first become one row.
const WINDOW: SignedDuration = SignedDuration::from_mins(5);
/// How many different refusals of one sandbox have rows of their own at once.
const BURST: u32 = 200;
/// After that, one more in so long.
const ONE_MORE: SignedDuration = SignedDuration::from_secs(10);
/// Different events of one sandbox that are remembered; beyond, even identical ones have a row each.
const MOST: usize = 10_000;

/// What sandboxes did of late, by their ids.
#[derive(Default)]
pub(super) struct Repeats(Mutex<HashMap<String, Recent>>);

struct Recent {
    /// Different refusals that may have a row now.
    rows: u32,
    /// Since when one more is earned.
    since: Timestamp,
    events: HashMap<Same, Counted>,
}

/// What makes two events the same: action, subject, outcome.
type Same = (&'static str, String, &'static str);

struct Counted {
    event: AuditEvent,
    until: Timestamp,
    /// How many have no row yet.
    times: u64,
}

impl Repeats {
    /// Whether this event gets a row now; otherwise it is counted, and [`Self::due`] gives it later.
    pub(super) fn take(&self, event: &AuditEvent) -> bool {
        let mut all = self.all();
        let recent = all.entry(event.actor.clone()).or_insert_with(|| Recent::new(event.at));
        if let Some(counted) = recent.events.get_mut(&same(event)) {
            // One whose window is over, and which nobody repeated, was not told to be forgotten yet.
            if counted.times == 0 && counted.until <= event.at {
                recent.events.remove(&same(event));
            } else {
                counted.times += 1;
                return false;
            }
        }
        if !matches!(event.outcome, "ok" | "intercepted") && !recent.may_tell(event.at) {
            recent.count(&anything_like(event));
            return false;
        }
        if recent.events.len() < MOST {
            recent.events.insert(same(event), Counted::new(event, 0));
        }
        true
    }

    /// Counts events whose rows could not be written, so that they get one later.
    pub(super) fn owe(&self, event: &AuditEvent, times: u64) {
        let mut all = self.all();
        let recent = all.entry(event.actor.clone()).or_insert_with(|| Recent::new(event.at));
        let counted = recent
            .events
            .entry(same(event))
            .or_insert_with(|| Counted::new(event, 0));
        counted.times += times;
    }

    /// What was counted until now in windows that are over, or in all of them at the end; and how often.
    pub(super) fn due(&self, now: Timestamp, all_of_them: bool) -> Vec<(AuditEvent, u64)> {
        let mut due = Vec::new();
        self.all().retain(|_, recent| {
            recent.earn(now);
            let over = recent
                .events
                .extract_if(|_, counted| all_of_them || counted.until <= now);
            due.extend(over.filter(|(_, counted)| counted.times > 0).map(|(_, counted)| {
                let event = AuditEvent {
                    at: now,
                    ..counted.event
                };
                (event, counted.times)
            }));
            !recent.events.is_empty() || recent.rows < BURST
        });
        due
    }

    fn all(&self) -> MutexGuard<'_, HashMap<String, Recent>> {
        self.0.lock().expect("no holder of this lock panics")
    }
}

impl Recent {
    fn new(now: Timestamp) -> Self {
        Self {
            rows: BURST,
            since: now,
            events: HashMap::new(),
        }
    }

    fn earn(&mut self, now: Timestamp) {
        while self.rows < BURST && now.duration_since(self.since) >= ONE_MORE {
            self.rows += 1;
            self.since += ONE_MORE;
        }
        if self.rows == BURST {
            self.since = now;
        }
    }

    fn may_tell(&mut self, now: Timestamp) -> bool {
        self.earn(now);
        let may = self.rows > 0;
        self.rows = self.rows.saturating_sub(1);
        may
    }

    fn count(&mut self, event: &AuditEvent) {
        let counted = self.events.entry(same(event)).or_insert_with(|| Counted::new(event, 0));
        counted.times += 1;
    }
}

impl Counted {
    fn new(event: &AuditEvent, times: u64) -> Self {
        Self {
            event: event.clone(),
            until: event.at + WINDOW,
            times,
        }
    }
}

fn same(event: &AuditEvent) -> Same {
    (event.action, event.subject.clone(), event.outcome)
}

/// The event that stands for all of its kind in its slot: there are as many as there are ways to be refused.
fn anything_like(event: &AuditEvent) -> AuditEvent {
    let slot = event.subject.split(' ').next().unwrap_or_default();
    AuditEvent {
        subject: format!("{slot} (too many different ones)"),
        ..event.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + seconds).unwrap()
    }

    fn event(seconds: i64, actor: &str, what: &str, outcome: &'static str) -> AuditEvent {
        AuditEvent {
            at: at(seconds),
            actor: actor.into(),
            user: None,
            action: "egress.connect",
            subject: format!("main/dev {what}"),
            outcome,
        }
    }

    fn told(due: Vec<(AuditEvent, u64)>) -> Vec<(String, &'static str, u64)> {
        let mut told: Vec<_> = due.into_iter().map(|(e, n)| (e.subject, e.outcome, n)).collect();
        told.sort();
        told
    }

    #[test]
    fn the_first_of_identical_events_has_its_row_at_once_and_the_others_are_told_at_the_end_of_the_window() {
        let repeats = Repeats::default();
        assert!(repeats.take(&event(0, "a", "x:1", "locked")));
        for second in 1..=50 {
            assert!(!repeats.take(&event(second, "a", "x:1", "locked")));
        }
        // Another sandbox, subject or outcome is another event.
        assert!(repeats.take(&event(1, "b", "x:1", "locked")));
        assert!(repeats.take(&event(1, "a", "x:2", "locked")));
        assert!(repeats.take(&event(1, "a", "x:1", "ok")));
        assert!(repeats.due(at(299), false).is_empty());
        assert_eq!(
            told(repeats.due(at(300), false)),
            [("main/dev x:1".into(), "locked", 50)]
        );
        // A new window begins with a row.
        assert!(repeats.take(&event(301, "a", "x:1", "locked")));
        assert!(!repeats.take(&event(302, "a", "x:1", "locked")));
        assert_eq!(told(repeats.due(at(303), true)), [("main/dev x:1".into(), "locked", 1)]);
    }

    #[test]
    fn a_day_of_ever_different_refusals_is_a_bounded_number_of_rows_and_each_is_counted() {
        let repeats = Repeats::default();
        let (mut rows, mut counted, mut count_rows) = (0u64, 0, 0);
        for second in 0..86_400 {
            for n in 0..10 {
                rows += u64::from(repeats.take(&event(second, "a", &format!("{second}.{n}:1"), "locked")));
            }
            for (_, times) in repeats.due(at(second), second == 86_399) {
                counted += times;
                count_rows += 1;
            }
        }
        assert_eq!(rows + counted, 864_000);
        assert!((8_000..9_000).contains(&rows), "{rows}");
        assert!(count_rows < 300, "{count_rows}");
        // The control: what was let through has a row each, however many.
        let passed = (0..1000).filter(|n| repeats.take(&event(86_400, "a", &format!("{n}:1"), "ok")));
        assert_eq!(passed.count(), 1000);
    }

    #[test]
    fn what_could_not_be_written_is_told_later_and_nothing_is_remembered_for_ever() {
        let repeats = Repeats::default();
        let lost = event(0, "a", "x:1", "locked");
        assert!(repeats.take(&lost));
        repeats.owe(&lost, 1);
        assert_eq!(
            told(repeats.due(at(300), false)),
            [("main/dev x:1".into(), "locked", 1)]
        );
        assert!(repeats.due(at(4000), false).is_empty());
        assert!(repeats.all().is_empty());
    }
}
