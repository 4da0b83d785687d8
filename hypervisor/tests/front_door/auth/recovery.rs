//! Recovery: what a code opens, what it does not, and what follows (C16, C19).

use axum::http::StatusCode;
use choir_store::AuditFilter;
use jiff::SignedDuration;
use serde_json::{Value, json};

use crate::support::passkey::SoftKey;
use crate::support::{Browser, SESSION, TestApp};

async fn recover(browser: &mut Browser, username: &str, code: &str) -> crate::support::Answer {
    browser
        .post("/auth/recovery", json!({"username": username, "code": code}))
        .await
}

#[tokio::test]
async fn a_code_opens_the_registration_of_one_passkey_and_nothing_else() {
    let app = TestApp::new();
    let ada = app.ada().await;
    let mut lost = app.browser();
    recover(&mut lost, "ada", &ada.recovery_codes[0].to_lowercase())
        .await
        .expect(StatusCode::OK);
    for path in ["/me/sessions", "/me/tokens", "/admin/users", "/me/passkeys"] {
        lost.get(path).await.refused(StatusCode::FORBIDDEN, "recovery_only");
    }
    lost.post("/me/recovery-codes", json!({}))
        .await
        .refused(StatusCode::FORBIDDEN, "recovery_only");
    lost.post("/auth/step-up/start", json!({}))
        .await
        .refused(StatusCode::FORBIDDEN, "recovery_only");
    lost.open("/auth/open?host=live--main--ada.localhost:9090")
        .await
        .refused(StatusCode::FORBIDDEN, "recovery_only");
    let me = lost.get("/auth/me").await.expect(StatusCode::OK);
    assert_eq!(me["by"], "recovery");
    lost.register_with(json!({"passkey_name": "New"}))
        .await
        .expect(StatusCode::OK);
    lost.get("/me/passkeys").await.expect(StatusCode::OK);
}

#[tokio::test]
async fn after_recovery_all_else_is_revoked_and_the_user_is_told() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let token = ada
        .post("/me/tokens", json!({"name": "ci", "scopes": ["read"]}))
        .await
        .expect(StatusCode::CREATED);
    let mut lost = app.browser();
    recover(&mut lost, "ada", &ada.recovery_codes[0])
        .await
        .expect(StatusCode::OK);
    let grant = lost.session();
    assert!(
        ada.is_signed_in().await,
        "until there is a new passkey, nothing is lost"
    );
    lost.register_with(json!({})).await.expect(StatusCode::OK);
    assert_ne!(lost.session(), grant);
    assert!(!ada.is_signed_in().await);
    let mut old_grant = app.browser();
    old_grant.cookies.insert(SESSION.into(), grant);
    assert!(!old_grant.is_signed_in().await);
    let mut program = app.browser();
    let request = axum::http::Request::get("/me/sessions")
        .header("authorization", format!("Bearer {}", token["token"].as_str().unwrap()))
        .body(axum::body::Body::empty())
        .unwrap();
    program
        .send(request)
        .await
        .refused(StatusCode::UNAUTHORIZED, "unauthenticated");
    let me = lost.get("/auth/me").await.expect(StatusCode::OK);
    assert_eq!(me["notices"][0]["code"], "recovered");
    assert!(
        lost.open("/account")
            .await
            .text()
            .contains("Your account was recovered")
    );
    let events = lost.get("/me/audit?action=recovery").await.expect(StatusCode::OK);
    let actions: Vec<_> = events["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|event| event["action"].clone())
        .collect();
    assert_eq!(actions, [json!("recovery.finish"), json!("recovery.begin")]);
    lost.login().await.expect(StatusCode::OK);
}

#[tokio::test]
async fn a_code_works_once_and_a_grant_for_ten_minutes() {
    let app = TestApp::new();
    let ada = app.ada().await;
    let mut lost = app.browser();
    recover(&mut lost, "ada", &ada.recovery_codes[0])
        .await
        .expect(StatusCode::OK);
    recover(&mut app.browser(), "ada", &ada.recovery_codes[0])
        .await
        .refused(StatusCode::FORBIDDEN, "recovery_refused");
    app.clock.advance(SignedDuration::from_mins(10));
    lost.register_with(json!({}))
        .await
        .refused(StatusCode::UNAUTHORIZED, "signed_out");
    assert!(!lost.is_signed_in().await);
    recover(&mut lost, "ada", &ada.recovery_codes[1])
        .await
        .expect(StatusCode::OK);
    lost.register_with(json!({})).await.expect(StatusCode::OK);
}

