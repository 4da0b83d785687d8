//! Daily caps: checked before a call, for everybody at once, and told in a way that helps.

use axum::http::{Method, StatusCode};
use choir_core::Slot;
use futures_util::future::join_all;
use jiff::SignedDuration;
use serde_json::json;

use super::super::outdoors::plain;
use super::{CHAT, Gate, MESSAGES, OPENAI, post};
use crate::fleet::sandbox;

const ANSWER: &str = "{\"choices\":[{\"message\":{}}],\"usage\":{\"prompt_tokens\":30,\"completion_tokens\":20}}";

#[tokio::test]
async fn of_fifty_requests_at_once_exactly_as_many_pass_as_the_cap_allows() {
    let gate = Gate::with(|openai| openai.daily_requests = Some(10)).await;
    let asked = (0..50).map(|n| {
        let slot = if n % 2 == 0 { Slot::Dev } else { Slot::Live };
        gate.ask_from(slot, post(CHAT, json!({})))
    });
    let told = join_all(asked).await;
    let of = |status: StatusCode| told.iter().filter(|it| it.status == status).count();
    assert_eq!((of(StatusCode::OK), of(StatusCode::TOO_MANY_REQUESTS)), (10, 40));
    assert_eq!(gate.outdoors.seen().len(), 10);
    let capped = told
        .iter()
        .find(|it| it.status == StatusCode::TOO_MANY_REQUESTS)
        .unwrap();
    let message = capped.refused(StatusCode::TOO_MANY_REQUESTS, "daily_cap");
    for part in [
        "10 of 10 requests",
        "2026-01-02",
        "daily_requests",
        "00:00 UTC",
        "[providers.openai]",
    ] {
        assert!(message.contains(part), "{message}");
    }
    // It is five past three.
    assert_eq!(
        capped.headers["retry-after"],
        (24 * 3600 - (3 * 3600 + 4 * 60 + 5)).to_string()
    );
    assert_eq!(capped.headers["x-should-retry"], "false");
    assert_eq!(capped.json()["error"]["type"], "rate_limit_error");
    let rows = gate.audited("provider.use").await;
    assert_eq!(rows.iter().filter(|(_, outcome)| outcome == "capped").count(), 40);
    // Another provider has its own cap, and the next day a new one.
    assert_eq!(gate.ask(post(MESSAGES, json!({}))).await.status, StatusCode::OK);
    gate.clock.advance(SignedDuration::from_hours(21));
    assert_eq!(gate.chat().await.status, StatusCode::OK);
}

#[tokio::test]
async fn tokens_that_are_used_up_refuse_the_next_call_and_not_one_with_a_key_of_ones_own() {
    let mut gate = Gate::with(|openai| openai.daily_tokens = Some(60)).await;
    gate.outdoors.answers(|_| plain(ANSWER));
    assert_eq!(gate.chat().await.status, StatusCode::OK);
    gate.used(json!([["dev openai platform", 1, 30, 0, 20]])).await;
    // 50 of 60: one more passes, and may overshoot.
    assert_eq!(
        gate.ask_from(Slot::Live, post(CHAT, json!({}))).await.status,
        StatusCode::OK
    );
    gate.used(json!([
        ["dev openai platform", 1, 30, 0, 20],
        ["live openai platform", 1, 30, 0, 20]
    ]))
    .await;
    let message = gate.chat().await.refused(StatusCode::TOO_MANY_REQUESTS, "daily_cap");
    assert!(
        message.contains("100 of 60 tokens") && message.contains("daily_tokens"),
        "{message}"
    );
    gate.own(Slot::Dev, "openai", OPENAI).await;
    assert_eq!(gate.chat().await.status, StatusCode::OK);
    gate.ask_from(Slot::Live, post(CHAT, json!({})))
        .await
        .refused(StatusCode::TOO_MANY_REQUESTS, "daily_cap");
    assert_eq!(gate.outdoors.seen().len(), 3);
}

#[tokio::test]
async fn a_sandboxs_cap_is_its_own_and_goes_with_it_through_a_swap() {
    let mut gate = Gate::with(|openai| openai.sandbox_daily_requests = Some(1)).await;
    let ask = || post(CHAT, json!({}));
    assert_eq!(gate.ask_from(Slot::Dev, ask()).await.status, StatusCode::OK);
    let message = gate
        .ask_from(Slot::Dev, ask())
        .await
        .refused(StatusCode::TOO_MANY_REQUESTS, "daily_cap");
    assert!(
        message.contains("this sandbox used 1 of 1 requests") && message.contains("sandbox_daily_requests"),
        "{message}"
    );
    gate.swap().await;
    gate.ask_from(Slot::Dev, ask())
        .await
        .refused(StatusCode::TOO_MANY_REQUESTS, "daily_cap");
    assert_eq!(gate.ask_from(Slot::Live, ask()).await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_new_workspace_is_no_new_day() {
    let mut gate = Gate::with(|openai| openai.daily_requests = Some(1)).await;
    assert_eq!(gate.chat().await.status, StatusCode::OK);
    gate.ada.delete("/api/workspaces/main?wait_s=60").await;
    let body = json!({"name": "second"});
    let made = gate.ada.post("/api/workspaces", body).await.expect(StatusCode::CREATED);
    gate.0.sandboxes = Slot::ALL.map(|slot| sandbox(&made, slot));
    let patch = Some(json!({"provider_mode": "api_key"}));
    let patched = gate.ada.fetch(Method::PATCH, "/api/workspaces/second", patch).await;
    patched.expect(StatusCode::OK);
    gate.ada
        .post("/api/workspaces/second/slots/dev/start?wait_s=20", json!({}))
        .await
        .expect(StatusCode::ACCEPTED);
    gate.chat().await.refused(StatusCode::TOO_MANY_REQUESTS, "daily_cap");
    gate.used(json!([["dev openai platform", 1, 3, 0, 0]])).await;
}
