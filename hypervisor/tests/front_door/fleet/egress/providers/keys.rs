//! Whose key goes where: the box's to the addresses it is good for, a user's by a grant, and neither anywhere else.

use axum::body::Body;
use axum::http::{Method, Request, StatusCode};
use choir_core::Slot;
use data_encoding::BASE64;
use serde_json::json;

use super::super::outdoors::plain;
use super::super::{SECRET, Scene};
use super::{ANTHROPIC, ANTHROPIC_KEY, CHAT, Gate, MESSAGES, OPENAI, OPENAI_KEY, post};
use crate::fleet::audit::Broken;

#[tokio::test]
async fn the_boxs_key_takes_the_placeholders_place_and_is_seen_by_the_provider_alone() {
    let mut gate = Gate::new().await;
    let mut asked = post(CHAT, json!({"model": "m"}));
    for (name, value) in [
        ("openai-organization", "org-other"),
        ("api-key", "x"),
        ("cookie", "a=b"),
        ("x-app", "kept"),
    ] {
        asked.headers_mut().insert(name, value.parse().unwrap());
    }
    let told = gate.ask(asked).await;
    assert_eq!((told.status, told.text().as_str()), (StatusCode::OK, "fine"));
    let told_too = gate
        .ask(post(&format!("{MESSAGES}?beta=true"), json!({"model": "m"})))
        .await;
    assert_eq!(told_too.status, StatusCode::OK);
    for told in [told, told_too] {
        assert!(!told.has(OPENAI_KEY) && !told.has(ANTHROPIC_KEY));
    }
    let seen = gate.outdoors.seen();
    assert_eq!(
        (seen[0].host.as_str(), seen[0].uri.as_str()),
        (OPENAI, "/v1/chat/completions")
    );
    assert_eq!(seen[0].header("authorization"), [format!("Bearer {OPENAI_KEY}")]);
    assert_eq!(seen[0].header("x-app"), ["kept"]);
    for gone in ["x-api-key", "api-key", "cookie", "openai-organization"] {
        assert!(seen[0].header(gone).is_empty(), "{gone}");
    }
    assert_eq!(
        (seen[1].host.as_str(), seen[1].uri.as_str()),
        (ANTHROPIC, "/v1/messages?beta=true")
    );
    assert_eq!(seen[1].header("x-api-key"), [ANTHROPIC_KEY]);
    assert!(seen[1].header("authorization").is_empty());
    let dialled = gate.outdoors.dialled.lock().unwrap().clone();
    assert!(dialled.iter().all(|to| to.port() == 443), "{dialled:?}");
    gate.until("provider.use", "ok").await;
    let rows = gate.rows("provider.use").await;
    assert_eq!(rows[0].subject, format!("main/dev openai POST {OPENAI}"));
    assert_eq!((rows[0].outcome.as_str(), rows[0].user.is_some()), ("intent", true));
    // What says nothing of tokens is counted by its length.
    gate.used(json!([
        ["dev anthropic platform", 1, 3, 0, 0],
        ["dev openai platform", 1, 3, 0, 0]
    ]))
    .await;
}

#[tokio::test]
async fn the_boxs_key_is_for_workspaces_in_the_mode_api_key_only() {
    let mut gate = Gate::new().await;
    for mode in ["none", "subscription"] {
        gate.mode(mode).await;
        let told = gate.chat().await;
        told.denied("provider_mode");
        assert!(told.has("config set provider_mode=api_key"), "{}", told.text());
    }
    assert!(gate.outdoors.dialled.lock().unwrap().is_empty());
    // One's own key needs no mode.
    gate.own(Slot::Dev, "openai", OPENAI).await;
    assert_eq!(gate.chat().await.status, StatusCode::OK);
    gate.mode("api_key").await;
    let live = gate.ask_from(Slot::Live, post(CHAT, json!({}))).await;
    assert_eq!(live.status, StatusCode::OK);
    let keys: Vec<_> = gate
        .outdoors
        .seen()
        .iter()
        .map(|it| it.header("authorization")[0].to_owned())
        .collect();
    assert_eq!(keys, [format!("Bearer {SECRET}"), format!("Bearer {OPENAI_KEY}")]);
}

