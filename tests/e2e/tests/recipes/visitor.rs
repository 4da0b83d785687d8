//! A visitor of the box from another address than the proxy's, and what a proxy must carry for them. It must not know
//! which proxy it is.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use choir_e2e::http::{self, Answer};
use choir_e2e::instance::Instance;
use choir_e2e::person::{USER, WORKSPACE};
use choir_e2e::waiting::PATIENCE;
use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

use crate::proxies::{CONTROL, Proxy, SANDBOXES};

/// Not the address that a proxy here connects from.
const VISITOR: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
/// A path that a tidy proxy would write differently.
const ODD: &str = "/a%2Fb?x=%41";
const MESSAGES: usize = 300;
const UPLOAD: usize = 100 << 20;
/// How long a first part of an answer is waited for where it should not come.
const BRIEF: Duration = Duration::from_secs(2);

/// What a proxy must carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carries {
    /// The control host's, liveness and login.
    Pages,
    /// A request to an app as it was sent, and whom it is from.
    Requests,
    Websockets,
    Uploads,
    /// Answers as they come.
    Parts,
}

impl Carries {
    pub const ALL: [Self; 5] = [
        Self::Pages,
        Self::Requests,
        Self::Websockets,
        Self::Uploads,
        Self::Parts,
    ];
}

pub struct Visitor<'p> {
    port: u16,
    tls: TlsConnector,
    trusted: &'p Path,
}

