//! What a crash leaves of a deployment, what the next start makes of it, and what `fsck` says.

use std::time::Duration;

use axum::http::StatusCode;
use choir_core::deployment::{Contents, Kind, Refill, Step};
use choir_core::{DeploymentId, SandboxId, Slot, SnapshotId};
use choir_hypervisor::reconcile::launch::spec;
use choir_runtime::Volumes;
use choir_store::{AuditEvent, Ended, NewDeployment, TakenFor};
use serde_json::json;

use super::{MAIN, snapshots, succeeds, used};
use crate::fleet::{Box, change, shown};

/// The same database and disk as after a crash that came once `refill` was committed, and as far as `done` goes.
async fn cut_short(
    start: &Box,
    slot: Slot,
    with: SnapshotId,
    done: impl AsyncFnOnce(&Box, &SandboxId, &Refill),
) -> DeploymentId {
    let view = start.app.store.all_workspaces().await.unwrap().remove(0);
    let sandbox = view.slot(slot).clone();
    let id = DeploymentId::from_random([9; 16]);
    let new = NewDeployment {
        id: id.clone(),
        workspace: view.workspace.id.clone(),
        kind: Kind::Restore,
        slot,
        idempotency_key: None,
        reason: None,
    };
    let audit = start.app.event(&view, "workspace.restore");
    let store = &start.app.store;
    store.begin_deployment(new, audit.clone()).await.unwrap();
    let refill = Refill {
        deployment: id.clone(),
        keep: SnapshotId::from_random([6; 16]),
        with: Contents::Snapshot(with),
    };
    store
        .switch_contents(refill.clone(), sandbox.release, Vec::new(), audit)
        .await
        .unwrap();
    done(start, &sandbox.id, &refill).await;
    id
}

#[tokio::test]
async fn contents_that_a_crash_found_half_replaced_are_replaced_by_the_next_start() {
    for far in 0..4 {
        let start = Box::new().await;
        let mut ada = start.ada().await;
        let [live, _] = used(&start, &mut ada).await;
        let path = format!("{MAIN}/slots/live/snapshots");
        let taken = ada.post(&path, json!({})).await.expect(StatusCode::CREATED);
        start.write(&live, "changed");
        let from: SnapshotId = taken["id"].as_str().unwrap().parse().unwrap();
        let id = cut_short(&start, Slot::Live, from.clone(), async |start, live, refill| {
            let (own, keep) = (live.as_str(), refill.keep.as_str());
            if far > 0 {
                start.volumes.snapshot(own, keep, true).await.unwrap();
            }
            if far > 1 {
                start.volumes.delete(own).await.unwrap();
            }
            if far > 2 {
                start.volumes.snapshot(from.as_str(), own, false).await.unwrap();
            }
        })
        .await;
        let again = start.restarted().await;
        ada.router = again.router.clone();
        let view = again.app.store.all_workspaces().await.unwrap().remove(0);
        let minute = Duration::from_secs(60);
        let ended = again
            .app
            .await_deployment(&view.workspace.id, &id, minute)
            .await
            .unwrap();
        assert_eq!(ended.step.as_str(), "succeeded", "{far}: {ended:?}");
        assert_eq!(again.home(live.as_str()), "good", "{far}");
        assert_eq!(
            again.home(SnapshotId::from_random([6; 16]).as_str()),
            "changed",
            "{far}"
        );
        assert_eq!(shown(&mut ada).await["slots"]["live"]["state"], "ready");
        again.fits_together().await;
    }
}

#[tokio::test]
async fn a_snapshot_that_a_crash_cut_short_is_gone_after_the_next_start() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    used(&start, &mut ada).await;
    let view = start.app.store.all_workspaces().await.unwrap().remove(0);
    let id = SnapshotId::from_random([5; 16]);
    let audit = start.app.event(&view, "snapshot.take");
    let store = &start.app.store;
    store
        .begin_snapshot(&id, &view.workspace.id, Slot::Live, TakenFor::Somebody, audit)
        .await
        .unwrap();
    start
        .volumes
        .snapshot(view.live.id.as_str(), id.as_str(), true)
        .await
        .unwrap();
    let again = start.restarted().await;
    ada.router = again.router.clone();
    assert!(snapshots(&mut ada, Slot::Live).await.is_empty());
    again.fits_together().await;
}

#[tokio::test]
async fn what_does_not_fit_is_found_and_what_belongs_to_nobody_is_removed_when_asked() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, _] = used(&start, &mut ada).await;
    succeeds(&mut ada, "swap", json!({})).await;
    start.fits_together().await;
    let listed = ada.get("/admin/fsck").await.expect(StatusCode::OK);
    assert_eq!(listed["items"], json!([]));

    start.volumes.snapshot(live.as_str(), "s-stray", false).await.unwrap();
    let kept = snapshots(&mut ada, Slot::Live).await[0]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    start.volumes.delete(&kept).await.unwrap();
    let mut findings = start.app.fsck().await.unwrap();
    let told: Vec<_> = findings
        .iter()
        .map(|f| (f.told.invariant.as_str(), f.told.what.clone()))
        .collect();
    assert_eq!(
        told,
        [
            ("I2", "volume s-stray is in no row of the database".to_owned()),
            ("I5", format!("volume {kept} is missing")),
        ]
    );
    let services = &start.app.fleet.services;
    choir_hypervisor::fsck::repair(&mut findings, &*services.runtime, &*services.volumes)
        .await
        .unwrap();
    let left: Vec<_> = start
        .app
        .fsck()
        .await
        .unwrap()
        .into_iter()
        .map(|f| f.told.invariant)
        .collect();
    assert_eq!(
        left,
        ["I5"],
        "what is lost cannot be brought back by removing something"
    );
}

