//! What the proxy and its owner tell each other: who asks, who may pass, where to, and what was seen.
//! It must not know how any of it is decided.

use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use choir_core::{Door, Generation, SandboxHost};
use http::request::Parts;
use http::{HeaderName, HeaderValue, Request, Response};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;

use crate::Body;

/// A byte stream that can be proxied over.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Io for T {}

/// A future in a box, for traits that are used as objects.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Monotonic milliseconds.
pub type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// Who sent a request. Control-host requests carry it as an extension.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The client's address; behind a trusted proxy, the one it reports.
    pub addr: IpAddr,
    /// Whether the client speaks TLS, to us or to a trusted proxy.
    pub https: bool,
}

impl Peer {
    /// The scheme of the origin this client sees.
    pub fn scheme(&self) -> &'static str {
        if self.https { "https" } else { "http" }
    }
}

/// Serves the control host.
pub trait Control: Send + Sync + 'static {
    /// Answers one request; its extensions hold the [`Peer`], and hyper's `OnUpgrade` where one was asked for.
    fn serve(&self, request: Request<Body>) -> impl Future<Output = Response<Body>> + Send;
}

/// Decides who may pass to a sandbox host.
pub trait Gate: Send + Sync + 'static {
    /// Admits or answers a request. It may hold the request while the sandbox wakes. The head is as the client sent
    /// it, cookies included; cross-site requests were refused before this is asked.
    fn admit(&self, host: &SandboxHost, head: &Parts, peer: &Peer) -> impl Future<Output = Admission> + Send;
}

/// Connects to a sandbox.
pub trait Dial: Send + Sync + 'static {
    /// A fresh stream to one door of a generation. The caller may drop the future at any time.
    fn open<'a>(&'a self, generation: &'a Generation, door: Door) -> BoxFuture<'a, io::Result<Box<dyn Io>>>;
}

/// What the gate says.
pub enum Admission {
    /// Forward it.
    Pass(Arc<Route>, Arc<Visitor>),
    /// Answer it here: a login redirect, the ticket callback, a 401, a 404, a waiting page.
    Answer(Response<Body>),
}

/// Where a sandbox host leads right now. Make one per generation and door, and share it.
#[derive(Debug)]
pub struct Route {
    pub generation: Generation,
    pub door: Door,
    /// Whether the owner lets pages register service workers.
    pub service_workers: bool,
    /// Whether the app may see `Authorization`; a `choir_` token never passes.
    pub forward_authorization: bool,
    /// Until then a program may still be starting that will listen there: a request waits for it.
    pub listens_by: Option<Instant>,
    /// Whether how it answers says how the app is.
    pub judged: bool,
    pub activity: Arc<Activity>,
}

impl Route {
    /// Whether what is to listen there may still be starting.
    pub(crate) fn is_starting(&self) -> bool {
        self.listens_by.is_some_and(|by| Instant::now() < by)
    }
}

/// A person (or nobody, on a public host) with a session. Make one per session, and share it.
#[derive(Debug, Default)]
pub struct Visitor {
    /// Set on each request after everything of that kind was removed: `x-choir-user` and the like.
    pub identity: Vec<(HeaderName, HeaderValue)>,
    /// Fires when the session ends: streams and websockets are then closed (1008), within 3 s.
    pub closed: CancellationToken,
}

/// What was seen of a sandbox's use.
pub struct Activity {
    clock: Clock,
    last: AtomicU64,
    tunnels: AtomicUsize,
    /// Answers by how long their heads took: the n-th counts those below 2^n ms, the last one all that took longer.
    answers: [AtomicU64; TIMES],
    failures: AtomicU64,
}

/// From below 1 ms to below 32 s, and beyond.
const TIMES: usize = 17;

/// What was answered until some moment, or between two.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Answers with a status below 500.
    answers: [u64; TIMES],
    /// Those with one above, and requests that nothing answered.
    pub failures: u64,
}

impl Tally {
    /// What came after `before`.
    pub fn since(&self, before: &Self) -> Self {
        Self {
            answers: std::array::from_fn(|nth| self.answers[nth].saturating_sub(before.answers[nth])),
            failures: self.failures.saturating_sub(before.failures),
        }
    }

    /// Requests, however they ended.
    pub fn requests(&self) -> u64 {
        self.answers.iter().sum::<u64>() + self.failures
    }

    /// A time in ms that 5 of 100 answers took longer than, at least half of the longest such; 0 where there are none.
    pub fn p95_ms(&self) -> u64 {
        let all: u64 = self.answers.iter().sum();
        let mut within = 0;
        for (nth, count) in self.answers.iter().enumerate() {
            within += count;
            if all > 0 && within * 100 >= all * 95 {
                return (1 << nth) / 2;
            }
        }
        0
    }
}

impl Activity {
    /// Nothing seen yet but its making.
    pub fn new(clock: Clock) -> Arc<Self> {
        let last = AtomicU64::new(clock());
        Arc::new(Self {
            clock,
            last,
            tunnels: AtomicUsize::new(0),
            answers: Default::default(),
            failures: AtomicU64::new(0),
        })
    }

    /// When the last byte passed, either way, by the clock given.
    pub fn last_ms(&self) -> u64 {
        self.last.load(Ordering::Relaxed)
    }

    pub(crate) fn now_ms(&self) -> u64 {
        (self.clock)()
    }

    /// Open websockets.
    pub fn tunnels(&self) -> usize {
        self.tunnels.load(Ordering::Relaxed)
    }

    /// Notes use.
    pub fn touch(&self) {
        self.last.store((self.clock)(), Ordering::Relaxed);
    }

    /// How requests were answered since its making.
    pub fn tally(&self) -> Tally {
        Tally {
            answers: std::array::from_fn(|nth| self.answers[nth].load(Ordering::Relaxed)),
            failures: self.failures.load(Ordering::Relaxed),
        }
    }

    /// Notes a request that nobody was there to answer.
    pub fn failed(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes how a request ended that was begun at `begun` by the clock.
    pub fn answered(&self, begun: u64, failed: bool) {
        if failed {
            return self.failed();
        }
        let took = (self.clock)().saturating_sub(begun);
        let nth = (u64::BITS - took.leading_zeros()) as usize;
        self.answers[nth.min(TIMES - 1)].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn tunnel(self: &Arc<Self>) -> OpenTunnel {
        self.tunnels.fetch_add(1, Ordering::Relaxed);
        OpenTunnel(self.clone())
    }
}

impl std::fmt::Debug for Activity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Activity")
            .field("last_ms", &self.last_ms())
            .field("tunnels", &self.tunnels())
            .finish()
    }
}

/// Counts one websocket while it lives.
pub(crate) struct OpenTunnel(Arc<Activity>);

impl OpenTunnel {
    pub(crate) fn touch(&self) {
        self.0.touch();
    }
}

impl Drop for OpenTunnel {
    fn drop(&mut self) {
        self.0.tunnels.fetch_sub(1, Ordering::Relaxed);
    }
}
