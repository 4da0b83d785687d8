//! Clients that ask without pause, each request on a connection of its own, and what became of every one. It must not
//! forgive: only a connection that broke under a request may be asked again, within the same limit.

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
    pub answered: u64,
    /// Connections that broke under a request; the request was answered on the next one.
    pub broken: u64,
    pub longest: Duration,
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
            all.answered += one.answered;
            all.broken += one.broken;
            all.longest = all.longest.max(one.longest);
        }
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
            tally.answered += 1;
            tally.longest = tally.longest.max(begun.elapsed());
            self.answered.store(tally.answered, Ordering::Relaxed);
        }
        Ok(tally)
    }
}
