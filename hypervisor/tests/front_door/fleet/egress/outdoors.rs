//! The world outside as tests make it: names that resolve as they say, and hosts with certificates of the test's own
//! authority that record what reaches them. It must not know what ought to reach them.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use choir_hypervisor::egress::{Net, Outside};
use choir_proxy::Io;
use choir_proxy::route::BoxFuture;
use futures_util::{StreamExt, stream};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, Issuer, KeyPair};
use rustls::pki_types::PrivateKeyDer;
use rustls::{RootCertStore, ServerConfig};
use tokio::io::DuplexStream;
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;

/// Where honest hosts are.
pub const PUBLIC: &str = "93.184.215.14";

/// One request as a host saw it.
#[derive(Debug, Clone)]
pub struct Seen {
    pub host: String,
    pub method: String,
    pub uri: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Seen {
    pub fn header(&self, name: &str) -> Vec<&str> {
        let all = self.headers.get_all(name).iter();
        all.map(|value| value.to_str().unwrap()).collect()
    }
}

pub type Answer = Response<BoxBody<Bytes, Infallible>>;
type Script = Box<dyn Fn(&Seen) -> Answer + Send + Sync>;

/// Everything beyond the gateway.
pub struct Outdoors {
    authority: Issuer<'static, KeyPair>,
    pub roots: RootCertStore,
    /// What a name resolves to, the last answer again and again.
    names: Mutex<HashMap<String, VecDeque<Vec<IpAddr>>>>,
    /// Names of the certificate that a host at an address shows; it answers over TLS.
    hosts: Mutex<HashMap<IpAddr, Vec<String>>>,
    script: Mutex<Script>,
    pub resolved: Mutex<Vec<String>>,
    pub dialled: Mutex<Vec<SocketAddr>>,
    pub seen: Mutex<Vec<Seen>>,
}

impl Outdoors {
    /// An empty world.
    pub fn new() -> Arc<Self> {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let mut roots = RootCertStore::empty();
        roots.add(params.self_signed(&key).unwrap().der().clone()).unwrap();
        Arc::new(Self {
            authority: Issuer::new(params, key),
            roots,
            names: Mutex::default(),
            hosts: Mutex::default(),
            script: Mutex::new(Box::new(|_| plain("fine"))),
            resolved: Mutex::default(),
            dialled: Mutex::default(),
            seen: Mutex::default(),
        })
    }

    pub fn outside(self: &Arc<Self>) -> Outside {
        Outside::trusting(Arc::new(Dialled(self.clone())), self.roots.clone())
    }

    /// A name that resolves to these addresses, one look-up after another.
    pub fn name(&self, name: &str, answers: &[&[&str]]) {
        let parsed = answers
            .iter()
            .map(|all| all.iter().map(|ip| ip.parse().unwrap()).collect());
        self.names.lock().unwrap().insert(name.to_owned(), parsed.collect());
    }

    /// An honest host: a name, and a certificate for it, at an address.
    pub fn host(&self, name: &str, address: &str) {
        self.name(name, &[&[address]]);
        let mut hosts = self.hosts.lock().unwrap();
        hosts.entry(address.parse().unwrap()).or_default().push(name.to_owned());
    }

    /// What every host answers from now on.
    pub fn answers(&self, script: impl Fn(&Seen) -> Answer + Send + Sync + 'static) {
        *self.script.lock().unwrap() = Box::new(script);
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    async fn serve(self: Arc<Self>, names: Vec<String>, stream: DuplexStream) {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &self.authority);
        let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.unwrap().der().clone()],
                PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        // A client that does not believe the certificate goes away here.
        let Ok(secured) = TlsAcceptor::from(Arc::new(config)).accept(stream).await else {
            return;
        };
        let service = service_fn(move |request: Request<Incoming>| {
            let outdoors = self.clone();
            async move { Ok::<_, Infallible>(outdoors.record(request).await) }
        });
        let _ = hyper::server::conn::http1::Builder::new()
            .serve_connection(TokioIo::new(secured), service)
            .with_upgrades()
            .await;
    }

