//! A secret that is replaced or deleted while it is in use (D22, D23).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Method, Request, StatusCode};
use choir_core::Slot;
use choir_store::AuditFilter;
use serde_json::json;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::{SECRET, Scene};

const ANEW: &str = "ghp_Anew00Anew11Anew22";

/// Requests a second.
const RATE: u32 = 100;

#[tokio::test]
async fn while_a_secret_is_replaced_each_call_carries_the_old_or_the_new_and_soon_the_new_alone() {
    let mut scene = Scene::new().await;
    scene.grant(json!({})).await;
    let (mut replaced, mut calls) = (None, Vec::new());
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / RATE);
    // Fewer than one sandbox may have open, however slow the machine is.
    let places = Arc::new(Semaphore::new(48));
    let ada = scene.ada.clone();
    let mut replacing = None;
    for n in 0..3 * RATE {
        ticks.tick().await;
        if n == RATE {
            let body = json!({"value": ANEW});
            let mut ada = ada.clone();
            replacing = Some(tokio::spawn(async move {
                let stored = ada.fetch(Method::PUT, "/me/secrets/gh", Some(body)).await;
                stored.expect(StatusCode::OK);
                Instant::now()
            }));
        }
        if replaced.is_none() && replacing.as_ref().is_some_and(tokio::task::JoinHandle::is_finished) {
            replaced = Some(replacing.take().unwrap().await.unwrap());
        }
        let request = Request::get(format!("/v1/egress/github/{n}"))
            .body(Body::empty())
            .unwrap();
        let place = places.clone().acquire_owned().await.unwrap();
        let stream = scene.connect_dev().await;
        calls.push(tokio::spawn(async move {
            let begun = Instant::now();
            let told = super::exchange(stream, request).await;
            drop(place);
            (n, begun, told)
        }));
    }
    let mut begun = BTreeMap::new();
    for call in calls {
        let (n, at, told) = call.await.unwrap();
        assert_eq!(told.status, StatusCode::OK, "{}", told.text());
        assert!(!told.has(SECRET) && !told.has(ANEW));
        begun.insert(n, at);
    }
    let replaced = replaced.expect("it was stored while calls went on");
    let mut carried: BTreeMap<&str, u32> = BTreeMap::new();
    for seen in scene.outdoors.seen() {
        let n: u32 = seen.uri.trim_start_matches('/').parse().unwrap();
        let value = match seen.header("authorization").as_slice() {
            [one] if *one == format!("Bearer {SECRET}") => "old",
            [one] if *one == format!("Bearer {ANEW}") => "new",
            other => panic!("call {n} carried {other:?}"),
        };
        if begun[&n] > replaced + Duration::from_secs(1) {
            assert_eq!(value, "new", "call {n} was made more than a second after");
        }
        *carried.entry(value).or_default() += 1;
    }
    assert_eq!(carried.values().sum::<u32>(), 3 * RATE, "each call arrived once");
    // The control: both were in use, and many calls came more than a second after.
    assert!(carried["old"] >= RATE / 2 && carried["new"] >= RATE, "{carried:?}");
    assert!(
        begun
            .values()
            .filter(|at| **at > replaced + Duration::from_secs(1))
            .count()
            > 20
    );
}

#[tokio::test]
async fn a_deleted_secret_ends_its_grants_and_one_of_the_same_name_revives_none() {
    let mut scene = Scene::new().await;
    scene.store("other", "another-secret-of-hers", false).await;
    let github = scene.grant(json!({})).await;
    let live = scene.grant(json!({"slot": "live"})).await;
    let kept = scene.grant(json!({"capability": "other", "secret": "other"})).await;
    assert_eq!(scene.get("/v1/egress/github/x").await.status, StatusCode::OK);
    let deleted = scene.ada.delete("/me/secrets/gh").await.expect(StatusCode::OK);
    let ended: Vec<_> = deleted["ended_grants"]
        .as_array()
        .unwrap()
        .iter()
        .map(|grant| &grant["id"])
        .collect();
    assert_eq!(ended, [&json!(github), &json!(live)]);
    let left = scene.ada.get("/me/grants").await.expect(StatusCode::OK);
    assert_eq!(left["items"].as_array().unwrap().len(), 1);
    assert_eq!(left["items"][0]["id"], json!(kept));
    // The same name again, as an old grant would find it.
    scene.store("gh", ANEW, false).await;
    scene.get("/v1/egress/github/x").await.denied("grant");
    assert_eq!(scene.outdoors.seen().len(), 1);
    let rows = scene.audited("grant.delete").await;
    let subjects: Vec<_> = rows.iter().map(|(subject, _)| subject.as_str()).collect();
    assert_eq!(
        subjects,
        [format!("main/dev github {github}"), format!("main/live github {live}")]
    );
    // The control: granted anew, the same call carries the new one.
    scene.grant(json!({})).await;
    assert_eq!(scene.get("/v1/egress/github/x").await.status, StatusCode::OK);
    assert_eq!(
        scene.outdoors.seen()[1].header("authorization"),
        [format!("Bearer {ANEW}")]
    );
}

/// A secret of 5,000 bytes can be kept, and not be sent: the search for it in each answer would cost too much.
#[tokio::test]
async fn a_secret_too_long_to_be_searched_for_is_not_sent_and_the_longest_is() {
    let mut scene = Scene::new().await;
    scene.grant(json!({})).await;
    for (length, sent) in [(4096, true), (4097, false), (64 << 10, false), (4000, true)] {
        let value: String = (0..length).map(|n| char::from(b'a' + (n % 25) as u8)).collect();
        scene.store("gh", &value, false).await;
        let told = scene.get("/v1/egress/github/x").await;
        if sent {
            assert_eq!(told.status, StatusCode::OK, "{length}: {}", told.text());
        } else {
            told.denied("secret.length");
        }
    }
    assert_eq!(scene.outdoors.seen().len(), 2);
}

#[tokio::test]
async fn who_hangs_up_while_a_secret_is_revealed_leaves_no_intent_open() {
    let mut scene = Scene::new().await;
    scene.store("open", "opened-to-all", true).await;
    scene.grant(json!({"capability": "open", "secret": "open"})).await;
    for instant in 0..20 {
        let reveal = Request::post("/v1/capabilities/open/resolve")
            .body(Body::empty())
            .unwrap();
        let stream = scene.connect_dev().await;
        // At ever later moments of the call the hypervisor finds nobody there any more.
        let asked = tokio::spawn(super::exchange(stream, reveal));
        for _ in 0..instant {
            scene.start.app.store.check().await.unwrap();
        }
        asked.abort();
    }
    let all = AuditFilter {
        action: Some("secret.reveal".into()),
        outcome: Some("intent".into()),
        limit: 500,
        ..AuditFilter::default()
    };
    let ended = async {
        while scene.start.app.store.verify_audit(None).await.unwrap().open_intents > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), ended).await.unwrap();
    assert!(!scene.start.app.store.audit_rows(all).await.unwrap().is_empty());
    // The control: who waits has it.
    let reveal = Request::post("/v1/capabilities/open/resolve")
        .body(Body::empty())
        .unwrap();
    assert_eq!(scene.ask_from(Slot::Dev, reveal).await.json()["value"], "opened-to-all");
}
