//! One slot that asks for everything at once takes nothing from the other (D25).

use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use choir_core::Slot;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

use super::Scene;
use super::outdoors::{plain, streamed};

/// What one sandbox may have open at once.
const CAP: usize = 64;

#[tokio::test]
async fn a_thousand_calls_of_one_slot_get_its_places_and_the_other_slots_calls_take_as_long_as_before() {
    let mut scene = Scene::new().await;
    for slot in ["live", "dev"] {
        scene.grant(json!({ "slot": slot })).await;
    }
    let (_says_nothing, body) = streamed();
    scene.outdoors.answers(move |seen| {
        let mut answer = plain("fine");
        if seen.uri == "/events" {
            let kind = "text/event-stream".parse().unwrap();
            answer.headers_mut().insert("content-type", kind);
            *answer.body_mut() = body();
        }
        answer
    });
    let before = lives_calls(&scene).await;
    let mut held = Vec::new();
    for _ in 0..1000 {
        let mut stream = scene.connect_dev().await;
        let ask = b"GET /v1/egress/github/events HTTP/1.1\r\nHost: 127.0.0.1:9091\r\n\r\n";
        // One that was closed at once takes nothing.
        if stream.write_all(ask).await.is_ok() {
            held.push(stream);
        }
    }
    let (mut open, mut answered) = (Vec::new(), 0);
    for mut stream in held {
        let mut first = [0; 12];
        if stream.read_exact(&mut first).await.is_ok() {
            answered += usize::from(&first == b"HTTP/1.1 200");
            open.push(stream);
        }
    }
    assert_eq!((open.len(), answered), (CAP, CAP));
    let during = lives_calls(&scene).await;
    assert!(
        during < before * 3 + Duration::from_millis(20),
        "{before:?}, then {during:?}"
    );
    // The control: dev itself gets no further call through, and with its places free again it does.
    assert!(scene.connect_dev().await.read_u8().await.is_err());
    drop(open);
    let freed = async {
        while scene.outdoors.seen().last().unwrap().uri != "/freed" {
            let mut stream = scene.connect_dev().await;
            let ask = b"GET /v1/egress/github/freed HTTP/1.1\r\nHost: 127.0.0.1:9091\r\nConnection: close\r\n\r\n";
            if stream.write_all(ask).await.is_ok() {
                let _ = stream.read_to_end(&mut Vec::new()).await;
            }
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(20), freed).await;
    waited.expect("places are given back");
}

/// The slowest but one of a hundred calls of live.
async fn lives_calls(scene: &Scene) -> Duration {
    let mut took = Vec::new();
    for _ in 0..100 {
        let begun = Instant::now();
        let call = Request::get("/v1/egress/github/user").body(Body::empty()).unwrap();
        assert_eq!(scene.ask_from(Slot::Live, call).await.status, StatusCode::OK);
        took.push(begun.elapsed());
    }
    took.sort();
    took[98]
}
