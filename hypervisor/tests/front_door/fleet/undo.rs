//! Rollback, deploy, restore, fork and snapshots: what they bring back and what they keep.

mod archives;
mod crashes;
mod diff;
mod guard;
mod schedule;

use std::time::Duration;

use axum::http::StatusCode;
use choir_core::deployment::Step;
use choir_core::sandbox::{Exit, Observed};
use choir_core::{SandboxId, Slot};
use choir_runtime::sim::Fault;
use serde_json::{Value, json};

use super::{Box, change, sandbox, shown, workspace};
use crate::support::Browser;

pub(super) const MAIN: &str = "/api/workspaces/main";

/// Asks for a deployment and waits for its end.
async fn deployed(browser: &mut Browser, what: &str, body: Value) -> Value {
    let path = format!("{MAIN}/{what}?wait_s=60");
    browser.post(&path, body).await.expect(StatusCode::OK)
}

async fn succeeds(browser: &mut Browser, what: &str, body: Value) -> Value {
    let ended = deployed(browser, what, body).await;
    assert_eq!(ended["step"], "succeeded", "{what}: {ended}");
    ended
}

fn steps(deployment: &Value) -> Vec<&str> {
    let steps = deployment["steps"].as_array().unwrap();
    steps.iter().map(|s| s["step"].as_str().unwrap()).collect()
}

async fn snapshots(browser: &mut Browser, slot: Slot) -> Vec<Value> {
    let path = format!("{MAIN}/slots/{slot}/snapshots");
    let page = browser.get(&path).await.expect(StatusCode::OK);
    page["items"].as_array().unwrap().clone()
}

impl Box {
    fn home(&self, volume: &str) -> String {
        self.volumes.read(volume).unwrap().1
    }

    fn write(&self, sandbox: &SandboxId, text: &str) {
        self.volumes.write_home(sandbox.as_str(), text).unwrap();
    }

    /// All invariants hold, once what goes is gone.
    async fn fits_together(&self) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        loop {
            let findings = self.app.fsck().await.unwrap();
            if findings.is_empty() {
                return;
            }
            assert!(tokio::time::Instant::now() < deadline, "{findings:#?}");
            tokio::task::yield_now().await;
        }
    }
}

/// A workspace whose two sandboxes have run; live first.
async fn used(start: &Box, ada: &mut Browser) -> [SandboxId; 2] {
    let both = workspace(ada).await;
    for slot in Slot::ALL {
        change(ada, slot, "start").await;
    }
    start.write(&both[0], "good");
    start.write(&both[1], "new");
    both
}

#[tokio::test]
async fn a_rollback_right_after_a_swap_brings_the_very_same_processes_back() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, dev] = used(&start, &mut ada).await;
    let before = shown(&mut ada).await["slots"]["live"]["generation"].clone();
    let swapped = succeeds(&mut ada, "swap", json!({})).await;
    let after = shown(&mut ada).await;
    assert_eq!(after["slots"]["dev"]["state"], "paused", "{after}");
    assert_eq!(after["undo"]["warm"], true);
    assert_eq!(after["undo"]["deployment"], swapped["id"]);

    let starts = start.world.starts();
    let back = succeeds(&mut ada, "rollback", json!({})).await;
    assert_eq!(
        steps(&back),
        ["preparing", "verifying", "switching", "draining", "succeeded"]
    );
    let after = shown(&mut ada).await;
    assert_eq!((sandbox(&after, Slot::Live), sandbox(&after, Slot::Dev)), (live, dev));
    assert_eq!(after["slots"]["live"]["generation"], before, "no new generation");
    assert_eq!(start.world.starts(), starts, "nothing was started");
    start.fits_together().await;
}

#[tokio::test]
async fn a_rollback_can_itself_be_undone() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, dev] = used(&start, &mut ada).await;
    succeeds(&mut ada, "swap", json!({})).await;
    succeeds(&mut ada, "rollback", json!({})).await;
    succeeds(&mut ada, "rollback", json!({})).await;
    let after = shown(&mut ada).await;
    assert_eq!((sandbox(&after, Slot::Live), sandbox(&after, Slot::Dev)), (dev, live));
}

#[tokio::test]
async fn the_frozen_sandbox_stays_a_warm_undo_over_a_restart_of_the_hypervisor() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, _] = used(&start, &mut ada).await;
    succeeds(&mut ada, "swap", json!({})).await;
    let again = start.restarted().await;
    ada.router = again.router.clone();
    assert_eq!(shown(&mut ada).await["undo"]["warm"], true);
    let starts = start.world.starts();
    succeeds(&mut ada, "rollback", json!({})).await;
    assert_eq!(sandbox(&shown(&mut ada).await, Slot::Live), live);
    assert_eq!(start.world.starts(), starts);
}

