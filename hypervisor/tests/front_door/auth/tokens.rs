//! API tokens and signing a command line in; other users' objects (C25).

use axum::body::Body;
use axum::http::{Request, StatusCode};
use jiff::SignedDuration;
use serde_json::{Value, json};

use crate::support::{Answer, Browser, ORIGIN, SESSION, TestApp, send};

async fn call(app: &TestApp, method: &str, path: &str, token: &str, more: &[(&str, &str)]) -> Answer {
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .header("authorization", format!("Bearer {token}"));
    for (name, value) in more {
        request = request.header(*name, *value);
    }
    send(&app.router, [192, 0, 2, 9].into(), request.body(Body::empty()).unwrap()).await
}

async fn token(browser: &mut Browser, scopes: &[&str]) -> Value {
    browser
        .post("/me/tokens", json!({"name": "ci", "scopes": scopes}))
        .await
        .expect(StatusCode::CREATED)
}

#[tokio::test]
async fn a_token_may_what_its_scopes_say_and_dies_when_deleted() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let made = token(&mut ada, &["read"]).await;
    let reader = made["token"].as_str().unwrap();
    assert!(reader.starts_with("choir_"));
    call(&app, "GET", "/me/sessions", reader, &[])
        .await
        .expect(StatusCode::OK);
    call(&app, "DELETE", "/me/tokens/x", reader, &[])
        .await
        .refused(StatusCode::FORBIDDEN, "scope");
    call(&app, "GET", "/admin/users", reader, &[])
        .await
        .refused(StatusCode::FORBIDDEN, "scope");
    call(&app, "POST", "/me/recovery-codes", reader, &[])
        .await
        .refused(StatusCode::FORBIDDEN, "session_needed");
    let list = ada.get("/me/tokens").await.expect(StatusCode::OK);
    assert!(list["items"][0]["last_used_at"].is_string() && !list.to_string().contains(&reader[6..]));

    let made = token(&mut ada, &["read", "write", "admin"]).await;
    let all = made["token"].as_str().unwrap();
    call(&app, "GET", "/admin/users", all, &[]).await.expect(StatusCode::OK);
    call(&app, "DELETE", "/me/tokens/x", all, &[])
        .await
        .refused(StatusCode::NOT_FOUND, "not_found");
    let id = made["item"]["id"].as_str().unwrap();
    ada.delete(&format!("/me/tokens/{id}"))
        .await
        .expect(StatusCode::NO_CONTENT);
    call(&app, "GET", "/me/sessions", all, &[])
        .await
        .refused(StatusCode::UNAUTHORIZED, "unauthenticated");
}

#[tokio::test]
async fn a_token_never_comes_with_a_cookie_or_from_a_foreign_page() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let made = token(&mut ada, &["read"]).await;
    let token = made["token"].as_str().unwrap();
    let cookie = format!("{SESSION}={}", ada.session());
    let both = call(&app, "GET", "/me/sessions", token, &[("cookie", &cookie)]).await;
    both.refused(StatusCode::BAD_REQUEST, "two_credentials");
    for origin in ["https://evil.example", "null", "http://localhost:9292"] {
        let foreign = call(&app, "GET", "/me/sessions", token, &[("origin", origin)]).await;
        foreign.refused(StatusCode::FORBIDDEN, "foreign_origin");
    }
    call(&app, "GET", "/me/sessions", token, &[("origin", ORIGIN)])
        .await
        .expect(StatusCode::OK);
    for bad in ["x", "choir_", &token[6..], &format!("{token}x"), ""] {
        call(&app, "GET", "/me/sessions", bad, &[])
            .await
            .refused(StatusCode::UNAUTHORIZED, "unauthenticated");
    }
}

#[tokio::test]
async fn a_token_runs_out_and_what_hangs_on_it_ends() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let made = ada
        .post(
            "/me/tokens",
            json!({"name": "ci", "scopes": ["read"], "expires_in_s": 3600}),
        )
        .await;
    let made = made.expect(StatusCode::CREATED);
    let token = made["token"].as_str().unwrap();
    let mut headers = axum::http::HeaderMap::new();
    headers.insert("authorization", format!("Bearer {token}").parse().unwrap());
    let caller = app.auth.caller_of(&headers).await.unwrap().unwrap();
    let ended = app.auth.watch(&caller);
    app.clock.advance(SignedDuration::from_mins(59));
    call(&app, "GET", "/me/sessions", token, &[])
        .await
        .expect(StatusCode::OK);
    app.clock.advance(SignedDuration::from_mins(1));
    call(&app, "GET", "/me/sessions", token, &[])
        .await
        .refused(StatusCode::UNAUTHORIZED, "unauthenticated");
    let timer = tokio::spawn(app.auth.clone().run());
    ended.cancelled().await;
    timer.abort();
}

