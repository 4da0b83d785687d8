//! What leaves sandboxes, through the hypervisor as it is composed: a world outside that records, and programs inside
//! that speak to the broker's door and to the proxy.

mod answers;
mod closed;
mod door;
mod flood;
mod grants;
mod outdoors;
mod policy;
mod providers;
mod replaced;
mod scope;
mod ssh;
mod taken;
mod trail;

use std::sync::Arc;

use axum::body::Body;
use axum::http::{Method, Request, StatusCode};
use bytes::Bytes;
use choir_core::{Generation, SandboxId, Slot};
use choir_hypervisor::clock::MockClock;
use choir_hypervisor::config::Config;
use choir_runtime::{ListenerKind, Stream};
use choir_store::{AuditFilter, AuditRow};
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};

use self::outdoors::{Outdoors, PUBLIC};
use super::wire::{clock, start_configured};
use super::{Box as Start, change, workspace};
use crate::support::Browser;

/// What must never be seen inside.
const SECRET: &str = "ghp_Canary0Canary1Canary2";
const API: &str = "api.a.example";

/// A hypervisor, its owner ada with a secret and both sandboxes running, and the world outside.
struct Scene {
    outdoors: Arc<Outdoors>,
    clock: Arc<MockClock>,
    start: Start,
    ada: Browser,
    sandboxes: [SandboxId; 2],
}

impl Scene {
    async fn new() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(configure: impl FnOnce(&mut Config)) -> Self {
        Self::made(tempfile::tempdir().unwrap(), configure).await
    }

    /// With its database in this directory.
    async fn on(directory: tempfile::TempDir) -> Self {
        Self::made(directory, |_| {}).await
    }

    async fn made(directory: tempfile::TempDir, configure: impl FnOnce(&mut Config)) -> Self {
        let outdoors = Outdoors::new();
        outdoors.host(API, PUBLIC);
        let clock = clock();
        let start = start_configured(directory, &clock, |sim| sim, outdoors.outside(), configure).await;
        let mut ada = start.ada().await;
        let sandboxes = workspace(&mut ada).await;
        for slot in Slot::ALL {
            change(&mut ada, slot, "start").await;
        }
        let mut scene = Self {
            outdoors,
            clock,
            start,
            ada,
            sandboxes,
        };
        scene.store("gh", SECRET, false).await;
        scene
    }

    async fn store(&mut self, name: &str, value: &str, reveal: bool) {
        let body = json!({"value": value, "reveal": reveal});
        let answer = self
            .ada
            .fetch(Method::PUT, &format!("/me/secrets/{name}"), Some(body))
            .await;
        assert!(answer.status.is_success(), "{}", answer.text());
    }

    /// A grant of the secret `gh` to dev for the host of the tests, with these fields changed; its id.
    async fn grant(&mut self, changes: Value) -> String {
        let mut asked = json!({
            "workspace": "main", "slot": "dev", "capability": "github", "secret": "gh", "hosts": [API],
            "methods": ["GET", "POST"], "template": "bearer",
        });
        for (field, value) in changes.as_object().unwrap() {
            asked[field] = value.clone();
        }
        let made = self.ada.post("/me/grants", asked).await.expect(StatusCode::CREATED);
        made["id"].as_str().unwrap().to_owned()
    }

    /// A new process over the same database and sandboxes, once it has taken these over.
    async fn restart(&mut self) {
        self.start = self.start.restarted().await;
        for id in &self.sandboxes {
            let handle = self.start.app.fleet.handle(id).unwrap();
            let ready = handle
                .settle(std::time::Duration::from_secs(20), |s| s.observed.name() == "ready")
                .await;
            assert_eq!(ready.observed.name(), "ready");
        }
    }

    /// The sandboxes exchange their slots, and the one that was frozen goes on.
    async fn swap(&mut self) {
        self.ada
            .post("/api/workspaces/main/swap?wait_s=60", json!({}))
            .await
            .expect(StatusCode::OK);
        for id in &self.sandboxes {
            let handle = self.start.app.fleet.handle(id).unwrap();
            handle.wake(std::time::Duration::from_secs(20)).await.unwrap();
        }
    }

    /// The sandbox that was put into this slot at first.
    fn generation(&self, slot: Slot) -> Generation {
        let id = &self.sandboxes[usize::from(slot == Slot::Dev)];
        self.start.app.fleet.handle(id).unwrap().ready().unwrap()
    }

    /// What a program in dev's first sandbox gets from the broker.
    async fn ask(&self, request: Request<Body>) -> Told {
        self.ask_from(Slot::Dev, request).await
    }

    async fn ask_from(&self, slot: Slot, request: Request<Body>) -> Told {
        self.begin(slot, request).await.whole().await
    }

    /// The same, with the body still on its way.
    async fn begin(&self, slot: Slot, request: Request<Body>) -> Begun {
        begin(self.connect_broker(slot).await, request).await
    }

    async fn connect_broker(&self, slot: Slot) -> Stream {
        let sim = &self.start.sim;
        sim.connect_inside(&self.generation(slot), ListenerKind::Broker).await
    }

