//! The broker's door: who gets what (D07, D08, D09, D15, D20).

use axum::body::Body;
use axum::http::{Request, StatusCode};
use choir_core::Slot;
use jiff::SignedDuration;
use serde_json::json;

use super::outdoors::{PUBLIC, plain};
use super::{API, SECRET, Scene};
use crate::fleet::audit::Broken;

#[tokio::test]
async fn a_call_carries_the_secret_and_the_sandbox_never_sees_it() {
    let mut scene = Scene::new().await;
    scene.grant(json!({})).await;
    let request = Request::post("/v1/egress/github/repos/x?per_page=2")
        .header("authorization", "Bearer of-the-sandbox")
        .header("connection", "authorization")
        .header("x-app", "kept")
        .header("range", "bytes=0-3");
    let told = scene.ask(request.body(Body::from("{\"title\":1}")).unwrap()).await;
    assert_eq!((told.status, told.text().as_str()), (StatusCode::OK, "fine"));
    assert!(!told.has(SECRET));
    let seen = scene.outdoors.seen();
    assert_eq!(seen.len(), 1);
    assert_eq!(
        (seen[0].method.as_str(), seen[0].uri.as_str()),
        ("POST", "/repos/x?per_page=2")
    );
    assert_eq!((seen[0].host.as_str(), &seen[0].body[..]), (API, &b"{\"title\":1}"[..]));
    assert_eq!(seen[0].header("authorization"), [format!("Bearer {SECRET}")]);
    assert_eq!(seen[0].header("x-app"), ["kept"]);
    assert!(seen[0].header("range").is_empty());
    assert_eq!(
        *scene.outdoors.dialled.lock().unwrap(),
        [format!("{PUBLIC}:443").parse().unwrap()]
    );
    scene.until("secret.use", "ok").await;
    let what = format!("main/dev github POST {API}");
    let rows = scene.rows("secret.use").await;
    assert_eq!(
        rows.iter()
            .map(|r| (r.subject.as_str(), r.outcome.as_str()))
            .collect::<Vec<_>>(),
        [(what.as_str(), "intent"), (what.as_str(), "ok")]
    );
    assert_eq!(rows[1].intent, Some(rows[0].id));

    let listed = scene.get("/v1/capabilities").await;
    assert_eq!(listed.json()["items"][0]["capability"], "github");
    assert_eq!(listed.json()["items"][0]["path"], "/v1/egress/github");
    assert!(!listed.has(SECRET));
    let live = Request::get("/v1/capabilities").body(Body::empty()).unwrap();
    assert_eq!(scene.ask_from(Slot::Live, live).await.json(), json!({"items": []}));
}

#[tokio::test]
async fn without_a_grant_after_one_and_beside_one_the_answer_is_the_same_and_recorded() {
    let mut scene = Scene::new().await;
    let never = scene.get("/v1/egress/github/user").await;
    never.denied("grant");
    for part in [
        "dev slot of main",
        "grants add github --slot dev",
        "/me/grants/requests",
    ] {
        assert!(never.has(part), "{}", never.text());
    }
    // The control: granted, the same call is made.
    let id = scene.grant(json!({})).await;
    assert_eq!(scene.get("/v1/egress/github/user").await.status, StatusCode::OK);
    scene
        .ada
        .delete(&format!("/me/grants/{id}"))
        .await
        .expect(StatusCode::NO_CONTENT);
    let deleted = scene.get("/v1/egress/github/user").await;
    assert_eq!(deleted.words(), never.words());

    scene.grant(json!({"expires_at": "2026-01-02T04:00:00Z"})).await;
    assert_eq!(scene.get("/v1/egress/github/user").await.status, StatusCode::OK);
    scene.clock.advance(SignedDuration::from_hours(1));
    let expired = scene.get("/v1/egress/github/user").await;
    assert_eq!(expired.words(), never.words());

    // An expired grant makes room for another; one whose secret is gone permits nothing.
    scene.grant(json!({})).await;
    scene.ada.delete("/me/secrets/gh").await.expect(StatusCode::OK);
    let orphan = scene.get("/v1/egress/github/user").await;
    assert_eq!(orphan.words(), never.words());
    assert_eq!(scene.outdoors.seen().len(), 2);
    scene.get("/v1/egress/..%2f/x").await.denied("grant");
    assert_eq!(scene.get("/v1/else").await.status, StatusCode::NOT_FOUND);
    // The four are one row, and one for those that were like it; the other name has its own.
    let told = scene.told_in_the_end("secret.use", "no_grant", 5).await;
    assert_eq!(told.len(), 3, "{told:?}");
}

