//! What visitors of live see while it changes, and the guard that takes a swap back for their sake.

use std::time::Duration;

use axum::http::{Method, StatusCode};
use choir_core::Slot;
use choir_core::sandbox::Observed;
use choir_runtime::sim::Fault;
use serde_json::{Value, json};

use super::{MAIN, succeeds, used};
use crate::fleet::wire::{Served, status};
use crate::fleet::{Box, sandbox, shown};
use crate::support::Browser;

const ASK: &str = "GET / HTTP/1.1\r\nHost: live--main--ada.localhost:9090\r\nConnection: close\r\n\r\n";

async fn patched(ada: &mut Browser, patch: Value) {
    ada.fetch(Method::PATCH, MAIN, Some(patch)).await.expect(StatusCode::OK);
}

/// A release whose app is expected on this port.
async fn on_port(ada: &mut Browser, port: u16) -> Value {
    let releases = ada.get("/api/releases").await.expect(StatusCode::OK);
    let asked = json!({"image": releases["items"][0]["image_digest"], "config": {"app_port": port}});
    ada.post("/api/releases", asked).await.expect(StatusCode::CREATED)["id"].clone()
}

/// A swap whose app does not listen, under a guard that judges five requests.
async fn broken_swap(ada: &mut Browser) -> Value {
    let guard = json!({"watch_s": 60, "min_requests": 5});
    patched(ada, json!({"access": {"live": "public"}, "guard": guard})).await;
    let release = on_port(ada, 4000).await;
    succeeds(ada, "slots/dev/deploy", json!({"release": release})).await;
    succeeds(ada, "swap", json!({})).await
}

/// The newest deployment, once it is another than this.
async fn next_after(ada: &mut Browser, known: &Value) -> Value {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    loop {
        let listed = ada.get(&format!("{MAIN}/deployments")).await.expect(StatusCode::OK);
        let newest = listed["items"][0].clone();
        if newest["id"] != known["id"] && !newest["finished_at"].is_null() {
            return newest;
        }
        assert!(tokio::time::Instant::now() < deadline, "nothing came after {known}");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_swap_after_which_requests_fail_is_rolled_back_by_the_guard_and_says_why() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [good, _] = used(&start, &mut ada).await;
    let served = Served::over(&start).await;
    let swapped = broken_swap(&mut ada).await;
    for _ in 0..5 {
        assert_eq!(status(&served.raw(ASK).await), 502);
    }
    let back = next_after(&mut ada, &swapped).await;
    assert_eq!(
        (&back["kind"], &back["step"]),
        (&json!("rollback"), &json!("succeeded")),
        "{back}"
    );
    assert_eq!(back["reason"], "after the swap 5 of 5 requests failed");
    assert_eq!(sandbox(&shown(&mut ada).await, Slot::Live), good);
    assert_eq!(status(&served.raw(ASK).await), 200);
    let trail = ada
        .get("/me/audit?action=workspace.rollback")
        .await
        .expect(StatusCode::OK);
    assert_eq!(trail["items"][0]["actor"], "system", "{trail}");
}

#[tokio::test]
async fn a_guard_goes_on_after_a_restart_of_the_hypervisor() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [good, _] = used(&start, &mut ada).await;
    let swapped = broken_swap(&mut ada).await;
    let again = start.restarted().await;
    ada.router = again.router.clone();
    let served = Served::over(&again).await;
    for _ in 0..5 {
        assert_eq!(status(&served.raw(ASK).await), 502);
    }
    let back = next_after(&mut ada, &swapped).await;
    assert_eq!(back["step"], "succeeded", "{back}");
    assert_eq!(sandbox(&shown(&mut ada).await, Slot::Live), good);
}

/// The honest twin: over many looks of the guard.
#[tokio::test]
async fn a_swap_stays_for_as_long_as_requests_are_answered() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [_, new] = used(&start, &mut ada).await;
    let served = Served::over(&start).await;
    start.world.listen(4000);
    let swapped = broken_swap(&mut ada).await;
    patched(&mut ada, json!({"ports": {"4001": "public"}})).await;
    let other = ASK.replace("live--", "4001--live--");
    let begun = tokio::time::Instant::now();
    while begun.elapsed() < Duration::from_secs(1) {
        assert_eq!(status(&served.raw(ASK).await), 200);
        // Another port of it is not its app.
        assert_eq!(status(&served.raw(&other).await), 502);
    }
    assert_eq!(sandbox(&shown(&mut ada).await, Slot::Live), new);
    let listed = ada.get(&format!("{MAIN}/deployments")).await.expect(StatusCode::OK);
    assert_eq!(listed["items"][0]["id"], swapped["id"], "{listed}");
}

#[tokio::test]
async fn a_request_that_waits_for_a_deploy_goes_to_the_port_that_the_new_release_says() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, _] = used(&start, &mut ada).await;
    patched(&mut ada, json!({"access": {"live": "public"}})).await;
    let served = Served::over(&start).await;
    start.world.listen(4000);
    assert!(served.raw(ASK).await.contains("\"port\":3000"));
    let release = on_port(&mut ada, 4000).await;
    // The second try is half a second later, which is time enough for a request to come.
    start.world.fail_next(&live, Fault::FailCreate);
    let mut other = ada.clone();
    let deploying = tokio::spawn(async move {
        succeeds(&mut other, "slots/live/deploy", json!({"release": release})).await;
    });
    let handle = start.app.fleet.handle(&live).unwrap();
    let away = |status: &choir_hypervisor::reconcile::Status| !matches!(status.observed, Observed::Ready { .. });
    handle.settle(Duration::from_secs(20), away).await;
    let held = served.raw(ASK).await;
    assert!(status(&held) == 200 && held.contains("\"port\":4000"), "{held}");
    deploying.await.unwrap();
}
