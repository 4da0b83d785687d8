//! Starting, stopping, crashing, sleeping, and what a new hypervisor finds.

use std::time::Duration;

use axum::http::{Method, StatusCode};
use choir_core::sandbox::{Exit, Observed};
use choir_core::{Awake, Generation, SandboxId, Slot};
use choir_runtime::sim::Fault;
use choir_runtime::{Runtime, Seen};
use choir_store::AuditFilter;
use serde_json::json;

use super::{Box, change, shown, workspace};
use crate::support::Browser;

const SOON: Duration = Duration::from_secs(20);

#[tokio::test]
async fn both_slots_run_at_once_and_stop_apart() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, dev] = workspace(&mut ada).await;
    assert_ne!(live, dev);
    assert_eq!(change(&mut ada, Slot::Live, "start").await["state"], "ready");
    assert_eq!(change(&mut ada, Slot::Dev, "start").await["state"], "ready");
    assert_eq!(change(&mut ada, Slot::Dev, "stop").await["state"], "stopped");
    assert_eq!(shown(&mut ada).await["slots"]["live"]["state"], "ready");
}

#[tokio::test]
async fn a_hundred_requests_for_a_sleeping_sandbox_cause_one_start() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, _] = workspace(&mut ada).await;
    let handle = start.app.fleet.handle(&live).unwrap();
    let wakes = (0..100).map(|_| {
        let handle = handle.clone();
        tokio::spawn(async move { handle.wake(SOON).await })
    });
    for wake in wakes.collect::<Vec<_>>() {
        assert_eq!(
            wake.await.unwrap(),
            Ok(Generation {
                sandbox: live.clone(),
                number: 1
            })
        );
    }
    assert_eq!(start.world.starts(), 1);
}

#[tokio::test]
async fn a_caller_that_goes_away_does_not_cancel_the_start() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, _] = workspace(&mut ada).await;
    let handle = start.app.fleet.handle(&live).unwrap();
    assert!(handle.wake(Duration::ZERO).await.is_err());
    let status = handle
        .settle(SOON, |s| matches!(s.observed, Observed::Ready { .. }))
        .await;
    assert!(matches!(status.observed, Observed::Ready { .. }));
}

#[tokio::test]
async fn each_start_is_a_new_generation_and_the_old_container_goes() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, _] = workspace(&mut ada).await;
    change(&mut ada, Slot::Live, "start").await;
    let again = change(&mut ada, Slot::Live, "restart").await;
    assert_eq!(
        (again["state"].as_str(), again["generation"].as_u64()),
        (Some("ready"), Some(2))
    );
    let first = Generation {
        sandbox: live,
        number: 1,
    };
    assert_eq!(start.sim.inspect(&first).await.unwrap(), Seen::Absent);
}

#[tokio::test]
async fn a_sandbox_that_dies_comes_back_by_itself() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, _] = workspace(&mut ada).await;
    change(&mut ada, Slot::Live, "start").await;
    let handle = start.app.fleet.handle(&live).unwrap();
    start
        .world
        .exit(
            &Generation {
                sandbox: live,
                number: 1,
            },
            Exit {
                code: 139,
                oom_killed: false,
            },
        )
        .await;
    let status = handle
        .settle(SOON, |s| matches!(s.observed, Observed::Ready { generation: 2, .. }))
        .await;
    assert!(
        matches!(status.observed, Observed::Ready { generation: 2, .. }),
        "{status:?}"
    );
    let audit = ada.get("/me/audit?action=sandbox.exited").await.expect(StatusCode::OK);
    assert_eq!(audit["items"].as_array().map(Vec::len), Some(1), "{audit}");
}

#[tokio::test]
async fn a_sandbox_that_ran_out_of_memory_says_so() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, _] = workspace(&mut ada).await;
    change(&mut ada, Slot::Live, "start").await;
    let handle = start.app.fleet.handle(&live).unwrap();
    let first = Generation {
        sandbox: live,
        number: 1,
    };
    let (status, ()) = tokio::join!(
        handle.settle(SOON, |s| matches!(s.observed, Observed::Starting { .. })),
        start.world.exit(
            &first,
            Exit {
                code: 137,
                oom_killed: true
            }
        ),
    );
    assert!(
        status.observed.reason().unwrap_or_default().contains("out of memory"),
        "{status:?}"
    );
    let audit = ada.get("/me/audit?action=sandbox.exited").await.expect(StatusCode::OK);
    assert_eq!(audit["items"][0]["outcome"], "out_of_memory");
}

