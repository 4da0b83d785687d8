//! Clients that ask without pause, each request on a connection of its own, and what became of every one. It must not
//! forgive: only a connection that broke under a request may be asked again, within the same limit.

use std::fmt;
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use tokio::task::JoinSet;
use tokio::time::Instant;
use url::Url;

use crate::http;
use crate::waiting::until;

/// What a request may take, the hypervisor's restart included.
pub const LIMIT: Duration = Duration::from_secs(2);

/// What became of the requests of all clients.
#[derive(Debug, Default)]
pub struct Tally {
    /// Connections that broke under a request; the request was answered on the next one.
    pub broken: u64,
    /// How long each answered request took, the longest last.
    pub times: Vec<Duration>,
}

impl Tally {
    /// The time within which 99 of 100 requests were answered.
    pub fn p99(&self) -> Duration {
        let index = (self.times.len() * 99).div_ceil(100).saturating_sub(1);
        self.times.get(index).copied().unwrap_or_default()
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let longest = self.times.last().copied().unwrap_or_default();
        let (answered, broken, p99) = (self.times.len(), self.broken, self.p99());
        write!(
            f,
            "{answered} answered, {broken} broken, p99 {p99:.1?}, longest {longest:.1?}"
        )
    }
}

/// Clients under way.
pub struct Load {
    clients: JoinSet<Result<Tally>>,
    stop: Arc<AtomicBool>,
    /// By client.
    answered: Vec<Arc<AtomicU64>>,
}

impl Load {
    /// This many clients that GET the URL with the header and expect a 2xx answer that contains `wanted`.
    pub fn start(number: usize, url: &Url, header: (&'static str, &str), wanted: &str) -> Self {
        let mut load = Self {
            clients: JoinSet::new(),
            stop: Arc::default(),
            answered: (0..number).map(|_| Arc::default()).collect(),
        };
        for answered in &load.answered {
            let client = Client {
                url: url.clone(),
                header: (header.0, header.1.to_owned()),
                wanted: wanted.to_owned(),
                stop: load.stop.clone(),
                answered: answered.clone(),
            };
            load.clients.spawn(client.run());
        }
        load
    }

    /// Waits until each client had this many more answers.
    pub async fn answers(&mut self, more: u64) -> Result<()> {
        let before: Vec<_> = self.answered.iter().map(|it| it.load(Ordering::Relaxed)).collect();
        let all = async || {
            let had = |(now, before): (&Arc<AtomicU64>, &u64)| now.load(Ordering::Relaxed) >= before + more;
            Ok(self.answered.iter().zip(&before).all(had).then_some(()))
        };
        tokio::select! {
            done = until("every client to be answered", all) => done,
            Some(ended) = self.clients.join_next() => bail!("a client gave up: {:?}", ended?.err()),
        }
    }

    /// Lets every client finish its request. Fails where one request was not answered as wanted and in time.
    pub async fn finish(mut self) -> Result<Tally> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Tally::default();
        while let Some(ended) = self.clients.join_next().await {
            let one = ended??;
            all.broken += one.broken;
            all.times.extend(one.times);
        }
        all.times.sort();
        Ok(all)
    }
}

struct Client {
    url: Url,
    header: (&'static str, String),
    wanted: String,
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
}

impl Client {
    async fn run(self) -> Result<Tally> {
        let mut tally = Tally::default();
        let headers = [(self.header.0, self.header.1.as_str())];
        while !self.stop.load(Ordering::Relaxed) {
            let begun = Instant::now();
            let answer = loop {
                let sent = http::send("GET", &self.url, &headers, "");
                match tokio::time::timeout(LIMIT.saturating_sub(begun.elapsed()), sent).await {
                    Err(_) => bail!("{} was not answered within {LIMIT:?}", self.url),
                    Ok(Ok(answer)) => break answer,
                    Ok(Err(error)) => {
                        let refused = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
                        ensure!(
                            refused != Some(ErrorKind::ConnectionRefused),
                            "{} refused a connection",
                            self.url
                        );
                        tally.broken += 1;
                    }
                }
            };
            let good = (200..300).contains(&answer.status) && answer.body.contains(&self.wanted);
            ensure!(good, "{} answered {} {}", self.url, answer.status, answer.body);
            tally.times.push(begun.elapsed());
            self.answered.fetch_add(1, Ordering::Relaxed);
        }
        Ok(tally)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::Tally;

    #[test]
    fn one_slow_request_in_a_hundred_is_not_the_p99_and_two_are() {
        let times = |slow| {
            let mut times = vec![Duration::from_millis(1); 100 - slow];
            times.extend(vec![Duration::from_secs(1); slow]);
            Tally { broken: 0, times }
        };
        assert_eq!(times(1).p99(), Duration::from_millis(1));
        assert_eq!(times(2).p99(), Duration::from_secs(1));
    }
}