#[tokio::test]
async fn scopes_and_lifetimes_out_of_bounds_are_refused() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let mut bob = app.member(&mut ada, "bob").await;
    for scopes in [json!([]), json!(["root"]), json!(["read", "admin"])] {
        let answer = bob.post("/me/tokens", json!({"name": "ci", "scopes": scopes})).await;
        answer.refused(StatusCode::BAD_REQUEST, "bad_scopes");
    }
    for seconds in [0, -1, 400 * 24 * 3600] {
        let answer = bob
            .post(
                "/me/tokens",
                json!({"name": "ci", "scopes": ["read"], "expires_in_s": seconds}),
            )
            .await;
        answer.refused(StatusCode::BAD_REQUEST, "bad_expiry");
    }
    let answer = bob.post("/me/tokens", json!({"name": " ", "scopes": ["read"]})).await;
    answer.refused(StatusCode::BAD_REQUEST, "bad_text");
    token(&mut bob, &["read", "write"]).await;
}

#[tokio::test]
async fn another_users_objects_are_as_absent_ones() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let mut bob = app.member(&mut ada, "bob").await;
    let token = token(&mut ada, &["read"]).await["item"]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let session = ada.get("/auth/me").await.expect(StatusCode::OK)["session"]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let passkey = ada.get("/me/passkeys").await.expect(StatusCode::OK)["items"][0]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    for (kind, id) in [("tokens", token), ("sessions", session), ("passkeys", passkey)] {
        let theirs = bob.delete(&format!("/me/{kind}/{id}")).await;
        let absent = bob.delete(&format!("/me/{kind}/nothing")).await;
        theirs.refused(StatusCode::NOT_FOUND, "not_found");
        let plain = |answer: &Answer| {
            let mut body = answer.json();
            body["error"]["request_id"].take();
            (answer.status, body)
        };
        assert_eq!(plain(&theirs), plain(&absent));
        let list = bob.get(&format!("/me/{kind}")).await.expect(StatusCode::OK);
        assert!(!list.to_string().contains(&id), "{kind}");
        assert!(
            ada.get(&format!("/me/{kind}")).await.text().contains(&id),
            "positive control: {kind}"
        );
    }
    let events = bob.get("/me/audit").await.expect(StatusCode::OK).to_string();
    let ada_id = ada.get("/auth/me").await.expect(StatusCode::OK)["user"]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(!events.contains(&ada_id) && ada.get("/me/audit").await.text().contains(&ada_id));
}

#[tokio::test]
async fn a_program_gets_a_token_once_its_code_was_allowed() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let mut program = app.browser();
    program.peer = "198.51.100.7".parse().unwrap();
    let login = program
        .post("/auth/device/start", json!({"client_name": "choir on laptop"}))
        .await
        .expect(StatusCode::OK);
    let code = login["user_code"].as_str().unwrap();
    let poll = json!({"device_code": login["device_code"]});
    program
        .post("/auth/device/poll", poll.clone())
        .await
        .expect(StatusCode::ACCEPTED);
    let page = ada
        .open(login["verification_uri_complete"].as_str().unwrap())
        .await
        .text();
    assert!(
        page.contains("choir on laptop") && page.contains("198.51.100.7") && page.contains(code),
        "{page}"
    );
    ada.post("/auth/device/approve", json!({"user_code": code.to_lowercase()}))
        .await
        .expect(StatusCode::NO_CONTENT);
    ada.post("/auth/device/approve", json!({"user_code": code}))
        .await
        .refused(StatusCode::NOT_FOUND, "code_unknown");
    let done = program
        .post("/auth/device/poll", poll.clone())
        .await
        .expect(StatusCode::OK);
    assert_eq!(done["user"]["name"], "ada");
    call(&app, "GET", "/me/sessions", done["token"].as_str().unwrap(), &[])
        .await
        .expect(StatusCode::OK);
    program
        .post("/auth/device/poll", poll)
        .await
        .refused(StatusCode::GONE, "login_over");
}

#[tokio::test]
async fn a_denied_or_old_code_gives_nothing() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let mut program = app.browser();
    for deny in [true, false] {
        let login = program
            .post("/auth/device/start", json!({"client_name": ""}))
            .await
            .expect(StatusCode::OK);
        if deny {
            ada.post("/auth/device/deny", json!({"user_code": login["user_code"]}))
                .await
                .expect(StatusCode::NO_CONTENT);
        } else {
            app.clock.advance(SignedDuration::from_mins(10));
            ada.step_up().await.expect(StatusCode::OK);
            let late = ada
                .post("/auth/device/approve", json!({"user_code": login["user_code"]}))
                .await;
            late.refused(StatusCode::NOT_FOUND, "code_unknown");
        }
        let poll = program
            .post("/auth/device/poll", json!({"device_code": login["device_code"]}))
            .await;
        poll.refused(StatusCode::GONE, "login_over");
    }
    program
        .post("/auth/device/poll", json!({"device_code": "x"}))
        .await
        .refused(StatusCode::GONE, "login_over");
}