#[tokio::test]
async fn a_process_that_ran_out_of_memory_is_shown_and_recorded_once_a_generation() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, _] = workspace(&mut ada).await;
    let ready = change(&mut ada, Slot::Live, "start").await;
    assert_eq!(ready["reason"], json!(null));
    let handle = start.app.fleet.handle(&live).unwrap();
    let generation = handle.ready().unwrap();
    for kills in [0, 1, 1, 3] {
        start.sim.activity(&generation, 0, 0, kills).await;
        handle.settle(SOON, |s| s.oom_kills == kills).await;
    }
    let shown = shown(&mut ada).await;
    let live = &shown["slots"]["live"];
    assert_eq!(live["state"], "ready");
    assert!(live["reason"].as_str().unwrap().contains("were killed: 3"), "{live}");
    let audit = ada
        .get("/me/audit?action=sandbox.process_killed")
        .await
        .expect(StatusCode::OK);
    assert_eq!(audit["items"].as_array().unwrap().len(), 1, "{audit}");

    let after = change(&mut ada, Slot::Live, "restart").await;
    assert_eq!(after["reason"], json!(null));
}

#[tokio::test]
async fn a_start_that_hangs_holds_nobody_else_up() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [_, dev] = workspace(&mut ada).await;
    start.world.fail_next(&dev, Fault::Hang);
    ada.post("/api/workspaces/main/slots/dev/start", json!({}))
        .await
        .expect(StatusCode::ACCEPTED);
    assert_eq!(change(&mut ada, Slot::Live, "start").await["state"], "ready");
    assert_eq!(shown(&mut ada).await["slots"]["dev"]["state"], "starting");
}

/// Looks at a slot's figures until they show this limit of memory and of disk.
async fn limited_to(browser: &mut Browser, slot: Slot, memory: u64, disk: u64) {
    let path = format!("/api/workspaces/main/slots/{slot}/stats");
    let shown = async {
        loop {
            let stats = browser.get(&path).await.expect(StatusCode::OK);
            if stats["memory_limit"] == memory && stats["disk_limit"] == disk {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(SOON, shown).await.expect("the limits take effect");
}

#[tokio::test]
async fn limits_change_while_it_runs_and_the_last_change_wins() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    change(&mut ada, Slot::Live, "start").await;
    for mib in [512u64, 768, 640] {
        let limits = json!({"limits": {"memory": mib << 20, "disk": mib << 21}});
        ada.fetch(Method::PATCH, "/api/workspaces/main", Some(limits))
            .await
            .expect(StatusCode::OK);
    }
    limited_to(&mut ada, Slot::Live, 640 << 20, 640 << 21).await;
}

#[tokio::test]
async fn limits_that_a_crash_held_back_take_effect_with_the_next_hypervisor() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    change(&mut ada, Slot::Live, "start").await;
    let view = start.app.store.all_workspaces().await.unwrap().remove(0);
    let patch = serde_json::from_value(json!({"limits": {"memory": 512 << 20, "disk": 1 << 30}})).unwrap();
    // Committed, and nobody told: as if killed right after.
    let event = start.app.event(&view, "workspace.change");
    start
        .app
        .store
        .patch_settings(&view.workspace.id, patch, event)
        .await
        .unwrap();
    let again = start.restarted().await;
    ada.router = again.router.clone();
    limited_to(&mut ada, Slot::Live, 512 << 20, 1 << 30).await;
}

#[tokio::test]
async fn who_waits_for_a_deletion_finds_the_name_free() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    for _ in 0..2 {
        workspace(&mut ada).await;
        change(&mut ada, Slot::Live, "start").await;
        let deleted = ada.delete("/api/workspaces/main?wait_s=20").await;
        assert_eq!(deleted.status, StatusCode::NO_CONTENT, "{}", deleted.text());
    }
    workspace(&mut ada).await;
    assert_eq!(ada.delete("/api/workspaces/main").await.status, StatusCode::ACCEPTED);
}

