//! Answers programs in a granted host's name: over TLS that the sandbox believes where its owner switched that on, or
//! where a program asked in plain HTTP. What a grant covers goes out with its secret; the rest as it is, where the
//! workspace's policy lets it. It must not open a secret.

use std::sync::Arc;
use std::time::Duration;

use choir_broker::grant;
use choir_core::HostName;
use choir_proxy::egress::{answer_all, check, inward, outward, switch, wants_websocket};
use choir_proxy::{Body, Io};
use choir_store::{Grant, Standing};
use http::{HeaderValue, Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use tokio_rustls::TlsAcceptor;

use super::{Outlet, PORT};
use crate::broker::Refusal;

/// How long a program may take to believe our certificate.
const SHAKE_WITHIN: Duration = Duration::from_secs(10);
/// How long it may take over a request's head, and between two requests.
const HEADERS_WITHIN: Duration = Duration::from_secs(60);

/// Serves a program that asked for `host` until it is done.
pub(super) async fn serve(outlet: Outlet, host: HostName, stream: Box<dyn Io>) {
    let config = match outlet.leaf(&host) {
        Ok(config) => config,
        Err(error) => return tracing::error!(%error, %host, "no certificate can be made"),
    };
    let accepting = TlsAcceptor::from(config).accept(stream);
    let Ok(Ok(stream)) = tokio::time::timeout(SHAKE_WITHIN, accepting).await else {
        return tracing::debug!(%host, sandbox.id = %outlet.sandbox, "a program does not believe the sandbox's authority");
    };
    let (outlet, host) = (Arc::new(outlet), Arc::new(host));
    let answer = |request| {
        let (outlet, host) = (outlet.clone(), host.clone());
        async move { answer(&outlet, &host, request).await }
    };
    answer_all(stream, HEADERS_WITHIN, answer).await;
}

async fn answer(outlet: &Outlet, host: &HostName, request: Request<Incoming>) -> Response<Body> {
    let answered = async {
        let (head, body) = request.into_parts();
        let named = check(&head).map_err(Refusal::malformed)?;
        let named = named.as_bytes();
        let ours = named
            .strip_suffix(b":443")
            .unwrap_or(named)
            .eq_ignore_ascii_case(host.as_str().as_bytes());
        if !ours || head.uri.authority().is_some() {
            let message = "send a Host header that equals the host that you connected to";
            return Err(Refusal::malformed(message));
        }
        let request = Box::new(Request::from_parts(head, body));
        let (standing, grants) = outlet.granted().await?.ok_or_else(Refusal::nowhere)?;
        let path = request.uri().path().to_owned();
        match covering(&grants, host, request.method().as_str(), &path) {
            Ok(grant) => outlet.call(&standing, grant, host, &path, request).await,
            Err(denied) => match standing.egress.refuses(host.as_str()) {
                None => pass(outlet, host, request).await,
                Some(_) => Err(refused(outlet, &standing, denied, host, &request).await),
            },
        }
    };
    let refusal = match answered.await {
        Ok(response) => return response,
        Err(refusal) => refusal,
    };
    refusal.response(&*outlet.gateway.deps.random)
}

/// The first grant that covers a call, else the first for its host with what it lacks.
pub(super) fn covering<'g>(
    grants: &'g [Grant],
    host: &HostName,
    method: &str,
    path: &str,
) -> Result<&'g Grant, Option<(&'g Grant, grant::Denial)>> {
    let mut denied = None;
    for grant in super::meant_for(grants, host) {
        match grant::admit(&grant.rule, method, Some(host.as_str()), path) {
            Ok(_) => return Ok(grant),
            Err(denial) => _ = denied.get_or_insert((grant, denial)),
        }
    }
    Err(denied)
}

async fn refused(
    outlet: &Outlet,
    standing: &Standing,
    denied: Option<(&Grant, grant::Denial)>,
    host: &HostName,
    request: &Request<Incoming>,
) -> Refusal {
    let (what, refusal) = match denied {
        Some((grant, denial)) => (
            format!("{} {} {host}", grant.capability, request.method()),
            Refusal::not_covered(&denial, grant),
        ),
        None => (
            format!("{} {host}", request.method()),
            Refusal::not_granted(standing, None),
        ),
    };
    let event = outlet.event(standing, "secret.use", &what, refusal.outcome);
    outlet.refused(standing, event, None).await;
    refusal
}

/// Sends a request on as the program wrote it.
async fn pass(outlet: &Outlet, host: &HostName, request: Box<Request<Incoming>>) -> Result<Response<Body>, Refusal> {
    let (mut head, body) = request.into_parts();
    let websocket = wants_websocket(&head);
    let client = head.extensions.remove::<OnUpgrade>().filter(|_| websocket);
    let name = HeaderValue::from_str(host.as_str()).map_err(|_| Refusal::broken(host.as_str()))?;
    head.headers = outward(head.headers, name, websocket);
    head.extensions.clear();
    head.version = Version::HTTP_11;
    let sent = outlet
        .https()
        .exchange(host, PORT, Box::new(Request::from_parts(head, Body::wrap(body))))
        .await;
    let response = sent.map_err(Refusal::from)?;
    let switched = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    match (switched, client) {
        (true, Some(client)) => Ok(switch(response, client, |upstream| upstream)),
        (true, None) => Err(Refusal::switched(host.as_str())),
        (false, _) => {
            let (mut parts, body) = response.into_parts();
            parts.headers = inward(parts.headers, false);
            parts.version = Version::HTTP_11;
            Ok(Response::from_parts(parts, Body::wrap(body)))
        }
    }
}
