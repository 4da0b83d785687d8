//! A box that runs short of memory: what gives way, in which order, and what is told to whoever asks for it.

use std::time::Duration;

use axum::http::{Method, StatusCode};
use choir_core::memory::{Level, Memory};
use choir_core::sandbox::Observed;
use choir_core::{SandboxId, Slot};
use choir_hypervisor::pressure::Watch;
use choir_runtime::{Runtime, Seen};
use jiff::Timestamp;
use serde_json::json;

use super::{Box, change, sandbox, shown, workspace};
use crate::support::Browser;

const SOON: Duration = Duration::from_secs(20);
const RESERVE: u64 = 1 << 30;

/// A box, what its hypervisor remembers of its memory, and the seconds that have passed.
struct Scene {
    start: Box,
    watch: Watch,
    second: i64,
}

impl Scene {
    async fn new() -> Self {
        Self {
            start: Box::new().await,
            watch: Watch::new(RESERVE),
            second: 1_800_000_000,
        }
    }

    /// A second later, with so much memory left.
    async fn look(&mut self, available: u64) -> Level {
        self.second += 1;
        let seen = Memory {
            available,
            stalled: None,
        };
        let now = Timestamp::from_second(self.second).unwrap();
        self.start.app.look_at_memory(&mut self.watch, seen, now).await
    }

    /// There is enough, for as long as it takes to be believed.
    async fn relief(&mut self) {
        for _ in 0..30 {
            if self.look(RESERVE * 2).await == Level::Fine {
                return;
            }
        }
        panic!("it is short for ever");
    }

    /// Its processes stand still; what the worker says comes before that.
    async fn is_frozen(&self, sandbox: &SandboxId) {
        self.becomes(sandbox, |o| matches!(o, Observed::Paused { .. })).await;
        let generation = self.start.app.fleet.handle(sandbox).unwrap().present().unwrap();
        let deadline = tokio::time::Instant::now() + SOON;
        while self.start.sim.inspect(&generation).await.unwrap() != Seen::Paused {
            assert!(tokio::time::Instant::now() < deadline, "{generation} is not frozen");
            tokio::task::yield_now().await;
        }
    }

    /// Short until this one, which is frozen, has stopped. While its worker has not heard that it is, a look is in vain.
    async fn stops(&mut self, sandbox: &SandboxId) {
        let handle = self.start.app.fleet.handle(sandbox).unwrap();
        for _ in 0..4 {
            self.look(0).await;
            if matches!(handle.status.borrow().observed, Observed::Stopped { .. }) {
                return;
            }
        }
        panic!("{:?}", *handle.status.borrow());
    }

    async fn becomes(&self, sandbox: &SandboxId, wanted: fn(&Observed) -> bool) {
        let handle = self.start.app.fleet.handle(sandbox).unwrap();
        let status = handle.settle(SOON, |s| wanted(&s.observed)).await;
        assert!(wanted(&status.observed), "{status:?}");
    }
}

async fn runs(browser: &mut Browser) {
    for slot in Slot::ALL {
        assert_eq!(change(browser, slot, "start").await["state"], "ready");
    }
}

/// The dev of another workspace, which runs.
async fn other_dev(browser: &mut Browser) -> SandboxId {
    let other = browser
        .post("/api/workspaces", json!({"name": "other"}))
        .await
        .expect(StatusCode::CREATED);
    let path = "/api/workspaces/other/slots/dev/start?wait_s=20";
    browser.post(path, json!({})).await.expect(StatusCode::ACCEPTED);
    sandbox(&other, Slot::Dev)
}

async fn states(browser: &mut Browser) -> [String; 2] {
    let slots = &shown(browser).await["slots"];
    ["live", "dev"].map(|slot| slots[slot]["state"].as_str().unwrap().to_owned())
}

#[tokio::test]
async fn dev_is_frozen_then_stopped_while_live_runs_on_and_whoever_asks_for_dev_is_told_when_to_come_again() {
    let mut scene = Scene::new().await;
    let mut ada = scene.start.ada().await;
    let [_, dev] = workspace(&mut ada).await;
    runs(&mut ada).await;
    assert_eq!(scene.look(RESERVE).await, Level::Fine);
    assert_eq!(states(&mut ada).await, ["ready", "ready"]);

    assert_eq!(scene.look(RESERVE - 1).await, Level::Short);
    assert_eq!(states(&mut ada).await, ["ready", "paused"]);
    scene.is_frozen(&dev).await;
    let reason = shown(&mut ada).await["slots"]["dev"]["reason"].clone();
    assert!(reason.as_str().unwrap().contains("short of memory"), "{reason}");
    let refused = ada.get("/api/workspaces/main/slots/dev/sandbox/health").await;
    assert_eq!(
        (refused.status, refused.code()),
        (StatusCode::SERVICE_UNAVAILABLE, "short_of_memory".to_owned())
    );
    assert_eq!(refused.headers["retry-after"], "10");

    scene.stops(&dev).await;
    assert_eq!(states(&mut ada).await, ["ready", "stopped"]);
    let refused = ada.post("/api/workspaces/main/slots/dev/start", json!({})).await;
    assert_eq!(
        (refused.status, refused.code()),
        (StatusCode::SERVICE_UNAVAILABLE, "short_of_memory".to_owned())
    );
    assert_eq!(refused.headers["retry-after"], "10");
    for _ in 0..3 {
        scene.look(0).await;
    }
    assert_eq!(
        states(&mut ada).await,
        ["ready", "stopped"],
        "live gives way to nothing"
    );
    change(&mut ada, Slot::Live, "stop").await;
    assert_eq!(
        change(&mut ada, Slot::Live, "start").await["state"],
        "ready",
        "live may start"
    );

    scene.relief().await;
    assert_eq!(states(&mut ada).await, ["ready", "stopped"]);
    assert_eq!(change(&mut ada, Slot::Dev, "start").await["state"], "ready");
}

