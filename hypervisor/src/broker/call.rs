//! One call with a secret: authorise, commit the intent, open the secret, send, search the answer, record the outcome.
//! Redirects are handed back, never followed. It must not decide what a grant covers.

use std::sync::Arc;
use std::time::Duration;

use choir_broker::{Scanner, grant, inject};
use choir_core::HostName;
use choir_proxy::Body;
use choir_proxy::egress::{inward, outward};
use choir_store::{Grant, Standing};
use http::header::{CONTENT_ENCODING, CONTENT_TYPE};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, Version};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio_rustls::TlsConnector;

use super::Door;
use super::refusal::Refusal;
use super::scanned::{Failed, Receipt, Scanned};

/// The action's name in the audit trail.
const ACTION: &str = "secret.use";
/// Where every call goes: credentials travel over TLS only.
const PORT: u16 = 443;
/// How long the certificate's proof may take.
const PROVE_WITHIN: Duration = Duration::from_secs(20);
/// How long a host may think before its answer begins; models think for minutes.
const ANSWER_WITHIN: Duration = Duration::from_secs(600);

impl Door {
    /// `below` is the path at the host, as it was written.
    pub(super) async fn call(
        &self,
        name: &str,
        below: &str,
        request: Request<Incoming>,
    ) -> Result<Response<Body>, Refusal> {
        let (standing, grant) = self.find(ACTION, name).await?;
        let path = if below.is_empty() { "/" } else { below };
        let chosen = chosen_host(request.headers());
        let method = request.method().clone();
        let host = match grant::admit(&grant.rule, method.as_str(), chosen.as_deref(), path) {
            Ok(host) => host.clone(),
            Err(denial) => {
                let what = format!("{name} {method} {}", chosen.as_deref().unwrap_or_default());
                let refusal = Refusal::not_covered(&denial, &grant);
                return Err(self.refuse(&standing, ACTION, what.trim_end(), None, refusal).await);
            }
        };
        let intent = self
            .intent(&standing, ACTION, &format!("{name} {method} {host}"))
            .await?;
        let deps = &self.outlet.gateway.deps;
        let receipt = Receipt::new(deps.store.clone(), deps.clock.clone(), intent);
        match self.send(&standing, &grant, &host, path, request).await {
            Ok((response, scanner)) => {
                self.used(&standing, &grant);
                answer(response, scanner, receipt, &host).await
            }
            Err(refusal) => {
                receipt.end(refusal.outcome);
                Err(refusal)
            }
        }
    }

    /// Sends the request with the secret in it; the answer, and what to look for in it.
    async fn send(
        &self,
        standing: &Standing,
        grant: &Grant,
        host: &HostName,
        path: &str,
        request: Request<Incoming>,
    ) -> Result<(Response<Incoming>, Scanner), Refusal> {
        let opened = self.outlet.gateway.deps.vault.open(&standing.user, &grant.secret).await;
        let secret = opened
            .map_err(|error| Refusal::from_vault(&error, standing, grant))?
            .value;
        let scanner = Scanner::new(&secret).ok_or_else(|| Refusal::too_short(grant))?;

        let (mut head, body) = request.into_parts();
        let unsendable = || Refusal::unfit(&inject::InjectError::TooLong);
        let target = match head.uri.query() {
            Some(query) => format!("{path}?{query}"),
            None => path.to_owned(),
        };
        head.uri = Uri::from(PathAndQuery::try_from(target).map_err(|_| unsendable())?);
        let authority = HeaderValue::from_str(host.as_str()).map_err(|_| unsendable())?;
        head.headers = outward(head.headers, authority);
        head.extensions.clear();
        head.version = Version::HTTP_11;
        inject::apply(&grant.rule.inject, &secret, &mut head).map_err(|error| Refusal::unfit(&error))?;
        drop(secret);

        let response = self.exchange(host, Request::from_parts(head, body)).await?;
        Ok((response, scanner))
    }

    async fn exchange(&self, host: &HostName, request: Request<Incoming>) -> Result<Response<Incoming>, Refusal> {
        let gateway = &self.outlet.gateway;
        let dialled = gateway.dial(host.as_str(), PORT).await;
        let stream = dialled.map_err(|refused| Refusal::from_dial(&refused))?;
        let untrusted = || Refusal::untrusted(host.as_str());
        let name = ServerName::try_from(host.to_string()).map_err(|_| untrusted())?;
        let proving = TlsConnector::from(Arc::clone(&gateway.deps.outside.tls)).connect(name, stream);
        let secured = match tokio::time::timeout(PROVE_WITHIN, proving).await {
            Ok(Ok(secured)) => secured,
            Ok(Err(error)) => {
                tracing::info!(%error, %host, "a host could not prove who it is");
                return Err(untrusted());
            }
            Err(_) => return Err(untrusted()),
        };
        let broken = || Refusal::broken(host.as_str());
        let shaken = http1::Builder::new().handshake(TokioIo::new(secured)).await;
        let (mut send, connection) = shaken.map_err(|_| broken())?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection with a secret ended");
            }
        });
        match tokio::time::timeout(ANSWER_WITHIN, send.send_request(request)).await {
            Ok(Ok(response)) => Ok(response),
            _ => Err(broken()),
        }
    }
}

/// The host that the caller chose; two of them choose none that a grant has.
fn chosen_host(headers: &HeaderMap) -> Option<String> {
    let mut chosen = headers.get_all(grant::HOST_HEADER).iter();
    match (chosen.next(), chosen.next()) {
        (None, _) => None,
        (Some(host), None) => Some(host.to_str().unwrap_or_default().to_owned()),
        _ => Some(String::new()),
    }
}

/// What is handed back of the host's answer. Its reason phrase, trailers and extensions are not.
async fn answer(
    response: Response<Incoming>,
    scanner: Scanner,
    receipt: Receipt,
    host: &HostName,
) -> Result<Response<Body>, Refusal> {
    let (parts, body) = response.into_parts();
    let host = host.as_str();
    let told = |(name, value): (&http::HeaderName, &HeaderValue)| {
        scanner.is_in(name.as_str().as_bytes()) || scanner.is_in(value.as_bytes())
    };
    let encoded = |value: &HeaderValue| !value.as_bytes().eq_ignore_ascii_case(b"identity");
    let refusal = if parts.status == StatusCode::SWITCHING_PROTOCOLS {
        Some(Refusal::switched(host))
    } else if parts.headers.iter().any(told) {
        Some(Refusal::reflected(host))
    } else if parts.headers.get_all(CONTENT_ENCODING).iter().any(encoded) {
        Some(Refusal::encoded(host))
    } else {
        None
    };
    if let Some(refusal) = refusal {
        receipt.end(refusal.outcome);
        return Err(refusal);
    }
    let mut body = Scanned::new(body, scanner, receipt);
    if !streams_events(&parts.headers) {
        body.begin().await.map_err(|failed| match failed {
            Failed::Reflected => Refusal::reflected(host),
            Failed::Broken => Refusal::broken(host),
        })?;
    }
    let mut answer = Response::new(Body::wrap(body));
    *answer.status_mut() = parts.status;
    *answer.headers_mut() = inward(parts.headers);
    Ok(answer)
}

/// Whether the head is worth having before anything follows.
fn streams_events(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).map_or(&[][..], HeaderValue::as_bytes);
    kind.to_ascii_lowercase().starts_with(b"text/event-stream")
}
