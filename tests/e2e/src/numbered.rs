//! Visitors of an app that number every request, on connections that they keep, and websockets beside them. What was
//! answered is compared with what the app wrote down. It must not ask anything twice that may have been sent.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, interval};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use url::Url;

use crate::waiting::until;

/// Between two requests of one visitor: fifty a second.
const EVERY: Duration = Duration::from_millis(20);
/// Between two messages on one websocket.
const TALKS: Duration = Duration::from_millis(100);
/// What asks a client to come again.
const SERVICE_RESTART: u16 = 1012;
/// After so many a visitor gives up.
const MOST_FAILURES: usize = 10;
const PATIENCE: Duration = Duration::from_secs(45);

/// What became of the requests of all visitors.
#[derive(Debug, Default)]
pub struct Report {
    /// The numbers that were answered.
    pub answered: Vec<String>,
    /// What went wrong, by number.
    pub failed: Vec<String>,
    /// How long each answer took, the longest last.
    pub times: Vec<Duration>,
    /// Websockets that were told to come again.
    pub told: u64,
}

impl Report {
    pub fn percentile(&self, percent: usize) -> Duration {
        let index = (self.times.len() * percent).div_ceil(100).saturating_sub(1);
        self.times.get(index).copied().unwrap_or_default()
    }

    /// Compares with what the app wrote down, a number a line. Whatever is wrong is an error that says what.
    pub fn reconcile(&self, written: &str) -> Result<()> {
        ensure!(
            self.failed.is_empty(),
            "{} requests failed: {:?}",
            self.failed.len(),
            self.failed
        );
        let twice = twice(written);
        ensure!(twice.is_empty(), "delivered more than once: {twice:?}");
        let written: BTreeSet<&str> = written.lines().collect();
        let lost: Vec<_> = self.answered.iter().filter(|n| !written.contains(n.as_str())).collect();
        ensure!(lost.is_empty(), "answered, and not delivered: {lost:?}");
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} answered, {} failed, p50 {:.1?}, p99 {:.1?}, longest {:.1?}; {} websockets came again",
            self.answered.len(),
            self.failed.len(),
            self.percentile(50),
            self.percentile(99),
            self.percentile(100),
            self.told
        )
    }
}

/// The numbers that an app wrote down more than once.
pub fn twice(written: &str) -> Vec<&str> {
    let mut seen = BTreeSet::new();
    written.lines().filter(|number| !seen.insert(*number)).collect()
}

/// Visitors under way.
pub struct Visitors {
    all: JoinSet<Result<Report>>,
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
}

impl Visitors {
    /// So many that ask fifty times a second each, and so many websockets, of the app at this address, which is public.
    /// `run` keeps the numbers apart from those of other visitors.
    pub fn come(app: &Url, run: &str, asking: usize, talking: usize) -> Self {
        let mut visitors = Self {
            all: JoinSet::new(),
            stop: Arc::default(),
            answered: Arc::default(),
        };
        for nth in 0..asking {
            let visitor = Visitor {
                app: app.clone(),
                stop: visitors.stop.clone(),
                answered: visitors.answered.clone(),
            };
            visitors.all.spawn(visitor.ask(format!("{run}-{nth}")));
        }
        for _ in 0..talking {
            let visitor = Visitor {
                app: app.clone(),
                stop: visitors.stop.clone(),
                answered: Arc::default(),
            };
            visitors.all.spawn(visitor.talk());
        }
        visitors
    }

    /// Waits until so many more requests were answered.
    pub async fn answers(&mut self, more: u64) -> Result<()> {
        let wanted = self.answered.load(Ordering::Relaxed) + more;
        tokio::select! {
            done = until("visitors to be answered", async || {
                Ok((self.answered.load(Ordering::Relaxed) >= wanted).then_some(()))
            }) => done,
            Some(ended) = self.all.join_next() => bail!("a visitor gave up: {:?}", ended?.err()),
        }
    }

    /// Lets every visitor finish what is under way.
    pub async fn leave(mut self) -> Result<Report> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Report::default();
        while let Some(ended) = self.all.join_next().await {
            let one = ended??;
            all.answered.extend(one.answered);
            all.failed.extend(one.failed);
            all.times.extend(one.times);
            all.told += one.told;
        }
        all.times.sort();
        Ok(all)
    }
}

struct Visitor {
    app: Url,
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
}

