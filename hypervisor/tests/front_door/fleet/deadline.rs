//! An agent that never comes: its container is ended at the deadline, the attempts are counted, and the sandbox is left
//! failed with its reason and nothing running.

use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use choir_core::sandbox::{ATTEMPTS, Observed, READY_WITHIN};
use choir_core::{Generation, SandboxId, Slot};
use choir_hypervisor::clock::{Clock, MockClock};
use choir_runtime::sim::Fault;
use choir_runtime::{Runtime, Seen};
use jiff::{SignedDuration, Timestamp};

use super::wire::{clock, start_at};
use super::{Box, change, shown, workspace};

/// For what needs no clock: an effect of the simulated runtime.
const SOON: Duration = Duration::from_secs(20);

fn generation(sandbox: &SandboxId, number: u64) -> Generation {
    Generation {
        sandbox: sandbox.clone(),
        number,
    }
}

/// Moves the clock a second at a time, each time letting the worker look, until its state is as wanted.
async fn tick_until(
    start: &Box,
    clock: &Arc<MockClock>,
    sandbox: &SandboxId,
    wanted: impl Fn(&Observed) -> bool,
) -> Observed {
    let handle = start.app.fleet.handle(sandbox).unwrap();
    let begun = clock.now();
    loop {
        let observed = handle.status.borrow().observed.clone();
        if wanted(&observed) {
            return observed;
        }
        let gone = clock.now().duration_since(begun);
        assert!(gone < SignedDuration::from_mins(10), "still {observed:?} after {gone}");
        clock.advance(SignedDuration::from_secs(1));
        // Any message makes a worker look at the clock; this one is answered at once.
        _ = handle.wake(Duration::ZERO).await;
        start.app.store.check().await.unwrap();
    }
}

/// Waits until the container of this generation runs; the time then.
async fn running(start: &Box, clock: &Arc<MockClock>, generation: &Generation) -> Timestamp {
    let up = async {
        while start.sim.inspect(generation).await.unwrap() != Seen::Running {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(SOON, up).await.expect("the container starts");
    clock.now()
}

#[tokio::test]
async fn an_agent_that_never_comes_is_ended_at_its_deadline_and_left_failed_with_nothing_running() {
    let clock = clock();
    let start = start_at(&clock, |sim| sim).await;
    let mut ada = start.ada().await;
    let [live, _] = workspace(&mut ada).await;
    for _ in 0..ATTEMPTS {
        start.world.fail_next(&live, Fault::NeverReady);
    }
    ada.post("/api/workspaces/main/slots/live/start", serde_json::json!({}))
        .await
        .expect(StatusCode::ACCEPTED);
    for number in 1..=u64::from(ATTEMPTS) {
        let begun = running(&start, &clock, &generation(&live, number)).await;
        // The attempt is over when its container is, and not before its time.
        tick_until(&start, &clock, &live, |o| {
            o.generation() != Some(number)
                || matches!(o, Observed::Starting { attempt, .. } if u64::from(*attempt) > number)
        })
        .await;
        let took = clock.now().duration_since(begun).unsigned_abs();
        assert!(took >= READY_WITHIN, "attempt {number} was given {took:?}");
        assert!(
            took < READY_WITHIN + Duration::from_secs(10),
            "attempt {number} was given {took:?}"
        );
        if number < u64::from(ATTEMPTS) {
            let next = generation(&live, number + 1);
            let handle = start.app.fleet.handle(&live).unwrap();
            let up = async {
                while start.sim.inspect(&next).await.unwrap() != Seen::Running {
                    clock.advance(SignedDuration::from_millis(100));
                    _ = handle.wake(Duration::ZERO).await;
                }
            };
            tokio::time::timeout(SOON, up).await.expect("the next attempt comes");
        }
    }
    let failed = tick_until(&start, &clock, &live, |o| matches!(o, Observed::Failed { .. })).await;
    let reason = failed.reason().unwrap_or_default();
    assert!(reason.contains("did not become ready in time"), "{reason}");
    assert_eq!(start.world.starts(), u64::from(ATTEMPTS));
    let slot = shown(&mut ada).await["slots"]["live"].clone();
    assert_eq!(slot["state"], "failed");
    assert_eq!(slot["reason"], serde_json::json!(reason));
    let gone = async {
        while !start.sim.list().await.unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(SOON, gone).await.expect("no container is left");
    // A person who asks again is not bound by the failures, and an agent that comes is ready.
    assert_eq!(change(&mut ada, Slot::Live, "start").await["state"], "ready");
}

/// The honest twin: late once, and then there.
#[tokio::test]
async fn an_agent_that_misses_one_deadline_gets_another_container() {
    let clock = clock();
    let start = start_at(&clock, |sim| sim).await;
    let mut ada = start.ada().await;
    let [live, _] = workspace(&mut ada).await;
    start.world.fail_next(&live, Fault::NeverReady);
    ada.post("/api/workspaces/main/slots/live/start", serde_json::json!({}))
        .await
        .expect(StatusCode::ACCEPTED);
    let first = generation(&live, 1);
    running(&start, &clock, &first).await;
    let ready = tick_until(&start, &clock, &live, |o| matches!(o, Observed::Ready { .. })).await;
    assert_eq!(ready.generation(), Some(2));
    assert_eq!(start.sim.inspect(&first).await.unwrap(), Seen::Absent);
}
