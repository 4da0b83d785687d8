//! Snapshots that nobody asks for: when they are taken, and which go again.

use choir_core::Slot;
use jiff::ToSpan;
use serde_json::Value;

use super::{Box, change, json, snapshots, workspace};
use crate::support::Browser;
use axum::http::{Method, StatusCode};

async fn scheduled(browser: &mut Browser, slot: Slot) -> Vec<Value> {
    let mut all = snapshots(browser, slot).await;
    all.retain(|s| s["scheduled"] == true);
    all
}

async fn look(start: &Box, hours: i64) {
    let now = start.app.clock.now() + hours.hours();
    start.app.scheduled_snapshots(now).await.unwrap();
}

#[tokio::test]
async fn what_runs_is_kept_once_an_hour_and_what_does_not_run_is_not() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, _] = workspace(&mut ada).await;
    change(&mut ada, Slot::Live, "start").await;
    start.write(&live, "first");
    for _ in 0..3 {
        look(&start, 0).await;
    }
    let kept = scheduled(&mut ada, Slot::Live).await;
    assert_eq!(kept.len(), 1, "{kept:?}");
    assert_eq!(start.home(kept[0]["id"].as_str().unwrap()), "first");
    assert!(kept[0].get("taken_for").is_none());
    assert!(scheduled(&mut ada, Slot::Dev).await.is_empty(), "dev never ran");

    start.write(&live, "second");
    look(&start, 1).await;
    // Both are of this hour by the clock of the test, so the newer one stays.
    let kept = scheduled(&mut ada, Slot::Live).await;
    assert_eq!(start.home(kept[0]["id"].as_str().unwrap()), "second");

    change(&mut ada, Slot::Live, "stop").await;
    look(&start, 2).await;
    let last = scheduled(&mut ada, Slot::Live).await;
    assert_ne!(last[0]["id"], kept[0]["id"], "it ran since the last one");
    look(&start, 4).await;
    assert_eq!(
        scheduled(&mut ada, Slot::Live).await[0]["id"],
        last[0]["id"],
        "it has not run since"
    );
    start.fits_together().await;
}

#[tokio::test]
async fn a_workspace_that_wants_none_has_none() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    for slot in Slot::ALL {
        change(&mut ada, slot, "start").await;
    }
    let none = json!({"snapshot_every_s": 0});
    ada.fetch(Method::PATCH, "/api/workspaces/main", Some(none))
        .await
        .expect(StatusCode::OK);
    look(&start, 0).await;
    assert!(scheduled(&mut ada, Slot::Live).await.is_empty());
    let often = json!({"snapshot_every_s": 600});
    ada.fetch(Method::PATCH, "/api/workspaces/main", Some(often))
        .await
        .expect(StatusCode::OK);
    look(&start, 0).await;
    assert_eq!(scheduled(&mut ada, Slot::Live).await.len(), 1);
}

#[tokio::test]
async fn on_a_disk_that_gets_full_none_are_taken_and_those_that_were_go_while_what_people_asked_for_stays() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    change(&mut ada, Slot::Live, "start").await;
    let asked_for = "/api/workspaces/main/slots/live/snapshots";
    ada.post(asked_for, json!({})).await.expect(StatusCode::CREATED);
    look(&start, 2).await;
    assert_eq!(snapshots(&mut ada, Slot::Live).await.len(), 2);

    start.volumes.fill(85);
    look(&start, 4).await;
    assert_eq!(
        snapshots(&mut ada, Slot::Live).await.len(),
        2,
        "neither taken nor given up"
    );
    start.volumes.fill(95);
    look(&start, 4).await;
    let left = snapshots(&mut ada, Slot::Live).await;
    assert_eq!(left.len(), 1, "{left:?}");
    assert_eq!(left[0]["scheduled"], false);
    start.fits_together().await;
}