#[tokio::test]
async fn a_grant_is_its_slots_and_passes_to_the_other_sandbox_with_a_swap() {
    let mut scene = Scene::new().await;
    scene.grant(json!({"slot": "live"})).await;
    let call = || Request::get("/v1/egress/github/user").body(Body::empty()).unwrap();
    scene.ask_from(Slot::Dev, call()).await.denied("grant");
    assert!(scene.outdoors.seen().is_empty());
    assert_eq!(scene.ask_from(Slot::Live, call()).await.status, StatusCode::OK);
    scene.swap().await;
    // The sandbox that was dev is live now, on the same connection's listener.
    assert_eq!(scene.ask_from(Slot::Dev, call()).await.status, StatusCode::OK);
    scene.ask_from(Slot::Live, call()).await.denied("grant");
    assert_eq!(scene.outdoors.seen().len(), 2);
}

#[tokio::test]
async fn the_value_itself_is_given_out_only_where_its_owner_said_so() {
    let mut scene = Scene::new().await;
    let ask = || {
        Request::post("/v1/capabilities/github/resolve")
            .body(Body::empty())
            .unwrap()
    };
    scene.ask(ask()).await.denied("grant");
    scene.grant(json!({})).await;
    let kept = scene.ask(ask()).await;
    kept.denied("secret.reveal");
    assert!(!kept.has(SECRET));
    // The control: stored with reveal, the same call has it.
    scene.store("gh", SECRET, true).await;
    let given = scene.ask(ask()).await;
    assert_eq!((given.status, given.json()), (StatusCode::OK, json!({"value": SECRET})));
    scene.ask_from(Slot::Live, ask()).await.denied("grant");
    scene.store("gh", SECRET, false).await;
    scene.ask(ask()).await.denied("secret.reveal");
    let outcomes: Vec<_> = scene
        .audited("secret.reveal")
        .await
        .into_iter()
        .map(|(_, o)| o)
        .collect();
    assert_eq!(outcomes, ["no_grant", "not_revealed", "intent", "ok", "no_grant"]);
    // The last one is like the second, and told of at the end of its window.
    let told = scene.told_in_the_end("secret.reveal", "not_revealed", 2).await;
    assert_eq!(told.len(), 2);
}

#[tokio::test]
async fn the_secret_goes_to_no_host_that_the_grant_does_not_name() {
    let mut scene = Scene::new().await;
    scene.outdoors.host("b.example", "93.184.215.15");
    scene.outdoors.host("uploads.a.example", "93.184.215.16");
    scene.grant(json!({"hosts": [API, "uploads.a.example"]})).await;
    let to = |host: &str| {
        Request::get("/v1/egress/github/")
            .header("x-choir-host", host)
            .body(Body::empty())
            .unwrap()
    };
    for other in [
        "b.example",
        "api.a.example:8443",
        "api.a.example.b.example",
        "http://api.a.example",
        "",
        "API.A.EXAMPLE",
    ] {
        scene.ask(to(other)).await.denied("grant.hosts");
    }
    let twice = Request::get("/v1/egress/github/")
        .header("x-choir-host", API)
        .header("x-choir-host", "b.example");
    scene
        .ask(twice.body(Body::empty()).unwrap())
        .await
        .denied("grant.hosts");
    // Nor by the Host header, or by an address in the path.
    let named = Request::get("/v1/egress/github//b.example/x")
        .header("host", "b.example")
        .body(Body::empty());
    let told = scene.ask(named.unwrap()).await;
    assert!(scene.outdoors.seen().iter().all(|seen| seen.host == API), "{told:?}");
    let before = scene.outdoors.seen().len();
    assert_eq!(scene.ask(to("uploads.a.example")).await.status, StatusCode::OK);
    let seen = scene.outdoors.seen();
    assert_eq!(
        (seen.len(), seen[before].host.as_str()),
        (before + 1, "uploads.a.example")
    );
    assert!(seen[before].header("x-choir-host").is_empty());
    let dialled = scene.outdoors.dialled.lock().unwrap().clone();
    assert!(dialled.iter().all(|to| to.port() == 443), "{dialled:?}");
}

