//! Whether all that is decided at the broker's door is in the audit trail, once, and nothing else (D19).

use std::collections::BTreeMap;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use choir_core::Slot;
use futures_util::future::join_all;
use serde_json::json;

use super::{API, SECRET, Scene};

/// What a program may try, and how each try is recorded: action, subject, outcome.
const TRIES: [(&str, &str, [&str; 3]); 6] = [
    (
        "GET",
        "/v1/egress/github/x",
        ["secret.use", "main/dev github GET api.a.example", "ok"],
    ),
    (
        "POST",
        "/v1/egress/github/x",
        ["secret.use", "main/dev github POST api.a.example", "ok"],
    ),
    (
        "DELETE",
        "/v1/egress/github/x",
        ["secret.use", "main/dev github DELETE", "methods"],
    ),
    (
        "GET",
        "/v1/egress/other/x",
        ["secret.use", "main/dev other", "no_grant"],
    ),
    (
        "POST",
        "/v1/capabilities/open/resolve",
        ["secret.reveal", "main/dev open", "ok"],
    ),
    (
        "POST",
        "/v1/capabilities/github/resolve",
        ["secret.reveal", "main/dev github", "not_revealed"],
    ),
];

/// More than ten thousand decisions.
const ROUNDS: usize = 1700;

#[tokio::test]
async fn each_of_ten_thousand_decisions_is_told_once_with_one_outcome_and_no_value_is_among_them() {
    let mut scene = Scene::new().await;
    scene.grant(json!({})).await;
    scene.store("open", "opened-to-all", true).await;
    scene.grant(json!({"capability": "open", "secret": "open"})).await;
    let mut truth: BTreeMap<[String; 3], usize> = BTreeMap::new();
    let mut released = 0;
    for _ in 0..ROUNDS {
        // At once, so that decisions are recorded in each other's midst.
        let asked = TRIES.map(|(method, path, _)| {
            let request = Request::builder().method(method).uri(path);
            scene.ask_from(Slot::Dev, request.body(Body::empty()).unwrap())
        });
        for (told, (method, path, row)) in join_all(asked).await.into_iter().zip(TRIES) {
            let ok = row[2] == "ok";
            assert_eq!(told.status == StatusCode::OK, ok, "{method} {path}: {}", told.text());
            if ok {
                released += 1;
                *truth.entry([row[0], row[1], "intent"].map(Into::into)).or_default() += 1;
            }
            *truth.entry(row.map(Into::into)).or_default() += 1;
        }
    }
    let mut told: BTreeMap<[String; 3], usize> = BTreeMap::new();
    let ended = async {
        while scene.start.app.store.verify_audit(None).await.unwrap().open_intents > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(20), ended)
        .await
        .unwrap();
    let refused = u64::try_from(ROUNDS).unwrap();
    for (action, outcome, times) in [
        ("secret.use", "methods", refused),
        ("secret.use", "no_grant", refused),
        ("secret.reveal", "not_revealed", refused),
    ] {
        let rows = scene.told_in_the_end(action, outcome, times).await;
        assert_eq!(rows.len(), 2, "the first, and one for all that were like it");
    }
    let everything = "/admin/audit?format=jsonl&action=secret.";
    let lines = scene.ada.get(everything).await.text();
    for line in lines.lines() {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        let word = |name: &str| row[name].as_str().unwrap().to_owned();
        if !word("action").starts_with("secret.put") {
            let times = row["times"].as_u64().unwrap_or(1);
            // What was released stands alone.
            assert!(times == 1 || row["outcome"] != "ok" && row["intent"].is_null(), "{row}");
            *told.entry(["action", "subject", "outcome"].map(word)).or_default() += usize::try_from(times).unwrap();
        }
    }
    assert_eq!(told, truth);
    assert_eq!(scene.outdoors.seen().len(), 2 * ROUNDS);
    assert_eq!(released, 3 * ROUNDS);
    let found = scene.start.app.store.verify_audit(None).await.unwrap();
    assert_eq!((found.bad, found.sealed), (None, vec![]));
    for value in [SECRET, "opened-to-all"] {
        assert!(!lines.contains(value));
    }
    // The control: the same search finds what is there.
    assert!(lines.contains(API));
}
