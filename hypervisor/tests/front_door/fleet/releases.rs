//! Releases that people make, of a sandbox or of an archive; whose they are, and what their end needs.

use axum::body::{Body, Bytes};
use axum::http::{Request, StatusCode};
use std::time::Duration;

use choir_core::{ReleaseConfig, ReleaseId, Slot};
use choir_hypervisor::reconcile::trial::tried_in;
use choir_runtime::sim::Fault;
use choir_store::{AuditEvent, NewRelease, ReleaseState};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::{Box, change, sandbox, shown, workspace};
use crate::support::{Answer, Browser};

const RELEASES: &str = "/api/releases";

pub(super) async fn upload(browser: &mut Browser, query: &str, body: impl Into<Body>) -> Answer {
    let request = Request::post(format!("{RELEASES}/archive?{query}"))
        .header("origin", "http://localhost:9090")
        .header("x-choir", "1")
        .header("content-type", "application/x-tar")
        .body(body.into())
        .unwrap();
    browser.send(request).await
}

async fn listed(browser: &mut Browser) -> Vec<Value> {
    let page = browser.get(RELEASES).await.expect(StatusCode::OK);
    page["items"].as_array().unwrap().clone()
}

/// A release of live's system, made by the one who owns it.
async fn made(browser: &mut Browser) -> String {
    let live = sandbox(&shown(browser).await, Slot::Live);
    let made = browser.post(RELEASES, json!({"sandbox": live, "name": "mine"})).await;
    made.expect(StatusCode::CREATED)["id"].as_str().unwrap().to_owned()
}

async fn deploy(browser: &mut Browser, slot: Slot, release: &str) -> Answer {
    let path = format!("/api/workspaces/main/slots/{slot}/deploy?wait_s=60");
    browser.post(&path, json!({"release": release})).await
}