#[tokio::test]
async fn a_container_that_the_service_made_for_a_process_that_is_gone_is_removed_and_what_runs_stays() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, _] = used(&start, &mut ada).await;
    let handle = start.app.fleet.handle(&live).unwrap();
    let former = handle.ready().unwrap();
    change(&mut ada, Slot::Live, "restart").await;
    let present = handle.wake(Duration::from_secs(20)).await.unwrap();
    start.fits_together().await;
    let services = &start.app.fleet.services;
    let workspace = start.app.store.all_workspaces().await.unwrap()[0].workspace.id.clone();
    let late = spec(services, &workspace, &former, "asked for before".to_owned())
        .await
        .unwrap();
    services.runtime.create(&late).await.unwrap();
    assert_eq!(start.app.fsck().await.unwrap().len(), 1, "it is seen");
    start.app.remove_stray_containers().await.unwrap();
    assert!(start.app.fsck().await.unwrap().is_empty());
    assert_eq!(handle.ready(), Some(present));
}

/// The first row that contradicts another one once had every sandbox called a stray.
#[tokio::test]
async fn where_rows_contradict_each_other_nothing_is_called_a_stray_and_nothing_is_removed() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    used(&start, &mut ada).await;
    let id = a_refill_that_nobody_finishes(&start).await;
    let before = start.volumes.list().await.unwrap();
    let mut findings = start.app.fsck().await.unwrap();
    let told: Vec<_> = findings.iter().map(|f| f.told.invariant.as_str()).collect();
    assert_eq!(told, ["I4"], "{findings:?} for {id}");
    let services = &start.app.fleet.services;
    choir_hypervisor::fsck::repair(&mut findings, &*services.runtime, &*services.volumes)
        .await
        .unwrap();
    assert_eq!(start.volumes.list().await.unwrap(), before);
    assert!(findings.iter().all(|f| !f.told.repaired));
}

/// A deployment that has ended although its sandbox is still to be refilled.
async fn a_refill_that_nobody_finishes(start: &Box) -> DeploymentId {
    let view = start.app.store.all_workspaces().await.unwrap().remove(0);
    let from = SnapshotId::from_random([4; 16]);
    let store = &start.app.store;
    let audit = start.app.event(&view, "snapshot.take");
    store
        .begin_snapshot(&from, &view.workspace.id, Slot::Live, TakenFor::Somebody, audit.clone())
        .await
        .unwrap();
    let live = view.live.id.as_str();
    start.volumes.snapshot(live, from.as_str(), true).await.unwrap();
    store.snapshot_made(&from).await.unwrap();
    let id = cut_short(start, Slot::Live, from, async |_, _, _| {}).await;
    let ended = Ended {
        step: Step::RolledBack,
        reason: None,
        displaced: None,
    };
    let audit = AuditEvent {
        action: "workspace.deployment_ended",
        ..audit
    };
    store.finish_deployment(&id, ended, audit).await.unwrap();
    id
}

#[tokio::test]
async fn a_backup_made_while_contents_were_replaced_replays_nothing_when_it_is_restored() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, _] = used(&start, &mut ada).await;
    let taken = ada
        .post(&format!("{MAIN}/slots/live/snapshots"), json!({}))
        .await
        .expect(StatusCode::CREATED);
    let from = taken["id"].as_str().unwrap().parse().unwrap();
    let id = cut_short(&start, Slot::Live, from, async |_, _, _| {}).await;
    let copy = start.directory.path().join("copy.db");
    start.app.store.copy_to(&copy).await.unwrap();
    start.write(&live, "came since");
    let view = start.app.store.all_workspaces().await.unwrap().remove(0);
    let restored = AuditEvent {
        action: "backup.restore",
        ..start.app.event(&view, "backup.restore")
    };
    choir_store::admit_copy(&copy, &restored).unwrap();
    let store = choir_store::Store::open(&copy).unwrap();
    let view = store.all_workspaces().await.unwrap().remove(0);
    assert_eq!((view.live.refill, view.open_deployment), (None, None));
    let ended = store.deployment(&view.workspace.id, &id).await.unwrap();
    assert_eq!(ended.step, Step::Failed);
    assert!(
        store.claims().await.unwrap().broken.is_empty(),
        "its end is in the trail"
    );
    assert_eq!(start.home(live.as_str()), "came since");
}
