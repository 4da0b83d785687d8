//! The control host as tests see it: its router behind its guard, a database of its own, a clock that is moved by hand,
//! and browsers with software passkeys.

pub mod limited;
pub mod passkey;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode};
use choir_core::Hosts;
use choir_hypervisor::auth::{self, Auth, AuthDeps, PeerAddr, ROUTES, RegistrationMode};
use choir_hypervisor::clock::MockClock;
use choir_hypervisor::random::OsRandom;
use choir_proxy::Peer;
use choir_store::Store;
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use jiff::SignedDuration;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tower::ServiceExt;

use passkey::{Behaviour, SoftKey};

pub const ORIGIN: &str = "http://localhost:9090";
pub const SESSION: &str = "__Host-choir";

pub struct TestApp {
    dir: Arc<tempfile::TempDir>,
    pub store: Store,
    pub clock: Arc<MockClock>,
    pub auth: Auth,
    pub router: Router,
}

impl TestApp {
    pub fn new() -> Self {
        Self::with(RegistrationMode::Invite)
    }

    pub fn with(registration: RegistrationMode) -> Self {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let clock = Arc::new(MockClock::new("2026-01-02T03:04:05Z".parse().unwrap()));
        Self::build(dir, clock, registration)
    }

    fn build(dir: Arc<tempfile::TempDir>, clock: Arc<MockClock>, registration: RegistrationMode) -> Self {
        let store = Store::open(&dir.path().join("choir.db")).unwrap();
        let auth = Auth::new(AuthDeps {
            store: store.clone(),
            clock: clock.clone(),
            random: Arc::new(OsRandom),
            origin: ORIGIN.parse().unwrap(),
            rp_id: "localhost".into(),
            hosts: Hosts::new("localhost", "localhost", Some(9090)),
            pepper: Some([42; 32]),
            session_idle: SignedDuration::from_hours(24),
            session_absolute: SignedDuration::from_hours(7 * 24),
            registration,
        })
        .unwrap();
        let router = auth::protect(auth.router(), &auth, &[ROUTES]);
        Self {
            dir,
            store,
            clock,
            auth,
            router,
        }
    }

    /// The same database, with nothing left in memory.
    pub fn restarted(&self) -> Self {
        Self::build(self.dir.clone(), self.clock.clone(), RegistrationMode::Invite)
    }

    /// The database and what SQLite keeps beside it.
    pub fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let entries = std::fs::read_dir(self.dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().path());
        entries
            .filter(|path| !path.ends_with("choir.db-shm"))
            .map(|path| (path.clone(), std::fs::read(&path).unwrap()))
            .collect()
    }

    pub async fn claim(&self) -> String {
        self.auth
            .ensure_claim()
            .await
            .unwrap()
            .expect("nobody has registered")
            .expose()
            .to_owned()
    }

    pub fn browser(&self) -> Browser {
        Browser::new(self.router.clone())
    }

    /// The browser of the first user, `ada`, who is the admin.
    pub async fn ada(&self) -> Browser {
        let mut browser = self.browser();
        let claim = self.claim().await;
        browser.register("ada", Some(&claim)).await.expect(StatusCode::OK);
        browser
    }

    /// The browser of one more user, invited by an admin.
    pub async fn member(&self, admin: &mut Browser, name: &str) -> Browser {
        let invite = admin
            .post("/admin/invites", json!({}))
            .await
            .expect(StatusCode::CREATED);
        let mut browser = self.browser();
        browser
            .register(name, invite["invite"].as_str())
            .await
            .expect(StatusCode::OK);
        browser
    }
}

/// A browser with cookies and one passkey.
#[derive(Clone)]
pub struct Browser {
    pub router: Router,
    pub cookies: BTreeMap<String, String>,
    pub key: SoftKey,
    pub behaviour: Behaviour,
    pub peer: IpAddr,
    pub recovery_codes: Vec<String>,
}

