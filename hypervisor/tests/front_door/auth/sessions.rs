//! Sessions: fixation, rotation, the end of them, what is kept of them (C11 to C15).

use axum::http::StatusCode;
use jiff::SignedDuration;
use serde_json::json;

use crate::support::{Browser, SESSION, TestApp};

/// A browser that has nothing but this session cookie.
fn thief(app: &TestApp, session: &str) -> Browser {
    let mut browser = app.browser();
    browser.cookies.insert(SESSION.into(), session.into());
    browser
}

#[tokio::test]
async fn a_chosen_cookie_never_becomes_a_session() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let chosen = "A".repeat(43);
    ada.cookies.insert(SESSION.into(), chosen.clone());
    ada.login().await.expect(StatusCode::OK);
    assert_ne!(ada.session(), chosen);
    assert_eq!(ada.session().len(), 43, "256 bits in base64url");
    assert!(!thief(&app, &chosen).is_signed_in().await);
}

#[tokio::test]
async fn signing_in_and_confirming_replace_the_cookie_at_once() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let first = ada.session();
    assert!(
        thief(&app, &first).is_signed_in().await,
        "positive control: a copy of a live cookie works"
    );
    ada.login().await.expect(StatusCode::OK);
    let second = ada.session();
    assert!(!thief(&app, &first).is_signed_in().await);
    ada.step_up().await.expect(StatusCode::OK);
    let third = ada.session();
    assert!(!thief(&app, &second).is_signed_in().await);
    assert!(thief(&app, &third).is_signed_in().await);
    assert!(
        !thief(&app.restarted(), &second).is_signed_in().await,
        "not in the database either"
    );
    assert!(
        thief(&app.restarted(), &third).is_signed_in().await,
        "sessions survive a restart"
    );
}

#[tokio::test]
async fn confirming_does_not_end_what_hangs_on_the_session() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    ada.get("/me/sessions").await.expect(StatusCode::OK);
    let mut headers = axum::http::HeaderMap::new();
    headers.insert("cookie", format!("{SESSION}={}", ada.session()).parse().unwrap());
    let session = app.auth.session_of(&headers).await.unwrap().unwrap();
    let ended = app.auth.watch_session(&session);
    ada.step_up().await.expect(StatusCode::OK);
    assert!(!ended.is_cancelled());
    ada.post("/auth/logout", json!({})).await.expect(StatusCode::NO_CONTENT);
    assert!(ended.is_cancelled());
}

#[tokio::test]
async fn after_signing_out_the_cookie_is_dead_on_the_server() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let stolen = ada.session();
    ada.post("/auth/logout", json!({})).await.expect(StatusCode::NO_CONTENT);
    assert!(!ada.cookies.contains_key(SESSION));
    let mut thief = thief(&app, &stolen);
    thief
        .get("/me/sessions")
        .await
        .refused(StatusCode::UNAUTHORIZED, "unauthenticated");
    assert!(
        app.store
            .sessions(app.store.users().await.unwrap()[0].id.clone())
            .await
            .unwrap()
            .is_empty()
    );
}

#[tokio::test]
async fn one_session_or_all_others_can_be_ended() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let mut others = Vec::new();
    for _ in 0..3 {
        let mut browser = app.browser();
        browser.key = ada.key.clone();
        browser.login().await.expect(StatusCode::OK);
        ada.key = browser.key.clone();
        others.push(browser);
    }
    let list = ada.get("/me/sessions").await.expect(StatusCode::OK);
    let items = list["items"].as_array().unwrap();
    assert_eq!(items.len(), 4);
    assert_eq!(items.iter().filter(|item| item["current"] == true).count(), 1);
    let own = others[0].get("/auth/me").await.expect(StatusCode::OK)["session"]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    ada.delete(&format!("/me/sessions/{own}"))
        .await
        .expect(StatusCode::NO_CONTENT);
    assert!(!others[0].is_signed_in().await);
    assert!(others[1].is_signed_in().await);
    ada.delete("/me/sessions").await.expect(StatusCode::NO_CONTENT);
    assert!(!others[1].is_signed_in().await && !others[2].is_signed_in().await);
    assert!(ada.is_signed_in().await);
}

#[tokio::test]
async fn a_session_ends_after_a_day_without_use() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    for _ in 0..3 {
        app.clock.advance(SignedDuration::from_hours(23));
        assert!(ada.is_signed_in().await, "use keeps it alive");
    }
    app.clock.advance(SignedDuration::from_hours(24));
    ada.get("/me/sessions")
        .await
        .refused(StatusCode::UNAUTHORIZED, "unauthenticated");
    assert!(!thief(&app.restarted(), &ada.session()).is_signed_in().await);
}

#[tokio::test]
async fn a_session_ends_after_a_week_however_it_is_used() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    for _ in 0..8 {
        app.clock.advance(SignedDuration::from_hours(20));
        assert!(ada.is_signed_in().await);
    }
    app.clock.advance(SignedDuration::from_hours(8));
    ada.get("/me/sessions")
        .await
        .refused(StatusCode::UNAUTHORIZED, "unauthenticated");
}

#[tokio::test]
async fn what_hangs_on_a_session_ends_when_it_runs_out_without_a_request() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let mut headers = axum::http::HeaderMap::new();
    headers.insert("cookie", format!("{SESSION}={}", ada.session()).parse().unwrap());
    let session = app.auth.session_of(&headers).await.unwrap().unwrap();
    let ended = app.auth.watch_session(&session);
    let timer = tokio::spawn(app.auth.clone().run());
    app.clock.advance(SignedDuration::from_hours(24));
    let within = std::time::Duration::from_secs(5);
    tokio::time::timeout(within, ended.cancelled())
        .await
        .expect("the watch fires within five seconds");
    timer.abort();
    assert!(!ada.is_signed_in().await);
}

#[tokio::test]
async fn no_cookie_token_or_code_is_kept_in_clear() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let token = ada
        .post("/me/tokens", json!({"name": "ci", "scopes": ["read"]}))
        .await
        .expect(StatusCode::CREATED);
    let mut secrets = vec![
        ada.session(),
        token["token"].as_str().unwrap().trim_start_matches("choir_").to_owned(),
    ];
    secrets.extend(
        ada.recovery_codes
            .iter()
            .flat_map(|code| [code.clone(), code.replace('-', "")]),
    );
    let id = ada.get("/auth/me").await.expect(StatusCode::OK)["session"]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let files = app.files();
    let found = |text: &str| {
        files
            .iter()
            .any(|(_, bytes)| bytes.windows(text.len()).any(|window| window == text.as_bytes()))
    };
    assert!(found(&id), "positive control: what is stored in clear is found");
    for secret in secrets {
        assert!(!found(&secret));
    }
}

#[tokio::test]
async fn two_session_cookies_are_refused() {
    let app = TestApp::new();
    let ada = app.ada().await;
    let mut other = app.browser();
    let pair = format!("{SESSION}={}", ada.session());
    let request = |cookie: String| {
        let request = axum::http::Request::get("/me/sessions").header("cookie", cookie);
        request.body(axum::body::Body::empty()).unwrap()
    };
    other.send(request(pair.clone())).await.expect(StatusCode::OK);
    other
        .send(request(format!("{pair}; {pair}")))
        .await
        .refused(StatusCode::BAD_REQUEST, "two_cookies");
}