#[tokio::test]
async fn a_users_own_key_comes_first_in_its_slot_and_no_other_slot_has_it() {
    let mut gate = Gate::new().await;
    let id = gate.own(Slot::Live, "openai", OPENAI).await;
    let ask = || post(CHAT, json!({}));
    assert_eq!(gate.ask_from(Slot::Live, ask()).await.status, StatusCode::OK);
    assert_eq!(gate.ask_from(Slot::Dev, ask()).await.status, StatusCode::OK);
    gate.ada
        .delete(&format!("/me/grants/{id}"))
        .await
        .expect(StatusCode::NO_CONTENT);
    assert_eq!(gate.ask_from(Slot::Live, ask()).await.status, StatusCode::OK);
    // A grant for another host, or for other paths, is none for this call.
    gate.grant(json!({"capability": "openai", "hosts": ["api.a.example"]}))
        .await;
    assert_eq!(gate.ask_from(Slot::Dev, ask()).await.status, StatusCode::OK);
    let keys: Vec<_> = gate
        .outdoors
        .seen()
        .iter()
        .map(|it| it.header("authorization")[0].to_owned())
        .collect();
    let [own, of_the_box] = [SECRET, OPENAI_KEY].map(|key| format!("Bearer {key}"));
    assert_eq!(keys, [own, of_the_box.clone(), of_the_box.clone(), of_the_box]);
    gate.used(json!([
        ["dev openai platform", 2, 0, 0, 0],
        ["live openai own", 1, 0, 0, 0],
        ["live openai platform", 1, 0, 0, 0],
    ]))
    .await;
    // Uses of a user's secret are where all of them are.
    gate.until("secret.use", "ok").await;
    assert_eq!(gate.audited("secret.use").await.len(), 2);
}

#[tokio::test]
async fn without_a_key_of_the_box_a_users_own_is_used_and_without_either_the_answer_says_how_to_get_one() {
    let mut scene = Scene::new().await;
    scene.outdoors.host(OPENAI, "93.184.215.20");
    let told = scene.ask(post(CHAT, json!({}))).await;
    told.denied("grant");
    assert!(told.has("grants add openai --slot dev"), "{}", told.text());
    let asked = scene.ada.get("/me/grants/requests").await.expect(StatusCode::OK);
    assert_eq!(asked["items"][0]["capability"], "openai");
    let unknown = scene.ask(post("/v1/providers/other/v1/x", json!({}))).await;
    assert!(
        unknown
            .refused(StatusCode::NOT_FOUND, "no_provider")
            .contains("anthropic and openai")
    );
    let grant = json!({"capability": "openai", "hosts": [OPENAI], "methods": ["POST"], "path_prefix": "/v1/chat"});
    scene.grant(grant).await;
    assert_eq!(scene.ask(post(CHAT, json!({}))).await.status, StatusCode::OK);
    let seen = scene.outdoors.seen();
    assert_eq!(seen[0].header("authorization"), [format!("Bearer {SECRET}")]);
    assert!(seen[0].header("x-api-key").is_empty());
    // What the grant does not cover is refused by the grant's rule.
    scene
        .ask(post("/v1/providers/openai/v1/files", json!({})))
        .await
        .denied("grant.path_prefix");
    assert_eq!(scene.outdoors.seen().len(), 1);
}

#[tokio::test]
async fn the_boxs_key_opens_nothing_of_its_account_but_the_models() {
    let mut gate = Gate::new().await;
    let ask = |method: Method, path: &str| {
        Request::builder()
            .method(method)
            .uri(format!("/v1/providers/{path}"))
            .body(Body::from("{}"))
            .unwrap()
    };
    for (method, path) in [
        (Method::GET, "openai/v1/files"),
        (Method::POST, "openai/v1/files"),
        (Method::GET, "openai/v1/organization/admin_api_keys"),
        (Method::GET, "openai/v1/chat/completions"),
        (Method::GET, "openai/v1/chat/completions/chatcmpl-1"),
        (Method::POST, "openai/v1/chat/completions/chatcmpl-1"),
        (Method::GET, "openai/v1/responses/resp_1"),
        (Method::POST, "openai/v1/responses/resp_1/cancel"),
        (Method::DELETE, "openai/v1/models/ft:m"),
        (Method::POST, "openai/v1/batches"),
        (Method::POST, "openai/v1/chat/completions/"),
        (Method::GET, "openai/v1/models/../files"),
        (Method::GET, "openai/v1/models/%2e%2e/files"),
        (Method::GET, "openai/v1/models//x"),
        (Method::POST, "openai//v1/chat/completions"),
        (Method::POST, "openai/V1/chat/completions"),
        (Method::GET, "openai/dashboard/billing/usage"),
        (Method::POST, "openai"),
        (Method::POST, "anthropic/v1/messages/batches"),
        (Method::GET, "anthropic/v1/organizations/me"),
        (Method::GET, "anthropic/v1/files"),
        (Method::POST, "anthropic/v1/complete"),
    ] {
        let told = gate.ask(ask(method.clone(), path)).await;
        told.denied("provider.paths");
        let provider = path.split('/').next().unwrap();
        assert!(
            told.has("/v1/models") && told.has(&format!("grants add {provider}")),
            "{}",
            told.text()
        );
    }
    assert!(gate.outdoors.dialled.lock().unwrap().is_empty());
    gate.used(json!([])).await;
    // The control: the models are there, and with a key of one's own the rest is, too.
    for path in ["openai/v1/models", "openai/v1/models/gpt-x", "anthropic/v1/models"] {
        assert_eq!(gate.ask(ask(Method::GET, path)).await.status, StatusCode::OK, "{path}");
    }
    gate.own(Slot::Dev, "openai", OPENAI).await;
    assert_eq!(
        gate.ask(ask(Method::GET, "openai/v1/files")).await.status,
        StatusCode::OK
    );
    assert_eq!(
        gate.outdoors.seen().pop().unwrap().header("authorization"),
        [format!("Bearer {SECRET}")]
    );
}