#[tokio::test]
async fn once_the_displaced_sandbox_ran_again_a_rollback_starts_live_on_the_snapshot_and_leaves_dev_alone() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [good, new] = used(&start, &mut ada).await;
    succeeds(&mut ada, "swap", json!({})).await;
    // Work goes on in dev, and what is live now writes, too.
    change(&mut ada, Slot::Dev, "start").await;
    start.write(&good, "good, then broken in dev");
    start.write(&new, "new, and written since");
    assert_eq!(shown(&mut ada).await["undo"]["warm"], false);

    let back = succeeds(&mut ada, "rollback", json!({})).await;
    assert_eq!(
        steps(&back),
        ["preparing", "switching", "draining", "starting", "succeeded"]
    );
    let after = shown(&mut ada).await;
    assert_eq!(
        (sandbox(&after, Slot::Live), sandbox(&after, Slot::Dev)),
        (new.clone(), good.clone()),
        "the sandboxes stay where they are"
    );
    assert_eq!(start.home(new.as_str()), "good");
    assert_eq!(
        start.home(good.as_str()),
        "good, then broken in dev",
        "dev is not touched"
    );
    assert_eq!(after["slots"]["live"]["state"], "ready");
    let kept = &snapshots(&mut ada, Slot::Live).await[0];
    assert_eq!(kept["taken_for"], "rollback");
    assert_eq!(start.home(kept["id"].as_str().unwrap()), "new, and written since");

    succeeds(&mut ada, "rollback", json!({})).await;
    assert_eq!(
        start.home(new.as_str()),
        "new, and written since",
        "what the rollback replaced comes back"
    );
    start.fits_together().await;
}

#[tokio::test]
async fn a_rollback_reaches_each_of_the_last_five_deployments_and_no_further() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, _] = used(&start, &mut ada).await;
    let mut done = Vec::new();
    let release = shown(&mut ada).await["slots"]["live"]["release"].clone();
    for nth in 0..6 {
        start.write(&live, &format!("before {nth}"));
        let deployed = succeeds(&mut ada, "slots/live/deploy", json!({"release": release})).await;
        done.push(deployed["id"].as_str().unwrap().to_owned());
    }
    let oldest = ada.post(&format!("{MAIN}/rollback"), json!({"to": done[0]})).await;
    oldest.refused(StatusCode::CONFLICT, "nothing_to_undo");
    succeeds(&mut ada, "rollback", json!({"to": done[1]})).await;
    assert_eq!(start.home(live.as_str()), "before 1");
    // The rollback was a deployment, too: now the second is the sixth from the end.
    ada.post(&format!("{MAIN}/rollback"), json!({"to": done[1]}))
        .await
        .refused(StatusCode::CONFLICT, "nothing_to_undo");
}

#[tokio::test]
async fn with_nothing_done_there_is_nothing_to_roll_back() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    used(&start, &mut ada).await;
    ada.post(&format!("{MAIN}/rollback"), json!({}))
        .await
        .refused(StatusCode::CONFLICT, "nothing_to_undo");
    assert!(shown(&mut ada).await["undo"].is_null());
    let listed = ada.get(&format!("{MAIN}/deployments")).await.expect(StatusCode::OK);
    assert_eq!(listed["items"], json!([]), "a refusal leaves nothing behind");
}

#[tokio::test]
async fn a_deploy_changes_the_system_and_keeps_the_home() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, _] = used(&start, &mut ada).await;
    let old = start.volumes.read(live.as_str()).unwrap().0;
    start
        .app
        .releases
        .ensure_default(std::path::Path::new("default-2.tar"))
        .await;
    let releases = ada.get("/api/releases").await.expect(StatusCode::OK);
    let release = releases["items"][0]["id"].clone();
    succeeds(&mut ada, "slots/live/deploy", json!({"release": release})).await;
    let (root, home) = start.volumes.read(live.as_str()).unwrap();
    assert_eq!((root.as_str(), home.as_str()), (release.as_str().unwrap(), "good"));
    assert_eq!(shown(&mut ada).await["slots"]["live"]["release"], release);
    succeeds(&mut ada, "rollback", json!({})).await;
    assert_eq!(
        start.volumes.read(live.as_str()).unwrap(),
        (old.clone(), "good".to_owned())
    );
    assert_eq!(shown(&mut ada).await["slots"]["live"]["release"], old);
}