#[tokio::test]
async fn a_redirect_is_handed_back_and_not_followed() {
    let mut scene = Scene::new().await;
    scene.outdoors.host("b.example", "93.184.215.15");
    scene.grant(json!({})).await;
    for to in [
        "https://b.example/",
        "http://api.a.example/",
        "http://169.254.169.254/latest/meta-data/",
        "http://127.0.0.1:9090/",
    ] {
        scene.outdoors.answers(move |_| {
            let mut answer = plain("");
            *answer.status_mut() = StatusCode::FOUND;
            answer.headers_mut().insert("location", to.parse().unwrap());
            answer
        });
        let told = scene.get("/v1/egress/github/").await;
        assert_eq!(
            (told.status, told.headers["location"].to_str().unwrap()),
            (StatusCode::FOUND, to)
        );
    }
    assert_eq!(scene.outdoors.seen().len(), 4);
    assert!(scene.outdoors.seen().iter().all(|seen| seen.host == API));
}

#[tokio::test]
async fn a_host_that_cannot_prove_its_name_gets_nothing() {
    let mut scene = Scene::new().await;
    // Its name leads to a host with another's certificate.
    scene.outdoors.host("b.example", "93.184.215.15");
    scene.outdoors.name("c.example", &[&["93.184.215.15"]]);
    scene.grant(json!({"capability": "c", "hosts": ["c.example"]})).await;
    scene.grant(json!({"capability": "b", "hosts": ["b.example"]})).await;
    let told = scene.get("/v1/egress/c/").await;
    assert_eq!(
        (told.status, &told.json()["error"]["code"]),
        (StatusCode::BAD_GATEWAY, &json!("untrusted"))
    );
    assert!(scene.outdoors.seen().is_empty());
    assert_eq!(scene.get("/v1/egress/b/").await.status, StatusCode::OK);
    scene.until("secret.use", "untrusted").await;
}

#[tokio::test]
async fn no_secret_is_released_while_its_use_cannot_be_recorded() {
    let mut scene = Scene::new().await;
    scene.grant(json!({})).await;
    scene.store("open", "opened-to-all", true).await;
    scene.grant(json!({"capability": "open", "secret": "open"})).await;
    let broken = Broken::trail_of(&scene.start);
    let reveal = || {
        Request::post("/v1/capabilities/open/resolve")
            .body(Body::empty())
            .unwrap()
    };
    for told in [scene.get("/v1/egress/github/user").await, scene.ask(reveal()).await] {
        assert_eq!(told.status, StatusCode::SERVICE_UNAVAILABLE, "{}", told.text());
        assert_eq!(told.json()["error"]["code"], "audit_unavailable");
        assert!(!told.has("opened-to-all"));
    }
    // What would be refused is refused still.
    scene.get("/v1/egress/other/user").await.denied("grant");
    assert!(scene.outdoors.seen().is_empty() && scene.outdoors.dialled.lock().unwrap().is_empty());
    broken.mend();
    assert_eq!(scene.get("/v1/egress/github/user").await.status, StatusCode::OK);
    assert_eq!(scene.ask(reveal()).await.json(), json!({"value": "opened-to-all"}));
}

#[tokio::test]
async fn without_the_master_key_no_secret_is_released_and_with_it_again_all_are() {
    let mut scene = Scene::new().await;
    scene.store("open", "opened-to-all", true).await;
    scene.grant(json!({"capability": "open", "secret": "open"})).await;
    scene.grant(json!({})).await;
    let reveal = || {
        Request::post("/v1/capabilities/open/resolve")
            .body(Body::empty())
            .unwrap()
    };
    let key = scene.start.app.config.key_file();
    let aside = key.with_extension("aside");
    std::fs::rename(&key, &aside).unwrap();
    scene.restart().await;
    for told in [scene.get("/v1/egress/github/user").await, scene.ask(reveal()).await] {
        assert_eq!(
            (told.status, &told.json()["error"]["code"]),
            (StatusCode::SERVICE_UNAVAILABLE, &json!("sealed"))
        );
    }
    assert!(scene.get("/v1/capabilities").await.has("github"));
    scene.until("secret.reveal", "sealed").await;
    std::fs::rename(&aside, &key).unwrap();
    scene.restart().await;
    assert_eq!(scene.ask(reveal()).await.json(), json!({"value": "opened-to-all"}));
}