#[tokio::test]
async fn a_key_that_is_missing_costs_its_provider_alone_and_one_that_is_replaced_is_used_at_once() {
    let mut gate = Gate::new().await;
    let file = gate.start.app.config.providers.secrets_dir.join("openai-key");
    std::fs::remove_file(&file).unwrap();
    let told = gate.chat().await;
    let message = told.refused(StatusCode::SERVICE_UNAVAILABLE, "no_key");
    assert!(!message.contains("providers/"), "{message}");
    assert_eq!(gate.ask(post(MESSAGES, json!({}))).await.status, StatusCode::OK);
    let ready = gate.ada.get("/readyz").await.expect(StatusCode::OK);
    assert_eq!(
        (&ready["ready"], &ready["degraded"]),
        (&json!(true), &json!(["provider openai"]))
    );
    let stats = gate.ada.get("/admin/stats").await.text();
    assert!(
        stats.contains("no key of the box for the provider openai") && stats.contains("is missing"),
        "{stats}"
    );
    // Readable by others is as bad.
    std::fs::write(&file, "sk-box-readable-by-all").unwrap();
    gate.chat().await.refused(StatusCode::SERVICE_UNAVAILABLE, "no_key");
    assert!(gate.outdoors.seen().iter().all(|it| it.host == ANTHROPIC));
    for key in ["sk-box-second-key", "sk-box-third-key"] {
        gate.put("openai-key", key);
        assert_eq!(gate.chat().await.status, StatusCode::OK);
        let seen = gate.outdoors.seen().pop().unwrap();
        assert_eq!(seen.header("authorization"), [format!("Bearer {key}")]);
    }
    let ready = gate.ada.get("/readyz").await.expect(StatusCode::OK);
    assert_eq!(ready["degraded"], json!([]));
    // What could not be sent counts as nothing.
    gate.used(json!([
        ["dev anthropic platform", 1, 0, 0, 0],
        ["dev openai platform", 2, 6, 0, 0]
    ]))
    .await;
}

#[tokio::test]
async fn an_answer_that_repeats_the_boxs_key_is_cut() {
    let gate = Gate::new().await;
    for form in [OPENAI_KEY.to_owned(), BASE64.encode(OPENAI_KEY.as_bytes())] {
        let shown = form.clone();
        gate.outdoors
            .answers(move |_| plain(format!("{{\"echo\":\"{shown}\"}}")));
        let told = gate.chat().await;
        told.refused(StatusCode::BAD_GATEWAY, "reflected");
        assert!(!told.has(&form));
    }
    gate.until("provider.use", "reflected").await;
    gate.outdoors
        .answers(|_| plain("{\"echo\":\"sk-box-Canary3Canary4Canary0\"}"));
    assert_eq!(gate.chat().await.status, StatusCode::OK);
}

#[tokio::test]
async fn no_key_of_the_box_is_used_while_that_cannot_be_recorded() {
    let mut gate = Gate::new().await;
    let broken = Broken::trail_of(&gate.start);
    gate.chat()
        .await
        .refused(StatusCode::SERVICE_UNAVAILABLE, "audit_unavailable");
    assert!(gate.outdoors.dialled.lock().unwrap().is_empty());
    gate.used(json!([])).await;
    broken.mend();
    assert_eq!(gate.chat().await.status, StatusCode::OK);
    gate.used(json!([["dev openai platform", 1, 3, 0, 0]])).await;
}

#[tokio::test]
async fn an_upstream_elsewhere_gets_the_boxs_key_and_never_a_users() {
    let mut gate =
        Gate::with(|openai| openai.upstream = Some("https://api.a.example:8443/openai".parse().unwrap())).await;
    gate.grant(json!({"capability": "openai", "path_prefix": "/openai"}))
        .await;
    assert_eq!(gate.chat().await.status, StatusCode::OK);
    let seen = gate.outdoors.seen();
    assert_eq!(
        (seen[0].host.as_str(), seen[0].uri.as_str()),
        ("api.a.example:8443", "/openai/v1/chat/completions")
    );
    // The grant names the host, and is for TLS on port 443.
    assert_eq!(seen[0].header("authorization"), [format!("Bearer {OPENAI_KEY}")]);
    assert_eq!(gate.outdoors.dialled.lock().unwrap()[0].port(), 8443);
}
