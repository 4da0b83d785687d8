//! Accepts connections, and routes each request by its Host. It must not know what any target does.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use choir_core::host::HostError;
use choir_core::{Hosts, SandboxHost, Target};
use http::header::LOCATION;
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use ipnet::IpNet;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::answer::{self, Answers, Refusal};
use crate::forward::{Face, Forwarder, Via};
use crate::pace::PacedIo;
use crate::pulse::Pulse;
use crate::route::{Admission, Control, Gate, Peer};
use crate::{Body, head, site};

/// Read and write buffers of one connection: what a head may take (32 KiB), and room to say 414 to a longer one.
const BUFFER: usize = 36 * 1024;
const MAX_HEADERS: usize = 100;
/// How long a connection that never asked may still do so when the server stops: its first request may be on its way.
const FIRST_REQUEST: Duration = Duration::from_secs(1);
/// How long accepting rests when the process is out of descriptors or memory.
const BACK_OFF: Duration = Duration::from_millis(100);
const SWEEP: Duration = Duration::from_secs(5);

/// Bounds on clients.
#[derive(Debug, Clone)]
pub struct Bounds {
    /// Connections in total, websockets included; further ones wait in the kernel. Each may cost two descriptors.
    pub connections: usize,
    /// Connections of one address (IPv6: one /64); further ones are closed. Loopback and trusted proxies are exempt.
    pub per_peer: usize,
    /// Time for a request's head, and for a kept connection to send its next one.
    pub header_timeout: Duration,
    /// Time for requests under way when the server stops.
    pub drain: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            connections: 4096,
            per_peer: 512,
            header_timeout: Duration::from_secs(10),
            drain: Duration::from_secs(10),
        }
    }
}

/// The proxy.
pub struct Server<C, G> {
    pub bounds: Bounds,
    pub hosts: Hosts,
    /// Whose `X-Forwarded-For` and `X-Forwarded-Proto` are believed.
    pub trusted_proxies: Vec<IpNet>,
    pub control: C,
    pub gate: G,
    pub forwarder: Arc<Forwarder>,
    pub answers: Arc<Answers>,
    /// Felt while connections are accepted, also while every place is taken: a flood is not taken for a death.
    pub pulse: Arc<Pulse>,
}

/// A client's connection as hyper holds it.
pub(crate) type ClientIo = PacedIo<TcpStream, Slot>;

impl<C: Control, G: Gate> Server<C, G> {
    /// Serves until `stop` fires. Then requests under way finish within the drain limit, idle connections close, and
    /// websockets are closed with 1012.
    pub async fn serve(self: Arc<Self>, listeners: Vec<TcpListener>, stop: CancellationToken) {
        let bounds = &self.bounds;
        let doors = Doors {
            places: Arc::new(Semaphore::new(bounds.connections)),
            peers: Arc::default(),
            connections: TaskTracker::new(),
            stop: stop.clone(),
            kill: CancellationToken::new(),
        };
        for listener in listeners {
            if let Err(error) = notice_dead_peers(&listener) {
                tracing::warn!(%error, "cannot turn on TCP keep-alive; clients that vanish hold their place longer");
            }
            doors.connections.spawn(self.clone().accept(listener, doors.clone()));
        }
        let mut sweep = tokio::time::interval(SWEEP);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut stopped = pin!(stop.cancelled());
        loop {
            tokio::select! {
                () = &mut stopped => break,
                _ = sweep.tick() => self.forwarder.sweep(),
            }
        }
        doors.connections.close();
        let drained = async { tokio::join!(doors.connections.wait(), self.forwarder.shut_down()) };
        if tokio::time::timeout(bounds.drain, drained).await.is_err() {
            tracing::warn!("requests were still under way when the time to drain ended");
        }
        doors.kill.cancel();
        doors.connections.wait().await;
    }