#[tokio::test]
async fn a_recovery_link_made_by_root_works_once() {
    let app = TestApp::new();
    app.ada().await;
    assert!(app.auth.recover_link(&"nobody".parse().unwrap()).await.is_err());
    let link = app.auth.recover_link(&"ada".parse().unwrap()).await.unwrap();
    let mut lost = app.browser();
    assert!(
        lost.open(&app.auth.recover_url(&link))
            .await
            .text()
            .contains("make a new passkey")
    );
    app.browser()
        .register("eve", Some(link.expose()))
        .await
        .refused(StatusCode::FORBIDDEN, "invite_required");
    lost.post("/auth/recovery", json!({"link": link.expose()}))
        .await
        .expect(StatusCode::OK);
    lost.register_with(json!({})).await.expect(StatusCode::OK);
    let again = app
        .browser()
        .post("/auth/recovery", json!({"link": link.expose()}))
        .await;
    again.refused(StatusCode::FORBIDDEN, "recovery_refused");
}

#[tokio::test]
async fn ten_tries_an_hour_are_evaluated_and_passkeys_are_never_locked() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    for guess in 0..10_000u32 {
        let mut eve = app.browser();
        eve.peer = format!("198.51.100.{}", guess % 100).parse().unwrap();
        let request = axum::http::Request::post("/auth/recovery")
            .header("origin", crate::support::ORIGIN)
            .header("x-choir", "1")
            .header("x-forwarded-for", format!("203.0.113.{}", guess % 250))
            .header("content-type", "application/json")
            .body(json!({"username": "ada", "code": guess.to_string()}).to_string().into())
            .unwrap();
        let answer = eve.send(request).await;
        assert!(
            matches!(answer.status, StatusCode::FORBIDDEN | StatusCode::TOO_MANY_REQUESTS),
            "{}",
            answer.text()
        );
    }
    let filter = AuditFilter {
        action: Some("recovery.".into()),
        limit: 1000,
        ..AuditFilter::default()
    };
    assert_eq!(
        app.store.audit_rows(filter).await.unwrap().len(),
        10,
        "each evaluated try leaves an event"
    );
    let mut lost = app.browser();
    lost.peer = "203.0.113.99".parse().unwrap();
    recover(&mut lost, "ada", &ada.recovery_codes[0])
        .await
        .refused(StatusCode::FORBIDDEN, "recovery_refused");
    ada.login().await.expect(StatusCode::OK);
    app.clock.advance(SignedDuration::from_hours(1));
    recover(&mut lost, "ada", &ada.recovery_codes[0])
        .await
        .expect(StatusCode::OK);
}

#[tokio::test]
async fn a_peer_that_floods_waits() {
    let app = TestApp::new();
    let mut eve = app.browser();
    let mut last = recover(&mut eve, "ada", "x").await;
    for _ in 0..20 {
        last = recover(&mut eve, "ada", "x").await;
    }
    last.refused(StatusCode::TOO_MANY_REQUESTS, "too_many_requests");
    assert!(last.headers.contains_key("retry-after"));
    for _ in 0..61 {
        last = eve.post("/auth/login/start", json!({})).await;
    }
    last.refused(StatusCode::TOO_MANY_REQUESTS, "too_many_requests");
}

#[tokio::test]
async fn a_wrong_code_and_an_unknown_name_cannot_be_told_apart() {
    let app = TestApp::new();
    app.ada().await;
    let mut told = Vec::new();
    for name in ["ada", "bob"] {
        let answer = recover(&mut app.browser(), name, "AAAA-BBBB").await;
        let mut body: Value = answer.json();
        body["error"]["request_id"].take();
        told.push((answer.status, answer.body.len(), body));
    }
    assert_eq!(told[0], told[1]);
}

#[tokio::test]
async fn new_codes_replace_the_old_ones() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    assert_eq!(ada.get("/me/recovery-codes").await.expect(StatusCode::OK)["left"], 10);
    let made = ada.post("/me/recovery-codes", json!({})).await.expect(StatusCode::OK);
    recover(&mut app.browser(), "ada", &ada.recovery_codes[0])
        .await
        .refused(StatusCode::FORBIDDEN, "recovery_refused");
    let mut lost = app.browser();
    lost.key = SoftKey::new();
    recover(&mut lost, "ada", made["recovery_codes"][9].as_str().unwrap())
        .await
        .expect(StatusCode::OK);
}
