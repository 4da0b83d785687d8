//! Assertions that must not pass (C05, C08, C09, A09), step-up and the last passkey (C20, C21).

use axum::http::StatusCode;
use jiff::SignedDuration;
use serde_json::{Value, json};

use crate::support::passkey::Behaviour;
use crate::support::{Browser, TestApp};

const REFUSED: (StatusCode, &str) = (StatusCode::UNAUTHORIZED, "passkey_refused");
const OVER: (StatusCode, &str) = (StatusCode::BAD_REQUEST, "ceremony_over");

async fn signed_out(app: &TestApp) -> Browser {
    let mut ada = app.ada().await;
    ada.post("/auth/logout", json!({})).await.expect(StatusCode::NO_CONTENT);
    ada
}

async fn finish(browser: &mut Browser, credential: &Value) -> crate::support::Answer {
    browser
        .post("/auth/login/finish", json!({"credential": credential}))
        .await
}

#[tokio::test]
async fn a_passkey_signs_in_without_a_name() {
    let app = TestApp::new();
    let mut ada = signed_out(&app).await;
    assert!(!ada.is_signed_in().await);
    let done = ada.login().await.expect(StatusCode::OK);
    assert_eq!(done["user"]["name"], "ada");
    assert!(ada.is_signed_in().await);
}

#[tokio::test]
async fn an_assertion_is_good_once() {
    let app = TestApp::new();
    let mut ada = signed_out(&app).await;
    let options = ada.post("/auth/login/start", json!({})).await.expect(StatusCode::OK);
    let credential = ada.key.assert(&options, &ada.behaviour).await;
    let mut thief = ada.clone();
    finish(&mut ada, &credential).await.expect(StatusCode::OK);
    finish(&mut thief, &credential).await.refused(OVER.0, OVER.1);
}

#[tokio::test]
async fn an_assertion_for_another_browsers_challenge_is_refused() {
    let app = TestApp::new();
    let mut ada = signed_out(&app).await;
    let mut eve = app.browser();
    let for_eve = eve.post("/auth/login/start", json!({})).await.expect(StatusCode::OK);
    ada.post("/auth/login/start", json!({})).await.expect(StatusCode::OK);
    let credential = ada.key.assert(&for_eve, &ada.behaviour).await;
    finish(&mut ada, &credential).await.refused(REFUSED.0, REFUSED.1);
    finish(&mut app.browser(), &credential).await.refused(OVER.0, OVER.1);
    finish(&mut eve, &credential).await.expect(StatusCode::OK);
}

#[tokio::test]
async fn a_challenge_older_than_five_minutes_is_refused() {
    let app = TestApp::new();
    let mut ada = signed_out(&app).await;
    for (minutes, good) in [(5, false), (4, true)] {
        let options = ada.post("/auth/login/start", json!({})).await.expect(StatusCode::OK);
        let credential = ada.key.assert(&options, &ada.behaviour).await;
        app.clock.advance(SignedDuration::from_mins(minutes));
        let answer = finish(&mut ada, &credential).await;
        assert_eq!(answer.status == StatusCode::OK, good, "{}", answer.text());
    }
}

#[tokio::test]
async fn a_challenge_serves_only_what_it_was_made_for() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let options = ada.post("/auth/register/start", json!({})).await.expect(StatusCode::OK);
    let mut for_login = options.clone();
    for_login["publicKey"]["userVerification"] = "required".into();
    let credential = ada.key.assert(&for_login, &ada.behaviour).await;
    finish(&mut ada, &credential).await.refused(OVER.0, OVER.1);

    let options = ada.post("/auth/step-up/start", json!({})).await.expect(StatusCode::OK);
    let credential = ada.key.assert(&options, &ada.behaviour).await;
    finish(&mut ada, &credential).await.refused(OVER.0, OVER.1);

    let options = ada.post("/auth/login/start", json!({})).await.expect(StatusCode::OK);
    let credential = ada.key.assert(&options, &ada.behaviour).await;
    let step_up = ada
        .post("/auth/step-up/finish", json!({"credential": credential}))
        .await;
    step_up.refused(OVER.0, OVER.1);

    ada.login().await.expect(StatusCode::OK);
}

#[tokio::test]
async fn an_assertion_of_another_origin_party_or_kind_is_refused() {
    let app = TestApp::new();
    let mut ada = signed_out(&app).await;
    let honest = ada.behaviour.clone();
    let mut forged = Vec::new();
    for origin in [
        "https://localhost:9090",
        "http://localhost:9292",
        "http://localhost",
        "http://live--main--ada.localhost:9090",
        "http://evil.example",
        "http://127.0.0.1:9090",
        "null",
    ] {
        forged.push(Behaviour {
            origin: origin.into(),
            ..honest.clone()
        });
    }
    for rp_id in ["evil.example", "live--main--ada.localhost", "127.0.0.1"] {
        forged.push(Behaviour {
            rp_id: rp_id.into(),
            ..honest.clone()
        });
    }
    forged.push(Behaviour {
        kind: Some("webauthn.create"),
        ..honest.clone()
    });
    for behaviour in forged {
        ada.behaviour = behaviour;
        ada.login().await.refused(REFUSED.0, REFUSED.1);
        assert!(!ada.is_signed_in().await);
    }
    ada.behaviour = honest;
    ada.login().await.expect(StatusCode::OK);
}