#[tokio::test]
async fn a_sandbox_that_cannot_be_created_says_why() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, _] = workspace(&mut ada).await;
    start.world.fail_next(&live, Fault::FailCreate);
    let handle = start.app.fleet.handle(&live).unwrap();
    let (woken, status) = tokio::join!(handle.wake(SOON), async {
        handle
            .settle(SOON, |s| matches!(s.observed, Observed::Starting { attempt: 2, .. }))
            .await
    });
    // The second attempt works, so the first one's failure cost a back-off and nothing else.
    assert!(woken.is_ok(), "{woken:?} {status:?}");
}

#[tokio::test]
async fn a_new_hypervisor_takes_over_what_runs_and_restarts_nothing() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, dev] = workspace(&mut ada).await;
    change(&mut ada, Slot::Live, "start").await;
    change(&mut ada, Slot::Dev, "start").await;
    let again = start.restarted().await;
    for id in [live, dev] {
        let handle = again.app.fleet.handle(&id).unwrap();
        let status = handle
            .settle(SOON, |s| matches!(s.observed, Observed::Ready { .. }))
            .await;
        assert!(
            matches!(status.observed, Observed::Ready { generation: 1, .. }),
            "{status:?}"
        );
    }
    assert_eq!(again.world.starts(), 2);
    // The session is in the database, so the browser is still signed in.
    ada.router = again.router.clone();
    assert_eq!(shown(&mut ada).await["slots"]["live"]["state"], "ready");
}

#[tokio::test]
async fn what_is_asked_before_the_take_over_waits_for_it() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    let again = Box::begin(
        start.directory.clone(),
        start.app.config.clone(),
        start.world.clone(),
        start.volumes.clone(),
        start.app.outside.clone(),
    )
    .await;
    ada.router = again.router.clone();
    let (early, ()) = tokio::join!(shown(&mut ada), async {
        // Polled second: the request is waiting by now.
        choir_hypervisor::serve::take_over(&again.app).await.unwrap();
    });
    assert_eq!(early["name"], "main");
}

/// The first hypervisor is in an executor of its own, so that nothing of it is left when that is dropped.
#[test]
fn what_died_while_no_hypervisor_looked_is_started_once() {
    let executor = || tokio::runtime::Runtime::new().unwrap();
    let first = executor();
    let (start, [live, dev]) = first.block_on(async {
        let start = Box::new().await;
        let mut ada = start.ada().await;
        let sandboxes = workspace(&mut ada).await;
        for slot in Slot::ALL {
            assert_eq!(change(&mut ada, slot, "start").await["state"], "ready");
        }
        (start, sandboxes)
    });
    drop(first);
    executor().block_on(async {
        let killed = Exit {
            code: 137,
            oom_killed: false,
        };
        let generation = Generation {
            sandbox: live.clone(),
            number: 1,
        };
        start.world.exit(&generation, killed).await;
        assert_eq!(start.world.starts(), 2, "nobody looks");
        let second = start.restarted().await;
        is_ready(&second, &live, 2).await;
        // The control: what ran on is the same.
        is_ready(&second, &dev, 1).await;
        assert_eq!(start.world.starts(), 3);
        assert_eq!(start.sim.inspect(&generation).await.unwrap(), Seen::Absent);
        // And it was that once: who comes next finds it well.
        let third = second.restarted().await;
        is_ready(&third, &live, 2).await;
        is_ready(&third, &dev, 1).await;
        assert_eq!(start.world.starts(), 3);
        let rows = third.app.store.audit_rows(AuditFilter {
            action: Some("sandbox.exited".into()),
            limit: 10,
            ..AuditFilter::default()
        });
        let died: Vec<_> = rows.await.unwrap().into_iter().map(|row| row.subject).collect();
        assert_eq!(died, [live.to_string()], "its death is recorded once");
    });
}