impl Browser {
    /// A browser without cookies, with an honest passkey of its own.
    pub fn new(router: Router) -> Self {
        Self {
            router,
            cookies: BTreeMap::new(),
            key: SoftKey::new(),
            behaviour: Behaviour {
                origin: ORIGIN.into(),
                rp_id: "localhost".into(),
                verifies_user: true,
                kind: None,
            },
            peer: "192.0.2.1".parse().unwrap(),
            recovery_codes: Vec::new(),
        }
    }

    /// What a page of ours sends with `fetch`.
    pub async fn post(&mut self, path: &str, body: Value) -> Answer {
        self.fetch(Method::POST, path, Some(body)).await
    }

    pub async fn get(&mut self, path: &str) -> Answer {
        self.fetch(Method::GET, path, None).await
    }

    pub async fn delete(&mut self, path: &str) -> Answer {
        self.fetch(Method::DELETE, path, None).await
    }

    pub async fn fetch(&mut self, method: Method, path: &str, body: Option<Value>) -> Answer {
        let mut request = Request::builder()
            .method(method.clone())
            .uri(path)
            .header("x-choir", "1");
        if method != Method::GET {
            request = request.header("origin", ORIGIN).header("sec-fetch-site", "same-origin");
        }
        let body = match body {
            Some(body) => {
                request = request.header("content-type", "application/json");
                Body::from(body.to_string())
            }
            None => Body::empty(),
        };
        self.send(request.body(body).unwrap()).await
    }

    /// What a person does who opens an address.
    pub async fn open(&mut self, path: &str) -> Answer {
        let request = Request::get(path)
            .header("sec-fetch-mode", "navigate")
            .header("accept", "text/html");
        self.send(request.body(Body::empty()).unwrap()).await
    }

    /// Sends a request with this browser's cookies and keeps those of the answer.
    pub async fn send(&mut self, mut request: Request<Body>) -> Answer {
        if !self.cookies.is_empty() {
            let pairs: Vec<_> = self
                .cookies
                .iter()
                .map(|(name, value)| format!("{name}={value}"))
                .collect();
            request
                .headers_mut()
                .insert("cookie", pairs.join("; ").parse().unwrap());
        }
        let answer = send(&self.router, self.peer, request).await;
        for line in answer.headers.get_all("set-cookie") {
            let line = line.to_str().unwrap();
            for attribute in ["Path=/", "Secure", "HttpOnly", "SameSite=Lax"] {
                assert!(line.split("; ").any(|part| part == attribute), "{line}");
            }
            let (pair, attributes) = line.split_once(';').unwrap();
            let (name, value) = pair.split_once('=').unwrap();
            assert!(name.starts_with("__Host-"), "{line}");
            if attributes.ends_with("Max-Age=0") {
                self.cookies.remove(name);
            } else {
                self.cookies.insert(name.into(), value.into());
            }
        }
        answer
    }

    pub fn session(&self) -> String {
        self.cookies.get(SESSION).expect("this browser is signed in").clone()
    }

    pub async fn register(&mut self, name: &str, invite: Option<&str>) -> Answer {
        let start = json!({"username": name, "display_name": "", "invite": invite});
        let answer = self.register_with(start).await;
        if answer.status == StatusCode::OK {
            let codes = answer.json()["recovery_codes"].clone();
            self.recovery_codes = serde_json::from_value(codes).unwrap();
        }
        answer
    }

    /// Both halves of a registration.
    pub async fn register_with(&mut self, start: Value) -> Answer {
        let options = self.post("/auth/register/start", start).await;
        if options.status != StatusCode::OK {
            return options;
        }
        let credential = self.key.create(&options.json(), &self.behaviour).await;
        self.post("/auth/register/finish", json!({"credential": credential}))
            .await
    }

    pub async fn login(&mut self) -> Answer {
        self.assert_at("/auth/login").await
    }

    pub async fn step_up(&mut self) -> Answer {
        self.assert_at("/auth/step-up").await
    }

