//! `/api/events`: what changes is told as it changes, to whom it concerns, and again to who comes back.

use std::net::IpAddr;

use axum::body::{Body, BodyDataStream};
use axum::http::{Request, StatusCode};
use choir_core::Slot;
use choir_hypervisor::auth::extract::PeerAddr;
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use tower::ServiceExt as _;

use super::wire::control_cookie;
use super::{Box, change, workspace};
use crate::support::Browser;

/// An open stream, and what came of it and was not looked at yet.
struct Stream {
    body: BodyDataStream,
    text: String,
}

#[derive(Debug)]
struct Told {
    name: String,
    id: String,
    data: Value,
}

impl Stream {
    async fn open(browser: &Browser, after: Option<&str>) -> Self {
        let mut request = Request::get("/api/events")
            .header("host", "localhost:9090")
            .header("accept", "text/event-stream")
            .header("cookie", control_cookie(browser));
        if let Some(id) = after {
            request = request.header("last-event-id", id);
        }
        let mut request = request.body(Body::empty()).unwrap();
        let peer: IpAddr = "192.0.2.1".parse().unwrap();
        request.extensions_mut().insert(PeerAddr(peer));
        let answer = browser.router.clone().oneshot(request).await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        assert_eq!(answer.headers()["content-type"], "text/event-stream");
        Self {
            body: answer.into_body().into_data_stream(),
            text: String::new(),
        }
    }

    async fn next(&mut self) -> Told {
        loop {
            if let Some((event, rest)) = self.text.split_once("\n\n") {
                let field = |name: &str| {
                    let found = event.lines().find_map(|line| line.strip_prefix(name));
                    found.unwrap_or_default().trim().to_owned()
                };
                let told = Told {
                    name: field("event:"),
                    id: field("id:"),
                    data: serde_json::from_str(&field("data:")).unwrap_or(Value::Null),
                };
                self.text = rest.to_owned();
                return told;
            }
            let soon = std::time::Duration::from_secs(20);
            let part = tokio::time::timeout(soon, self.body.next()).await.expect("an event");
            self.text += std::str::from_utf8(&part.expect("it goes on").unwrap()).unwrap();
        }
    }

    /// The next that is named so and is wanted, and the id of it.
    async fn find(&mut self, name: &str, wanted: impl Fn(&Value) -> bool) -> Told {
        loop {
            let told = self.next().await;
            if told.name == name && wanted(&told.data) {
                return told;
            }
        }
    }
}

#[tokio::test]
async fn states_and_steps_are_told_in_order_to_their_owner_alone() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let mut bob = start.member(&mut ada, "bob").await;
    let mut bobs = Stream::open(&bob, None).await;
    let mut stream = Stream::open(&ada, None).await;
    assert_eq!(stream.next().await.name, "begin");
    let [live, dev] = workspace(&mut ada).await;
    stream.find("workspace", |data| data["name"] == "main").await;
    change(&mut ada, Slot::Live, "start").await;
    for state in ["starting", "ready"] {
        let of_live = |data: &Value| data["sandbox"] == live.as_str();
        let mut told = stream.find("sandbox", of_live).await;
        // Its volume may have been made while we looked.
        while told.data["state"] == "stopped" {
            told = stream.find("sandbox", of_live).await;
        }
        assert_eq!(told.data["state"], state, "{told:?}");
    }
    change(&mut ada, Slot::Dev, "start").await;
    let swapped = ada
        .post("/api/workspaces/main/swap?wait_s=60", json!({}))
        .await
        .expect(StatusCode::OK);
    for step in ["preparing", "verifying", "switching", "draining", "succeeded"] {
        let told = stream.find("deployment", |_| true).await;
        assert_eq!(
            (&told.data["id"], &told.data["step"]),
            (&swapped["id"], &json!(step)),
            "{told:?}"
        );
    }
    // The control for what bob was not told: his own.
    workspace(&mut bob).await;
    assert_eq!(bobs.next().await.name, "begin");
    let first = bobs.next().await;
    assert!(first.name == "workspace" || first.name == "sandbox", "{first:?}");
    for id in [&live, &dev] {
        assert!(!bobs.text.contains(id.as_str()) && first.data["sandbox"] != id.as_str());
    }
}

#[tokio::test]
async fn who_comes_back_is_told_what_was_missed_and_after_a_restart_that_it_was() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, _] = workspace(&mut ada).await;
    let mut stream = Stream::open(&ada, None).await;
    let begun = stream.next().await;
    drop(stream);
    change(&mut ada, Slot::Live, "start").await;
    let mut again = Stream::open(&ada, Some(&begun.id)).await;
    let ready = |data: &Value| data["sandbox"] == live.as_str() && data["state"] == "ready";
    let told = again.find("sandbox", ready).await;

    let restarted = start.restarted().await;
    ada.router = restarted.router.clone();
    let mut after = Stream::open(&ada, Some(&told.id)).await;
    assert_eq!(after.next().await.name, "begin");
    assert_eq!(after.next().await.name, "missed");
}

#[tokio::test]
async fn who_opens_the_address_gets_no_page_that_loads_for_ever() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    ada.get("/api/events")
        .await
        .refused(StatusCode::NOT_ACCEPTABLE, "not_acceptable");
}
