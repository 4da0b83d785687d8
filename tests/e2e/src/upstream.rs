//! Services of the outside as a test plays them: a machine with names of its own, TLS by an authority of its own, answers
//! that the test makes, and a record of what came. An instance that is beside it finds its names and believes its
//! authority, as a company's machine does. It must not know what ought to reach it.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;

use crate::wire::Wire;

/// What the system believes without us.
const SYSTEM_BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";

/// One request as it arrived.
#[derive(Debug, Clone)]
pub struct Seen {
    pub host: String,
    pub method: String,
    /// Path and query.
    pub target: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Seen {
    /// Every value of a header.
    pub fn header(&self, name: &str) -> Vec<&str> {
        let all = self.headers.get_all(name).iter();
        all.map(|value| value.to_str().unwrap_or_default()).collect()
    }

    pub fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }
}

pub type Answer = Response<BoxBody<Bytes, Infallible>>;

/// An answer that comes at once.
pub fn whole(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Answer {
    typed(status, kind, BoxBody::new(Full::new(body.into())))
}

/// An answer that comes in these pieces.
pub fn pieces(kind: &'static str, pieces: Vec<Bytes>) -> Answer {
    streamed(kind, stream::iter(pieces))
}

/// An answer that comes as this goes on.
pub fn streamed(kind: &'static str, pieces: impl Stream<Item = Bytes> + Send + Sync + 'static) -> Answer {
    let frames = pieces.map(|piece| Ok(Frame::data(piece)));
    typed(StatusCode::OK, kind, BoxBody::new(StreamBody::new(frames)))
}

fn typed(status: StatusCode, kind: &'static str, body: BoxBody<Bytes, Infallible>) -> Answer {
    let mut answer = Response::new(body);
    *answer.status_mut() = status;
    let kind = HeaderValue::from_static(kind);
    answer.headers_mut().insert(http::header::CONTENT_TYPE, kind);
    answer
}

/// Listens on port 443 until it is dropped.
pub struct Upstream {
    names: Vec<String>,
    authority: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    accepting: AbortHandle,
    /// Where it is, and where this machine is on the same network.
    pub wire: Wire,
}

impl Upstream {
    /// Answers for these names. What is answered may take its time, and may run programs.
    pub async fn start<F, A>(names: &[&str], answer: F) -> Result<Self>
    where
        F: Fn(Seen) -> A + Send + Sync + 'static,
        A: Future<Output = Answer> + Send + 'static,
    {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let (authority, acceptor) = certified(&names)?;
        let wire = Wire::lay()?;
        let listener = TcpListener::from_std(wire.listen(443)?)?;
        let seen = Arc::<Mutex<Vec<Seen>>>::default();
        let (log, answer) = (seen.clone(), Arc::new(answer));
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(acceptor.clone(), stream, log.clone(), answer.clone()));
            }
        });
        Ok(Self {
            names,
            authority,
            seen,
            accepting: accepting.abort_handle(),
            wire,
        })
    }

    /// What came so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().expect("no holder of this lock panics").clone()
    }

    /// Forgets what came.
    pub fn forget(&self) {
        self.seen.lock().expect("no holder of this lock panics").clear();
    }

    /// Its address as `--egress-allow` takes it: it lies in a private network.
    pub fn network(&self) -> String {
        format!("{}/32", self.wire.address)
    }

    /// Its authority's certificate, PEM.
    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// Writes, into this directory, a `hosts` file that knows these names too, and a bundle `trusted.pem` that has these
    /// authorities too.
    pub fn write(all: &[&Self], directory: &Path) -> Result<()> {
        let mut hosts = fs::read_to_string("/etc/hosts").context("there is no /etc/hosts")?;
        let mut trusted = fs::read_to_string(SYSTEM_BUNDLE).unwrap_or_default();
        for upstream in all {
            write!(hosts, "\n{} {}\n", upstream.wire.address, upstream.names.join(" "))?;
            write!(trusted, "\n{}\n", upstream.authority)?;
        }
        fs::write(directory.join("hosts"), hosts)?;
        fs::write(directory.join("trusted.pem"), trusted)?;
        Ok(())
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// An authority of its own, PEM, and a server with a certificate of it.
fn certified(names: &[String]) -> Result<(String, TlsAcceptor)> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(Vec::<String>::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    // With one name for both, OpenSSL takes the server's certificate for one that signed itself.
    let name = "An authority of the outside";
    params.distinguished_name.push(DnType::CommonName, name);
    let certificate = params.self_signed(&key)?;
    let authority = pem(certificate.der());
    let issuer = Issuer::new(params, key);
    let key = KeyPair::generate()?;
    let leaf = CertificateParams::new(names.to_vec())?.signed_by(&key, &issuer)?;
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok((authority, TlsAcceptor::from(Arc::new(config))))
}

fn pem(der: &[u8]) -> String {
    let text = data_encoding::BASE64.encode(der);
    let lines: Vec<&str> = text
        .as_bytes()
        .chunks(64)
        .filter_map(|line| str::from_utf8(line).ok())
        .collect();
    format!(
        "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n",
        lines.join("\n")
    )
}

/// One connection. A client that does not believe the certificate goes away.
async fn serve<F, A>(
    acceptor: TlsAcceptor,
    stream: TcpStream,
    seen: Arc<Mutex<Vec<Seen>>>,
    answer: Arc<F>,
) -> Result<()>
where
    F: Fn(Seen) -> A + Send + Sync + 'static,
    A: Future<Output = Answer> + Send + 'static,
{
    let secured = acceptor.accept(stream).await?;
    let service = service_fn(move |request: Request<Incoming>| {
        let (seen, answer) = (seen.clone(), answer.clone());
        async move {
            let (head, body) = request.into_parts();
            let host = head.headers.get("host").and_then(|host| host.to_str().ok());
            let now = Seen {
                host: host.unwrap_or_default().to_owned(),
                method: head.method.to_string(),
                target: head.uri.to_string(),
                headers: head.headers,
                body: body.collect().await?.to_bytes(),
            };
            seen.lock().expect("no holder of this lock panics").push(now.clone());
            anyhow::Ok(answer(now).await)
        }
    });
    hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(secured), service)
        .await?;
    Ok(())
}
