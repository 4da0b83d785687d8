//! One established control link: asks the agent for connections and takes over its listeners.
//!
//! The agent is hostile. It may send what it likes, when it likes: only answers to questions that are open count
//! freely, everything else is rationed, every descriptor is checked, and a message that makes no sense ends the link.
//! This module must not know containers.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use choir_core::Generation;
use choir_link::channel::check_socket;
use choir_link::{Channel, FromAgent, ListenerKind, ToAgent};
use rustix::net::{AddressFamily, SocketFlags};
use tokio::io::unix::AsyncFd;
use tokio::net::TcpStream;
use tokio::sync::{Notify, Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::stream::Tcp;
use crate::{Error, Notice, Result, Stream};

/// How long the agent may take to connect to a port.
const DIAL: Duration = Duration::from_secs(5);
/// Dials of one sandbox that may be under way at once.
const MAX_DIALS: usize = 1024;
/// Connections from inside that may be open at once, for each of the two listeners. Further ones wait in the
/// listener's own queue, inside the sandbox.
const MAX_INSIDE: usize = 64;
/// Messages nobody asked for: so many at once, and then so many a second.
const BURST: f64 = 64.0;
const PER_SECOND: f64 = 16.0;
/// A listener that is ready and yet keeps `accept` waiting this long was tampered with.
const ACCEPT: Duration = Duration::from_secs(1);

/// What a link needs to know of its generation.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    pub generation: Generation,
    pub notices: mpsc::Sender<Notice>,
    /// Whether the broker's and egress' ports are the ones every sandbox has. In development they are not.
    pub fixed_ports: bool,
}

/// An agent that has been welcomed.
#[derive(Debug)]
pub(crate) struct Link {
    channel: Channel,
    next: AtomicU64,
    dials: Mutex<HashMap<u64, Dial>>,
    replaced: Notify,
}

#[derive(Debug)]
struct Dial {
    port: u16,
    answer: oneshot::Sender<Result<TcpStream>>,
}

impl Link {
    pub fn new(channel: Channel) -> Self {
        Self {
            channel,
            next: AtomicU64::new(0),
            dials: Mutex::default(),
            replaced: Notify::new(),
        }
    }

    /// Ends `serve`, because the agent has a newer link.
    pub fn replace(&self) {
        self.replaced.notify_one();
    }

    /// A fresh connection to a port inside.
    pub async fn dial(&self, port: u16) -> Result<Stream> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        {
            let mut dials = self.dials();
            if dials.len() >= MAX_DIALS {
                return Err(Error::Busy(
                    "too many connections are being made into the sandbox".into(),
                ));
            }
            dials.insert(id, Dial { port, answer });
        }
        let _forget = Forget { link: self, id };
        let exchange = async {
            self.channel
                .send(&ToAgent::Dial { id, port }, None)
                .await
                .map_err(|e| lost(&e.to_string()))?;
            answered.await.map_err(|_| lost("the link closed"))?
        };
        let stream = tokio::time::timeout(DIAL, exchange)
            .await
            .map_err(|_| lost("no answer within 5 s"))??;
        Ok(stream.into())
    }

    /// Takes what the agent sends until the link ends; says why.
    pub async fn serve(&self, context: &Context) -> String {
        let why = tokio::select! {
            why = self.take_messages(context) => why,
            () = self.replaced.notified() => "the agent came back on another".to_owned(),
        };
        self.dials().clear();
        why
    }

    async fn take_messages(&self, context: &Context) -> String {
        let mut listeners: HashMap<ListenerKind, JoinSet<()>> = HashMap::new();
        let mut ration = Ration::full();
        loop {
            let (message, descriptor) = match self.channel.receive::<FromAgent>().await {
                Ok(Some(received)) => received,
                Ok(None) => break "the agent closed it".to_owned(),
                Err(e) => break format!("a malformed message: {e}"),
            };
            if let Some(id) = dial_id(&message)
                && let Some(dial) = self.dials().remove(&id)
            {
                let _ = dial.answer.send(answer(message, descriptor, dial.port));
                continue;
            }
            if !ration.take() {
                break "too many messages".to_owned();
            }
            match (message, descriptor) {
                (FromAgent::Listener { kind }, Some(fd)) => match take_listener(fd, kind, context.fixed_ports) {
                    Ok(listener) => {
                        let mut task = JoinSet::new();
                        task.spawn(accept(listener, kind, context.clone()));
                        listeners.insert(kind, task);
                    }
                    Err(e) => break format!("the {kind:?} listener: {e}"),
                },
                (
                    FromAgent::Activity {
                        tasks,
                        terminals,
                        oom_kills,
                    },
                    None,
                ) => {
                    let notice = Notice::Activity {
                        generation: context.generation.clone(),
                        tasks,
                        terminals,
                        oom_kills,
                    };
                    let _ = context.notices.send(notice).await;
                }
                // An answer to a question that is closed, most likely because it came late.
                (FromAgent::Dialled { .. } | FromAgent::DialFailed { .. }, _) => {}
                _ => break "a message that does not belong there".to_owned(),
            }
        }
    }

    pub async fn welcome(&self, message: &ToAgent, listener: BorrowedFd<'_>) -> io::Result<()> {
        self.channel.send(message, Some(listener)).await
    }

    fn dials(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Dial>> {
        self.dials.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Removes a dial whose asker has gone.
struct Forget<'a> {
    link: &'a Link,
    id: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.link.dials().remove(&self.id);
    }
}

