//! Making grants: what is refused, whose they are, and each way to put a secret in.

use axum::http::StatusCode;
use data_encoding::BASE64;
use serde_json::{Value, json};

use super::outdoors::PUBLIC;
use super::{API, SECRET, Scene};

fn asked(changes: &Value) -> Value {
    let mut asked = json!({
        "workspace": "main", "slot": "dev", "capability": "mail", "secret": "gh", "hosts": [API], "template": "bearer",
    });
    for (field, value) in changes.as_object().unwrap() {
        asked[field] = value.clone();
    }
    asked
}

#[tokio::test]
async fn a_grant_that_could_not_mean_what_it_says_is_refused_with_a_sentence() {
    let mut scene = Scene::new().await;
    for (changes, code) in [
        (json!({"hosts": []}), "bad_grant"),
        (json!({"hosts": ["*.a.example"]}), "bad_json"),
        (json!({"hosts": ["127.0.0.1"]}), "bad_json"),
        (json!({"hosts": ["localhost"]}), "bad_json"),
        (json!({"hosts": ["https://api.a.example/"]}), "bad_json"),
        (json!({"methods": []}), "bad_grant"),
        (json!({"methods": ["CONNECT"]}), "bad_grant"),
        (json!({"path_prefix": "v1"}), "bad_grant"),
        (json!({"path_prefix": "/v1/../x"}), "bad_grant"),
        (json!({"template": "header:host"}), "bad_grant"),
        (json!({"template": "header:x-choir-host"}), "bad_grant"),
        (json!({"template": "cookie"}), "bad_template"),
        (json!({"template": null}), "bad_grant"),
        (
            json!({"inject": {"header": "x-key", "format": "no place"}}),
            "bad_grant",
        ),
        (json!({"inject": {"cookie": "x"}}), "bad_json"),
        (json!({"expires_at": "2026-01-01T00:00:00Z"}), "bad_expiry"),
        (json!({"secret": "none"}), "no_such_secret"),
        (json!({"capability": "../x"}), "bad_json"),
        (json!({"colour": "red"}), "bad_json"),
    ] {
        let answer = scene.ada.post("/me/grants", asked(&changes)).await;
        answer.refused(StatusCode::BAD_REQUEST, code);
        assert!(answer.text().contains(' '), "{}", answer.text());
    }
    let nowhere = asked(&json!({"workspace": "none"}));
    scene
        .ada
        .post("/me/grants", nowhere)
        .await
        .refused(StatusCode::NOT_FOUND, "not_found");
    assert_eq!(scene.ada.get("/me/grants").await.json(), json!({"items": []}));
    // The control: unchanged, it is made; looking only, everywhere at that host.
    let made = scene
        .ada
        .post("/me/grants", asked(&json!({})))
        .await
        .expect(StatusCode::CREATED);
    assert_eq!(
        (&made["methods"], &made["path_prefix"]),
        (&json!(["GET", "HEAD"]), &json!("/"))
    );
    let again = scene.ada.post("/me/grants", asked(&json!({}))).await;
    again.refused(StatusCode::CONFLICT, "granted_already");
    let service = json!({"workspace": "main", "slot": "live", "capability": "openai", "secret": "gh"});
    let made = scene.ada.post("/me/grants", service).await.expect(StatusCode::CREATED);
    assert_eq!(
        (&made["hosts"], &made["path_prefix"]),
        (&json!(["api.openai.com"]), &json!("/v1"))
    );
}

#[tokio::test]
async fn nobody_grants_with_somebody_elses_secret_or_into_somebody_elses_workspace() {
    let mut scene = Scene::new().await;
    let mut eve = scene.start.member(&mut scene.ada, "eve").await;
    let other = json!({"workspace": "main"});
    eve.post("/me/grants", asked(&other))
        .await
        .refused(StatusCode::NOT_FOUND, "not_found");
    eve.post("/api/workspaces", json!({"name": "main"}))
        .await
        .expect(StatusCode::CREATED);
    eve.post("/me/grants", asked(&other))
        .await
        .refused(StatusCode::BAD_REQUEST, "no_such_secret");
    let id = scene.grant(json!({})).await;
    eve.delete(&format!("/me/grants/{id}"))
        .await
        .refused(StatusCode::NOT_FOUND, "not_found");
    assert_eq!(scene.get("/v1/egress/github/").await.status, StatusCode::OK);
}

#[tokio::test]
async fn each_way_of_injecting_puts_the_secret_where_it_says_and_nowhere_else() {
    let mut scene = Scene::new().await;
    let hosts = ["a.b.example", "c.d.example", "e.f.example"];
    for host in hosts {
        scene.outdoors.host(host, PUBLIC);
    }
    for (way, host) in ["basic:me", "header:X-Api-Key", "query:key"].into_iter().zip(hosts) {
        let name = way.split(':').next().unwrap();
        scene
            .grant(json!({"capability": name, "template": way, "hosts": [host]}))
            .await;
        assert_eq!(
            scene.get(&format!("/v1/egress/{name}/p?q=1&key=mine")).await.status,
            StatusCode::OK
        );
    }
    let seen = scene.outdoors.seen();
    let pair = BASE64.encode(format!("me:{SECRET}").as_bytes());
    assert_eq!(seen[0].header("authorization"), [format!("Basic {pair}")]);
    assert_eq!(seen[1].header("x-api-key"), [SECRET]);
    assert!(seen[1].header("authorization").is_empty() && seen[2].header("authorization").is_empty());
    assert_eq!(seen[2].uri, format!("/p?q=1&key={SECRET}"));
    assert_eq!(
        (seen[0].uri.as_str(), seen[1].uri.as_str()),
        ("/p?q=1&key=mine", "/p?q=1&key=mine")
    );
}
