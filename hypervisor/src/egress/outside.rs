//! How the box reaches the rest of the world, as something that tests can replace. It must not know what is allowed.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use choir_proxy::Io;
use choir_proxy::route::BoxFuture;
use rustls::crypto::ring;
use rustls::{ClientConfig, RootCertStore};
use rustls_platform_verifier::BuilderVerifierExt as _;
use tokio::net::TcpStream;

/// Names and connections.
pub trait Net: Send + Sync {
    fn resolve<'a>(&'a self, host: &'a str) -> BoxFuture<'a, io::Result<Vec<IpAddr>>>;
    fn connect(&self, to: SocketAddr) -> BoxFuture<'_, io::Result<Box<dyn Io>>>;
}

/// The world outside, and whom to believe there.
#[derive(Clone)]
pub struct Outside {
    pub net: Arc<dyn Net>,
    /// For calls that carry a secret: HTTP/1.1 over TLS.
    pub tls: Arc<ClientConfig>,
}

impl Outside {
    /// The system's resolver and network, and the certificates that the system trusts.
    pub fn system() -> Self {
        let net = Arc::new(System);
        let platform = builder().and_then(|builder| Ok(builder.with_platform_verifier()?.with_no_client_auth()));
        match platform {
            Ok(config) => Self::with(net, config),
            Err(error) => {
                tracing::error!(%error, "the system's certificates cannot be read: no call of the broker will succeed");
                Self::trusting(net, RootCertStore::empty())
            }
        }
    }

    /// Believes these roots only.
    pub fn trusting(net: Arc<dyn Net>, roots: RootCertStore) -> Self {
        let builder = builder().expect("the versions are those of the provider");
        Self::with(net, builder.with_root_certificates(roots).with_no_client_auth())
    }

    fn with(net: Arc<dyn Net>, mut config: ClientConfig) -> Self {
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Self {
            net,
            tls: Arc::new(config),
        }
    }
}

fn builder() -> Result<rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>, rustls::Error> {
    ClientConfig::builder_with_provider(Arc::new(ring::default_provider())).with_safe_default_protocol_versions()
}

/// This machine's.
struct System;

impl Net for System {
    fn resolve<'a>(&'a self, host: &'a str) -> BoxFuture<'a, io::Result<Vec<IpAddr>>> {
        Box::pin(async move {
            let found = tokio::net::lookup_host((host, 0)).await?;
            Ok(found.map(|address| address.ip()).collect())
        })
    }

    fn connect(&self, to: SocketAddr) -> BoxFuture<'_, io::Result<Box<dyn Io>>> {
        Box::pin(async move {
            let stream = TcpStream::connect(to).await?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as Box<dyn Io>)
        })
    }
}