type Connection = SendRequest<Empty<Bytes>>;

impl Visitor {
    async fn ask(self, name: String) -> Result<Report> {
        let mut report = Report::default();
        let mut connection = self.connect().await?;
        let mut ticks = interval(EVERY);
        for nth in 0.. {
            ticks.tick().await;
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            let number = format!("{name}-{nth}");
            let begun = Instant::now();
            let asked = tokio::time::timeout(PATIENCE, self.number(&mut connection, &number)).await;
            match asked.unwrap_or_else(|_| bail!("no answer in {PATIENCE:?}")) {
                Ok(()) => {
                    report.times.push(begun.elapsed());
                    report.answered.push(number);
                    self.answered.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => {
                    report.failed.push(format!("{number}: {error:#}"));
                    connection = self.connect().await?;
                }
            }
        }
        Ok(report)
    }

    async fn connect(&self) -> Result<Connection> {
        let port = self.app.port_or_known_default().context("no port")?;
        let stream = TcpStream::connect(("127.0.0.1", port)).await?;
        stream.set_nodelay(true)?;
        let (send, connection) = handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(send)
    }

    /// Only what was certainly not sent is sent again.
    async fn number(&self, connection: &mut Connection, number: &str) -> Result<()> {
        let mut request = Request::get(format!("/n/{number}"))
            .header("host", self.app.authority())
            .body(Empty::new())?;
        let answer = loop {
            if connection.ready().await.is_err() {
                *connection = self.connect().await?;
            }
            match connection.try_send_request(request).await {
                Ok(answer) => break answer,
                Err(mut error) => match error.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(error.into_error().into()),
                },
            }
        };
        whole(answer).await
    }

    async fn talk(self) -> Result<Report> {
        let mut report = Report::default();
        while !self.stop.load(Ordering::Relaxed) {
            match self.converse().await {
                Ok(Some(SERVICE_RESTART)) => report.told += 1,
                Ok(None) => {}
                Ok(Some(code)) => report.failed.push(format!("a websocket was closed with {code}")),
                Err(error) => report.failed.push(format!("a websocket broke: {error:#}")),
            }
            ensure!(report.failed.len() < MOST_FAILURES, "{:?}", report.failed);
        }
        Ok(report)
    }

    /// Talks until it is closed, with its code, or until it is time to leave.
    async fn converse(&self) -> Result<Option<u16>> {
        let port = self.app.port_or_known_default().context("no port")?;
        let stream = TcpStream::connect(("127.0.0.1", port)).await?;
        let mut request = format!("ws://{}/socket", self.app.authority()).into_client_request()?;
        let origin = self.app.origin().ascii_serialization();
        request.headers_mut().insert("origin", origin.parse()?);
        let (mut socket, _) =
            tokio::time::timeout(PATIENCE, tokio_tungstenite::client_async(request, stream)).await??;
        let mut ticks = interval(TALKS);
        while !self.stop.load(Ordering::Relaxed) {
            ticks.tick().await;
            // Where this fails it was closed; why is what comes next.
            let _closed = socket.send(Message::text("hello")).await;
            match tokio::time::timeout(PATIENCE, socket.next()).await? {
                Some(Ok(Message::Text(_))) => {}
                Some(Ok(Message::Close(Some(frame)))) => return Ok(Some(frame.code.into())),
                other => bail!("not what it should say: {other:?}"),
            }
        }
        let _ = socket.close(None).await;
        Ok(None)
    }
}

async fn whole(answer: Response<Incoming>) -> Result<()> {
    let status = answer.status();
    let body = answer.into_body().collect().await?.to_bytes();
    ensure!(status == StatusCode::OK, "{status}: {}", String::from_utf8_lossy(&body));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::Report;

    fn report(answered: &[&str]) -> Report {
        Report {
            answered: answered.iter().map(|n| (*n).to_owned()).collect(),
            ..Report::default()
        }
    }

    #[test]
    fn what_was_delivered_once_is_well() {
        assert!(report(&["a-1", "a-2"]).reconcile("a-2\na-1\n").is_ok());
    }

    #[test]
    fn a_loss_and_a_duplicate_are_found() {
        assert!(report(&["a-1", "a-2"]).reconcile("a-1\n").is_err());
        assert!(report(&["a-1"]).reconcile("a-1\na-1\n").is_err());
    }
}
