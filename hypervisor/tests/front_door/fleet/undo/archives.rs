//! Snapshots that leave the box as an archive, and such that are made of one; and who may have it done.

use axum::body::{Body, Bytes};
use axum::http::{Method, Request, StatusCode};
use choir_core::{Slot, SnapshotId};
use choir_runtime::Volumes as _;
use http_body_util::BodyExt as _;
use jiff::SignedDuration;
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tower::ServiceExt as _;

use super::{Box, MAIN, snapshots, succeeds, used};
use crate::fleet::wire::{clock, start_at};
use crate::support::{Answer, Browser, ORIGIN, send};

/// A snapshot of live, which holds `good`; its id.
async fn taken(browser: &mut Browser) -> String {
    let path = format!("{MAIN}/slots/live/snapshots");
    let taken = browser.post(&path, json!({})).await.expect(StatusCode::CREATED);
    taken["id"].as_str().unwrap().to_owned()
}

fn address(id: &str) -> String {
    format!("{MAIN}/slots/live/snapshots/{id}/archive")
}

/// What a page of ours sends to make a snapshot of dev.
async fn import(browser: &mut Browser, archive: impl Into<Body>) -> Answer {
    let request = Request::post(format!("{MAIN}/slots/dev/snapshots/archive"))
        .header("origin", ORIGIN)
        .header("x-choir", "1")
        .header("content-type", "application/x-tar")
        .body(archive.into())
        .unwrap();
    browser.send(request).await
}

async fn archive(browser: &mut Browser, id: &str) -> Bytes {
    let answer = browser.get(&address(id)).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    answer.body
}

/// Action and outcome of each row about archives, oldest first.
async fn trail(browser: &mut Browser) -> Vec<(String, String)> {
    let mut rows = Vec::new();
    for action in ["snapshot.import", "snapshot.export"] {
        let page = browser.get(&format!("/me/audit?action={action}")).await;
        let page = page.expect(StatusCode::OK);
        let items = page["items"].as_array().unwrap().iter().rev();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        rows.extend(items.map(|row| (text(&row["action"]), text(&row["outcome"]))));
    }
    rows
}

fn rows(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    let owned = |(action, outcome): &(&str, &str)| ((*action).to_owned(), (*outcome).to_owned());
    expected.iter().map(owned).collect()
}

#[tokio::test]
async fn what_a_snapshot_holds_goes_out_and_comes_back_where_somebody_else_has_it() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    used(&start, &mut ada).await;
    let id = taken(&mut ada).await;
    let answer = ada.get(&address(&id)).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    assert_eq!(answer.headers["content-type"], "application/x-tar");
    let name = format!("attachment; filename=\"{id}.tar\"");
    assert_eq!(answer.headers["content-disposition"], name.as_str());

    let mut eve = start.member(&mut ada, "eve").await;
    let [_, dev] = used(&start, &mut eve).await;
    let made = import(&mut eve, answer.body).await.expect(StatusCode::CREATED);
    assert_eq!(
        (&made["slot"], &made["scheduled"]),
        (&json!("dev"), &json!(false)),
        "{made}"
    );
    let own = made["id"].as_str().unwrap();
    assert_eq!(start.home(own), "good");
    succeeds(&mut eve, &format!("slots/dev/snapshots/{own}/restore"), json!({})).await;
    assert_eq!(start.home(dev.as_str()), "good");
    let out = [("snapshot.export", "intent"), ("snapshot.export", "ok")];
    assert_eq!(trail(&mut ada).await, rows(&out));
    let brought = [("snapshot.import", "intent"), ("snapshot.import", "ok")];
    assert_eq!(trail(&mut eve).await, rows(&brought));
    start.fits_together().await;
}

#[tokio::test]
async fn a_snapshot_of_somebody_else_does_not_go_out_and_leaves_no_row() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    used(&start, &mut ada).await;
    let hers = taken(&mut ada).await;
    let mut eve = start.member(&mut ada, "eve").await;
    used(&start, &mut eve).await;
    let absent = SnapshotId::from_random([1; 16]).to_string();
    for id in [&hers, &absent] {
        let answer = eve.get(&address(id)).await;
        answer.refused(StatusCode::NOT_FOUND, "not_found");
    }
    assert!(trail(&mut eve).await.is_empty());
    let own = taken(&mut eve).await;
    archive(&mut eve, &own).await;
    assert_eq!(trail(&mut eve).await.len(), 2);
}

