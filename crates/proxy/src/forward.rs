//! Carries one request into a generation and its response back, streaming both ways. Nothing is sent twice: a request
//! is only tried again when a kept connection turned out closed before a byte of it was written.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, PoisonError, RwLock};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use choir_core::{Door, Generation};
use http::header::{CONNECTION, CONTENT_TYPE, HOST, TRANSFER_ENCODING};
use http::request::Parts;
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, Version};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::answer::{Answers, Refusal};
use crate::body::{Body, BoxError};
use crate::pool::{BodyFault, InFlight, Lane, Upstream};
use crate::route::{Dial, Peer, Route, Visitor};
use crate::{head, headers, tunnel};

/// Whom a response is shown to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Face {
    /// A sandbox host: the app's own origin.
    App,
    /// The control host's sandbox API: no cookie goes in or out, and no response can run as a page.
    Api,
}

/// How one request is carried.
#[derive(Debug, Clone, Copy)]
pub struct Via<'a> {
    pub route: &'a Arc<Route>,
    pub visitor: &'a Arc<Visitor>,
    pub peer: &'a Peer,
    pub face: Face,
}

/// Forwards requests, and knows what is under way in each generation.
pub struct Forwarder {
    dial: Arc<dyn Dial>,
    answers: Arc<Answers>,
    lanes: RwLock<HashMap<Generation, Arc<Lane>>>,
    tunnels: TaskTracker,
}

/// Between two looks whether a program that starts listens by now.
const LISTENS_AGAIN: Duration = Duration::from_millis(25);

const NO_APP: Refusal = Refusal::new(
    StatusCode::BAD_GATEWAY,
    "nothing_listens",
    "start a program that listens on this port inside the sandbox, then try again",
);
const NO_AGENT: Refusal = Refusal::new(
    StatusCode::BAD_GATEWAY,
    "sandbox_unreachable",
    "the sandbox does not answer; try again, and restart it if that does not help",
);
const BROKEN: Refusal = Refusal::new(
    StatusCode::BAD_GATEWAY,
    "bad_gateway",
    "the program in the sandbox broke off its answer; look at its log",
);
const SLOW: Refusal = Refusal::new(
    StatusCode::REQUEST_TIMEOUT,
    "request_timeout",
    "the request's body came too slowly; send it again",
)
.closing();
const MALFORMED: Refusal = Refusal::new(
    StatusCode::BAD_REQUEST,
    "bad_request",
    "send the request's body whole, and chunked as HTTP says",
)
.closing();

impl Forwarder {
    pub fn new(dial: Arc<dyn Dial>, answers: Arc<Answers>) -> Self {
        Self {
            dial,
            answers,
            lanes: RwLock::default(),
            tunnels: TaskTracker::new(),
        }
    }