#[tokio::test]
async fn the_largest_dev_gives_way_first_and_what_was_only_frozen_runs_on_when_there_is_memory_again() {
    let mut scene = Scene::new().await;
    let mut ada = scene.start.ada().await;
    let [_, small] = workspace(&mut ada).await;
    runs(&mut ada).await;
    let large = other_dev(&mut ada).await;
    scene.start.world.holds(&large, 2 << 30);

    scene.look(0).await;
    scene.becomes(&large, |o| matches!(o, Observed::Paused { .. })).await;
    scene.becomes(&small, |o| matches!(o, Observed::Ready { .. })).await;
    scene.look(0).await;
    scene.is_frozen(&small).await;
    scene.stops(&large).await;
    scene.becomes(&small, |o| matches!(o, Observed::Paused { .. })).await;
    scene.relief().await;
    scene.becomes(&small, |o| matches!(o, Observed::Ready { .. })).await;
    scene.becomes(&large, |o| matches!(o, Observed::Stopped { .. })).await;
    let audit = ada.get("/me/audit?action=sandbox.shed").await.expect(StatusCode::OK);
    let outcomes: Vec<_> = audit["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["outcome"].clone())
        .collect();
    assert_eq!(outcomes, ["stopped", "paused", "paused"], "{audit}");
}

#[tokio::test]
async fn a_dev_that_is_to_be_awake_always_waits_for_memory_and_starts_by_itself() {
    let mut scene = Scene::new().await;
    let mut ada = scene.start.ada().await;
    let [_, dev] = workspace(&mut ada).await;
    runs(&mut ada).await;
    scene.look(0).await;
    scene.is_frozen(&dev).await;
    scene.stops(&dev).await;
    let always = json!({"awake": {"live": "always", "dev": "always"}});
    ada.fetch(Method::PATCH, "/api/workspaces/main", Some(always))
        .await
        .expect(StatusCode::OK);
    let waits = shown(&mut ada).await["slots"]["dev"].clone();
    assert_eq!(
        (&waits["state"], &waits["desired"]),
        (&json!("queued"), &json!("running"))
    );
    let starts = scene.start.world.starts();
    scene.relief().await;
    scene.becomes(&dev, |o| matches!(o, Observed::Ready { .. })).await;
    assert_eq!(scene.start.world.starts(), starts + 1);
}

#[tokio::test]
async fn a_box_short_of_memory_refuses_a_swap_and_still_rolls_one_back() {
    let mut scene = Scene::new().await;
    let mut ada = scene.start.ada().await;
    let [good, bad] = workspace(&mut ada).await;
    runs(&mut ada).await;
    let swapped = ada
        .post("/api/workspaces/main/swap?wait_s=60", json!({}))
        .await
        .expect(StatusCode::OK);
    assert_eq!(swapped["step"], "succeeded", "{swapped}");
    scene.becomes(&good, |o| matches!(o, Observed::Paused { .. })).await;

    other_dev(&mut ada).await;
    assert_eq!(scene.look(0).await, Level::Short);
    let refused = ada
        .post("/api/workspaces/main/swap?wait_s=60", json!({}))
        .await
        .expect(StatusCode::OK);
    assert_eq!(refused["step"], "failed", "{refused}");
    assert!(
        refused["reason"].as_str().unwrap().contains("short of memory"),
        "{refused}"
    );
    let fork = ada
        .post("/api/workspaces/main/fork?wait_s=60", json!({}))
        .await
        .expect(StatusCode::OK);
    assert_eq!(fork["step"], "failed", "it would wait with what live may need: {fork}");
    assert_eq!(
        fork["reason"].as_str(),
        refused["reason"]
            .as_str()
            .map(|reason| reason.trim_start_matches("dev is not healthy: "))
    );
    let back = ada
        .post("/api/workspaces/main/rollback?wait_s=60", json!({}))
        .await
        .expect(StatusCode::OK);
    assert_eq!(back["step"], "succeeded", "{back}");
    let slots = shown(&mut ada).await["slots"].clone();
    assert_eq!(slots["live"]["sandbox"], good.as_str());
    assert_eq!(slots["dev"]["sandbox"], bad.as_str());
}