#[tokio::test]
async fn a_release_of_a_sandbox_is_its_owners_alone_and_holds_the_system_without_the_home() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, _] = workspace(&mut ada).await;
    change(&mut ada, Slot::Live, "start").await;
    start.volumes.write_home(live.as_str(), "private").unwrap();
    let id = made(&mut ada).await;
    let system = start.volumes.read(live.as_str()).unwrap().0;
    assert_eq!(start.volumes.read(&id).unwrap(), (system, String::new()));

    let own = ada.get(&format!("{RELEASES}/{id}")).await.expect(StatusCode::OK);
    assert_eq!((&own["own"], &own["name"]), (&json!(true), &json!("mine")), "{own}");
    assert_eq!(
        deploy(&mut ada, Slot::Dev, &id).await.expect(StatusCode::OK)["step"],
        "succeeded"
    );
    let own = loop {
        let own = ada.get(&format!("{RELEASES}/{id}")).await.expect(StatusCode::OK);
        if own["state"] == "verified" {
            break own;
        }
        tokio::task::yield_now().await;
    };
    assert_eq!(own["used_by"], json!(["main/dev"]));

    let mut bob = start.member(&mut ada, "bob").await;
    workspace(&mut bob).await;
    assert!(!listed(&mut bob).await.iter().any(|r| r["id"] == id.as_str()));
    assert_eq!(bob.get(&format!("{RELEASES}/{id}")).await.status, StatusCode::NOT_FOUND);
    assert_eq!(
        bob.delete(&format!("{RELEASES}/{id}")).await.status,
        StatusCode::NOT_FOUND
    );
    assert_eq!(deploy(&mut bob, Slot::Dev, &id).await.status, StatusCode::NOT_FOUND);
    let asked = json!({"name": "other", "release": id});
    assert_eq!(bob.post("/api/workspaces", asked).await.status, StatusCode::NOT_FOUND);
    let again = json!({"image": own["image_digest"]});
    bob.post(RELEASES, again)
        .await
        .refused(StatusCode::BAD_REQUEST, "no_such_image");
    let stolen = json!({"sandbox": live});
    assert_eq!(bob.post(RELEASES, stolen).await.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_release_goes_only_once_no_slot_and_no_snapshot_needs_it() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    for slot in Slot::ALL {
        change(&mut ada, slot, "start").await;
    }
    let before = shown(&mut ada).await["slots"]["dev"]["release"].clone();
    let id = made(&mut ada).await;
    let path = format!("{RELEASES}/{id}");
    deploy(&mut ada, Slot::Dev, &id).await.expect(StatusCode::OK);
    let refused = ada.delete(&path).await;
    assert!(refused.text().contains("slot runs this release"), "{}", refused.text());
    // Its snapshot is of the time when it ran there.
    deploy(&mut ada, Slot::Dev, before.as_str().unwrap())
        .await
        .expect(StatusCode::OK);
    let refused = ada.delete(&path).await;
    assert!(
        refused.text().contains("snapshot is of this release"),
        "{}",
        refused.text()
    );
    let snapshots = ada
        .get("/api/workspaces/main/slots/dev/snapshots")
        .await
        .expect(StatusCode::OK);
    for snapshot in snapshots["items"].as_array().unwrap() {
        let path = format!(
            "/api/workspaces/main/slots/dev/snapshots/{}",
            snapshot["id"].as_str().unwrap()
        );
        ada.delete(&path).await.expect(StatusCode::NO_CONTENT);
    }
    ada.delete(&path).await.expect(StatusCode::NO_CONTENT);
    assert_eq!(ada.get(&path).await.status, StatusCode::NOT_FOUND);
    assert!(start.volumes.read(&id).is_err(), "its volume is gone, too");
    assert!(start.app.fsck().await.unwrap().is_empty());
    assert_eq!(deploy(&mut ada, Slot::Dev, &id).await.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn an_archive_becomes_a_release_or_says_why_not_and_leaves_nothing() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    let config = "%7B%22app_port%22%3A5173%7D";
    let good = upload(
        &mut ada,
        &format!("name=alpine&config={config}&wait_s=20"),
        "image of alpine",
    )
    .await;
    let good = good.expect(StatusCode::CREATED);
    assert_eq!(
        (&good["state"], &good["config"]["app_port"]),
        (&json!("verified"), &json!(5173)),
        "{good}"
    );
    assert_eq!(good["image_digest"].as_str().unwrap().len(), 64);
    let id = good["id"].as_str().unwrap();
    assert_eq!(
        deploy(&mut ada, Slot::Dev, id).await.expect(StatusCode::OK)["step"],
        "succeeded"
    );

    let refused = upload(&mut ada, "name=bad&wait_s=20", "something else").await;
    refused.refused(StatusCode::UNPROCESSABLE_ENTITY, "rejected");
    let bad = refused.json()["error"]["release"].as_str().unwrap().to_owned();
    let shown = ada.get(&format!("{RELEASES}/{bad}")).await.expect(StatusCode::OK);
    assert_eq!(
        (&shown["state"], &shown["bytes"]),
        (&json!("rejected"), &Value::Null),
        "{shown}"
    );
    assert!(
        shown["reason"].as_str().unwrap().contains("no image archive"),
        "{shown}"
    );
    deploy(&mut ada, Slot::Dev, &bad)
        .await
        .refused(StatusCode::CONFLICT, "release_not_usable");
    let parts: Vec<Result<Bytes, std::io::Error>> =
        vec![Ok("image".into()), Err(std::io::ErrorKind::ConnectionReset.into())];
    let broken = Body::from_stream(futures_util::stream::iter(parts));
    upload(&mut ada, "name=broken", broken)
        .await
        .refused(StatusCode::BAD_REQUEST, "broke_off");

    for (query, code) in [
        ("name=", "bad_name"),
        ("name=a%0Ab", "bad_name"),
        ("name=a&config=7", "bad_config"),
        ("name=a&config=%7B%22app_port%22%3A9091%7D", "bad_config"),
    ] {
        upload(&mut ada, query, "image")
            .await
            .refused(StatusCode::BAD_REQUEST, code);
    }
    let uploads = start.directory.path().join("uploads");
    let left = std::fs::read_dir(uploads).unwrap().count();
    assert_eq!(left, 0, "no archive stays");
    for release in listed(&mut ada).await {
        if release["state"] == "rejected" {
            let path = format!("{RELEASES}/{}", release["id"].as_str().unwrap());
            ada.delete(&path).await.expect(StatusCode::NO_CONTENT);
        }
    }
    assert!(start.app.fsck().await.unwrap().is_empty());
}

#[tokio::test]
async fn an_archive_that_is_too_large_is_refused_before_all_of_it_was_sent() {
    let start = Box::with(|config| config.sandboxes.limits.disk = Some(1 << 20)).await;
    let mut ada = start.ada().await;
    let mebibyte = Bytes::from(vec![b'x'; 1 << 20]);
    let parts = (0..).map(move |nth| {
        assert!(nth < 4, "it is still listened to");
        Ok::<_, std::io::Error>(mebibyte.clone())
    });
    let endless = Body::from_stream(futures_util::stream::iter(parts));
    upload(&mut ada, "name=endless", endless)
        .await
        .refused(StatusCode::PAYLOAD_TOO_LARGE, "too_large");
}

#[tokio::test]
async fn an_upload_whose_sender_goes_away_is_rejected_and_leaves_nothing() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    let (hold, held) = oneshot::channel::<()>();
    let mut sender = ada.clone();
    let sending = tokio::spawn(async move {
        let breaks = futures_util::stream::once(async {
            let _ = held.await;
            Err::<Bytes, std::io::Error>(std::io::ErrorKind::ConnectionReset.into())
        });
        upload(&mut sender, "name=gone", Body::from_stream(breaks)).await
    });
    let begun = loop {
        let listed = listed(&mut ada).await;
        if let Some(begun) = listed.iter().find(|r| r["name"] == "gone") {
            break begun["id"].as_str().unwrap().parse().unwrap();
        }
        assert!(!sending.is_finished(), "it is waited for");
    };
    // As the server does with whom it answers no more.
    sending.abort();
    assert!(sending.await.unwrap_err().is_cancelled());
    drop(hold);
    let gone = decided(&mut ada, &begun).await;
    assert_eq!(gone["state"], "rejected");
    assert!(gone["reason"].as_str().unwrap().contains("broke off"), "{gone}");
    assert!(start.app.fsck().await.unwrap().is_empty());
    // The control: who stays is heard to the end.
    let good = upload(&mut ada, "name=here&wait_s=20", "image of alpine").await;
    good.expect(StatusCode::CREATED);
}

