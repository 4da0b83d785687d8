//! The HTTP proxy that a sandbox's programs use: CONNECT for TLS and everything else, absolute addresses for plain
//! HTTP. It must not know what is allowed; an [`Outward`] decides, dials and audits, and may answer itself. Redirects are
//! never followed.

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_TYPE, HOST};
use http::request::Parts;
use http::uri::{Authority, Scheme};
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, Version};
use http_body::Body as HttpBody;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioIo, TokioTimer};

use crate::body::Body;
use crate::forward::UpstreamBody;
pub use crate::head::wants_websocket;
pub use crate::headers::{inward, outward};
use crate::pool::Upstream;
use crate::route::{BoxFuture, Io};
use crate::{head, headers, tunnel};

const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// Dials out for one sandbox: applies policy, resolves once, checks the address, dials it, writes the audit row.
pub trait Outward: Send + Sync + 'static {
    /// What becomes of a CONNECT.
    fn connect(&self, host: &str, port: u16) -> impl Future<Output = Result<Way, Refused>> + Send;

    /// What becomes of a plain request to this host and port.
    fn request(
        &self,
        host: &str,
        port: u16,
        request: Request<Incoming>,
    ) -> impl Future<Output = Result<Plain, Refused>> + Send;
}

/// Where a program's bytes go once it may connect.
pub enum Way {
    /// As they are, to the host that it named.
    Through(Box<dyn Io>),
    /// To whoever answers in the host's name.
    Taken(Box<dyn FnOnce(Box<dyn Io>) -> BoxFuture<'static, ()> + Send>),
}

/// What becomes of a plain request.
pub enum Plain {
    /// It goes to the host.
    Through(Box<dyn Io>, Request<Incoming>),
    Answered(Response<Body>),
}

/// Why a sandbox does not get through.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// A rule says no. `rule` names it; `remedy` says how a person can allow it.
    #[error("{host} is not allowed by the rule {rule}; {remedy}")]
    Denied { host: String, rule: String, remedy: String },
    #[error("the name {0} cannot be resolved; check its spelling")]
    Unresolved(String),
    #[error("{0} does not answer; try again later")]
    Unreachable(String),
    /// The decision could not be recorded, so it is no.
    #[error("this cannot be allowed right now; try again later")]
    Unavailable,
}

/// Serves one connection of a sandbox's program until it ends.
pub async fn serve<S: Io, O: Outward>(stream: S, outward: Arc<O>) {
    let answer = move |request| {
        let outward = outward.clone();
        async move { answer(request, outward).await }
    };
    answer_all(stream, HEADER_TIMEOUT, answer).await;
}

/// Answers the requests that come by one connection from inside, each in its turn.
pub async fn answer_all<S: Io, A>(
    stream: S,
    header_timeout: Duration,
    answer: impl Fn(Request<Incoming>) -> A + Send + Sync,
) where
    A: Future<Output = Response<Body>> + Send,
{
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .max_headers(100)
        .max_buf_size(64 * 1024)
        .half_close(false)
        .serve_connection(
            TokioIo::new(stream),
            service_fn(|request| {
                // What only making an answer needs is not kept while it streams.
                let answer = Box::pin(answer(request));
                async move { Ok::<_, Infallible>(answer.await) }
            }),
        )
        .with_upgrades();
    if let Err(error) = connection.await {
        tracing::debug!(%error, "a connection from inside ended");
    }
}

/// The one Host of a head that nobody can read in two ways, or what is wrong with it.
pub fn check(head: &Parts) -> Result<HeaderValue, &'static str> {
    head::check(head).map_err(|refusal| refusal.message)
}

/// Hands on that a host accepted a websocket, and what both say from then on. `see` is put between the program and what
/// the host says.
pub fn switch(
    mut response: Response<Incoming>,
    program: OnUpgrade,
    see: impl FnOnce(Box<dyn Io>) -> Box<dyn Io> + Send + 'static,
) -> Response<Body> {
    let host = hyper::upgrade::on(&mut response);
    tokio::spawn(async move {
        let Ok(host) = host.await else { return };
        let mut host = see(Box::new(TokioIo::new(host)));
        let Ok(program) = program.await else { return };
        tunnel::relay(&mut TokioIo::new(program), &mut host, Vec::new()).await;
    });
    let (mut parts, _) = response.into_parts();
    parts.headers = headers::inward(parts.headers, true);
    parts.version = Version::HTTP_11;
    Response::from_parts(parts, Body::empty())
}

async fn answer<O: Outward>(request: Request<Incoming>, outward: Arc<O>) -> Response<Body> {
    let result = if request.method() == Method::CONNECT {
        connect(request, &*outward).await
    } else {
        plain(request, &*outward).await
    };
    result.unwrap_or_else(|refusal| *refusal)
}

