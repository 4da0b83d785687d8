//! Kept connections of one sandbox to hosts outside, each proven over TLS. They are a sandbox's own, so that what one
//! sent can never come out at another. It must not know what is allowed, nor which requests carry a secret.

use std::error::Error as _;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use choir_core::HostName;
use choir_proxy::egress::Refused;
use choir_proxy::route::BoxFuture;
use choir_proxy::{Body, Io};
use http::uri::PathAndQuery;
use http::{Request, Response, Uri};
use hyper::body::Incoming;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::pki_types::ServerName;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::Gateway;

/// Where a grant's calls go: credentials travel over TLS only. An operator may name another port for a provider.
pub(crate) const PORT: u16 = 443;
/// How long the certificate's proof may take.
const PROVE_WITHIN: Duration = Duration::from_secs(20);
/// How long a host may think before its answer begins; models think for minutes.
const ANSWER_WITHIN: Duration = Duration::from_secs(600);
/// How long a connection is kept, below what servers commonly allow.
const KEPT_FOR: Duration = Duration::from_secs(30);
/// Connections to one host that are kept.
const KEPT: usize = 16;
/// The longest answer head. Each stream may hold this much.
const BUFFER: usize = 16 * 1024;

/// One sandbox's connections.
#[derive(Clone)]
pub(crate) struct Https(legacy::Client<Connector, Body>);

/// Why there is no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum Lost {
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error("{0} does not prove who it is over TLS")]
    Untrusted(String),
    #[error("{0} broke the connection off before it answered")]
    Broken(String),
}

impl Https {
    pub(super) fn new(gateway: Weak<Gateway>) -> Self {
        let client = legacy::Client::builder(TokioExecutor::new())
            .pool_idle_timeout(KEPT_FOR)
            .pool_max_idle_per_host(KEPT)
            .pool_timer(TokioTimer::new())
            .http1_max_buf_size(BUFFER)
            .set_host(false)
            .build(Connector(gateway));
        Self(client)
    }

    /// Sends a request whose head names its host already; nothing of it is sent twice.
    pub(crate) async fn exchange(
        &self,
        host: &HostName,
        port: u16,
        mut request: Box<Request<Body>>,
    ) -> Result<Response<Incoming>, Lost> {
        let broken = || Lost::Broken(host.to_string());
        let mut parts = std::mem::take(request.uri_mut()).into_parts();
        parts.scheme = Some(http::uri::Scheme::HTTPS);
        parts.authority = Some(authority(host, port).parse().map_err(|_| broken())?);
        parts.path_and_query.get_or_insert(PathAndQuery::from_static("/"));
        *request.uri_mut() = Uri::from_parts(parts).map_err(|_| broken())?;
        match tokio::time::timeout(ANSWER_WITHIN, self.0.request(*request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(reason(&error).unwrap_or_else(broken)),
            Err(_) => Err(broken()),
        }
    }
}

/// A host as a request names it.
pub(crate) fn authority(host: &HostName, port: u16) -> String {
    match port {
        PORT => host.to_string(),
        port => format!("{host}:{port}"),
    }
}

/// What the connector said, if it was the connector.
fn reason(error: &legacy::Error) -> Option<Lost> {
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(lost) = error.downcast_ref::<Lost>() {
            return Some(lost.clone());
        }
        cause = error.source();
    }
    None
}

/// Connects to a host by its name.
#[derive(Clone)]
struct Connector(Weak<Gateway>);

impl tower::Service<Uri> for Connector {
    type Response = Secured;
    type Error = Lost;
    type Future = BoxFuture<'static, Result<Secured, Lost>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Lost>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let gateway = self.0.upgrade();
        Box::pin(async move {
            let host = uri.host().unwrap_or_default().to_owned();
            let Some(gateway) = gateway else {
                return Err(Lost::Broken(host));
            };
            let stream = gateway.dial(&host, uri.port_u16().unwrap_or(PORT)).await?;
            let name = ServerName::try_from(host.clone()).map_err(|_| Lost::Untrusted(host.clone()))?;
            let proving = TlsConnector::from(Arc::clone(&gateway.deps.outside.tls)).connect(name, stream);
            match tokio::time::timeout(PROVE_WITHIN, proving).await {
                Ok(Ok(secured)) => Ok(Secured(TokioIo::new(secured))),
                Ok(Err(error)) => {
                    tracing::info!(%error, %host, "a host could not prove who it is");
                    Err(Lost::Untrusted(host))
                }
                Err(_) => Err(Lost::Untrusted(host)),
            }
        })
    }
}

/// A connection whose other end proved its name.
struct Secured(TokioIo<TlsStream<Box<dyn Io>>>);

impl Connection for Secured {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl Read for Secured {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: ReadBufCursor<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl Write for Secured {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(cx, bufs)
    }
}