    /// Forwards a request; errors become answers. The path and query are sent as they are in its URI, the Host as in
    /// its head. A websocket request must still carry hyper's upgrade extension.
    pub async fn forward(&self, request: Request<Body>, via: Via<'_>) -> Response<Body> {
        let (mut parts, body) = request.into_parts();
        let websocket = head::wants_websocket(&parts);
        let upgrade = parts.extensions.remove::<OnUpgrade>().filter(|_| websocket);
        let in_flight = self.lane(&via.route.generation).begin();
        let activity = &via.route.activity;
        activity.touch();
        let begun = activity.last_ms();
        let asked = Asked {
            page: crate::answer::wants_page(&parts.headers),
            head: parts.method == Method::HEAD,
        };
        let Some(request) = rebuild(&mut parts, body, websocket, &via) else {
            return self.answers.error(
                &parts.headers,
                StatusCode::BAD_REQUEST,
                "bad_request",
                "send a Host header",
            );
        };
        let mut waiting = Waiting {
            route: via.route,
            begun,
        };
        let sent = self.send(request, &in_flight, via.route, websocket).await;
        waiting.answered(match &sent {
            Ok((_, response)) => response.status().is_server_error(),
            Err(refusal) => refusal.status().is_server_error(),
        });
        let mut response = match sent {
            Ok((upstream, response)) if response.status() == StatusCode::SWITCHING_PROTOCOLS => match upgrade {
                Some(client) => return self.switch(upstream, response, client, &in_flight, &via),
                None => self.refuse(asked, &BROKEN),
            },
            Ok((upstream, response)) => respond(upstream, response, in_flight, &via, asked.head),
            Err(refusal) => self.refuse(asked, refusal),
        };
        if websocket {
            // What the client sent on behind its handshake must not be read as a request.
            response
                .headers_mut()
                .insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    /// Requests under way in a generation, websockets apart.
    pub fn in_flight(&self, generation: &Generation) -> usize {
        self.known(generation).map_or(0, |lane| lane.in_flight())
    }

    /// Returns once no request is under way in a generation. The caller sets the deadline.
    pub async fn quiet(&self, generation: &Generation) {
        if let Some(lane) = self.known(generation) {
            lane.quiet().await;
        }
    }

    /// Ends what would never end by itself: the websockets that are open now, each with this code at its next frame
    /// boundary (1012 asks clients to connect again), and event streams, which are cut off.
    pub fn close_tunnels(&self, generation: &Generation, code: u16) {
        if let Some(lane) = self.known(generation) {
            lane.close_tunnels(code);
        }
    }

    /// Forgets a generation that is gone or frozen: its kept connections are closed. Requests under way go on.
    pub fn retire(&self, generation: &Generation) {
        let lane = self
            .lanes
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(generation);
        if let Some(lane) = lane {
            lane.retire();
        }
    }

    /// Ends every websocket (1012) and event stream, and returns once the websockets are gone.
    pub(crate) async fn shut_down(&self) {
        self.tunnels.close();
        for lane in self.lanes.read().unwrap_or_else(PoisonError::into_inner).values() {
            lane.close_tunnels(1012);
        }
        self.tunnels.wait().await;
    }

    /// Closes connections that were kept too long.
    pub(crate) fn sweep(&self) {
        for lane in self.lanes.read().unwrap_or_else(PoisonError::into_inner).values() {
            lane.sweep();
        }
    }

    fn known(&self, generation: &Generation) -> Option<Arc<Lane>> {
        self.lanes
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(generation)
            .cloned()
    }

    fn lane(&self, generation: &Generation) -> Arc<Lane> {
        self.known(generation).unwrap_or_else(|| {
            let mut lanes = self.lanes.write().unwrap_or_else(PoisonError::into_inner);
            lanes.entry(generation.clone()).or_insert_with(Lane::new).clone()
        })
    }

    async fn send(
        &self,
        mut request: Request<Body>,
        in_flight: &InFlight,
        route: &Route,
        websocket: bool,
    ) -> Result<(Box<Upstream>, Response<Incoming>), &'static Refusal> {
        loop {
            let kept = if websocket {
                None
            } else {
                in_flight.lane().take(route.door)
            };
            let was_kept = kept.is_some();
            let mut upstream = match kept {
                Some(upstream) => upstream,
                None => Box::pin(self.connect(route)).await?,
            };
            match upstream.exchange(request).await {
                Ok(response) => return Ok((upstream, response)),
                Err(lost) => match (lost.body_fault(), lost.request) {
                    (_, Some(unsent)) if was_kept => request = unsent,
                    (Some(BodyFault::Slow), _) => return Err(&SLOW),
                    (Some(BodyFault::Malformed), _) => return Err(&MALFORMED),
                    _ => {
                        tracing::debug!(generation = %route.generation, door = ?route.door, error = %lost.error, "no response");
                        return Err(&BROKEN);
                    }
                },
            }
        }
    }

    async fn connect(&self, route: &Route) -> Result<Box<Upstream>, &'static Refusal> {
        let unreachable = match route.door {
            Door::Agent => &NO_AGENT,
            Door::Port(_) => &NO_APP,
        };
        let io = loop {
            match self.dial.open(&route.generation, route.door).await {
                Ok(io) => break io,
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && route.is_starting() => {
                    tokio::time::sleep(LISTENS_AGAIN).await;
                }
                Err(error) => {
                    tracing::debug!(generation = %route.generation, door = ?route.door, %error, "cannot connect");
                    return Err(unreachable);
                }
            }
        };
        Upstream::new(io).await.map_err(|_| unreachable)
    }

    /// The upstream accepted a websocket: answer 101, and let bytes flow once the client has it.
    fn switch(
        &self,
        upstream: Box<Upstream>,
        response: Response<Incoming>,
        client: OnUpgrade,
        in_flight: &InFlight,
        via: &Via<'_>,
    ) -> Response<Body> {
        let open = tunnel::Open {
            client,
            upstream,
            count: via.route.activity.tunnel(),
            closing: in_flight.lane().closing(),
            ended: via.visitor.closed.clone(),
        };
        self.tunnels.spawn(open.run());
        let (mut parts, _) = response.into_parts();
        parts.headers = headers::response(parts.headers, true, via.face);
        parts.version = Version::HTTP_11;
        Response::from_parts(parts, Body::empty())
    }

    fn refuse(&self, asked: Asked, refusal: &Refusal) -> Response<Body> {
        let mut headers = http::HeaderMap::new();
        if asked.page {
            headers.insert(http::header::ACCEPT, HeaderValue::from_static("text/html"));
        }
        self.answers.refuse(&headers, refusal)
    }
}

/// A request whose answer is waited for. Given up by the client after a while it counts as failed.
struct Waiting<'a> {
    route: &'a Route,
    /// In ms, by the activity's clock.
    begun: u64,
}

/// What a client may be expected to wait for, in ms.
const WAITED: u64 = 5000;