async fn connect<O: Outward>(request: Request<Incoming>, outward: &O) -> Result<Response<Body>, Box<Response<Body>>> {
    let authority = request.uri().authority().filter(|a| plain_authority(a));
    let Some((host, port)) = authority.and_then(|a| Some((bare(a.host()), a.port_u16()?))) else {
        return Err(malformed("send CONNECT with a host and a port"));
    };
    let way = outward.connect(host, port).await.map_err(refuse)?;
    tokio::spawn(async move {
        let Ok(inside) = hyper::upgrade::on(request).await else {
            return;
        };
        let mut inside = TokioIo::new(inside);
        match way {
            Way::Through(mut outside) => tunnel::relay(&mut inside, &mut outside, Vec::new()).await,
            Way::Taken(answer) => answer(Box::new(inside)).await,
        }
    });
    Ok(Response::new(Body::empty()))
}

async fn plain<O: Outward>(request: Request<Incoming>, outward: &O) -> Result<Response<Body>, Box<Response<Body>>> {
    let (head, body) = request.into_parts();
    head::framing(&head).map_err(|refusal| malformed(refusal.message))?;
    let authority = head.uri.authority().filter(|a| plain_authority(a)).cloned();
    let Some(authority) = authority.filter(|_| head.uri.scheme() == Some(&Scheme::HTTP)) else {
        return Err(malformed(
            "this is an HTTP proxy: send CONNECT, or an address that begins with http://",
        ));
    };
    let mut hosts = head.headers.get_all(HOST).iter();
    if matches!((hosts.next(), hosts.next()), (Some(h), None) if h.as_bytes() != authority.as_str().as_bytes())
        || head.headers.get_all(HOST).iter().count() > 1
    {
        return Err(malformed("send one Host header that equals the address"));
    }
    let bad_target = || malformed("send an address that begins with http://");
    let host = HeaderValue::from_str(authority.as_str()).map_err(|_| bad_target())?;
    let target = head.uri.path_and_query().cloned().ok_or_else(bad_target)?;
    let (name, port) = (bare(authority.host()), authority.port_u16().unwrap_or(80));
    let unreachable = || refuse(Refused::Unreachable(name.to_owned()));
    let request = Request::from_parts(head, body);
    let (outside, request) = match outward.request(name, port, request).await.map_err(refuse)? {
        Plain::Through(outside, request) => (outside, request),
        Plain::Answered(response) => return Ok(response),
    };
    let (mut head, body) = request.into_parts();

    let mut onward = Request::new(Body::wrap(body));
    *onward.method_mut() = std::mem::take(&mut head.method);
    *onward.uri_mut() = Uri::from(target);
    *onward.headers_mut() = headers::outward(head.headers, host, false);
    let mut upstream = Upstream::new(outside).await.map_err(|_| unreachable())?;
    let response = upstream.exchange(onward).await.map_err(|_| unreachable())?;
    let (mut parts, body) = response.into_parts();
    if parts.status == StatusCode::SWITCHING_PROTOCOLS {
        return Err(unreachable());
    }
    parts.headers = headers::inward(parts.headers, false);
    parts.version = Version::HTTP_11;
    let body = if body.is_end_stream() {
        Body::empty()
    } else {
        Body::upstream(UpstreamBody::single(body, upstream))
    };
    Ok(Response::from_parts(parts, body))
}

fn plain_authority(authority: &Authority) -> bool {
    !authority.host().is_empty() && !authority.as_str().contains('@')
}

/// An IPv6 address without its brackets.
fn bare(host: &str) -> &str {
    host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host)
}

fn refuse(refused: Refused) -> Box<Response<Body>> {
    let (status, code) = match &refused {
        Refused::Denied { .. } => (StatusCode::FORBIDDEN, "egress_denied"),
        Refused::Unresolved(_) => (StatusCode::BAD_GATEWAY, "name_not_found"),
        Refused::Unreachable(_) => (StatusCode::BAD_GATEWAY, "unreachable"),
        Refused::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
    };
    let rule = match &refused {
        Refused::Denied { rule, .. } => Some(rule.as_str()),
        _ => None,
    };
    say(status, code, &refused.to_string(), rule)
}

fn malformed(message: &str) -> Box<Response<Body>> {
    let mut response = say(StatusCode::BAD_REQUEST, "bad_request", message, None);
    response
        .headers_mut()
        .insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

fn say(status: StatusCode, code: &str, message: &str, rule: Option<&str>) -> Box<Response<Body>> {
    let mut body = serde_json::json!({"error": {"code": code, "message": message}});
    if let Some(rule) = rule {
        body["error"]["rule"] = rule.into();
    }
    let mut response = Response::new(Body::full(Bytes::from(format!("{body}\n"))));
    *response.status_mut() = status;
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, json);
    // Programs that show nothing of a failed CONNECT's body often show its headers.
    if let Ok(reason) = HeaderValue::from_str(message) {
        response.headers_mut().insert("x-choir-refusal", reason);
    }
    Box::new(response)
}