#[tokio::test]
async fn a_token_that_may_only_read_takes_nothing_out_and_brings_nothing_in() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    used(&start, &mut ada).await;
    let id = taken(&mut ada).await;
    let whole = archive(&mut ada, &id).await;
    let mut tokens = Vec::new();
    for scopes in [&["read"][..], &["read", "write"]] {
        let made = ada.post("/me/tokens", json!({"name": "ci", "scopes": scopes})).await;
        let made = made.expect(StatusCode::CREATED);
        tokens.push(made["token"].as_str().unwrap().to_owned());
    }
    let call = async |token: &str, method: Method| {
        let (path, body) = match method {
            Method::GET => (address(&id), Body::empty()),
            _ => (format!("{MAIN}/slots/dev/snapshots/archive"), Body::from(whole.clone())),
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("authorization", format!("Bearer {token}"))
            .header("content-type", "application/x-tar");
        send(&start.router, [192, 0, 2, 9].into(), request.body(body).unwrap()).await
    };
    for method in [Method::GET, Method::POST] {
        let refused = call(&tokens[0], method).await;
        refused.refused(StatusCode::FORBIDDEN, "scope");
    }
    let read = async |path: String| {
        let request = Request::get(path).header("authorization", format!("Bearer {}", tokens[0]));
        send(
            &start.router,
            [192, 0, 2, 9].into(),
            request.body(Body::empty()).unwrap(),
        )
        .await
    };
    let listed = read(format!("{MAIN}/slots/dev/snapshots")).await.expect(StatusCode::OK);
    assert_eq!(listed["items"], json!([]), "it may look, and sees nothing was made");
    assert_eq!(call(&tokens[1], Method::GET).await.status, StatusCode::OK);
    call(&tokens[1], Method::POST).await.expect(StatusCode::CREATED);
}

#[tokio::test]
async fn taking_a_snapshot_out_needs_a_fresh_assertion() {
    let clock = clock();
    let start = start_at(&clock, |sim| sim).await;
    let mut ada = start.ada().await;
    used(&start, &mut ada).await;
    let id = taken(&mut ada).await;
    clock.advance(SignedDuration::from_secs(5 * 60 + 1));
    let refused = ada.get(&address(&id)).await;
    refused.refused(StatusCode::FORBIDDEN, "step_up_required");
    assert!(trail(&mut ada).await.is_empty());
    ada.step_up().await.expect(StatusCode::OK);
    archive(&mut ada, &id).await;
    assert_eq!(trail(&mut ada).await.len(), 2);
}

#[tokio::test]
async fn an_archive_that_breaks_off_or_is_none_leaves_no_snapshot_and_no_volume() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    used(&start, &mut ada).await;
    let id = taken(&mut ada).await;
    let whole = archive(&mut ada, &id).await;
    let before = start.volumes.list().await.unwrap();
    // All of it has come, and still it broke off.
    for received in [whole.slice(..whole.len() / 2), whole.clone()] {
        let parts: Vec<Result<Bytes, std::io::Error>> =
            vec![Ok(received), Err(std::io::ErrorKind::ConnectionReset.into())];
        let broken = Body::from_stream(futures_util::stream::iter(parts));
        import(&mut ada, broken)
            .await
            .refused(StatusCode::BAD_REQUEST, "broke_off");
    }
    for bad in [whole.slice(..whole.len() / 2), Bytes::from_static(b"something else")] {
        import(&mut ada, bad)
            .await
            .refused(StatusCode::UNPROCESSABLE_ENTITY, "rejected");
    }
    let mut tried = [("snapshot.import", "intent"), ("snapshot.import", "failed")].repeat(4);
    tried.extend([("snapshot.export", "intent"), ("snapshot.export", "ok")]);
    assert_eq!(trail(&mut ada).await, rows(&tried));
    assert!(snapshots(&mut ada, Slot::Dev).await.is_empty());
    assert!(start.app.store.unfinished_snapshots().await.unwrap().is_empty());
    assert_eq!(start.volumes.list().await.unwrap(), before);
    import(&mut ada, whole).await.expect(StatusCode::CREATED);
    assert_eq!(snapshots(&mut ada, Slot::Dev).await.len(), 1);
    assert_eq!(start.volumes.list().await.unwrap().len(), before.len() + 1);
    start.fits_together().await;
}

#[tokio::test]
async fn what_cannot_be_read_to_its_end_does_not_end_like_a_whole_archive() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    used(&start, &mut ada).await;
    let id = taken(&mut ada).await;
    archive(&mut ada, &id).await;
    start.volumes.fail_copies(1);
    let cookie = format!("{}={}", crate::support::SESSION, ada.session());
    let request = Request::get(address(&id))
        .header("host", "localhost:9090")
        .header("cookie", cookie)
        .header("x-choir", "1")
        .body(Body::empty())
        .unwrap();
    let answer = start.router.clone().oneshot(request).await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    assert!(answer.into_body().collect().await.is_err());
    let out = ["intent", "ok", "intent", "failed"].map(|outcome| ("snapshot.export", outcome));
    assert_eq!(trail(&mut ada).await, rows(&out));
}

