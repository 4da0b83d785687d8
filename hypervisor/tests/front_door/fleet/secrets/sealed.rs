//! A hypervisor without its master key (G11): people sign in, sandboxes are reached and swapped, secrets wait for the key.

use axum::http::StatusCode;
use choir_core::Slot;
use choir_hypervisor::gate::Gatekeeper;
use serde_json::json;

use super::super::access::{HOST, knock};
use super::super::{Box, change, sandbox, shown, workspace};
use super::{delete, put, value};

#[tokio::test]
async fn without_its_key_secrets_answer_503_while_login_routing_and_swap_go_on() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, dev] = workspace(&mut ada).await;
    put(&mut ada, "token", json!({"value": "kept"}))
        .await
        .expect(StatusCode::CREATED);
    change(&mut ada, Slot::Live, "start").await;
    let key = start.directory.path().join("key");
    let aside = start.directory.path().join("key.aside");
    std::fs::rename(&key, &aside).unwrap();

    let sealed = start.restarted().await;
    ada.router = sealed.router.clone();
    let ready = ada.get("/readyz").await.json();
    assert_eq!(ready["parts"]["keys"], "sealed", "{ready}");
    ada.login().await.expect(StatusCode::OK);
    put(&mut ada, "token", json!({"value": "new"}))
        .await
        .refused(StatusCode::SERVICE_UNAVAILABLE, "sealed");
    put(&mut ada, "other", json!({"value": "new"}))
        .await
        .refused(StatusCode::SERVICE_UNAVAILABLE, "sealed");
    delete(&mut ada, "token")
        .await
        .refused(StatusCode::SERVICE_UNAVAILABLE, "sealed");
    // No code is made that could never be used, nor a user who would get some; a code that is right is not refused as wrong.
    ada.post("/me/recovery-codes", json!({}))
        .await
        .refused(StatusCode::SERVICE_UNAVAILABLE, "sealed");
    let invite = ada.post("/admin/invites", json!({})).await.expect(StatusCode::CREATED);
    let mut eve = sealed.browser();
    eve.register("eve", invite["invite"].as_str())
        .await
        .refused(StatusCode::SERVICE_UNAVAILABLE, "sealed");
    let code = json!({"username": "ada", "code": ada.recovery_codes[0]});
    let mut lost = sealed.browser();
    lost.post("/auth/recovery", code.clone())
        .await
        .refused(StatusCode::SERVICE_UNAVAILABLE, "sealed");
    let left = ada.get("/me/recovery-codes").await.expect(StatusCode::OK);
    assert_eq!(left["left"], 10);
    let listed = ada.get("/me/secrets").await.expect(StatusCode::OK);
    assert_eq!(listed["items"][0]["version"], 1, "names are known without the key");
    assert!(value(&sealed, &mut ada, "token").await.unwrap_err().contains("sealed"));
    let gate = Gatekeeper::new(sealed.app.clone());
    assert_eq!(knock(&gate, &sealed, HOST, Some(&ada), false).await.0, 200);
    ada.post("/api/workspaces/main/swap?wait_s=60", json!({}))
        .await
        .expect(StatusCode::OK);
    let after = shown(&mut ada).await;
    assert_eq!((sandbox(&after, Slot::Live), sandbox(&after, Slot::Dev)), (dev, live));
    assert!(!key.exists(), "no new key was made");

    // The control: with the key back and a restart, the same secret opens and can be replaced.
    std::fs::rename(&aside, &key).unwrap();
    let opened = sealed.restarted().await;
    ada.router = opened.router.clone();
    assert_eq!(ada.get("/readyz").await.json()["parts"]["keys"], "ok");
    assert_eq!(value(&opened, &mut ada, "token").await.unwrap(), "kept");
    put(&mut ada, "token", json!({"value": "new"}))
        .await
        .expect(StatusCode::OK);
    eve.router = opened.router.clone();
    eve.register("eve", invite["invite"].as_str())
        .await
        .expect(StatusCode::OK);
    assert_eq!(eve.recovery_codes.len(), 10);
    lost.router = opened.router.clone();
    lost.post("/auth/recovery", code).await.expect(StatusCode::OK);
    // What was written meanwhile is told of.
    let found = opened.app.store.verify_audit(None).await.unwrap();
    assert_eq!((found.bad, found.sealed.len()), (None, 1));
}