    async fn accept(self: Arc<Self>, listener: TcpListener, doors: Doors) {
        let mut heart = self.pulse.join();
        let mut failing = false;
        loop {
            let accepted = async {
                // The semaphore is never closed; without a place, clients wait in the kernel's queue.
                let place = doors.places.clone().acquire_owned().await.ok()?;
                Some((place, listener.accept().await))
            };
            let (place, accepted) = tokio::select! {
                () = doors.stop.cancelled() => return,
                () = heart.beat() => continue,
                Some(next) = accepted => next,
            };
            match accepted {
                Ok((stream, from)) => {
                    failing = false;
                    let from = from.ip().to_canonical();
                    let exempt = from.is_loopback() || self.trusts(from);
                    let Some(slot) = Slot::take(place, &doors.peers, (!exempt).then_some(from), self.bounds.per_peer)
                    else {
                        continue;
                    };
                    let connection = self.clone().connection(stream, from, slot, doors.clone());
                    doors.connections.spawn(connection);
                }
                Err(error) if is_of_one_client(&error) => {}
                Err(error) => {
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!(%error, "cannot accept connections; trying again");
                    }
                    tokio::time::sleep(BACK_OFF).await;
                }
            }
        }
    }

    async fn connection(self: Arc<Self>, stream: TcpStream, from: IpAddr, slot: Slot, doors: Doors) {
        // Fails only when the client is gone already.
        _ = stream.set_nodelay(true);
        let asked = CancellationToken::new();
        let service = service_fn(|request| {
            asked.cancel();
            let server = self.clone();
            async move { Ok::<_, Infallible>(server.answer(request, from).await) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.bounds.header_timeout)
            .max_headers(MAX_HEADERS)
            .max_buf_size(BUFFER)
            .half_close(false)
            .serve_connection(TokioIo::new(PacedIo::new(stream, slot)), service)
            .with_upgrades();
        let mut connection = pin!(connection);
        let told_to_end = async {
            doors.stop.cancelled().await;
            // Who has just come is about to ask, and would take its end for a failure.
            _ = tokio::time::timeout(FIRST_REQUEST, asked.cancelled()).await;
        };
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = told_to_end => {
                connection.as_mut().graceful_shutdown();
                tokio::select! {
                    ended = connection => ended,
                    () = doors.kill.cancelled() => return,
                }
            }
        };
        if let Err(error) = ended {
            tracing::trace!(%error, "connection ended");
        }
    }

    /// Where each request goes.
    async fn answer(&self, request: Request<Incoming>, from: IpAddr) -> Response<Body> {
        let (head, body) = request.into_parts();
        let host = match head::check(&head) {
            Ok(host) => host,
            Err(refusal) => return self.answers.refuse(&head.headers, &refusal),
        };
        let peer = self.peer(from, &head.headers);
        match self.hosts.parse(host.to_str().unwrap_or_default()) {
            Ok(Target::Control) => {
                let mut request = Request::from_parts(head, Body::incoming(body));
                request.extensions_mut().insert(peer);
                self.control.serve(request).await
            }
            Ok(Target::Sandbox(host)) => self.sandbox(&host, head, body, &peer).await,
            Ok(Target::Loopback) => self.to_control_host(&head),
            Err(error) => self.answers.refuse(&head.headers, unroutable(error)),
        }
    }

    async fn sandbox(&self, host: &SandboxHost, head: Parts, body: Incoming, peer: &Peer) -> Response<Body> {
        if let Err(refusal) = site::check(&self.hosts, host, &head, peer) {
            return self.answers.refuse(&head.headers, &refusal);
        }
        let (route, visitor) = match self.gate.admit(host, &head, peer).await {
            Admission::Pass(route, visitor) => (route, visitor),
            Admission::Answer(response) => return response,
        };
        if site::registers_worker(&head) && !route.service_workers {
            return self.answers.refuse(&head.headers, &site::SERVICE_WORKER);
        }
        let via = Via {
            route: &route,
            visitor: &visitor,
            peer,
            face: Face::App,
        };
        let request = Request::from_parts(head, Body::incoming(body));
        self.forwarder.forward(request, via).await
    }

    /// People type 127.0.0.1, where passkeys do not work.
    fn to_control_host(&self, head: &Parts) -> Response<Body> {
        let path = head.uri.path_and_query().map_or("/", |p| p.as_str());
        let location = HeaderValue::try_from(format!("http://{}{path}", self.hosts.control()));
        match location {
            Ok(location) if head.method == Method::GET && answer::wants_page(&head.headers) => {
                let mut response = Response::new(Body::empty());
                *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
                response.headers_mut().insert(LOCATION, location);
                response
            }
            _ => self.answers.refuse(&head.headers, unroutable(HostError::Unknown)),
        }
    }

    fn trusts(&self, addr: IpAddr) -> bool {
        self.trusted_proxies.iter().any(|net| net.contains(&addr))
    }

    /// The client behind any trusted proxies: the last address in the chain that is not one of them.
    fn peer(&self, from: IpAddr, headers: &HeaderMap) -> Peer {
        let mut peer = Peer {
            addr: from,
            https: false,
        };
        if !self.trusts(from) {
            return peer;
        }
        let last = |name: &str| headers.get_all(name).iter().next_back().and_then(|v| v.to_str().ok());
        // Traefik says `wss` of a websocket.
        peer.https = last("x-forwarded-proto")
            .and_then(|p| p.rsplit(',').next())
            .is_some_and(|p| matches!(p.trim(), "https" | "wss"));
        let lines = headers.get_all("x-forwarded-for").iter().rev();
        let hops = lines.filter_map(|v| v.to_str().ok()).flat_map(|v| v.rsplit(','));
        for hop in hops {
            let Ok(addr) = hop.trim().parse::<IpAddr>() else { break };
            peer.addr = addr.to_canonical();
            if !self.trusts(peer.addr) {
                break;
            }
        }
        peer
    }
}