#[tokio::test]
async fn lists_come_in_pages_for_those_who_ask_for_a_few() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    change(&mut ada, Slot::Live, "start").await;
    for _ in 0..2 {
        made(&mut ada).await;
        let taken = ada.post("/api/workspaces/main/slots/live/snapshots", json!({})).await;
        taken.expect(StatusCode::CREATED);
    }
    let lists = [
        ("/api/releases", "id", 3),
        ("/api/workspaces/main/slots/live/snapshots", "id", 2),
        ("/api/workspaces", "id", 1),
        ("/admin/sandboxes", "sandbox", 2),
    ];
    for (path, id, count) in lists {
        let ids = |page: &Value| -> Vec<Value> {
            let items = page["items"].as_array().unwrap().iter();
            items.map(|item| item[id].clone()).collect()
        };
        let whole = ids(&ada.get(path).await.expect(StatusCode::OK));
        assert_eq!(whole.len(), count, "{path}");
        let (mut one_by_one, mut query) = (Vec::new(), "limit=1".to_owned());
        loop {
            let page = ada.get(&format!("{path}?{query}")).await.expect(StatusCode::OK);
            assert_eq!(ids(&page).len(), 1, "{path}");
            one_by_one.extend(ids(&page));
            let Some(cursor) = page["next_cursor"].as_str() else {
                break;
            };
            query = format!("limit=1&cursor={cursor}");
        }
        let sorted = |mut ids: Vec<Value>| {
            ids.sort_by_key(Value::to_string);
            ids
        };
        assert_eq!(sorted(one_by_one), sorted(whole), "{path}");
    }
}