impl<'p> Visitor<'p> {
    /// Of this proxy, which listens on this port.
    pub fn new(port: u16, proxy: &'p Proxy) -> Result<Self> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(&fs::read(&proxy.trusted)?) {
            roots.add(certificate?)?;
        }
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self {
            port,
            tls: TlsConnector::from(Arc::new(config)),
            trusted: &proxy.trusted,
        })
    }

    /// Fails where the proxy does not.
    pub async fn finds(&self, what: Carries) -> Result<()> {
        let found = match what {
            Carries::Pages => self.pages().await,
            Carries::Requests => self.requests().await,
            Carries::Websockets => self.websockets().await,
            Carries::Uploads => self.uploads().await,
            Carries::Parts => self.parts(PATIENCE).await,
        };
        found.with_context(|| format!("{what:?}"))
    }

    /// Fails where the proxy does carry it.
    pub async fn misses(&self, what: Carries) -> Result<()> {
        let found = match what {
            Carries::Parts => self.parts(BRIEF).await,
            other => self.finds(other).await,
        };
        ensure!(found.is_err(), "{what:?} are carried");
        Ok(())
    }

    /// The status of the control host's liveness.
    pub async fn liveness(&self) -> Result<u16> {
        Ok(self.ask(CONTROL, "GET", "/healthz", &[], "").await?.status)
    }

    /// Whether there is a certificate for this host, and what its page answers.
    pub async fn status_of(&self, host: &str) -> Result<u16> {
        Ok(self.ask(host, "GET", "/", &[], "").await?.status)
    }

    /// The production smoke, by the command line that people have.
    pub fn smoke(&self, instance: &Instance, invite: &str) -> Result<()> {
        let mut smoke = Command::new(instance.path("bin/choir"));
        smoke.args([
            "smoke",
            "--url",
            &format!("https://{CONTROL}:{}", self.port),
            "--invite",
            invite,
        ]);
        smoke.env("SSL_CERT_FILE", self.trusted).env("HOME", instance.path(""));
        let done = smoke.output()?;
        ensure!(
            done.status.success(),
            "choir smoke: {}{}",
            String::from_utf8_lossy(&done.stdout),
            String::from_utf8_lossy(&done.stderr)
        );
        Ok(())
    }

    /// Both kinds of host over HTTP/2, as browsers speak it.
    pub fn http_2(&self) -> Result<()> {
        for host in [CONTROL, &app()] {
            let mut curl = Command::new("curl");
            curl.args([
                "--silent",
                "--show-error",
                "--fail",
                "--noproxy",
                "*",
                "--http2",
                "--cacert",
            ]);
            curl.arg(self.trusted)
                .args(["--output", "/dev/null", "--write-out", "%{http_version}"]);
            let done = curl.arg(format!("https://{host}:{}/healthz", self.port)).output()?;
            ensure!(done.stdout == b"2", "{host}: {done:?}");
        }
        Ok(())
    }

    async fn pages(&self) -> Result<()> {
        let answer = self.ask(CONTROL, "GET", "/healthz", &[], "").await?;
        ensure!(answer.status == 200 && answer.body.contains("hypervisor"), "{answer:?}");
        let answer = self.ask(CONTROL, "GET", "/login", &[], "").await?;
        let kind = answer.header("content-type").unwrap_or_default();
        ensure!(answer.status == 200 && kind.starts_with("text/html"), "{answer:?}");
        Ok(())
    }

    async fn requests(&self) -> Result<()> {
        let forged = [("X-Forwarded-For", "203.0.113.9"), ("X-Forwarded-Proto", "http")];
        let answer = self.ask(&app(), "GET", ODD, &forged, "").await?;
        let seen: Value = serde_json::from_str(&answer.body).with_context(|| format!("{answer:?}"))?;
        let wanted = json!({
            "host": self.authority(&app()),
            "x-forwarded-for": VISITOR.to_string(),
            "x-forwarded-proto": "https",
            "target": ODD,
        });
        ensure!(seen == wanted, "the app was told {seen} and not {wanted}");
        Ok(())
    }

    async fn websockets(&self) -> Result<()> {
        let authority = self.authority(&app());
        let mut request = format!("wss://{authority}/socket").into_client_request()?;
        let origin = format!("https://{authority}").parse()?;
        request.headers_mut().insert("origin", origin);
        let stream = self.connect(&app()).await?;
        let (mut socket, _) = timeout(PATIENCE, tokio_tungstenite::client_async(request, stream)).await??;
        for number in 0..MESSAGES {
            let said = Message::text(format!("message {number}"));
            socket.send(said.clone()).await?;
            let heard = timeout(PATIENCE, socket.next()).await?.context("it ended")??;
            ensure!(heard == said, "{heard:?} came back for {said:?}");
        }
        Ok(())
    }

    async fn uploads(&self) -> Result<()> {
        let answer = self.ask(&app(), "POST", "/", &[], &"x".repeat(UPLOAD)).await?;
        let seen: Value = serde_json::from_str(&answer.body).with_context(|| format!("{answer:?}"))?;
        ensure!(seen["bytes"] == UPLOAD, "the app was sent {seen}");
        Ok(())
    }

    /// The app sends the last part only after another request, which is made when the first has come.
    async fn parts(&self, patience: Duration) -> Result<()> {
        static ASKED: AtomicU64 = AtomicU64::new(0);
        let key = ASKED.fetch_add(1, Ordering::Relaxed);
        let mut stream = self.connect(&app()).await?;
        let host = self.authority(&app());
        let head = format!("GET /parts?{key} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).await?;
        stream.flush().await?;
        let first = timeout(patience, read_to(&mut stream, "first\n")).await;
        // In any case: else the app waits for ever.
        let asked = self.ask(&app(), "GET", &format!("/on?{key}"), &[], "").await?;
        ensure!(asked.status == 200, "{asked:?}");
        first.context("the first part did not come by itself")??;
        timeout(PATIENCE, read_to(&mut stream, "last\n")).await?
    }

    async fn ask(&self, host: &str, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Result<Answer> {
        let stream = self.connect(host).await?;
        let authority = self.authority(host);
        timeout(
            PATIENCE,
            http::send_over(stream, method, &authority, path, headers, body),
        )
        .await?
    }

    async fn connect(&self, host: &str) -> Result<TlsStream<TcpStream>> {
        let socket = TcpSocket::new_v4()?;
        socket.bind(SocketAddr::from((VISITOR, 0)))?;
        let proxy = SocketAddr::from((Ipv4Addr::LOCALHOST, self.port));
        let stream = timeout(PATIENCE, socket.connect(proxy)).await??;
        let name = ServerName::try_from(host.to_owned())?;
        Ok(timeout(PATIENCE, self.tls.connect(name, stream)).await??)
    }

    fn authority(&self, host: &str) -> String {
        format!("{host}:{}", self.port)
    }
}

/// The host of the app.
pub fn app() -> String {
    format!("live--{WORKSPACE}--{USER}.{SANDBOXES}")
}

async fn read_to(stream: &mut (impl AsyncRead + Unpin), end: &str) -> Result<()> {
    let mut text = String::new();
    let mut chunk = [0; 1024];
    while !text.contains(end) {
        let read = stream.read(&mut chunk).await?;
        ensure!(read > 0, "it ended before {end:?}: {text}");
        text += &String::from_utf8_lossy(&chunk[..read]);
    }
    Ok(())
}