#[tokio::test]
async fn a_deploy_that_never_becomes_ready_is_taken_back_and_says_why() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, _] = used(&start, &mut ada).await;
    let old = shown(&mut ada).await["slots"]["live"]["release"].clone();
    start
        .app
        .releases
        .ensure_default(std::path::Path::new("default-2.tar"))
        .await;
    let releases = ada.get("/api/releases").await.expect(StatusCode::OK);
    for _ in 0..choir_core::sandbox::ATTEMPTS {
        start.world.fail_next(&live, Fault::FailCreate);
    }
    let ended = deployed(
        &mut ada,
        "slots/live/deploy",
        json!({"release": releases["items"][0]["id"]}),
    )
    .await;
    assert_eq!(ended["step"], "rolled_back", "{ended}");
    assert_eq!(
        steps(&ended),
        [
            "preparing",
            "switching",
            "draining",
            "starting",
            "returning",
            "rolled_back"
        ]
    );
    assert!(
        ended["reason"].as_str().unwrap().contains("the script says so"),
        "{ended}"
    );
    let after = shown(&mut ada).await;
    assert_eq!(after["slots"]["live"]["release"], old);
    assert_eq!(after["slots"]["live"]["state"], "ready");
    let (root, home) = start.volumes.read(live.as_str()).unwrap();
    assert_eq!((root.as_str(), home.as_str()), (old.as_str().unwrap(), "good"));
    assert!(after["undo"].is_null(), "what came to nothing is not undone");
    start.fits_together().await;
}

#[tokio::test]
async fn a_fork_makes_dev_a_copy_of_live_and_keeps_what_dev_was() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, dev] = used(&start, &mut ada).await;
    let generation = shown(&mut ada).await["slots"]["live"]["generation"].clone();
    succeeds(&mut ada, "fork", json!({})).await;
    assert_eq!(start.home(dev.as_str()), "good");
    assert_eq!(start.home(live.as_str()), "good");
    assert_eq!(
        shown(&mut ada).await["slots"]["live"]["generation"],
        generation,
        "live runs on"
    );
    let kept = snapshots(&mut ada, Slot::Dev).await;
    assert_eq!(start.home(kept[0]["id"].as_str().unwrap()), "new");
    let path = format!("slots/dev/snapshots/{}/restore", kept[0]["id"].as_str().unwrap());
    succeeds(&mut ada, &path, json!({})).await;
    assert_eq!(start.home(dev.as_str()), "new", "and that can be had back");
    assert!(shown(&mut ada).await["undo"].is_null(), "live was not changed");
}

#[tokio::test]
async fn what_five_forks_in_one_hour_displaced_is_all_there_and_can_be_restored() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [_, dev] = used(&start, &mut ada).await;
    for work in ["first", "second", "third", "fourth", "fifth"] {
        start.write(&dev, work);
        succeeds(&mut ada, "fork", json!({})).await;
    }
    let kept = snapshots(&mut ada, Slot::Dev).await;
    let holds = |id: &Value| start.home(id.as_str().unwrap());
    let held: Vec<String> = kept.iter().map(|kept| holds(&kept["id"])).collect();
    assert_eq!(held, ["fifth", "fourth", "third", "second", "first"], "{kept:#?}");
    let path = format!("slots/dev/snapshots/{}/restore", kept[4]["id"].as_str().unwrap());
    succeeds(&mut ada, &path, json!({})).await;
    assert_eq!(start.home(dev.as_str()), "first");
    start.fits_together().await;
}

#[tokio::test]
async fn a_snapshot_that_was_asked_for_is_kept_until_it_is_deleted_and_can_be_restored_anywhere() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, dev] = used(&start, &mut ada).await;
    let path = format!("{MAIN}/slots/live/snapshots");
    let taken = ada.post(&path, json!({})).await.expect(StatusCode::CREATED);
    let id = taken["id"].as_str().unwrap();
    start.write(&live, "changed");
    succeeds(&mut ada, &format!("slots/live/snapshots/{id}/restore"), json!({})).await;
    assert_eq!(start.home(live.as_str()), "good");
    succeeds(&mut ada, "fork", json!({"from": id})).await;
    assert_eq!(start.home(dev.as_str()), "good");
    succeeds(&mut ada, "rollback", json!({})).await;
    assert_eq!(start.home(live.as_str()), "changed", "a restore can be undone");
    ada.delete(&format!("{path}/{id}")).await.expect(StatusCode::NO_CONTENT);
    assert_eq!(ada.get(&format!("{path}/{id}")).await.status, StatusCode::NOT_FOUND);
    start.fits_together().await;
}

#[tokio::test]
async fn a_snapshot_that_a_rollback_may_need_cannot_be_deleted() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    used(&start, &mut ada).await;
    succeeds(&mut ada, "swap", json!({})).await;
    let id = snapshots(&mut ada, Slot::Live).await[0]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    ada.delete(&format!("{MAIN}/slots/live/snapshots/{id}"))
        .await
        .refused(StatusCode::CONFLICT, "conflict");
    assert_eq!(snapshots(&mut ada, Slot::Live).await[0]["id"], id);
}

