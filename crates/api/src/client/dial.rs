//! How connections come about: `*.localhost` is this machine, whatever the system's resolver thinks of it, and TLS
//! trusts what the system trusts.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use rustls::crypto::ring;
use rustls::pki_types::ServerName;
use rustls_platform_verifier::BuilderVerifierExt as _;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use url::Url;

use super::{CONNECT_TIMEOUT, ClientError, KEPT_IDLE};

/// Bytes both ways, with or without TLS.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// The TLS settings for one server. The system's certificates are read only where TLS is used.
pub(super) fn tls(base: &Url) -> Result<Arc<rustls::ClientConfig>, ClientError> {
    let wrong = |e: rustls::Error| ClientError::Tls(e.to_string());
    let builder = rustls::ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(wrong)?;
    let config = if base.scheme() == "https" {
        builder.with_platform_verifier().map_err(wrong)?.with_no_client_auth()
    } else {
        builder
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth()
    };
    Ok(Arc::new(config))
}

pub(super) fn http(base: &Url, tls: &Arc<rustls::ClientConfig>) -> Result<reqwest::Client, ClientError> {
    let mut builder = reqwest::Client::builder()
        .tls_backend_preconfigured(tls.as_ref().clone())
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(CONNECT_TIMEOUT)
        .pool_idle_timeout(KEPT_IDLE)
        .user_agent(concat!("choir/", env!("CARGO_PKG_VERSION")))
        .dns_resolver(Loopback)
        .retry(once_more(base));
    if base.host_str().is_some_and(is_local) {
        // A proxy set in the environment has another idea of what `localhost` is.
        builder = builder.no_proxy();
    }
    builder.build().map_err(|e| ClientError::unreachable(base.as_str(), &e))
}

/// A hypervisor that restarts closes connections that are kept; whoever asks something of one just then asks once more.
fn once_more(base: &Url) -> reqwest::retry::Builder {
    reqwest::retry::for_host(base.host_str().unwrap_or_default().to_owned())
        .max_retries_per_request(1)
        .no_budget()
        .classify_fn(|attempt| match attempt.error() {
            Some(_) if attempt.method() == reqwest::Method::GET => attempt.retryable(),
            _ => attempt.success(),
        })
}

/// A connection to the URL's host for protocols other than plain HTTP.
pub(super) async fn connect(url: &Url, tls: &Arc<rustls::ClientConfig>) -> Result<Box<dyn Stream>, ClientError> {
    let unreachable = |reason: String| ClientError::Unreachable {
        url: url.origin().ascii_serialization(),
        reason,
    };
    let host = url
        .host_str()
        .ok_or_else(|| ClientError::Url(url.to_string()))?
        .to_owned();
    let port = url
        .port_or_known_default()
        .ok_or_else(|| ClientError::Url(url.to_string()))?;
    let dial = async {
        if is_local(&host) {
            TcpStream::connect(loopback(port).as_slice()).await
        } else {
            TcpStream::connect((host.trim_matches(['[', ']']), port)).await
        }
    };
    let tcp = tokio::time::timeout(CONNECT_TIMEOUT, dial)
        .await
        .map_err(|_| unreachable("the connection took too long".to_owned()))?
        .map_err(|e| unreachable(e.to_string()))?;
    tcp.set_nodelay(true).map_err(|e| unreachable(e.to_string()))?;
    if url.scheme() != "https" {
        return Ok(Box::new(tcp));
    }
    let name = ServerName::try_from(host).map_err(|e| unreachable(e.to_string()))?;
    let secured = tokio_rustls::TlsConnector::from(Arc::clone(tls))
        .connect(name, tcp)
        .await;
    Ok(Box::new(secured.map_err(|e| unreachable(e.to_string()))?))
}

fn is_local(host: &str) -> bool {
    host == "localhost" || host.ends_with(".localhost") || host == "127.0.0.1" || host == "[::1]"
}

/// IPv4 first: that is where a hypervisor listens unless it was told otherwise.
fn loopback(port: u16) -> [SocketAddr; 2] {
    [(Ipv4Addr::LOCALHOST, port).into(), (Ipv6Addr::LOCALHOST, port).into()]
}

struct Loopback;

impl Resolve for Loopback {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            if is_local(name.as_str()) {
                return Ok(Box::new(loopback(0).into_iter()) as Addrs);
            }
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_name_below_localhost_is_this_machine() {
        for name in ["localhost", "live--main--ada.localhost"] {
            let addresses = Loopback.resolve(name.parse().unwrap()).await.unwrap();
            assert!(addresses.into_iter().all(|a| a.ip().is_loopback()), "{name}");
        }
        assert!(!is_local("localhost.example.com"));
    }
}
