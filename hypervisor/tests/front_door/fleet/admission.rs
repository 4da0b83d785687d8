//! More sandboxes than may run: the line, its end, and who makes room.

use std::time::Duration;

use axum::http::{Method, StatusCode};
use choir_core::Slot;
use choir_core::sandbox::Observed;
use choir_hypervisor::reconcile::Handle;
use choir_runtime::{Runtime, Seen};
use serde_json::json;

use super::{Box, sandbox};
use crate::support::Browser;

const SOON: Duration = Duration::from_secs(20);

/// A slot with its worker: the workspace's name, the slot, the handle.
type Place = (String, Slot, Handle);

/// Makes so many workspaces; their slots, in order.
async fn slots(start: &Box, browser: &mut Browser, workspaces: usize) -> Vec<Place> {
    let mut made = Vec::new();
    for n in 0..workspaces {
        let name = format!("w{n}");
        let workspace = browser
            .post("/api/workspaces", json!({"name": name}))
            .await
            .expect(StatusCode::CREATED);
        for slot in Slot::ALL {
            let handle = start.app.fleet.handle(&sandbox(&workspace, slot)).unwrap();
            made.push((name.clone(), slot, handle));
        }
    }
    for (_, _, handle) in &made {
        let status = handle
            .settle(SOON, |s| matches!(s.observed, Observed::Stopped { .. }))
            .await;
        assert!(matches!(status.observed, Observed::Stopped { .. }), "{status:?}");
    }
    made
}

async fn ask(browser: &mut Browser, (workspace, slot, _): &Place, verb: &str) {
    let path = format!("/api/workspaces/{workspace}/slots/{slot}/{verb}");
    browser.post(&path, json!({})).await.expect(StatusCode::ACCEPTED);
}

async fn ready((workspace, slot, handle): &Place) {
    let status = handle
        .settle(SOON, |s| matches!(s.observed, Observed::Ready { .. }))
        .await;
    assert!(
        matches!(status.observed, Observed::Ready { .. }),
        "{workspace} {slot}: {status:?}"
    );
}

/// Waits until so many are in line before it; `None`: until it is not in line.
async fn in_line((workspace, slot, handle): &Place, before: Option<usize>) {
    let seen = async {
        while handle.in_line() != before {
            tokio::task::yield_now().await;
        }
    };
    let waited = tokio::time::timeout(SOON, seen).await;
    assert!(waited.is_ok(), "{workspace} {slot}: {:?} before it", handle.in_line());
}

async fn running(start: &Box) -> usize {
    let all = start.sim.list().await.unwrap();
    all.iter()
        .filter(|found| matches!(found.seen, Seen::Running | Seen::Paused))
        .count()
}

#[tokio::test]
async fn fifty_starts_at_once_are_served_in_order_and_ten_run_at_a_time() {
    let start = Box::with(|config| config.sandboxes.max_running = 10).await;
    let mut ada = start.ada().await;
    let all = slots(&start, &mut ada, 25).await;
    for slot in &all[..10] {
        ask(&mut ada, slot, "start").await;
    }
    for (before, slot) in all[10..].iter().enumerate() {
        ask(&mut ada, slot, "start").await;
        in_line(slot, Some(before)).await;
    }
    for slot in &all[..10] {
        ready(slot).await;
    }
    for next in 10..all.len() {
        assert_eq!(running(&start).await, 10);
        ask(&mut ada, &all[next - 10], "stop").await;
        ready(&all[next]).await;
        if let Some(then) = all.get(next + 1) {
            in_line(then, Some(0)).await;
        }
    }
    assert_eq!(start.world.starts(), 50);
}

#[tokio::test]
async fn who_waits_in_line_is_told_so_and_may_leave_it() {
    let start = Box::with(|config| config.sandboxes.max_running = 1).await;
    let mut ada = start.ada().await;
    let all = slots(&start, &mut ada, 2).await;
    ask(&mut ada, &all[0], "start").await;
    ready(&all[0]).await;
    for slot in &all[1..] {
        ask(&mut ada, slot, "start").await;
        in_line(slot, slot.2.in_line()).await;
    }
    in_line(&all[3], Some(2)).await;
    let shown = ada.get("/api/workspaces/w1").await.expect(StatusCode::OK);
    let dev = &shown["slots"]["dev"];
    assert_eq!((&dev["state"], &dev["desired"]), (&json!("queued"), &json!("running")));
    assert_eq!(dev["reason"], "no more than 1 may run at once; in line before it: 2");

    ask(&mut ada, &all[1], "stop").await;
    in_line(&all[1], None).await;
    in_line(&all[3], Some(1)).await;
    ask(&mut ada, &all[0], "stop").await;
    ready(&all[2]).await;
    assert!(matches!(all[1].2.status.borrow().observed, Observed::Stopped { .. }));
}