#[tokio::test]
async fn a_disk_without_room_fails_a_swap_before_it_changes_anything() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, dev] = used(&start, &mut ada).await;
    start.volumes.fail_copies(1);
    let ended = deployed(&mut ada, "swap", json!({})).await;
    assert_eq!(ended["step"], "failed");
    assert!(ended["reason"].as_str().unwrap().contains("no snapshot of"), "{ended}");
    let after = shown(&mut ada).await;
    assert_eq!((sandbox(&after, Slot::Live), sandbox(&after, Slot::Dev)), (live, dev));
    start.fits_together().await;
    succeeds(&mut ada, "swap", json!({})).await;
}

#[tokio::test]
async fn deleting_a_workspace_takes_its_snapshots_along() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    used(&start, &mut ada).await;
    succeeds(&mut ada, "swap", json!({})).await;
    ada.delete(MAIN).await.expect(StatusCode::ACCEPTED);
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !start.app.store.all_workspaces().await.unwrap().is_empty() {
        assert!(tokio::time::Instant::now() < deadline, "it stays");
        tokio::task::yield_now().await;
    }
    start.fits_together().await;
}

/// A release whose app never passes its check, which the simulated one answers with 200.
async fn unwell(start: &Box, ada: &mut Browser) -> Value {
    let known = start.app.store.releases().await.unwrap().remove(0);
    let config = json!({"health": {"expect": 500, "timeout_s": 2}});
    let asked = json!({"image": known.image_digest, "config": config});
    ada.post("/api/releases", asked).await.expect(StatusCode::CREATED)["id"].clone()
}

#[tokio::test]
async fn what_is_written_before_a_deploy_is_taken_back_is_kept_as_a_snapshot() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, _] = used(&start, &mut ada).await;
    let release = unwell(&start, &mut ada).await;
    // Of one hour, in which one of those that nobody needs is left.
    for written in [
        "written while the first was judged",
        "written while the second was judged",
    ] {
        is_taken_back(&start, &mut ada, &live, &release, written).await;
    }
    let mut kept = Vec::new();
    for snapshot in snapshots(&mut ada, Slot::Live).await {
        kept.push(start.volumes.read(snapshot["id"].as_str().unwrap()).unwrap().1);
    }
    for written in [
        "written while the first was judged",
        "written while the second was judged",
    ] {
        assert!(kept.contains(&written.to_owned()), "{kept:?}");
    }
    start.fits_together().await;
}

/// Deploys what is not well, writes while it serves, and sees it taken back.
async fn is_taken_back(start: &Box, ada: &mut Browser, live: &SandboxId, release: &Value, written: &str) {
    let before = start.app.fleet.handle(live).unwrap().ready().unwrap().number;
    let path = format!("{MAIN}/slots/live/deploy");
    let begun = ada
        .post(&path, json!({"release": release}))
        .await
        .expect(StatusCode::ACCEPTED);
    let handle = start.app.fleet.handle(live).unwrap();
    let served = handle
        .settle(
            Duration::from_secs(20),
            |s| matches!(s.observed, Observed::Ready { generation, .. } if generation > before),
        )
        .await;
    assert_eq!(served.observed.name(), "ready");
    start.write(live, written);
    let view = start.app.store.all_workspaces().await.unwrap().remove(0);
    let id = begun["id"].as_str().unwrap().parse().unwrap();
    let minute = Duration::from_secs(60);
    let ended = start
        .app
        .await_deployment(&view.workspace.id, &id, minute)
        .await
        .unwrap();
    assert_eq!(ended.step, Step::RolledBack, "{ended:?}");
    assert_eq!(start.home(live.as_str()), "good");
}

#[tokio::test]
async fn a_live_that_no_longer_starts_does_not_keep_what_was_frozen_out() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [good, new] = used(&start, &mut ada).await;
    succeeds(&mut ada, "swap", json!({})).await;
    for _ in 0..choir_core::sandbox::ATTEMPTS {
        start.world.fail_next(&new, Fault::FailCreate);
    }
    let handle = start.app.fleet.handle(&new).unwrap();
    let exit = Exit {
        code: 1,
        oom_killed: false,
    };
    start.world.exit(&handle.ready().unwrap(), exit).await;
    let broken = handle
        .settle(Duration::from_secs(30), |s| {
            matches!(s.observed, Observed::Failed { .. })
        })
        .await;
    assert_eq!(broken.observed.name(), "failed");
    let starts = start.world.starts();
    succeeds(&mut ada, "rollback", json!({})).await;
    let after = shown(&mut ada).await;
    assert_eq!(sandbox(&after, Slot::Live), good);
    assert_eq!(start.world.starts(), starts, "the frozen one goes on");
}
