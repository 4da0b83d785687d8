//! The first user, invites, and who may add a passkey to whom (C01 to C04).

use axum::http::StatusCode;
use choir_hypervisor::auth::RegistrationMode;
use jiff::SignedDuration;
use serde_json::json;

use crate::support::TestApp;

#[tokio::test]
async fn the_claim_link_makes_the_first_user_who_is_admin_and_gets_ten_codes() {
    let app = TestApp::new();
    let mut browser = app.browser();
    let claim = app.claim().await;
    let done = browser.register("ada", Some(&claim)).await.expect(StatusCode::OK);
    assert_eq!(done["user"]["name"], "ada");
    assert_eq!(done["user"]["role"], "admin");
    assert_eq!(browser.recovery_codes.len(), 10);
    let me = browser.get("/auth/me").await.expect(StatusCode::OK);
    assert_eq!(
        (&me["authenticated"], &me["user"]["name"]),
        (&json!(true), &json!("ada"))
    );
    assert!(
        app.auth.ensure_claim().await.unwrap().is_none(),
        "closed for ever after"
    );
}

#[tokio::test]
async fn nobody_registers_before_the_claim_without_its_link() {
    for mode in [RegistrationMode::Invite, RegistrationMode::Open] {
        let app = TestApp::with(mode);
        let claim = app.claim().await;
        let wrong = "A".repeat(43);
        for invite in [None, Some(""), Some("x"), Some(wrong.as_str())] {
            app.browser()
                .register("eve", invite)
                .await
                .refused(StatusCode::FORBIDDEN, "invite_required");
        }
        app.browser().register("ada", Some(&claim)).await.expect(StatusCode::OK);
    }
}

#[tokio::test]
async fn a_claim_works_once_for_thirty_minutes_and_a_new_one_replaces_it() {
    let app = TestApp::new();
    let old = app.claim().await;
    let replaced = app.claim().await;
    app.browser()
        .register("eve", Some(&old))
        .await
        .refused(StatusCode::FORBIDDEN, "invite_required");
    app.clock.advance(SignedDuration::from_mins(30));
    app.browser()
        .register("eve", Some(&replaced))
        .await
        .refused(StatusCode::FORBIDDEN, "invite_required");
    let good = app.claim().await;
    app.browser().register("ada", Some(&good)).await.expect(StatusCode::OK);
    app.browser()
        .register("eve", Some(&good))
        .await
        .refused(StatusCode::FORBIDDEN, "invite_required");
}

#[tokio::test]
async fn a_claim_that_ran_out_during_the_ceremony_makes_nobody() {
    let app = TestApp::new();
    let claim = app.claim().await;
    app.clock.advance(SignedDuration::from_mins(29));
    let mut browser = app.browser();
    let options = browser
        .post("/auth/register/start", json!({"username": "ada", "invite": claim}))
        .await;
    app.clock.advance(SignedDuration::from_mins(2));
    let credential = browser
        .key
        .create(&options.expect(StatusCode::OK), &browser.behaviour)
        .await;
    let answer = browser
        .post("/auth/register/finish", json!({"credential": credential}))
        .await;
    answer.refused(StatusCode::FORBIDDEN, "invite_required");
    assert!(!app.store.has_users().await.unwrap());
}

