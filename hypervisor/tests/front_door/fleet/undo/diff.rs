//! What differs between snapshots, and who may ask.

use axum::http::StatusCode;
use choir_core::{SandboxId, Slot, SnapshotId};
use serde_json::{Value, json};

use super::{Box, MAIN, used};
use crate::support::Browser;

async fn taken(ada: &mut Browser, slot: Slot) -> String {
    let path = format!("{MAIN}/slots/{slot}/snapshots");
    let taken = ada.post(&path, json!({})).await.expect(StatusCode::CREATED);
    taken["id"].as_str().unwrap().to_owned()
}

fn address(id: &str) -> String {
    format!("{MAIN}/slots/live/snapshots/{id}/diff")
}

/// Somebody whose live has changed since a snapshot of it.
async fn changed(start: &Box) -> (Browser, SandboxId, String) {
    let mut ada = start.ada().await;
    let [live, _] = used(start, &mut ada).await;
    let id = taken(&mut ada, Slot::Live).await;
    start.write(&live, "better");
    (ada, live, id)
}

#[tokio::test]
async fn a_snapshot_is_compared_with_what_its_slot_holds_now_and_with_another() {
    let start = Box::new().await;
    let (mut ada, live, first) = changed(&start).await;
    let expected = json!({
        "added": 0, "removed": 0, "changed": 1, "added_bytes": 0, "removed_bytes": 0, "truncated": false,
        "entries": [{"path": "/home/choir", "change": "changed", "before": 4, "after": 6}],
    });
    let now = ada.get(&address(&first)).await.expect(StatusCode::OK);
    assert_eq!(now, expected);
    let second = taken(&mut ada, Slot::Live).await;
    start.write(&live, "best of all");
    let path = format!("{}?to={second}", address(&first));
    assert_eq!(ada.get(&path).await.expect(StatusCode::OK), expected);
    let path = format!("{}?to={first}", address(&first));
    let nothing = ada.get(&path).await.expect(StatusCode::OK);
    assert_eq!((&nothing["changed"], &nothing["entries"]), (&json!(0), &json!([])));
}

#[tokio::test]
async fn a_snapshot_of_somebody_else_is_compared_on_neither_side() {
    let start = Box::new().await;
    let (mut ada, _, hers) = changed(&start).await;
    let mut eve = start.member(&mut ada, "eve").await;
    used(&start, &mut eve).await;
    let own = taken(&mut eve, Slot::Live).await;
    let absent = SnapshotId::from_random([1; 16]);
    for path in [
        address(&hers),
        format!("{}?to={hers}", address(&own)),
        format!("{}?to={own}", address(&hers)),
        format!("{}?to={absent}", address(&own)),
        format!("{}?to=", address(&own)),
    ] {
        eve.get(&path).await.refused(StatusCode::NOT_FOUND, "not_found");
    }
}

#[tokio::test]
async fn while_as_many_are_compared_as_may_be_others_are_asked_to_come_again() {
    let start = Box::new().await;
    let (mut ada, _, id) = changed(&start).await;
    let all = start.app.diffs.clone().try_acquire_many_owned(2).unwrap();
    let answer = ada.get(&address(&id)).await;
    assert_eq!(answer.headers["retry-after"], "5");
    answer.refused(StatusCode::TOO_MANY_REQUESTS, "too_many_requests");
    drop(all);
    let shown: Value = ada.get(&address(&id)).await.expect(StatusCode::OK);
    assert_eq!(shown["changed"], 1);
}