    /// A connection to the broker from a program in dev.
    async fn connect_dev(&self) -> Stream {
        self.connect_broker(Slot::Dev).await
    }

    async fn get(&self, path: &str) -> Told {
        self.ask(Request::get(path).body(Body::empty()).unwrap()).await
    }

    /// All audit rows of an action, oldest first, as subject and outcome.
    async fn audited(&self, action: &str) -> Vec<(String, String)> {
        let rows = self.rows(action).await;
        rows.into_iter().map(|row| (row.subject, row.outcome)).collect()
    }

    async fn rows(&self, action: &str) -> Vec<AuditRow> {
        // Outcomes are written behind the answer; a write that is asked for later comes after them.
        tokio::task::yield_now().await;
        self.start.app.store.check().await.unwrap();
        let filter = AuditFilter {
            action: Some(action.into()),
            limit: 500,
            ..AuditFilter::default()
        };
        let mut rows = self.start.app.store.audit_rows(filter).await.unwrap();
        rows.reverse();
        rows
    }

    /// Tells the hypervisor to stop, which makes it record what it only counted so far, and waits until the rows of this
    /// action and outcome stand for so many events; those rows.
    async fn told_in_the_end(&self, action: &str, outcome: &str, events: u64) -> Vec<AuditRow> {
        self.start.app.stopping.cancel();
        let told = async {
            loop {
                let filter = AuditFilter {
                    action: Some(action.into()),
                    outcome: Some(outcome.into()),
                    limit: 5000,
                    ..AuditFilter::default()
                };
                let rows = self.start.app.store.audit_rows(filter).await.unwrap();
                let stand_for: u64 = rows.iter().map(|row| row.times.unwrap_or(1)).sum();
                assert!(stand_for <= events, "{stand_for} of {events}: {rows:?}");
                if stand_for == events {
                    return rows;
                }
            }
        };
        let waited = tokio::time::timeout(std::time::Duration::from_secs(20), told).await;
        waited.expect("all events are told of")
    }

    /// Waits until an intent of this action has ended so.
    async fn until(&self, action: &str, outcome: &str) {
        let ended = async {
            while !self.audited(action).await.iter().any(|(_, got)| got == outcome) {
                tokio::task::yield_now().await;
            }
        };
        let waited = tokio::time::timeout(std::time::Duration::from_secs(20), ended).await;
        assert!(waited.is_ok(), "{:?}", self.audited(action).await);
    }
}

/// Sends one request and waits for the head of its answer.
async fn begin(stream: Stream, request: Request<Body>) -> Begun {
    let (mut send, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    let (mut head, body) = request.into_parts();
    head.headers.entry("host").or_insert("127.0.0.1:9091".parse().unwrap());
    let response = send.send_request(Request::from_parts(head, body)).await.unwrap();
    Begun(response)
}

/// The same, and all of the answer.
async fn exchange(stream: Stream, request: Request<Body>) -> Told {
    begin(stream, request).await.whole().await
}

/// An answer whose head has come.
struct Begun(http::Response<hyper::body::Incoming>);

impl Begun {
    async fn whole(self) -> Told {
        let (head, mut body) = self.0.into_parts();
        let mut told = Told {
            status: head.status,
            headers: head.headers,
            reason: head
                .extensions
                .get::<hyper::ext::ReasonPhrase>()
                .map(|r| r.as_bytes().to_vec()),
            body: Vec::new(),
            cut: false,
        };
        while let Some(frame) = body.frame().await {
            match frame {
                Ok(frame) => told.body.extend(frame.into_data().unwrap_or_default()),
                Err(_) => told.cut = true,
            }
        }
        told
    }

    /// The next bytes of the body.
    async fn next(&mut self) -> Bytes {
        self.0.body_mut().frame().await.unwrap().unwrap().into_data().unwrap()
    }
}

/// All that a program inside was told.
#[derive(Debug)]
struct Told {
    status: StatusCode,
    headers: axum::http::HeaderMap,
    reason: Option<Vec<u8>>,
    body: Vec<u8>,
    /// The connection broke before the body's end.
    cut: bool,
}

impl Told {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {}", self.text()))
    }

    /// Whether it has this in it, in head or body.
    fn has(&self, text: &str) -> bool {
        let head = format!(
            "{:?} {:?}",
            self.headers,
            self.reason.as_deref().map(String::from_utf8_lossy)
        );
        head.to_lowercase().contains(&text.to_lowercase()) || self.text().contains(text)
    }

    #[track_caller]
    fn denied(&self, rule: &str) {
        assert_eq!(self.status, StatusCode::FORBIDDEN, "{}", self.text());
        assert_eq!(self.json()["error"]["rule"], rule, "{}", self.text());
    }

    /// All but the request's own id.
    fn words(&self) -> Value {
        let mut body = self.json();
        body["error"]["request_id"] = Value::Null;
        json!([self.status.as_u16(), body])
    }
}
