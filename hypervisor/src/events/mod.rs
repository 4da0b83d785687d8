//! What changes, as it changes. The last events are kept in memory, so that who comes again within a while misses none.
//! It must not know who listens, nor be asked what is so: that is the database.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use choir_core::UserId;
use serde::Serialize;
use tokio::sync::watch;

pub mod routes;

/// How many are kept, of all users.
const KEPT: usize = 4096;

/// One event of one user.
#[derive(Debug)]
pub struct Event {
    number: u64,
    user: UserId,
    pub name: &'static str,
    /// As JSON.
    pub data: String,
}

/// What a listener gets.
#[derive(Debug, Clone)]
pub enum Told {
    Event(Arc<Event>),
    /// Some were missed.
    Missed,
}

/// The events of this process.
pub struct Events {
    /// Of this process: numbers begin anew with each.
    run: String,
    past: Mutex<VecDeque<Arc<Event>>>,
    /// The number of the last event.
    last: watch::Sender<u64>,
}

/// Somebody who listens.
pub struct Listener {
    events: Arc<Events>,
    user: UserId,
    /// The last event that was told.
    after: u64,
    missed: bool,
    last: watch::Receiver<u64>,
}

impl Events {
    pub fn new(run: String) -> Arc<Self> {
        Arc::new(Self {
            run,
            past: Mutex::default(),
            last: watch::Sender::new(0),
        })
    }

    /// Tells all who listen as this user.
    pub fn tell(&self, user: &UserId, name: &'static str, data: &impl Serialize) {
        let data = match serde_json::to_string(data) {
            Ok(data) => data,
            Err(error) => return tracing::error!(%error, name, "an event cannot be told"),
        };
        let mut past = self.past();
        let number = *self.last.borrow() + 1;
        past.push_back(Arc::new(Event {
            number,
            user: user.clone(),
            name,
            data,
        }));
        if past.len() > KEPT {
            past.pop_front();
        }
        // Under the lock, so that numbers come in order.
        self.last.send_replace(number);
    }

    /// Listens from now on, or from after the event with this id.
    pub fn listen(self: &Arc<Self>, user: &UserId, after: Option<&str>) -> Listener {
        let last = self.last.subscribe();
        let now = *last.borrow();
        let known = after.map(|id| self.number_of(id).filter(|number| *number <= now));
        Listener {
            events: self.clone(),
            user: user.clone(),
            after: known.flatten().unwrap_or(now),
            missed: known == Some(None),
            last,
        }
    }

    /// The id of an event, which resumes after it.
    pub fn id(&self, number: u64) -> String {
        format!("{}-{number}", self.run)
    }

    fn number_of(&self, id: &str) -> Option<u64> {
        let (run, number) = id.rsplit_once('-')?;
        (run == self.run).then(|| number.parse().ok())?
    }

    fn past(&self) -> MutexGuard<'_, VecDeque<Arc<Event>>> {
        // Whole after every statement, so a panic elsewhere does not spoil it.
        self.past.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Listener {
    /// What comes next, and the id that resumes after it.
    pub async fn next(&mut self) -> (Told, String) {
        loop {
            if let Some(told) = self.take() {
                return (told, self.events.id(self.after));
            }
            // The sender is held by `events`.
            let _ = self.last.changed().await;
        }
    }

    /// The id that resumes from here.
    pub fn here(&self) -> String {
        self.events.id(self.after)
    }

    fn take(&mut self) -> Option<Told> {
        let now = *self.last.borrow_and_update();
        let past = self.events.past();
        let oldest = past.front().map_or(now + 1, |event| event.number);
        if std::mem::take(&mut self.missed) || self.after + 1 < oldest {
            self.after = now;
            return Some(Told::Missed);
        }
        let mut new = past
            .iter()
            .skip(usize::try_from(self.after + 1 - oldest).unwrap_or(usize::MAX));
        match new.find(|event| event.user == self.user) {
            Some(event) => {
                self.after = event.number;
                Some(Told::Event(event.clone()))
            }
            None => {
                self.after = past.back().map_or(self.after, |event| event.number);
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(n: u8) -> UserId {
        UserId::from_random([n; 16])
    }

    async fn next(listener: &mut Listener) -> (String, String) {
        let (told, id) = listener.next().await;
        match told {
            Told::Event(event) => (event.data.clone(), id),
            Told::Missed => ("missed".to_owned(), id),
        }
    }

    #[tokio::test]
    async fn each_user_is_told_their_own_events_in_order_and_resumes_where_they_left() {
        let events = Events::new("run".to_owned());
        let mut listener = events.listen(&user(1), None);
        for n in 0..4 {
            events.tell(&user(n % 2), "n", &n);
        }
        let (first, id) = next(&mut listener).await;
        assert_eq!((first.as_str(), next(&mut listener).await.0.as_str()), ("1", "3"));
        let mut again = events.listen(&user(1), Some(&id));
        assert_eq!(next(&mut again).await.0, "3");
        let mut other = events.listen(&user(0), Some(&id));
        assert_eq!(next(&mut other).await.0, "2");
    }

    #[tokio::test]
    async fn who_was_away_for_too_long_or_comes_from_another_run_is_told_so_once() {
        let events = Events::new("run".to_owned());
        events.tell(&user(1), "n", &0);
        for id in ["other-1", "run-2", "nonsense", ""] {
            let mut listener = events.listen(&user(1), Some(id));
            assert_eq!(next(&mut listener).await.0, "missed", "{id}");
        }
        let mut slow = events.listen(&user(1), Some("run-0"));
        for n in 0..=KEPT {
            events.tell(&user(1), "n", &n);
        }
        assert_eq!(next(&mut slow).await.0, "missed");
        events.tell(&user(1), "n", &"new");
        assert_eq!(next(&mut slow).await.0, "\"new\"");
    }
}
