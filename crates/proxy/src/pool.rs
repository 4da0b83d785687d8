//! Kept connections into one generation, and what is under way there. It must not know what is asked.
//!
//! A connection is driven by the request that uses it, never by a task of its own: dropping the request drops the
//! connection, and no wake-up crosses threads.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use choir_core::Door;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::Body;
use crate::route::Io;

/// Below the 5 s after which Node's servers close a silent connection.
const IDLE: Duration = Duration::from_secs(4);
/// Read buffer of one connection, and the longest response head. Small, because each slow reader holds some of them.
const BUFFER: usize = 16 * 1024;
/// Kept connections of one generation.
const IDLE_CAP: usize = 128;

type Connection = http1::Connection<TokioIo<Box<dyn Io>>, Body>;

/// One connection to a server, used by one request at a time.
pub(crate) struct Upstream {
    send: http1::SendRequest<Body>,
    /// `None` once it ended.
    connection: Option<Connection>,
    /// It ran to its end; after an upgrade, its stream may be taken.
    ended: bool,
}

/// An exchange that brought no response.
pub(crate) struct Lost {
    /// The request, if nothing of it was written.
    pub(crate) request: Option<Request<Body>>,
    pub(crate) error: hyper::Error,
}

impl Upstream {
    pub(crate) async fn new(io: Box<dyn Io>) -> hyper::Result<Box<Self>> {
        let (send, connection) = http1::Builder::new()
            .max_buf_size(BUFFER)
            .handshake(TokioIo::new(io))
            .await?;
        Ok(Box::new(Self {
            send,
            connection: Some(connection),
            ended: false,
        }))
    }

    /// Sends a request and waits for the response's head.
    pub(crate) async fn exchange(&mut self, request: Request<Body>) -> Result<Response<Incoming>, Box<Lost>> {
        let mut answer = pin!(self.send.try_send_request(request));
        let result = poll_fn(|cx| {
            // The answer comes only from driving the connection right here, so it needs no waker of its own.
            let mut unheard = Context::from_waker(Waker::noop());
            self.drive(cx);
            if let Poll::Ready(result) = answer.as_mut().poll(&mut unheard) {
                return Poll::Ready(result);
            }
            if self.connection.is_none() || self.ended {
                // Dropping it gives back a request that was not written.
                self.connection = None;
                return answer.as_mut().poll(&mut unheard);
            }
            Poll::Pending
        });
        result.await.map_err(|mut failed| {
            Box::new(Lost {
                request: failed.take_message(),
                error: failed.into_error(),
            })
        })
    }

    /// Moves bytes as far as possible.
    pub(crate) fn drive(&mut self, cx: &mut Context<'_>) {
        if self.ended {
            return;
        }
        if let Some(connection) = &mut self.connection {
            match connection.poll_without_shutdown(cx) {
                Poll::Ready(Ok(())) => self.ended = true,
                Poll::Ready(Err(_)) => self.connection = None,
                Poll::Pending => {}
            }
        }
    }

    /// Whether driving it further can bring anything.
    pub(crate) fn is_done(&self) -> bool {
        self.ended || self.connection.is_none()
    }

    /// After a 101: the stream, and what was read beyond the head.
    pub(crate) async fn into_stream(mut self) -> Option<(Box<dyn Io>, Bytes)> {
        poll_fn(|cx| {
            self.drive(cx);
            if self.is_done() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        let parts = self.connection?.into_parts();
        Some((parts.io.into_inner(), parts.read_buf))
    }
}

/// What one generation has open.
pub(crate) struct Lane {
    idle: Mutex<Vec<(Door, Instant, Box<Upstream>)>>,
    retired: AtomicBool,
    requests: AtomicUsize,
    quiet: Notify,
    /// Each value sent closes the tunnels that are open then, with that code.
    close: watch::Sender<u16>,
}

impl Lane {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            idle: Mutex::new(Vec::new()),
            retired: AtomicBool::new(false),
            requests: AtomicUsize::new(0),
            quiet: Notify::new(),
            close: watch::Sender::new(0),
        })
    }

    fn idle(&self) -> MutexGuard<'_, Vec<(Door, Instant, Box<Upstream>)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection used last, as the likeliest to be alive.
    pub(crate) fn take(&self, door: Door) -> Option<Box<Upstream>> {
        let mut idle = self.idle();
        let at = idle.iter().rposition(|(d, ..)| *d == door)?;
        let (_, since, upstream) = idle.remove(at);
        (since.elapsed() < IDLE).then_some(upstream)
    }

    /// Keeps a connection whose response is complete, if it can serve another request.
    pub(crate) fn put(&self, door: Door, mut upstream: Box<Upstream>) {
        // Nobody listens to a kept connection; whether it still lives shows when it is used.
        upstream.drive(&mut Context::from_waker(Waker::noop()));
        if upstream.is_done() || !upstream.send.is_ready() {
            return;
        }
        let mut idle = self.idle();
        // Asked under the lock that retiring takes, so that nothing is put in after it was emptied.
        if idle.len() < IDLE_CAP && !self.retired.load(Ordering::Relaxed) {
            idle.push((door, Instant::now(), upstream));
        }
    }

    pub(crate) fn retire(&self) {
        let mut idle = self.idle();
        self.retired.store(true, Ordering::Relaxed);
        idle.clear();
    }

    pub(crate) fn sweep(&self) {
        self.idle().retain(|(_, since, _)| since.elapsed() < IDLE);
    }

    pub(crate) fn begin(self: &Arc<Self>) -> InFlight {
        self.requests.fetch_add(1, Ordering::Relaxed);
        InFlight(self.clone())
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }

    /// Returns once no request is under way.
    pub(crate) async fn quiet(&self) {
        loop {
            let quiet = self.quiet.notified();
            if self.in_flight() == 0 {
                return;
            }
            quiet.await;
        }
    }

    pub(crate) fn closing(&self) -> watch::Receiver<u16> {
        self.close.subscribe()
    }

    pub(crate) fn close_tunnels(&self, code: u16) {
        self.close.send_replace(code);
    }
}

/// One request, from its start to the last byte of its response.
pub(crate) struct InFlight(Arc<Lane>);

impl InFlight {
    pub(crate) fn lane(&self) -> &Arc<Lane> {
        &self.0
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if self.0.requests.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.quiet.notify_waiters();
        }
    }
}

/// Why a request's own body broke an exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BodyFault {
    Slow,
    Malformed,
}

impl Lost {
    /// What was wrong with the client's body, if that is what broke it.
    pub(crate) fn body_fault(&self) -> Option<BodyFault> {
        if !self.error.is_user() {
            return None;
        }
        let mut cause = std::error::Error::source(&self.error);
        while let Some(error) = cause {
            if error
                .downcast_ref::<io::Error>()
                .is_some_and(|e| e.kind() == io::ErrorKind::TimedOut)
            {
                return Some(BodyFault::Slow);
            }
            cause = error.source();
        }
        Some(BodyFault::Malformed)
    }
}