impl Waiting<'_> {
    fn answered(&mut self, failed: bool) {
        if self.route.judged {
            self.route.activity.answered(self.begun, failed);
        }
        // From the end of time on nothing is late.
        self.begun = u64::MAX;
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.route.judged && self.route.activity.now_ms().saturating_sub(self.begun) >= WAITED {
            self.route.activity.answered(self.begun, true);
        }
    }
}

/// What the answer depends on, once the head has gone.
#[derive(Clone, Copy)]
struct Asked {
    page: bool,
    head: bool,
}

/// The request as the upstream gets it.
fn rebuild(parts: &mut Parts, body: Body, websocket: bool, via: &Via<'_>) -> Option<Request<Body>> {
    let host = parts.headers.get(HOST)?.clone();
    let mut request = Request::new(body);
    *request.method_mut() = std::mem::take(&mut parts.method);
    *request.uri_mut() = if parts.uri.authority().is_some() {
        Uri::from(parts.uri.path_and_query()?.clone())
    } else {
        std::mem::take(&mut parts.uri)
    };
    let mut to = headers::request(std::mem::take(&mut parts.headers), host, websocket, via);
    if request.method() == Method::GET && request.body().size_hint().exact().is_none() {
        // hyper sends a GET's body only when the head says that there is one.
        to.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    *request.headers_mut() = to;
    Some(request)
}

fn respond(
    upstream: Box<Upstream>,
    response: Response<Incoming>,
    in_flight: InFlight,
    via: &Via<'_>,
    is_head: bool,
) -> Response<Body> {
    let (mut parts, body) = response.into_parts();
    let endless = parts
        .headers
        .get(CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
    parts.headers = headers::response(parts.headers, false, via.face);
    parts.version = Version::HTTP_11;
    let body = if is_head || body.is_end_stream() {
        in_flight.lane().put(via.route.door, upstream);
        Body::empty()
    } else {
        Body::upstream(UpstreamBody {
            body,
            upstream: Some(upstream),
            owner: Some(Owner {
                closing: endless.then(|| in_flight.lane().closing()),
                in_flight,
                route: via.route.clone(),
                visitor: via.visitor.clone(),
                cut: None,
            }),
        })
    };
    Response::from_parts(parts, body)
}

/// A response's body, together with the connection that it comes from.
pub(crate) struct UpstreamBody {
    body: Incoming,
    /// `None` once the body is complete.
    upstream: Option<Box<Upstream>>,
    /// `None` outside a generation.
    owner: Option<Owner>,
}

struct Owner {
    in_flight: InFlight,
    route: Arc<Route>,
    visitor: Arc<Visitor>,
    /// For a body without an end of its own.
    closing: Option<watch::Receiver<u16>>,
    /// Made when the body first has to wait: short responses never need it.
    cut: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

/// Returns when a body must be cut off.
async fn cut(session: CancellationToken, closing: Option<watch::Receiver<u16>>) {
    let Some(mut closing) = closing else {
        return session.cancelled().await;
    };
    tokio::select! {
        () = session.cancelled() => {}
        // An error means that the generation is gone.
        _ = closing.changed() => {}
    }
}

impl UpstreamBody {
    /// A body whose connection is not kept.
    pub(crate) fn single(body: Incoming, upstream: Box<Upstream>) -> Self {
        Self {
            body,
            upstream: Some(upstream),
            owner: None,
        }
    }

    fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        // Frames come only from driving the connection right here.
        let mut unheard = Context::from_waker(Waker::noop());
        let first = Pin::new(&mut self.body).poll_frame(&mut unheard);
        let polled = match (&mut self.upstream, first) {
            (Some(upstream), Poll::Pending) => {
                upstream.drive(cx);
                Pin::new(&mut self.body).poll_frame(&mut unheard)
            }
            (_, first) => first,
        };
        if polled.is_pending() && self.upstream.as_ref().is_none_or(|u| u.is_done()) {
            self.upstream = None;
            return Pin::new(&mut self.body).poll_frame(&mut unheard).map_err(Into::into);
        }
        polled.map_err(Into::into)
    }
}

impl HttpBody for UpstreamBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let polled = self.poll_body(cx);
        let Self { body, upstream, owner } = &mut *self;
        let Some(owner) = owner else { return polled };
        match &polled {
            Poll::Ready(Some(Ok(_))) => owner.route.activity.touch(),
            Poll::Ready(Some(Err(_))) => *upstream = None,
            Poll::Ready(None) => {}
            Poll::Pending => {
                let Owner { visitor, closing, .. } = owner;
                let cut = owner
                    .cut
                    .get_or_insert_with(|| Box::pin(cut(visitor.closed.clone(), closing.take())));
                if cut.as_mut().poll(cx).is_ready() {
                    *upstream = None;
                    return Poll::Ready(Some(Err("cut off: the session or the generation ended".into())));
                }
            }
        }
        // A body of known length is not asked again after its last byte.
        let complete = body.is_end_stream() || matches!(polled, Poll::Ready(None));
        if complete && let Some(upstream) = upstream.take() {
            owner.in_flight.lane().put(owner.route.door, upstream);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