#[tokio::test]
async fn fifty_claims_at_once_make_exactly_one_user() {
    let app = TestApp::new();
    let claim = app.claim().await;
    let mut finishes = tokio::task::JoinSet::new();
    let mut ready = Vec::new();
    for number in 0..50 {
        let mut browser = app.browser();
        browser.peer = format!("192.0.2.{number}").parse().unwrap();
        let start = json!({"username": format!("user{number}"), "invite": claim});
        let options = browser.post("/auth/register/start", start).await.expect(StatusCode::OK);
        let credential = browser.key.create(&options, &browser.behaviour).await;
        ready.push((browser, credential));
    }
    for (mut browser, credential) in ready {
        finishes.spawn(async move {
            browser
                .post("/auth/register/finish", json!({"credential": credential}))
                .await
                .status
        });
    }
    let made = finishes
        .join_all()
        .await
        .into_iter()
        .filter(|status| *status == StatusCode::OK)
        .count();
    assert_eq!(made, 1);
    assert_eq!(app.store.users().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_stranger_cannot_add_a_passkey_to_a_name_and_does_not_learn_that_it_exists() {
    let app = TestApp::new();
    app.ada().await;
    let known = app.browser().register("ada", None).await;
    let unknown = app.browser().register("nobody", None).await;
    known.refused(StatusCode::FORBIDDEN, "invite_required");
    assert_eq!(without_id(&known.text()), without_id(&unknown.text()));
    assert_eq!(app.store.users().await.unwrap().len(), 1);
}

fn without_id(body: &str) -> serde_json::Value {
    let mut body: serde_json::Value = serde_json::from_str(body).unwrap();
    assert!(body["error"]["request_id"].as_str().is_some_and(|id| !id.is_empty()));
    body["error"]["request_id"].take();
    body
}

#[tokio::test]
async fn who_is_signed_in_cannot_add_a_passkey_to_another_name() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let mut bob = app.member(&mut ada, "bob").await;
    let answer = bob.register_with(json!({"username": "ada"})).await;
    answer.refused(StatusCode::FORBIDDEN, "other_user");
    bob.register_with(json!({"username": "bob"}))
        .await
        .expect(StatusCode::OK);
}

#[tokio::test]
async fn an_invite_makes_one_member_and_never_takes_a_name() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let invite = ada.post("/admin/invites", json!({})).await.expect(StatusCode::CREATED);
    let invite = invite["invite"].as_str();
    app.browser()
        .register("ada", invite)
        .await
        .refused(StatusCode::CONFLICT, "name_taken");
    let done = app.browser().register("bob", invite).await.expect(StatusCode::OK);
    assert_eq!(done["user"]["role"], "member");
    app.browser()
        .register("carol", invite)
        .await
        .refused(StatusCode::FORBIDDEN, "invite_required");
}

#[tokio::test]
async fn a_deleted_invite_is_worth_nothing() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let invite = ada
        .post("/admin/invites", json!({"role": "admin"}))
        .await
        .expect(StatusCode::CREATED);
    let id = invite["id"].as_str().unwrap();
    ada.delete(&format!("/admin/invites/{id}"))
        .await
        .expect(StatusCode::NO_CONTENT);
    ada.delete(&format!("/admin/invites/{id}"))
        .await
        .refused(StatusCode::NOT_FOUND, "not_found");
    app.browser()
        .register("eve", invite["invite"].as_str())
        .await
        .refused(StatusCode::FORBIDDEN, "invite_required");
}

#[tokio::test]
async fn open_registration_makes_members_and_tells_of_a_taken_name_only_at_the_end() {
    let app = TestApp::with(RegistrationMode::Open);
    app.ada().await;
    let done = app.browser().register("bob", None).await.expect(StatusCode::OK);
    assert_eq!(done["user"]["role"], "member");
    let mut eve = app.browser();
    let start = eve.post("/auth/register/start", json!({"username": "ada"})).await;
    let credential = eve.key.create(&start.expect(StatusCode::OK), &eve.behaviour).await;
    let finish = eve
        .post("/auth/register/finish", json!({"credential": credential}))
        .await;
    finish.refused(StatusCode::CONFLICT, "name_taken");
}

#[tokio::test]
async fn names_that_are_no_names_are_refused() {
    let app = TestApp::new();
    let claim = app.claim().await;
    let huge = "a".repeat(100_000);
    for name in ["", "A", "a--b", "../a", "a/b", "a\0", "-a", &huge] {
        app.browser()
            .register(name, Some(&claim))
            .await
            .refused(StatusCode::BAD_REQUEST, "bad_name");
    }
    let mut browser = app.browser();
    let start = json!({"username": "ada", "display_name": "a\u{202e}b", "invite": claim});
    browser
        .register_with(start)
        .await
        .refused(StatusCode::BAD_REQUEST, "bad_text");
    browser.register("ada", Some(&claim)).await.expect(StatusCode::OK);
}

#[tokio::test]
async fn starting_to_sign_in_looks_the_same_with_and_without_users() {
    let app = TestApp::new();
    let before = app.browser().post("/auth/login/start", json!({})).await;
    app.ada().await;
    let after = app.browser().post("/auth/login/start", json!({})).await;
    assert_eq!((before.status, before.body.len()), (after.status, after.body.len()));
    assert_eq!(
        before.expect(StatusCode::OK)["publicKey"]["allowCredentials"],
        json!([])
    );
}
