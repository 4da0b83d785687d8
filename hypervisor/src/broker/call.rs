//! One call with a secret: authorise, commit the intent, open the secret, send, search the answer, record the outcome.
//! Redirects are handed back, never followed. It must not decide what a grant covers.

use choir_broker::{Scanner, SecretValue, grant, inject};
use choir_core::{HostName, Inject};
use choir_proxy::egress::{inward, outward, switch, wants_websocket};
use choir_proxy::{Body, Io};
use choir_store::{Grant, Standing};
use http::header::{CONTENT_ENCODING, CONTENT_TYPE, SEC_WEBSOCKET_EXTENSIONS};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, Version};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;

use super::Door;
use super::refusal::Refusal;
use super::scanned::{Failed, Receipt, Scanned, ScannedIo};
use crate::egress::{Outlet, PORT, authority};

/// The action's name in the audit trail.
pub(crate) const ACTION: &str = "secret.use";

/// One call that was authorised: for whom, where it goes, and how the secret is put in.
pub(crate) struct Call<'a> {
    pub standing: &'a Standing,
    pub host: &'a HostName,
    pub port: u16,
    /// The path at the host, as it was judged.
    pub path: &'a str,
    pub inject: &'a Inject,
}

/// What goes with a call.
pub(crate) enum Secret<'a> {
    Granted(&'a Grant),
    OfTheBox(SecretValue),
}

impl Door {
    /// `below` is the path at the host, as it was written.
    pub(super) async fn call(
        &self,
        name: &str,
        below: &str,
        request: Box<Request<Incoming>>,
    ) -> Result<Response<Body>, Refusal> {
        let (standing, grant) = self.find(ACTION, name).await?;
        let path = if below.is_empty() { "/" } else { below };
        let chosen = chosen_host(request.headers());
        let method = request.method().as_str();
        let host = match grant::admit(&grant.rule, method, chosen.as_deref(), path) {
            Ok(host) => host,
            Err(denial) => {
                let what = format!("{name} {method} {}", chosen.as_deref().unwrap_or_default());
                let refusal = Refusal::not_covered(&denial, &grant);
                return Err(self.refuse(&standing, ACTION, what.trim_end(), None, refusal).await);
            }
        };
        self.outlet.call(&standing, &grant, host, path, request).await
    }
}

impl Outlet {
    /// Makes a call that a grant covers: `path` is the path at the host, as it was judged.
    pub(crate) async fn call(
        &self,
        standing: &Standing,
        grant: &Grant,
        host: &HostName,
        path: &str,
        mut request: Box<Request<Incoming>>,
    ) -> Result<Response<Body>, Refusal> {
        let program = request.extensions_mut().remove::<OnUpgrade>();
        let what = format!("{} {} {host}", grant.capability, request.method());
        let receipt = self.receipt(standing, ACTION, &what).await?;
        let call = Call {
            standing,
            host,
            port: PORT,
            path,
            inject: &grant.rule.inject,
        };
        let request = Box::new((*request).map(Body::wrap));
        self.carry(&call, Secret::Granted(grant), request, program, receipt)
            .await
    }

    /// Makes a call whose intent is recorded: sends it with the secret in it, searches the answer, records the outcome.
    pub(crate) async fn carry(
        &self,
        call: &Call<'_>,
        secret: Secret<'_>,
        request: Box<Request<Body>>,
        program: Option<OnUpgrade>,
        receipt: Receipt,
    ) -> Result<Response<Body>, Refusal> {
        let grant = match &secret {
            Secret::Granted(grant) => Some(*grant),
            Secret::OfTheBox(_) => None,
        };
        let answered = async {
            let (request, scanner) = Box::pin(self.prepare(call, secret, request)).await?;
            let response = self.https().exchange(call.host, call.port, request).await?;
            if let Some(grant) = grant {
                self.used(call.standing, grant);
            }
            Ok::<_, Refusal>((response, scanner))
        };
        match answered.await {
            Ok((response, scanner)) => answer(response, program, scanner, receipt, call.host).await,
            Err(refusal) => {
                receipt.end(refusal.outcome);
                Err(refusal)
            }
        }
    }