    async fn assert_at(&mut self, path: &str) -> Answer {
        let options = self.post(&format!("{path}/start"), json!({})).await;
        if options.status != StatusCode::OK {
            return options;
        }
        let credential = self.key.assert(&options.json(), &self.behaviour).await;
        self.post(&format!("{path}/finish"), json!({"credential": credential}))
            .await
    }

    pub async fn is_signed_in(&mut self) -> bool {
        self.get("/auth/me").await.expect(StatusCode::OK)["authenticated"] == true
    }
}

/// The program that listens there, in the place of a router.
pub fn remote(address: SocketAddr) -> Router {
    Router::new().fallback(async move |mut request: Request<Body>| {
        let stream = TokioIo::new(TcpStream::connect(address).await.unwrap());
        let (mut send, connection) = hyper::client::conn::http1::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        request.extensions_mut().clear();
        send.send_request(request).await.unwrap().map(Body::new)
    })
}

/// Sends a request as it is.
pub async fn send(router: &Router, peer: IpAddr, mut request: Request<Body>) -> Answer {
    let host = HeaderValue::from_static("localhost:9090");
    request.headers_mut().entry("host").or_insert(host);
    request.extensions_mut().insert(PeerAddr(peer));
    request.extensions_mut().insert(Peer {
        addr: peer,
        https: false,
    });
    let (head, body) = router.clone().oneshot(request).await.unwrap().into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    Answer {
        status: head.status,
        headers: head.headers,
        body,
    }
}

/// What in the headers of an answer would let a page of another origin read it or frame it.
pub fn lapses(headers: &HeaderMap) -> Vec<String> {
    let mut found = Vec::new();
    let named = headers.keys().map(HeaderName::as_str);
    found.extend(
        named
            .filter(|name| name.starts_with("access-control-"))
            .map(str::to_owned),
    );
    let of = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let policy = of("content-security-policy");
    for part in [
        "default-src 'self'",
        "script-src 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
        "form-action 'self'",
        "object-src 'none'",
    ] {
        if !policy.split("; ").any(|found| found == part) {
            found.push(format!("no {part} in the policy {policy:?}"));
        }
    }
    for (name, value) in [
        ("x-content-type-options", "nosniff"),
        ("x-frame-options", "DENY"),
        ("cross-origin-opener-policy", "same-origin"),
        ("cross-origin-resource-policy", "same-origin"),
    ] {
        if of(name) != value {
            found.push(format!("{name} is {:?}", of(name)));
        }
    }
    for name in ["referrer-policy", "cache-control"] {
        if of(name).is_empty() {
            found.push(format!("no {name}"));
        }
    }
    found
}

#[derive(Debug, Clone)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    #[track_caller]
    pub fn expect(&self, status: StatusCode) -> Value {
        assert_eq!(self.status, status, "{}", self.text());
        if self.body.is_empty() { Value::Null } else { self.json() }
    }

    #[track_caller]
    pub fn refused(&self, status: StatusCode, code: &str) {
        assert_eq!((self.status, self.code().as_str()), (status, code), "{}", self.text());
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {}", self.text()))
    }

    #[track_caller]
    pub fn expect_page(&self) {
        assert_eq!(self.status, StatusCode::OK, "{}", self.text());
        assert!(self.headers["content-type"].to_str().unwrap().starts_with("text/html"));
    }

    /// The error code; empty when there is none.
    pub fn code(&self) -> String {
        let body: Value = serde_json::from_slice(&self.body).unwrap_or_default();
        body["error"]["code"].as_str().unwrap_or_default().to_owned()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn location(&self) -> &str {
        self.headers
            .get("location")
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default()
    }
}

/// Says aloud what is left out and why, also to whoever counts.
pub fn skip(what: &str) {
    use std::io::Write as _;
    eprintln!("skipped: {what}");
    if let Some(path) = std::env::var_os("CHOIR_SKIP_LOG")
        && let Ok(mut log) = std::fs::OpenOptions::new().append(true).create(true).open(path)
    {
        let _ = writeln!(log, "{what}");
    }
}