#[tokio::test]
async fn what_a_crash_left_half_made_or_half_deleted_is_ended_by_the_next_start() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    change(&mut ada, Slot::Live, "start").await;
    let gone = made(&mut ada).await;
    let half = made(&mut ada).await;
    let store = &start.app.store;
    let user = store.release(&gone.parse().unwrap()).await.unwrap().owner.unwrap();
    let audit = start
        .app
        .event(&store.all_workspaces().await.unwrap()[0], "release.delete");
    store
        .retire_release(&gone.parse().unwrap(), audit.clone())
        .await
        .unwrap();
    // As if the other one had not come to its end.
    let new = choir_store::NewRelease {
        id: choir_core::ReleaseId::from_random([9; 16]),
        name: "half".into(),
        owner: Some(user),
        config: choir_core::ReleaseConfig::default(),
    };
    let unfinished = new.id.clone();
    store.begin_release(new, audit).await.unwrap();
    let uploads = start.directory.path().join("uploads");
    std::fs::create_dir_all(&uploads).unwrap();
    std::fs::write(uploads.join("left.tar"), "image").unwrap();

    let again = start.restarted().await;
    ada.router = again.router.clone();
    let now = listed(&mut ada).await;
    let find = |id: &str| now.iter().find(|r| r["id"] == id);
    assert!(find(&gone).is_none() && start.volumes.read(&gone).is_err());
    assert_eq!(find(&half).unwrap()["state"], "candidate", "what was done stays");
    let unfinished = find(unfinished.as_str()).unwrap();
    assert_eq!(unfinished["state"], "rejected");
    assert!(
        unfinished["reason"].as_str().unwrap().contains("restarted"),
        "{unfinished}"
    );
    assert!(!uploads.exists());
    assert!(again.app.fsck().await.unwrap().is_empty());
}

/// A box that has no place for one more sandbox, and a release that waits for one to be tried in.
async fn untried(start: &Box, ada: &mut Browser) -> ReleaseId {
    workspace(ada).await;
    change(ada, Slot::Live, "start").await;
    let waiting = upload(ada, "name=alpine", "image of alpine").await;
    let waiting = waiting.expect(StatusCode::ACCEPTED);
    assert_eq!(waiting["state"], "importing");
    let id: ReleaseId = waiting["id"].as_str().unwrap().parse().unwrap();
    let tried = async {
        while start.app.fleet.admission.before(&tried_in(&id)).is_none() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), tried).await.unwrap();
    id
}