#[tokio::test]
async fn what_cannot_be_read_at_all_is_answered_with_the_reason() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    used(&start, &mut ada).await;
    let id = taken(&mut ada).await;
    start.volumes.delete(&id).await.unwrap();
    ada.get(&address(&id)).await.refused(StatusCode::NOT_FOUND, "not_found");
    let out = ["intent", "failed"].map(|outcome| ("snapshot.export", outcome));
    assert_eq!(trail(&mut ada).await, rows(&out));
}

/// An archive of which nothing has come yet. It breaks off when `hold` is dropped.
struct Stalled {
    hold: oneshot::Sender<()>,
    answer: JoinHandle<Answer>,
}

/// Begins to send one, and returns once it is the `nth` that the hypervisor waits for.
async fn stalled(start: &Box, mut browser: Browser, nth: usize) -> Stalled {
    let (hold, held) = oneshot::channel::<()>();
    let answer = tokio::spawn(async move {
        let breaks = futures_util::stream::once(async {
            let _ = held.await;
            Err::<Bytes, std::io::Error>(std::io::ErrorKind::ConnectionReset.into())
        });
        import(&mut browser, Body::from_stream(breaks)).await
    });
    while start.app.store.unfinished_snapshots().await.unwrap().len() < nth {
        assert!(!answer.is_finished(), "it is waited for");
        tokio::task::yield_now().await;
    }
    Stalled { hold, answer }
}

#[tokio::test]
async fn what_was_sent_is_a_snapshot_although_its_slot_got_another_release_meanwhile() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    used(&start, &mut ada).await;
    let id = taken(&mut ada).await;
    let whole = archive(&mut ada, &id).await;
    let live = ada.get(MAIN).await.expect(StatusCode::OK)["slots"]["live"]["sandbox"].clone();
    let release = ada.post("/api/releases", json!({"sandbox": live})).await;
    let release = release.expect(StatusCode::CREATED)["id"].clone();
    let (rest, awaited) = oneshot::channel::<Bytes>();
    let mut sender = ada.clone();
    let answer = tokio::spawn(async move {
        let comes = futures_util::stream::once(async { awaited.await.map_err(std::io::Error::other) });
        import(&mut sender, Body::from_stream(comes)).await
    });
    while start.app.store.unfinished_snapshots().await.unwrap().is_empty() {
        assert!(!answer.is_finished(), "it is waited for");
        tokio::task::yield_now().await;
    }
    let path = format!("{MAIN}/slots/dev/deploy?wait_s=60");
    let deployed = ada.post(&path, json!({"release": release})).await;
    assert_eq!(deployed.expect(StatusCode::OK)["step"], "succeeded");
    rest.send(whole).unwrap();
    let made = answer.await.unwrap().expect(StatusCode::CREATED);
    let listed = snapshots(&mut ada, Slot::Dev).await;
    assert!(listed.iter().any(|snapshot| snapshot["id"] == made["id"]), "{listed:?}");
    start.fits_together().await;
}

#[tokio::test]
async fn who_sends_slowly_holds_up_nobody_but_himself() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    used(&start, &mut ada).await;
    let id = taken(&mut ada).await;
    let mut others = Vec::new();
    for name in ["bob", "cyd", "dan", "eve"] {
        let mut other = start.member(&mut ada, name).await;
        used(&start, &mut other).await;
        others.push(other);
    }
    let second = others[0].clone();
    let mut sending = vec![stalled(&start, others.remove(0), 1).await];
    let mut second = second;
    import(&mut second, "x")
        .await
        .refused(StatusCode::TOO_MANY_REQUESTS, "too_many_requests");
    let whole = archive(&mut ada, &id).await;
    for (nth, other) in others.into_iter().enumerate() {
        sending.push(stalled(&start, other, nth + 2).await);
    }
    for answer in [ada.get(&address(&id)).await, import(&mut ada, whole.clone()).await] {
        assert_eq!(answer.headers["retry-after"], "5");
        answer.refused(StatusCode::TOO_MANY_REQUESTS, "too_many_requests");
    }
    for Stalled { hold, answer } in sending {
        drop(hold);
        answer.await.unwrap().refused(StatusCode::BAD_REQUEST, "broke_off");
    }
    archive(&mut ada, &id).await;
    import(&mut ada, whole).await.expect(StatusCode::CREATED);
}

#[tokio::test]
async fn an_import_ends_with_the_session_that_began_it() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    used(&start, &mut ada).await;
    let sending = stalled(&start, ada.clone(), 1).await;
    ada.post("/auth/logout", json!({})).await;
    sending
        .answer
        .await
        .unwrap()
        .refused(StatusCode::UNAUTHORIZED, "unauthenticated");
    assert!(start.app.store.unfinished_snapshots().await.unwrap().is_empty());
}