#[tokio::test]
async fn beyond_the_end_of_the_line_a_start_and_a_request_are_refused_at_once() {
    let start = Box::with(|config| config.sandboxes.max_running = 1).await;
    let mut ada = start.ada().await;
    let mut bob = start.member(&mut ada, "bob").await;
    let adas = slots(&start, &mut ada, 50).await;
    let bobs = slots(&start, &mut bob, 15).await;
    for slot in &adas {
        ask(&mut ada, slot, "start").await;
    }
    // One runs and 128 are in line: a hundred slots of ada's, and of bob's all but the last.
    let (last, others) = bobs.split_last().unwrap();
    for slot in others {
        ask(&mut bob, slot, "start").await;
    }
    in_line(others.last().unwrap(), Some(127)).await;

    let (workspace, slot, handle) = last;
    let path = format!("/api/workspaces/{workspace}/slots/{slot}");
    let refused = bob.post(&format!("{path}/start"), json!({})).await;
    assert_eq!(refused.headers["retry-after"], "10");
    refused.refused(StatusCode::SERVICE_UNAVAILABLE, "busy");
    let refused = bob.get(&format!("{path}/sandbox/health")).await;
    assert_eq!(refused.headers["retry-after"], "10");
    refused.refused(StatusCode::SERVICE_UNAVAILABLE, "busy");
    assert_eq!(handle.status.borrow().desired, choir_core::sandbox::Desired::Stopped);

    ask(&mut ada, &adas[0], "stop").await;
    in_line(others.last().unwrap(), Some(126)).await;
    ask(&mut bob, last, "start").await;
    in_line(last, Some(127)).await;
}

#[tokio::test]
async fn a_paused_sandbox_gives_its_place_to_one_that_is_asked_for_unless_it_should_always_run() {
    let start = Box::with(|config| config.sandboxes.max_running = 2).await;
    let mut ada = start.ada().await;
    let all = slots(&start, &mut ada, 2).await;
    let always = json!({"awake": {"live": "always", "dev": "on_demand"}});
    ada.fetch(Method::PATCH, "/api/workspaces/w0", Some(always))
        .await
        .expect(StatusCode::OK);
    for slot in &all[..2] {
        ask(&mut ada, slot, "start").await;
        ready(slot).await;
        ask(&mut ada, slot, "pause").await;
    }
    ask(&mut ada, &all[2], "start").await;
    ready(&all[2]).await;
    assert!(
        matches!(all[0].2.status.borrow().observed, Observed::Paused { .. }),
        "it should always be there"
    );
    assert!(matches!(all[1].2.status.borrow().observed, Observed::Stopped { .. }));

    // One that is paused while somebody waits gives way just the same.
    ask(&mut ada, &all[3], "start").await;
    in_line(&all[3], Some(0)).await;
    ask(&mut ada, &all[2], "pause").await;
    ready(&all[3]).await;
}

#[tokio::test]
async fn a_restart_keeps_its_place() {
    let start = Box::with(|config| config.sandboxes.max_running = 1).await;
    let mut ada = start.ada().await;
    let all = slots(&start, &mut ada, 1).await;
    ask(&mut ada, &all[0], "start").await;
    ready(&all[0]).await;
    ask(&mut ada, &all[1], "start").await;
    in_line(&all[1], Some(0)).await;
    let path = "/api/workspaces/w0/slots/live/restart?wait_s=20";
    let after = ada.post(path, json!({})).await.expect(StatusCode::ACCEPTED);
    assert_eq!((&after["state"], &after["generation"]), (&json!("ready"), &json!(2)));
    assert_eq!(all[1].2.in_line(), Some(0));
}

#[tokio::test]
async fn the_places_of_what_runs_are_counted_by_the_next_hypervisor() {
    let start = Box::with(|config| config.sandboxes.max_running = 1).await;
    let mut ada = start.ada().await;
    let all = slots(&start, &mut ada, 1).await;
    ask(&mut ada, &all[0], "start").await;
    ready(&all[0]).await;
    ask(&mut ada, &all[1], "start").await;
    in_line(&all[1], Some(0)).await;

    let again = start.restarted().await;
    ada.router = again.router.clone();
    let after = |(name, slot, handle): &Place| (name.clone(), *slot, again.app.fleet.handle(&handle.id).unwrap());
    let (live, dev) = (after(&all[0]), after(&all[1]));
    ready(&live).await;
    in_line(&dev, Some(0)).await;
    assert_eq!(running(&again).await, 1);
}
