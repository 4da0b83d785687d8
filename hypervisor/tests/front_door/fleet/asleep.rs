//! Falling asleep and being woken: by idleness, by a schedule, by a request.

use std::time::Duration;

use axum::http::{Method, StatusCode};
use choir_core::sandbox::{Desired, Observed};
use choir_core::{Generation, SandboxId, Slot};
use serde_json::json;

use super::{Box, change, workspace};
use crate::support::Browser;

const SOON: Duration = Duration::from_secs(20);

#[tokio::test]
async fn a_schedule_starts_a_slot_and_keeps_it_up_during_the_minutes_it_names() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, dev] = workspace(&mut ada).await;
    change(&mut ada, Slot::Dev, "start").await;
    let every_minute = json!({"cron": "* * * * *", "tz": "Europe/Vienna"});
    let settings = json!({"awake": {"live": every_minute}, "idle_pause_s": 1, "idle_stop_s": 2});
    let shown = ada
        .fetch(Method::PATCH, "/api/workspaces/main", Some(settings))
        .await
        .expect(StatusCode::OK);
    assert_eq!(
        shown["settings"]["awake"],
        json!({"live": every_minute, "dev": "on_demand"})
    );
    let live = start.app.fleet.handle(&live).unwrap();
    let status = live
        .settle(SOON, |s| matches!(s.observed, Observed::Ready { .. }))
        .await;
    assert!(matches!(status.observed, Observed::Ready { .. }), "{status:?}");
    // The control: on demand, the other sandbox falls asleep after the same settings.
    let dev = start.app.fleet.handle(&dev).unwrap();
    let status = dev
        .settle(SOON, |s| matches!(s.observed, Observed::Stopped { .. }))
        .await;
    assert!(matches!(status.observed, Observed::Stopped { .. }), "{status:?}");
    assert!(live.ready().is_some(), "{:?}", live.status.borrow());
}

#[tokio::test]
async fn a_schedule_starts_nothing_before_its_minute() {
    let clock = super::wire::clock();
    let start = super::wire::start_at(&clock, |sim| sim).await;
    let mut ada = start.ada().await;
    let [live, dev] = workspace(&mut ada).await;
    let sandboxes = [live, dev].map(|id| start.app.fleet.handle(&id).unwrap());
    let set = async |ada: &mut Browser, awake: serde_json::Value| {
        let settings = json!({"awake": awake});
        ada.fetch(Method::PATCH, "/api/workspaces/main", Some(settings))
            .await
            .expect(StatusCode::OK);
    };
    // It is 03:04:05 on a Friday.
    let at_eight = json!({"cron": "0 8 * * 1-5", "tz": "UTC"});
    let at_four_past = json!({"cron": "4 * * * *", "tz": "UTC"});
    set(&mut ada, json!({"live": at_eight, "dev": at_four_past})).await;
    let status = sandboxes[1]
        .settle(SOON, |s| matches!(s.observed, Observed::Ready { .. }))
        .await;
    assert!(matches!(status.observed, Observed::Ready { .. }), "{status:?}");
    assert_eq!(sandboxes[0].status.borrow().desired, Desired::Stopped);
    clock.advance(jiff::SignedDuration::from_hours(5) - jiff::SignedDuration::from_mins(4));
    set(&mut ada, json!({"live": at_eight})).await;
    let status = sandboxes[0]
        .settle(SOON, |s| matches!(s.observed, Observed::Ready { .. }))
        .await;
    assert!(matches!(status.observed, Observed::Ready { .. }), "{status:?}");
}

#[tokio::test]
async fn running_programs_keep_a_sandbox_awake() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, dev] = workspace(&mut ada).await;
    let settings = json!({"idle_pause_s": 1, "idle_stop_s": 2});
    ada.fetch(Method::PATCH, "/api/workspaces/main", Some(settings))
        .await
        .expect(StatusCode::OK);
    change(&mut ada, Slot::Live, "start").await;
    start
        .sim
        .activity(
            &Generation {
                sandbox: live.clone(),
                number: 1,
            },
            1,
            0,
            0,
        )
        .await;
    change(&mut ada, Slot::Dev, "start").await;
    // The control: without a task the other sandbox falls asleep, after the same settings.
    let dev = start.app.fleet.handle(&dev).unwrap();
    let status = dev
        .settle(SOON, |s| matches!(s.observed, Observed::Stopped { .. }))
        .await;
    assert!(matches!(status.observed, Observed::Stopped { .. }), "{status:?}");
    let live = start.app.fleet.handle(&live).unwrap();
    assert!(live.ready().is_some(), "{:?}", live.status.borrow());
}

#[tokio::test]
async fn what_ran_when_it_was_frozen_is_not_stopped_because_nobody_came_for_longer() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, dev] = workspace(&mut ada).await;
    let settings = json!({"idle_pause_s": 1, "idle_stop_s": 6});
    let set = ada.fetch(Method::PATCH, "/api/workspaces/main", Some(settings)).await;
    set.expect(StatusCode::OK);
    change(&mut ada, Slot::Live, "start").await;
    let generation = Generation {
        sandbox: live.clone(),
        number: 1,
    };
    start.sim.activity(&generation, 1, 0, 0).await;
    change(&mut ada, Slot::Dev, "start").await;
    let stops = async |sandbox: &SandboxId, within| {
        let handle = start.app.fleet.handle(sandbox).unwrap();
        let status = handle.settle(within, |s| matches!(s.observed, Observed::Stopped { .. }));
        status.await.observed.name()
    };
    assert_eq!(
        stops(&dev, SOON).await,
        "stopped",
        "that long nobody came to live either"
    );
    assert_eq!(change(&mut ada, Slot::Live, "pause").await["state"], "paused");
    assert_eq!(stops(&live, Duration::from_secs(2)).await, "paused");
    assert_eq!(stops(&live, SOON).await, "stopped", "the control: it is idle by then");
    let again = ada.post("/api/workspaces/main/slots/live/pause", json!({})).await;
    again.refused(StatusCode::CONFLICT, "not_running");
}

#[tokio::test]
async fn an_idle_sandbox_is_paused_then_stopped_and_woken_by_a_request() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, _] = workspace(&mut ada).await;
    let settings = json!({"idle_pause_s": 1, "idle_stop_s": 6});
    ada.fetch(Method::PATCH, "/api/workspaces/main", Some(settings))
        .await
        .expect(StatusCode::OK);
    change(&mut ada, Slot::Live, "start").await;
    let handle = start.app.fleet.handle(&live).unwrap();
    let paused = handle
        .settle(SOON, |s| matches!(s.observed, Observed::Paused { .. }))
        .await;
    assert!(matches!(paused.observed, Observed::Paused { .. }), "{paused:?}");
    assert_eq!(
        handle.wake(SOON).await.unwrap().number,
        1,
        "a thaw is not a new generation"
    );
    let stopped = handle
        .settle(SOON, |s| matches!(s.observed, Observed::Stopped { .. }))
        .await;
    assert!(matches!(stopped.observed, Observed::Stopped { .. }), "{stopped:?}");
    assert_eq!(handle.wake(SOON).await.unwrap().number, 2);
}
