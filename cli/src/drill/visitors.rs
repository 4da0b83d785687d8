//! Visitors of one address who never stop asking, and count. They must not know what is done to it meanwhile.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use choir_api::client::Client;
use choir_api::client::header::HeaderMap;
use tokio::sync::watch;
use tokio::task::JoinSet;
use url::Url;

use crate::failure::Failure;

/// Between two questions of one visitor.
const PAUSE: Duration = Duration::from_millis(20);
/// How long an answer may be waited for, from whom it may be.
const SEEN_WITHIN: Duration = Duration::from_secs(30);

/// What was answered so far.
#[derive(Debug, Default)]
struct Seen {
    answered: u64,
    /// What went wrong, and how often.
    failed: BTreeMap<String, u64>,
    longest: Duration,
    /// The last answer, and when it was asked for.
    last: Option<(String, Instant)>,
}

pub struct Visitors {
    seen: Arc<Mutex<Seen>>,
    /// Rings with each answer.
    rang: watch::Sender<()>,
    _asking: JoinSet<()>,
}

/// What came of all their questions.
#[derive(Debug, serde::Serialize)]
pub struct Tally {
    pub answered: u64,
    pub failed: u64,
    pub longest_ms: u64,
}

impl Visitors {
    /// So many of them, from now on.
    pub fn come(client: &Client, address: &Url, many: usize) -> Self {
        let (seen, rang) = (Arc::new(Mutex::new(Seen::default())), watch::Sender::new(()));
        let mut asking = JoinSet::new();
        for _ in 0..many {
            let (client, address, seen, rang) = (client.clone(), address.clone(), seen.clone(), rang.clone());
            asking.spawn(async move {
                loop {
                    let begun = Instant::now();
                    let answer = match client.visit(&address, HeaderMap::new()).await {
                        Ok(visit) if visit.status == 200 => Ok(visit.body),
                        Ok(visit) => Err(format!("HTTP {}", visit.status)),
                        Err(error) => Err(error.to_string()),
                    };
                    seen.lock().unwrap_or_else(PoisonError::into_inner).add(answer, begun);
                    rang.send_replace(());
                    tokio::time::sleep(PAUSE).await;
                }
            });
        }
        Self {
            seen,
            rang,
            _asking: asking,
        }
    }

    /// Waits until a question that was asked from now on is answered like this.
    pub async fn see(&self, mark: &str) -> Result<(), Failure> {
        let begun = Instant::now();
        let mut rang = self.rang.subscribe();
        let told = async {
            loop {
                if self
                    .look()
                    .last
                    .as_ref()
                    .is_some_and(|(said, at)| said == mark && *at >= begun)
                {
                    return;
                }
                // The sender is ours, so it is there.
                let _ = rang.changed().await;
            }
        };
        tokio::time::timeout(SEEN_WITHIN, told).await.map_err(|_| {
            let last = self.look().last.as_ref().map(|(said, _)| said.clone());
            Failure::Failed(format!("live serves {last:?} and not {mark:?}"))
        })
    }

    /// That every question so far was answered.
    pub fn all_answered(&self) -> Result<Tally, Failure> {
        let seen = self.look();
        let failed: u64 = seen.failed.values().sum();
        if let Some((what, times)) = seen.failed.first_key_value() {
            let all = seen.answered + failed;
            return Err(Failure::Failed(format!(
                "{failed} of {all} requests failed, {times} of them with: {what}"
            )));
        }
        Ok(Tally {
            answered: seen.answered,
            failed,
            longest_ms: u64::try_from(seen.longest.as_millis()).unwrap_or(u64::MAX),
        })
    }

    fn look(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seen {
    fn add(&mut self, answer: Result<String, String>, begun: Instant) {
        match answer {
            Ok(body) => {
                self.answered += 1;
                self.longest = self.longest.max(begun.elapsed());
                // Of two that cross, the one that was asked later says more.
                if self.last.as_ref().is_none_or(|(_, at)| *at <= begun) {
                    self.last = Some((body, begun));
                }
            }
            Err(why) => *self.failed.entry(why).or_default() += 1,
        }
    }
}