fn unroutable(error: HostError) -> &'static Refusal {
    const INVALID: Refusal = Refusal::new(StatusCode::BAD_REQUEST, "bad_host", "send a valid Host header").closing();
    const UNKNOWN: Refusal = Refusal::new(
        StatusCode::MISDIRECTED_REQUEST,
        "unknown_host",
        "this host is not served here; check the address",
    );
    const RESERVED: Refusal = Refusal::new(
        StatusCode::NOT_FOUND,
        "reserved_port",
        "this port is used by the sandbox itself; choose another",
    );
    match error {
        HostError::Invalid => &INVALID,
        HostError::Unknown => &UNKNOWN,
        HostError::Reserved => &RESERVED,
    }
}

/// Accepted sockets inherit this, so a vanished laptop's websocket is gone after some two minutes.
fn notice_dead_peers(listener: &TcpListener) -> rustix::io::Result<()> {
    rustix::net::sockopt::set_socket_keepalive(listener, true)?;
    rustix::net::sockopt::set_tcp_keepidle(listener, Duration::from_secs(60))?;
    rustix::net::sockopt::set_tcp_keepintvl(listener, Duration::from_secs(15))?;
    rustix::net::sockopt::set_tcp_keepcnt(listener, 4)
}

fn is_of_one_client(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted
    )
}

/// What all accept loops share.
#[derive(Clone)]
struct Doors {
    places: Arc<Semaphore>,
    peers: Peers,
    connections: TaskTracker,
    stop: CancellationToken,
    kill: CancellationToken,
}

type Peers = Arc<Mutex<HashMap<IpAddr, usize>>>;

/// One connection's place, held until its stream is dropped.
pub(crate) struct Slot {
    _place: OwnedSemaphorePermit,
    peer: Option<(Peers, IpAddr)>,
}

impl Slot {
    fn take(place: OwnedSemaphorePermit, peers: &Peers, peer: Option<IpAddr>, cap: usize) -> Option<Self> {
        let peer = peer.map(subscriber);
        if let Some(peer) = peer {
            let mut counts = peers.lock().unwrap_or_else(PoisonError::into_inner);
            let count = counts.entry(peer).or_default();
            if *count >= cap {
                return None;
            }
            *count += 1;
        }
        Some(Self {
            _place: place,
            peer: peer.map(|peer| (peers.clone(), peer)),
        })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let Some((peers, peer)) = &self.peer else { return };
        let mut counts = peers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(peer) {
            *count -= 1;
            if *count == 0 {
                counts.remove(peer);
            }
        }
    }
}

/// One subscriber has a whole IPv6 /64.
fn subscriber(addr: IpAddr) -> IpAddr {
    match addr {
        IpAddr::V4(_) => addr,
        IpAddr::V6(addr) => Ipv6Addr::from(u128::from(addr) >> 64 << 64).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_address_has_a_bounded_number_of_connections() {
        let places = Arc::new(Semaphore::new(10));
        let peers = Peers::default();
        let take = |addr: &str| {
            let place = places.clone().try_acquire_owned().unwrap();
            Slot::take(place, &peers, Some(addr.parse().unwrap()), 2)
        };
        let (a, b) = (take("2001:db8::1"), take("2001:db8::2"));
        assert!(a.is_some() && b.is_some());
        assert!(take("2001:db8::3").is_none());
        assert!(take("2001:db8:0:1::3").is_some());
        drop(a);
        assert!(take("2001:db8::3").is_some());
        drop(b);
        assert!(peers.lock().unwrap().is_empty());
        assert_eq!(places.available_permits(), 10);
    }
}