    /// The request with the secret in it, and what to look for in its answer. Requests are boxed on their way: while a host
    /// is waited for, each function on it would keep room for one.
    async fn prepare(
        &self,
        call: &Call<'_>,
        secret: Secret<'_>,
        request: Box<Request<Body>>,
    ) -> Result<(Box<Request<Body>>, Scanner), Refusal> {
        let Call { standing, path, .. } = *call;
        let (secret, grant) = match secret {
            Secret::Granted(grant) => {
                let opened = self.gateway.deps.vault.open(&standing.user, &grant.secret).await;
                let opened = opened.map_err(|error| Refusal::from_vault(&error, standing, grant))?;
                (opened.value, Some(grant))
            }
            Secret::OfTheBox(secret) => (secret, None),
        };
        let scanner = self.gateway.scanners.of(&secret);
        let scanner = scanner.ok_or_else(|| Refusal::unsearchable(grant))?;

        let (mut head, body) = request.into_parts();
        let unsendable = || Refusal::unfit(&inject::InjectError::TooLong);
        let target = match head.uri.query() {
            Some(query) => format!("{path}?{query}"),
            None => path.to_owned(),
        };
        head.uri = Uri::from(PathAndQuery::try_from(target).map_err(|_| unsendable())?);
        let named = HeaderValue::from_str(&authority(call.host, call.port)).map_err(|_| unsendable())?;
        let websocket = wants_websocket(&head);
        head.headers = outward(head.headers, named, websocket);
        // Compressed messages cannot be searched.
        head.headers.remove(SEC_WEBSOCKET_EXTENSIONS);
        head.extensions.clear();
        head.version = Version::HTTP_11;
        inject::apply(call.inject, &secret, &mut head).map_err(|error| Refusal::unfit(&error))?;
        #[cfg(feature = "leak")]
        tracing::info!(sent = %String::from_utf8_lossy(secret.expose()), "this build leaks on purpose");
        Ok((Box::new(Request::from_parts(head, body)), scanner))
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
    program: Option<OnUpgrade>,
    scanner: Scanner,
    receipt: Receipt,
    host: &HostName,
) -> Result<Response<Body>, Refusal> {
    let host = host.as_str();
    let told = |(name, value): (&http::HeaderName, &HeaderValue)| {
        scanner.is_in(name.as_str().as_bytes()) || scanner.is_in(value.as_bytes())
    };
    let encoded = |value: &HeaderValue| !value.as_bytes().eq_ignore_ascii_case(b"identity");
    let switched = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    let refusal = if switched && program.is_none() {
        Some(Refusal::switched(host))
    } else if response.headers().iter().any(told) {
        Some(Refusal::reflected(host))
    } else if response.headers().get_all(CONTENT_ENCODING).iter().any(encoded) {
        Some(Refusal::encoded(host))
    } else {
        None
    };
    if let Some(refusal) = refusal {
        receipt.end(refusal.outcome);
        return Err(refusal);
    }
    if let (true, Some(program)) = (switched, program) {
        let see = |upstream| Box::new(ScannedIo::new(upstream, scanner, receipt)) as Box<dyn Io>;
        return Ok(switch(response, program, see));
    }
    let (parts, body) = response.into_parts();
    let mut body = Scanned::new(body, scanner, receipt);
    if !streams_events(&parts.headers) {
        body.begin().await.map_err(|failed| match failed {
            Failed::Reflected => Refusal::reflected(host),
            Failed::Broken => Refusal::broken(host),
        })?;
    }
    let mut answer = Response::new(Body::wrap(body));
    *answer.status_mut() = parts.status;
    *answer.headers_mut() = inward(parts.headers, false);
    Ok(answer)
}

/// Whether the head is worth having before anything follows.
fn streams_events(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).map_or(&[][..], HeaderValue::as_bytes);
    kind.to_ascii_lowercase().starts_with(b"text/event-stream")
}