#[tokio::test]
async fn where_sandboxes_are_awake_always_a_new_workspace_runs_without_being_asked() {
    let start = Box::with(|config| config.sandboxes.awake = Awake::Always).await;
    let mut ada = start.ada().await;
    for sandbox in workspace(&mut ada).await {
        is_ready(&start, &sandbox, 1).await;
    }
    assert_eq!(start.world.starts(), 2);
}

/// Waits until a sandbox is ready, and checks that it is so in this generation.
async fn is_ready(start: &Box, sandbox: &SandboxId, number: u64) {
    let handle = start.app.fleet.handle(sandbox).unwrap();
    let status = handle
        .settle(SOON, |s| matches!(s.observed, Observed::Ready { .. }))
        .await;
    assert!(
        matches!(status.observed, Observed::Ready { generation, .. } if generation == number),
        "{status:?}"
    );
}

#[tokio::test]
async fn a_deleted_workspace_leaves_no_container_volume_or_row() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, dev] = workspace(&mut ada).await;
    change(&mut ada, Slot::Live, "start").await;
    ada.delete("/api/workspaces/main").await.expect(StatusCode::ACCEPTED);
    for id in [&live, &dev] {
        if let Some(handle) = start.app.fleet.handle(id) {
            handle.settle(SOON, |s| s.observed == Observed::Deleted).await;
        }
    }
    ada.get("/api/workspaces/main").await.expect(StatusCode::NOT_FOUND);
    assert!(start.sim.list().await.unwrap().is_empty());
    let volumes = choir_runtime::Volumes::list(&start.volumes).await.unwrap();
    assert!(
        !volumes.iter().any(|v| v == live.as_str() || v == dev.as_str()),
        "{volumes:?}"
    );
    // The name is free again.
    let made = ada.post("/api/workspaces", json!({"name": "main"})).await;
    assert!([StatusCode::CREATED, StatusCode::CONFLICT].contains(&made.status));
}

#[tokio::test]
async fn a_sandbox_whose_volume_could_not_be_made_is_made_and_started_when_that_is_asked() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    // Of the release's copy for her, which both sandboxes need, and each of them makes in turn.
    start.volumes.fail_copies(2);
    let [live, _] = workspace(&mut ada).await;
    let handle = start.app.fleet.handle(&live).unwrap();
    let failed = |s: &choir_hypervisor::reconcile::Status| matches!(s.observed, Observed::Failed { .. });
    handle.settle(SOON, failed).await;
    let slot = shown(&mut ada).await["slots"]["live"].clone();
    assert_eq!(
        (&slot["state"], slot["reason"].as_str()),
        (&json!("failed"), Some("the container service refused: no space left"))
    );
    assert!(start.volumes.read(live.as_str()).is_err());
    assert_eq!(change(&mut ada, Slot::Live, "start").await["state"], "ready");
    assert!(start.volumes.read(live.as_str()).is_ok());
}

#[tokio::test]
async fn a_sandbox_that_was_frozen_unknown_to_the_service_is_replaced_and_does_not_hang() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, _] = workspace(&mut ada).await;
    change(&mut ada, Slot::Live, "start").await;
    start.world.freeze_untold(&live);
    ada.post("/api/workspaces/main/slots/live/pause", json!({}))
        .await
        .expect(StatusCode::ACCEPTED);
    let handle = start.app.fleet.handle(&live).unwrap();
    let again = |s: &choir_hypervisor::reconcile::Status| matches!(s.observed, Observed::Ready { generation: 2, .. });
    let status = handle.settle(SOON, again).await;
    assert!(again(&status), "{status:?}");
}

#[tokio::test]
async fn a_sandbox_whose_limits_are_being_set_is_frozen_right_after() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, _] = workspace(&mut ada).await;
    change(&mut ada, Slot::Live, "start").await;
    let view = start.app.store.all_workspaces().await.unwrap().remove(0);
    let handle = start.app.fleet.handle(&live).unwrap();
    start.app.fleet.limits_changed(&view).await;
    handle.pause().await;
    let status = handle
        .settle(SOON, |s| matches!(s.observed, Observed::Paused { .. }))
        .await;
    assert!(matches!(status.observed, Observed::Paused { .. }), "{status:?}");
}
