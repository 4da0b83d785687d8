//! The provider gateway: the box's keys and users' own, what they are good for, what is counted and where it ends.

mod caps;
mod keys;
mod shown;
mod streams;

use std::fs::{self, Permissions};
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::PermissionsExt as _;

use axum::body::Body;
use axum::http::{Method, Request, StatusCode};
use choir_core::Slot;
use choir_hypervisor::config::providers::Provider;
use serde_json::{Value, json};

use super::{Begun, Scene, Told};

/// The box's keys, which must never be seen inside.
const OPENAI_KEY: &str = "sk-box-Canary3Canary4Canary5";
const ANTHROPIC_KEY: &str = "sk-ant-box-Canary6Canary7";
const OPENAI: &str = "api.openai.com";
const ANTHROPIC: &str = "api.anthropic.com";

const CHAT: &str = "/v1/providers/openai/v1/chat/completions";
const MESSAGES: &str = "/v1/providers/anthropic/v1/messages";

/// A box with a key for both providers, whose one workspace may use them.
struct Gate(Scene);

impl Deref for Gate {
    type Target = Scene;

    fn deref(&self) -> &Scene {
        &self.0
    }
}

impl DerefMut for Gate {
    fn deref_mut(&mut self) -> &mut Scene {
        &mut self.0
    }
}

impl Gate {
    async fn new() -> Self {
        Self::with(|_| {}).await
    }

    /// With these changes to the provider `openai`.
    async fn with(change: impl FnOnce(&mut Provider)) -> Self {
        let scene = Scene::with(|config| {
            config.providers.secrets_dir = config.beside_store("providers");
            let mut openai = Provider {
                key: Some("openai-key".to_owned()),
                ..Provider::default()
            };
            change(&mut openai);
            let anthropic = Provider {
                key: Some("anthropic-key".to_owned()),
                ..Provider::default()
            };
            config.providers.named = [("openai", openai), ("anthropic", anthropic)]
                .map(|(name, provider)| (name.parse().unwrap(), provider))
                .into();
        })
        .await;
        scene.outdoors.host(OPENAI, "93.184.215.20");
        scene.outdoors.host(ANTHROPIC, "93.184.215.21");
        let mut gate = Self(scene);
        fs::create_dir(&gate.start.app.config.providers.secrets_dir).unwrap();
        gate.put("openai-key", OPENAI_KEY);
        gate.put("anthropic-key", ANTHROPIC_KEY);
        gate.mode("api_key").await;
        gate
    }

    /// Puts a key of the box into its file, as an operator does.
    fn put(&self, file: &str, key: &str) {
        let path = self.start.app.config.providers.secrets_dir.join(file);
        fs::write(&path, format!("{key}\n")).unwrap();
        fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
    }

    async fn mode(&mut self, mode: &str) {
        let patch = Some(json!({"provider_mode": mode}));
        let answer = self.ada.fetch(Method::PATCH, "/api/workspaces/main", patch).await;
        answer.expect(StatusCode::OK);
    }

    /// Grants ada's own key, the secret `gh`, to a slot as the capability of this provider.
    async fn own(&mut self, slot: Slot, provider: &str, host: &str) -> String {
        let way = if provider == "openai" {
            "bearer"
        } else {
            "header:x-api-key"
        };
        self.grant(json!({
            "slot": slot.as_str(), "capability": provider, "hosts": [host], "template": way, "path_prefix": "/v1",
        }))
        .await
    }

    async fn chat(&self) -> Told {
        self.ask(post(CHAT, json!({"model": "m"}))).await
    }

    /// The rows of what ada used, as soon as they are so.
    async fn used(&mut self, wanted: Value) {
        let mut got = Value::Null;
        for _ in 0..2000 {
            let usage = self.ada.get("/me/usage").await.expect(StatusCode::OK);
            got = usage["items"].as_array().unwrap().iter().map(figures).collect();
            if got == wanted {
                return;
            }
            tokio::task::yield_now().await;
        }
        assert_eq!(got, wanted);
    }
}

/// Slot, provider, whose key; requests, input, cached and output tokens.
fn figures(row: &Value) -> Value {
    let [slot, provider, key] = ["slot", "provider", "key"].map(|name| row[name].as_str().unwrap());
    let [requests, input, cached, output] =
        ["requests", "input_tokens", "cached_tokens", "output_tokens"].map(|name| row[name].as_u64().unwrap());
    json!([format!("{slot} {provider} {key}"), requests, input, cached, output])
}

/// What an SDK sends that has no key but the placeholder.
fn post(path: &str, body: Value) -> Request<Body> {
    Request::post(path)
        .header("authorization", "Bearer sk-choir-placeholder")
        .header("x-api-key", "sk-ant-choir-placeholder")
        .header("content-type", "application/json")
        .body(Body::from(body.to_string()))
        .unwrap()
}

impl Told {
    #[track_caller]
    fn refused(&self, status: StatusCode, code: &str) -> String {
        let error = &self.json()["error"];
        assert_eq!(
            (self.status, error["code"].as_str()),
            (status, Some(code)),
            "{}",
            self.text()
        );
        assert_eq!(self.json()["type"], "error");
        assert!(
            error["type"].as_str().is_some_and(|kind| kind.ends_with("_error")),
            "{error}"
        );
        error["message"].as_str().unwrap().to_owned()
    }
}

/// Everything that the rest of a streamed answer has.
async fn rest(begun: Begun) -> String {
    begun.whole().await.text()
}