fn lost(why: &str) -> Error {
    Error::Unavailable(format!("the sandbox's agent did not connect ({why})"))
}

fn dial_id(message: &FromAgent) -> Option<u64> {
    match message {
        FromAgent::Dialled { id } | FromAgent::DialFailed { id, .. } => Some(*id),
        _ => None,
    }
}

fn answer(message: FromAgent, descriptor: Option<OwnedFd>, port: u16) -> Result<TcpStream> {
    let (FromAgent::Dialled { .. }, Some(fd)) = (message, descriptor) else {
        return Err(Error::NotListening);
    };
    let peer = check_family(fd.as_fd(), false)
        .and_then(|()| peer(fd.as_fd()))
        .map_err(|e| Error::Protocol(e.to_string()))?;
    if !is_loopback(peer) || peer.port() != port {
        return Err(Error::Protocol(format!(
            "the agent connected to {peer} instead of port {port}"
        )));
    }
    let stream = std::net::TcpStream::from(fd);
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    Ok(TcpStream::from_std(stream)?)
}

/// Checks a listener the agent handed over.
fn take_listener(fd: OwnedFd, kind: ListenerKind, fixed_ports: bool) -> io::Result<OwnedFd> {
    check_family(fd.as_fd(), true)?;
    let at = SocketAddr::try_from(rustix::net::getsockname(&fd)?)?;
    if !is_loopback(at) || (fixed_ports && at.port() != kind.port()) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("it listens at {at}"),
        ));
    }
    rustix::io::ioctl_fionbio(&fd, true)?;
    Ok(fd)
}

fn check_family(fd: BorrowedFd<'_>, listening: bool) -> io::Result<()> {
    check_socket(fd, AddressFamily::INET, listening).or_else(|_| check_socket(fd, AddressFamily::INET6, listening))
}

fn peer(fd: BorrowedFd<'_>) -> io::Result<SocketAddr> {
    let peer = rustix::net::getpeername(fd)?.ok_or(io::ErrorKind::NotConnected)?;
    Ok(SocketAddr::try_from(peer)?)
}

fn is_loopback(address: SocketAddr) -> bool {
    address.ip().to_canonical().is_loopback()
}

/// Accepts what comes to a listener inside until the socket breaks.
async fn accept(listener: OwnedFd, kind: ListenerKind, context: Context) {
    let permits = Arc::new(Semaphore::new(MAX_INSIDE));
    // SAFETY: the `Arc` keeps one open descriptor at least as long as the `AsyncFd`, which holds a share of it.
    let Ok(listener) = (unsafe { AsyncFd::register(Arc::new(listener)) }) else {
        return;
    };
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
            return;
        };
        let stream = match accept_one(&listener).await {
            Ok(stream) => stream,
            Err(e) if out_of_descriptors(&e) => {
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
            Err(e) => {
                tracing::warn!(generation = %context.generation, ?kind, error = %e, "a listener inside broke");
                return;
            }
        };
        let notice = Notice::Inside {
            generation: context.generation.clone(),
            kind,
            stream: Stream::Tcp(Tcp::new(stream, Some(permit))),
        };
        if context.notices.send(notice).await.is_err() {
            return;
        }
    }
}

/// The agent still holds the listener and can make it blocking at any moment, and `accept` has no flag against that
/// as `recv` has: so it runs where only its own sandbox waits for it, and not for long.
async fn accept_one(listener: &AsyncFd<Arc<OwnedFd>>) -> io::Result<TcpStream> {
    loop {
        let mut ready = listener.readable().await?;
        let socket = Arc::clone(listener.get_ref());
        let mut waker = Waker {
            socket: Some(Arc::clone(&socket)),
        };
        let accepting = tokio::task::spawn_blocking(move || {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            rustix::net::accept_with(&*socket, flags).map_err(io::Error::from)
        });
        let accepted = tokio::time::timeout(ACCEPT, accepting).await;
        let accepted = accepted.map_err(|_| io::Error::other("accepting from it blocks"))?;
        waker.socket = None;
        match accepted? {
            Ok(fd) => {
                let stream = std::net::TcpStream::from(fd);
                stream.set_nodelay(true)?;
                return TcpStream::from_std(stream);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
            // The peer was gone before it was accepted.
            Err(e) if matches!(e.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted) => {}
            Err(e) => return Err(e),
        }
    }
}

/// Ends an `accept` that is still waiting when nobody wants its result any more.
struct Waker {
    socket: Option<Arc<OwnedFd>>,
}

impl Drop for Waker {
    fn drop(&mut self) {
        if let Some(socket) = &self.socket {
            let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
        }
    }
}

fn out_of_descriptors(error: &io::Error) -> bool {
    use rustix::io::Errno;
    matches!(
        Errno::from_io_error(error),
        Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)
    )
}

/// A token bucket.
struct Ration {
    tokens: f64,
    at: Instant,
}

impl Ration {
    fn full() -> Self {
        Self {
            tokens: BURST,
            at: Instant::now(),
        }
    }

    fn take(&mut self) -> bool {
        let now = Instant::now();
        let earned = now.duration_since(self.at).as_secs_f64() * PER_SECOND;
        self.tokens = (self.tokens + earned).min(BURST) - 1.0;
        self.at = now;
        self.tokens >= 0.0
    }
}