    async fn record(&self, mut request: Request<Incoming>) -> Answer {
        let upgrade = hyper::upgrade::on(&mut request);
        let (head, body) = request.into_parts();
        let body = body.collect().await.map(|all| all.to_bytes()).unwrap_or_default();
        let host = head.headers["host"].to_str().unwrap().to_owned();
        let seen = Seen {
            host,
            method: head.method.to_string(),
            uri: head.uri.to_string(),
            headers: head.headers,
            body,
        };
        self.seen.lock().unwrap().push(seen.clone());
        let answer = (self.script.lock().unwrap())(&seen);
        if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
            // From then on it says what it is told.
            tokio::spawn(async move {
                let (mut hears, mut says) = tokio::io::split(TokioIo::new(upgrade.await.unwrap()));
                tokio::io::copy(&mut hears, &mut says).await
            });
        }
        answer
    }
}

struct Dialled(Arc<Outdoors>);

impl Net for Dialled {
    fn resolve<'a>(&'a self, host: &'a str) -> BoxFuture<'a, io::Result<Vec<IpAddr>>> {
        Box::pin(async move {
            self.0.resolved.lock().unwrap().push(host.to_owned());
            let mut names = self.0.names.lock().unwrap();
            let answers = names.get_mut(host).ok_or(io::ErrorKind::NotFound)?;
            let next = if answers.len() > 1 {
                answers.pop_front()
            } else {
                answers.front().cloned()
            };
            Ok(next.unwrap_or_default())
        })
    }

    fn connect(&self, to: SocketAddr) -> BoxFuture<'_, io::Result<Box<dyn Io>>> {
        Box::pin(async move {
            self.0.dialled.lock().unwrap().push(to);
            let names = self.0.hosts.lock().unwrap().get(&to.ip()).cloned();
            let names = names.ok_or(io::ErrorKind::ConnectionRefused)?;
            let (near, far) = tokio::io::duplex(64 << 10);
            tokio::spawn(self.0.clone().serve(names, far));
            Ok(Box::new(near) as Box<dyn Io>)
        })
    }
}

/// An answer with this text.
pub fn plain(text: impl Into<Bytes>) -> Answer {
    Response::new(Full::new(text.into()).boxed())
}

/// An answer that accepts a websocket.
pub fn accepted() -> Answer {
    let mut answer = plain("");
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    for (name, value) in [
        ("connection", "upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-accept", "yes"),
    ] {
        answer.headers_mut().insert(name, value.parse().unwrap());
    }
    answer
}

/// An answer whose chunks come when the test sends them.
pub fn streamed() -> (mpsc::Sender<&'static str>, impl Fn() -> BoxBody<Bytes, Infallible>) {
    let (send, receive) = mpsc::channel::<&'static str>(8);
    let receive = Arc::new(tokio::sync::Mutex::new(receive));
    let body = move || {
        let chunks = stream::unfold(receive.clone(), |receive| async move {
            let chunk = receive.lock().await.recv().await?;
            Some((chunk, receive))
        });
        let frames = chunks.map(|chunk| Ok(Frame::data(Bytes::from_static(chunk.as_bytes()))));
        // The sender is shared between threads, the stream is not.
        BodyExt::boxed(StreamBody::new(SyncStream(std::sync::Mutex::new(Box::pin(frames)))))
    };
    (send, body)
}

type Frames = std::pin::Pin<Box<dyn futures_util::Stream<Item = Result<Frame<Bytes>, Infallible>> + Send>>;

/// A stream that may be named from several threads, as a boxed body must.
struct SyncStream(std::sync::Mutex<Frames>);

impl futures_util::Stream for SyncStream {
    type Item = Result<Frame<Bytes>, Infallible>;

    fn poll_next(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        self.0.lock().unwrap().as_mut().poll_next(cx)
    }
}