/// Until it is made or rejected.
async fn decided(browser: &mut Browser, id: &ReleaseId) -> Value {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(40);
    loop {
        let shown = browser.get(&format!("{RELEASES}/{id}")).await.expect(StatusCode::OK);
        if shown["state"] != "importing" {
            return shown;
        }
        assert!(tokio::time::Instant::now() < deadline, "{shown}");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_release_that_does_not_start_is_rejected_before_a_slot_runs_it() {
    for fault in [Some(Fault::FailCreate), None] {
        let start = Box::with(|config| config.sandboxes.max_running = 1).await;
        let mut ada = start.ada().await;
        let id = untried(&start, &mut ada).await;
        if let Some(fault) = fault {
            start.world.fail_next(&tried_in(&id), fault);
        }
        change(&mut ada, Slot::Live, "stop").await;
        let decided = decided(&mut ada, &id).await;
        if fault.is_none() {
            assert_eq!(decided["state"], "verified", "{decided}");
        } else {
            assert_eq!(decided["state"], "rejected", "{decided}");
            assert!(
                decided["reason"].as_str().unwrap().contains("does not start"),
                "{decided}"
            );
            assert!(start.volumes.read(id.as_str()).is_err(), "its volume is gone");
        }
        assert!(start.volumes.read(tried_in(&id).as_str()).is_err());
        assert!(start.app.fsck().await.unwrap().is_empty());
    }
}

#[tokio::test]
async fn a_crash_while_a_release_is_tried_leaves_nothing_of_the_trial() {
    let start = Box::with(|config| config.sandboxes.max_running = 1).await;
    let mut ada = start.ada().await;
    let id = untried(&start, &mut ada).await;
    let tried = tried_in(&id);
    start.world.fail_next(&tried, Fault::NeverReady);
    change(&mut ada, Slot::Live, "stop").await;
    let starts = start.world.starts();
    while start.world.starts() == starts {
        tokio::task::yield_now().await;
    }
    assert!(
        start.app.fsck().await.unwrap().is_empty(),
        "what is being tried is no stray"
    );
    let again = start.restarted().await;
    ada.router = again.router.clone();
    assert_eq!(decided(&mut ada, &id).await["state"], "rejected");
    assert!(again.volumes.read(tried.as_str()).is_err());
    assert!(again.app.fsck().await.unwrap().is_empty());
}

#[tokio::test]
async fn of_the_boxs_own_releases_the_last_two_stay_and_only_an_administrator_deletes_one() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    let import = async |nth: u32| {
        let name = format!("default-{nth}.tar");
        start.app.releases.ensure_default(std::path::Path::new(&name)).await;
    };
    import(2).await;
    import(3).await;
    let names = async |browser: &mut Browser| -> Vec<String> {
        let name = |r: &Value| r["name"].as_str().unwrap().to_owned();
        listed(browser).await.iter().map(name).collect()
    };
    // The first is in use.
    assert_eq!(names(&mut ada).await, ["default-3", "default-2", "default-1"]);
    import(4).await;
    assert_eq!(names(&mut ada).await, ["default-4", "default-3", "default-1"]);

    let all = listed(&mut ada).await;
    let path = |nth: usize| format!("{RELEASES}/{}", all[nth]["id"].as_str().unwrap());
    let mut bob = start.member(&mut ada, "bob").await;
    bob.delete(&path(1)).await.refused(StatusCode::FORBIDDEN, "not_yours");
    ada.delete(&path(0)).await.refused(StatusCode::CONFLICT, "in_use");
    ada.delete(&path(1)).await.expect(StatusCode::NO_CONTENT);
    assert_eq!(names(&mut bob).await, ["default-4", "default-1"]);
}

#[tokio::test]
async fn a_box_that_goes_back_to_an_older_image_makes_workspaces_of_that() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let configured = async |name: &str| start.app.releases.ensure_default(std::path::Path::new(name)).await;
    let mut made_of = async |workspace: &str| {
        let made = ada.post("/api/workspaces", json!({"name": workspace})).await;
        let release = made.expect(StatusCode::CREATED)["slots"]["dev"]["release"].clone();
        let release = ada.get(&format!("{RELEASES}/{}", release.as_str().unwrap())).await;
        release.expect(StatusCode::OK)["name"].clone()
    };
    configured("default-2.tar").await;
    assert_eq!(made_of("upgraded").await, "default-2");
    configured("default-1.tar").await;
    assert_eq!(made_of("back").await, "default-1");
    // What came to nothing is no obstacle to another one, and does not stay half made.
    let left = ReleaseId::from_random([7; 16]);
    let cut_off = NewRelease {
        id: left.clone(),
        name: "default-3".to_owned(),
        owner: None,
        config: ReleaseConfig::default(),
    };
    let audit = AuditEvent {
        at: jiff::Timestamp::UNIX_EPOCH,
        actor: "system".into(),
        user: None,
        action: "release.create",
        subject: left.to_string(),
        outcome: "ok",
    };
    start.app.store.begin_release(cut_off, audit).await.unwrap();
    configured("default-4.tar").await;
    assert_eq!(made_of("fourth").await, "default-4");
    let state = start.app.store.release(&left).await.unwrap().state;
    assert_eq!(state, ReleaseState::Rejected);
}

#[tokio::test]
async fn a_box_without_its_image_says_so_until_it_has_one_and_then_does_without() {
    let start = Box::without_image(|_| {}).await;
    let mut ada = start.ada().await;
    let of_release = async |browser: &mut Browser| browser.get("/readyz").await.json()["parts"]["release"].clone();
    let image = std::path::Path::new("default-1.tar");
    start.app.releases.do_without(image).await;
    assert_eq!(of_release(&mut ada).await, "missing");
    let asked = ada.post("/api/workspaces", json!({"name": "main"})).await;
    asked.refused(StatusCode::SERVICE_UNAVAILABLE, "release_missing");
    start.app.releases.ensure_default(image).await;
    workspace(&mut ada).await;
    start.app.releases.do_without(image).await;
    assert_eq!(of_release(&mut ada).await, "ok");
}
