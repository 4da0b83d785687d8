//! What people see of it: their own use, an admin everybody's, and what programs inside are set up with.

use axum::http::StatusCode;
use choir_core::Slot;
use choir_hypervisor::reconcile::launch;
use serde_json::json;

use super::super::Scene;
use super::super::outdoors::plain;
use super::{Gate, figures};

#[tokio::test]
async fn users_see_their_own_use_and_admins_everybodys() {
    let mut gate = Gate::new().await;
    gate.outdoors
        .answers(|_| plain("{\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2}}"));
    assert_eq!(gate.chat().await.status, StatusCode::OK);
    gate.used(json!([["dev openai platform", 1, 3, 0, 2]])).await;
    let own = gate.ada.get("/me/usage").await.expect(StatusCode::OK);
    let row = &own["items"][0];
    assert_eq!(
        (&row["day"], &row["user"], &row["workspace"]),
        (&json!("2026-01-02"), &json!("ada"), &json!("main"))
    );
    let cap = own["caps"]
        .as_array()
        .unwrap()
        .iter()
        .find(|cap| cap["provider"] == "openai")
        .unwrap();
    assert_eq!((&cap["requests"], &cap["tokens"]), (&json!(1), &json!(5)));
    assert!(cap["daily_requests"].is_u64() && cap["resets_in_s"].is_u64());
    assert_eq!(
        gate.ada.get("/me/usage?since=2026-01-03").await.json()["items"],
        json!([])
    );
    assert_eq!(
        gate.ada.get("/me/usage?since=soon").await.status,
        StatusCode::BAD_REQUEST
    );

    let mut bob = {
        let Scene { start, ada, .. } = &mut gate.0;
        start.member(ada, "bob").await
    };
    assert_eq!(bob.get("/me/usage").await.json()["items"], json!([]));
    assert_eq!(bob.get("/admin/usage").await.status, StatusCode::FORBIDDEN);
    let all = gate.ada.get("/admin/usage").await.expect(StatusCode::OK);
    assert_eq!(figures(&all["items"][0]), json!(["dev openai platform", 1, 3, 0, 2]));
    assert_eq!(gate.ada.get("/admin/usage?user=bob").await.json()["items"], json!([]));
    assert_eq!(
        gate.ada.get("/admin/usage?user=ada").await.json()["items"],
        all["items"]
    );
    assert_eq!(
        gate.ada.get("/admin/usage?user=eve").await.status,
        StatusCode::NOT_FOUND
    );
}

#[tokio::test]
async fn only_the_mode_api_key_sets_anything_and_what_a_person_sets_wins() {
    let mut gate = Gate::new().await;
    let view = gate.start.app.store.all_workspaces().await.unwrap().remove(0);
    let workspace = view.workspace.id;
    let env = async |gate: &Gate| {
        let services = &gate.start.app.fleet.services;
        let spec = launch::spec(services, &workspace, &gate.generation(Slot::Dev), String::new()).await;
        let mut env = spec.unwrap().agent.env;
        env.retain(|name, _| name.starts_with("OPENAI") || name.starts_with("ANTHROPIC"));
        env
    };
    let set = env(&gate).await;
    assert_eq!(set["OPENAI_BASE_URL"], "http://127.0.0.1:9091/v1/providers/openai/v1");
    assert_eq!(
        set["ANTHROPIC_BASE_URL"],
        "http://127.0.0.1:9091/v1/providers/anthropic"
    );
    assert_eq!((set["OPENAI_API_KEY"].as_str(), set.len()), ("sk-choir-placeholder", 4));
    let patch = Some(json!({"env": {"OPENAI_API_KEY": "mine"}}));
    let patched = gate
        .ada
        .fetch(axum::http::Method::PATCH, "/api/workspaces/main", patch)
        .await;
    patched.expect(StatusCode::OK);
    assert_eq!(env(&gate).await["OPENAI_API_KEY"], "mine");
    for mode in ["subscription", "none"] {
        gate.mode(mode).await;
        let left: Vec<_> = env(&gate).await.into_keys().collect();
        assert_eq!(left, ["OPENAI_API_KEY"], "{mode}");
    }
    let shown = gate.ada.get("/api/workspaces/main/config").await.text();
    assert!(shown.contains("provider_mode"), "{shown}");
}