#[tokio::test]
async fn a_passkey_of_another_origin_cannot_be_registered() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let honest = ada.behaviour.clone();
    for behaviour in [
        Behaviour {
            origin: "http://live--main--ada.localhost:9090".into(),
            ..honest.clone()
        },
        Behaviour {
            origin: "http://localhost:9292".into(),
            ..honest.clone()
        },
        Behaviour {
            rp_id: "evil.example".into(),
            ..honest.clone()
        },
        Behaviour {
            verifies_user: false,
            ..honest.clone()
        },
    ] {
        let mut other = ada.clone();
        other.behaviour = behaviour;
        other
            .register_with(json!({}))
            .await
            .refused(StatusCode::BAD_REQUEST, "passkey_refused");
    }
    ada.register_with(json!({"passkey_name": "Phone"}))
        .await
        .expect(StatusCode::OK);
}

#[tokio::test]
async fn without_user_verification_nobody_signs_in() {
    let app = TestApp::new();
    let mut ada = signed_out(&app).await;
    ada.behaviour.verifies_user = false;
    ada.login().await.refused(REFUSED.0, REFUSED.1);
    ada.behaviour.verifies_user = true;
    ada.login().await.expect(StatusCode::OK);
}

#[tokio::test]
async fn a_copied_passkey_is_refused_by_its_counter() {
    let app = TestApp::new();
    let mut ada = signed_out(&app).await;
    let copy = ada.key.clone();
    ada.login().await.expect(StatusCode::OK);
    let mut thief = app.browser();
    thief.key = copy;
    thief.login().await.refused(REFUSED.0, REFUSED.1);
}

#[tokio::test]
async fn a_passkey_without_a_counter_signs_in_again_and_again() {
    let app = TestApp::new();
    let mut browser = app.browser();
    browser.key.counts = false;
    let claim = app.claim().await;
    browser.register("ada", Some(&claim)).await.expect(StatusCode::OK);
    for _ in 0..3 {
        browser.login().await.expect(StatusCode::OK);
    }
}

#[tokio::test]
async fn a_passkey_that_nobody_registered_is_refused_like_a_wrong_one() {
    let app = TestApp::new();
    let mut ada = signed_out(&app).await;
    let mut other = TestApp::new().ada().await;
    other.router = app.router.clone();
    other.cookies.clear();
    other.login().await.refused(REFUSED.0, REFUSED.1);
    // A handle of another user with a key that is known.
    let options = ada.post("/auth/login/start", json!({})).await.expect(StatusCode::OK);
    let mut credential = ada.key.assert(&options, &ada.behaviour).await;
    credential["response"]["userHandle"] = "AAAAAAAAAAAAAAAAAAAAAA".into();
    finish(&mut ada, &credential).await.refused(REFUSED.0, REFUSED.1);
}

/// What needs an assertion of the last five minutes.
async fn delicate(browser: &mut Browser) -> Vec<(&'static str, crate::support::Answer)> {
    vec![
        ("add a passkey", browser.post("/auth/register/start", json!({})).await),
        ("remove a passkey", browser.delete("/me/passkeys/x").await),
        ("new codes", browser.post("/me/recovery-codes", json!({})).await),
        (
            "a token",
            browser
                .post("/me/tokens", json!({"name": "ci", "scopes": ["read"]}))
                .await,
        ),
        (
            "allow a program",
            browser.post("/auth/device/approve", json!({"user_code": "X"})).await,
        ),
    ]
}

#[tokio::test]
async fn delicate_things_need_an_assertion_of_the_last_five_minutes() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    for (what, answer) in delicate(&mut ada).await {
        assert_ne!(answer.code(), "step_up_required", "{what}: just signed in");
    }
    app.clock.advance(SignedDuration::from_secs(301));
    for (what, answer) in delicate(&mut ada).await {
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (StatusCode::FORBIDDEN, "step_up_required"),
            "{what}"
        );
    }
    ada.step_up().await.expect(StatusCode::OK);
    for (what, answer) in delicate(&mut ada).await {
        assert_ne!(answer.code(), "step_up_required", "{what}: just confirmed");
    }
}

#[tokio::test]
async fn somebody_elses_passkey_confirms_nothing() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let bob = app.member(&mut ada, "bob").await;
    let before = ada.session();
    ada.key = bob.key.clone();
    ada.step_up().await.refused(StatusCode::FORBIDDEN, "other_user");
    assert_eq!(ada.session(), before);
}

#[tokio::test]
async fn the_last_passkey_cannot_be_removed_and_a_removed_one_is_dead() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let first = ada.key.clone();
    let list = ada.get("/me/passkeys").await.expect(StatusCode::OK);
    let id = list["items"][0]["id"].as_str().unwrap().to_owned();
    ada.delete(&format!("/me/passkeys/{id}"))
        .await
        .refused(StatusCode::CONFLICT, "last_passkey");
    ada.register_with(json!({"passkey_name": "Phone"}))
        .await
        .expect(StatusCode::OK);
    ada.delete(&format!("/me/passkeys/{id}"))
        .await
        .expect(StatusCode::NO_CONTENT);
    let list = ada.get("/me/passkeys").await.expect(StatusCode::OK);
    assert_eq!(
        (list["items"].as_array().unwrap().len(), &list["items"][0]["name"]),
        (1, &json!("Phone"))
    );
    let mut old = app.browser();
    old.key = first;
    old.login().await.refused(REFUSED.0, REFUSED.1);
    ada.login().await.expect(StatusCode::OK);
}

#[tokio::test]
async fn two_removals_at_once_leave_one_passkey() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    ada.register_with(json!({})).await.expect(StatusCode::OK);
    let list = ada.get("/me/passkeys").await.expect(StatusCode::OK);
    let remove = |index: usize| {
        let (mut browser, id) = (ada.clone(), list["items"][index]["id"].as_str().unwrap().to_owned());
        async move { browser.delete(&format!("/me/passkeys/{id}")).await.status }
    };
    let (one, two) = tokio::join!(remove(0), remove(1));
    let mut both = [one, two];
    both.sort();
    assert_eq!(both, [StatusCode::NO_CONTENT, StatusCode::CONFLICT]);
}
