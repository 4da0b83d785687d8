//! Swaps: what they change, what they leave, and two of them at once.

use axum::body::Body;
use axum::http::{Request, StatusCode};
use choir_core::deployment::Kind;
use choir_core::{DeploymentId, Slot};
use choir_runtime::sim::Fault;
use choir_store::{NewDeployment, WorkspaceView};
use serde_json::{Value, json};

use super::{Box, change, sandbox, shown, workspace};
use crate::support::{Answer, Browser, ORIGIN};

async fn swap(browser: &mut Browser) -> Value {
    browser
        .post("/api/workspaces/main/swap?wait_s=60", json!({}))
        .await
        .expect(StatusCode::OK)
}

async fn swap_with_key(browser: &mut Browser, key: &str) -> Answer {
    let request = Request::post("/api/workspaces/main/swap")
        .header("x-choir", "1")
        .header("origin", ORIGIN)
        .header("content-type", "application/json")
        .header("idempotency-key", key)
        .body(Body::from("{}"))
        .unwrap();
    browser.send(request).await
}

fn begun(id: &DeploymentId, view: &WorkspaceView) -> NewDeployment {
    NewDeployment {
        id: id.clone(),
        workspace: view.workspace.id.clone(),
        kind: Kind::Swap,
        slot: Slot::Live,
        idempotency_key: None,
        reason: None,
    }
}

#[tokio::test]
async fn a_swap_exchanges_what_the_slots_mean_and_starts_what_sleeps() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, dev] = workspace(&mut ada).await;
    let deployment = swap(&mut ada).await;
    assert_eq!(deployment["step"], "succeeded", "{deployment}");
    let steps: Vec<_> = deployment["steps"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["step"].clone())
        .collect();
    assert_eq!(steps, ["preparing", "verifying", "switching", "draining", "succeeded"]);
    let after = shown(&mut ada).await;
    assert_eq!((sandbox(&after, Slot::Live), sandbox(&after, Slot::Dev)), (dev, live));
}

#[tokio::test]
async fn a_swap_outlives_the_hypervisor_and_a_restart_of_the_sandbox() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, dev] = workspace(&mut ada).await;
    let swapped = swap(&mut ada).await;
    assert_eq!(swapped["step"], "succeeded", "{swapped}");
    change(&mut ada, Slot::Live, "restart").await;
    let again = start.restarted().await;
    ada.router = again.router.clone();
    let after = shown(&mut ada).await;
    assert_eq!((sandbox(&after, Slot::Live), sandbox(&after, Slot::Dev)), (dev, live));
    let user = "ada".parse().unwrap();
    let entry = again
        .app
        .table
        .get(&user, &"main".parse().unwrap())
        .expect("its hosts are routed");
    assert_eq!(
        entry.live.handle.id,
        sandbox(&after, Slot::Live),
        "the route table is what the database says"
    );
}

#[tokio::test]
async fn a_swap_whose_target_never_becomes_ready_changes_nothing_and_says_why() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, dev] = workspace(&mut ada).await;
    for _ in 0..choir_core::sandbox::ATTEMPTS {
        start.world.fail_next(&dev, Fault::FailCreate);
    }
    let deployment = swap(&mut ada).await;
    assert_eq!(deployment["step"], "failed");
    assert!(
        deployment["reason"].as_str().unwrap().contains("dev is not healthy"),
        "{deployment}"
    );
    let after = shown(&mut ada).await;
    assert_eq!((sandbox(&after, Slot::Live), sandbox(&after, Slot::Dev)), (live, dev));
}

#[tokio::test]
async fn of_two_swaps_at_once_one_is_carried_out_and_the_other_is_told_which() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, dev] = workspace(&mut ada).await;
    // A slow start keeps the first one open while the second one comes.
    start.world.fail_next(&dev, Fault::FailCreate);
    let first = ada
        .post("/api/workspaces/main/swap", json!({}))
        .await
        .expect(StatusCode::ACCEPTED);
    let second = ada.post("/api/workspaces/main/swap", json!({})).await;
    second.refused(StatusCode::CONFLICT, "deployment_open");
    assert_eq!(second.json()["error"]["deployment"], first["id"]);
    let path = format!("/api/workspaces/main/deployments/{}", first["id"].as_str().unwrap());
    let workspace = start.app.store.all_workspaces().await.unwrap()[0].workspace.id.clone();
    let id = first["id"].as_str().unwrap().parse().unwrap();
    start
        .app
        .await_deployment(&workspace, &id, std::time::Duration::from_secs(60))
        .await
        .unwrap();
    assert_eq!(ada.get(&path).await.expect(StatusCode::OK)["step"], "succeeded");
    let after = shown(&mut ada).await;
    assert_eq!((sandbox(&after, Slot::Live), sandbox(&after, Slot::Dev)), (dev, live));
}

#[tokio::test]
async fn the_same_idempotency_key_is_one_swap() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, dev] = workspace(&mut ada).await;
    change(&mut ada, Slot::Live, "start").await;
    change(&mut ada, Slot::Dev, "start").await;
    let first = swap_with_key(&mut ada, "once").await.json();
    let id = first["id"].as_str().unwrap().to_owned();
    let second = swap_with_key(&mut ada, "once").await.json();
    assert_eq!(second["id"].as_str(), Some(id.as_str()));
    let workspace = start.app.store.all_workspaces().await.unwrap()[0].workspace.id.clone();
    let minute = std::time::Duration::from_secs(60);
    start
        .app
        .await_deployment(&workspace, &id.parse().unwrap(), minute)
        .await
        .unwrap();
    let after = shown(&mut ada).await;
    assert_eq!((sandbox(&after, Slot::Live), sandbox(&after, Slot::Dev)), (dev, live));
}

#[tokio::test]
async fn a_swap_that_a_crash_cut_short_is_undone_before_the_switch() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, dev] = workspace(&mut ada).await;
    let view = start.app.store.all_workspaces().await.unwrap().remove(0);
    let id = DeploymentId::from_random([7; 16]);
    let audit = start.app.event(&view, "workspace.swap");
    start
        .app
        .store
        .begin_deployment(begun(&id, &view), audit)
        .await
        .unwrap();
    let again = start.restarted().await;
    ada.router = again.router.clone();
    let ended = ada
        .get(&format!("/api/workspaces/main/deployments/{id}"))
        .await
        .expect(StatusCode::OK);
    assert_eq!(ended["step"], "failed");
    let after = shown(&mut ada).await;
    assert_eq!((sandbox(&after, Slot::Live), sandbox(&after, Slot::Dev)), (live, dev));
    assert_eq!(swap(&mut ada).await["step"], "succeeded", "nothing stays open");
}

#[tokio::test]
async fn a_swap_that_a_crash_cut_short_is_finished_after_the_switch() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, dev] = workspace(&mut ada).await;
    let view = start.app.store.all_workspaces().await.unwrap().remove(0);
    let id = DeploymentId::from_random([8; 16]);
    let audit = start.app.event(&view, "workspace.swap");
    start
        .app
        .store
        .begin_deployment(begun(&id, &view), audit.clone())
        .await
        .unwrap();
    start.app.store.switch(&id, Vec::new(), audit).await.unwrap();
    let again = start.restarted().await;
    ada.router = again.router.clone();
    let minute = std::time::Duration::from_secs(60);
    let ended = again
        .app
        .await_deployment(&view.workspace.id, &id, minute)
        .await
        .unwrap();
    assert_eq!(ended.step.as_str(), "succeeded");
    let after = shown(&mut ada).await;
    assert_eq!((sandbox(&after, Slot::Live), sandbox(&after, Slot::Dev)), (dev, live));
}
