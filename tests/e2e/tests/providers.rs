//! The SDKs of model providers in a real sandbox, against providers that answer in recorded formats and write down what
//! they receive.

use std::os::unix::fs::PermissionsExt as _;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use choir_api::client::{Client, SlotVerb};
use choir_api::usage::UsageRow;
use choir_core::settings::ProviderMode;
use choir_core::{Slot, WorkspaceSettings};
use choir_e2e::instance::Instance;
use choir_e2e::person::{self, exec, run, workspace};
use choir_e2e::registries::{self, PIP};
use choir_e2e::skip;
use choir_e2e::upstream::{Answer, Seen, Upstream, pieces, whole};
use choir_e2e::waiting::{PATIENCE, step, until};
use http::StatusCode;
use serde_json::{Value, json};

const OPENAI: &str = "api.openai.com";
const ANTHROPIC: &str = "api.anthropic.com";
/// The box's keys: all that they are is here, so that finding them elsewhere is a leak.
const OPENAI_KEY: &str = "sk-canary-openai-5b1f0c7e9d24a836";
const ANTHROPIC_KEY: &str = "sk-ant-canary-anthropic-0e6d94c1b7a25f38";

const SDK: &str = include_str!("sdk.py");

#[tokio::test]
async fn sdks_in_a_sandbox_use_the_boxs_keys_without_seeing_them_until_the_cap_is_used_up() -> Result<()> {
    if skip::cannot_run("providers") {
        return Ok(());
    }
    let providers = Upstream::start(&[OPENAI, ANTHROPIC], async |seen: Seen| provider(&seen)).await?;
    let mut instance = Instance::up_beside(&[&providers], &[])?;
    let client = person::sign_in(&instance).await?;
    client.create_workspace(&workspace()).await?;
    step("start dev", person::start(&client, Slot::Dev)).await?;
    let mut allowed = registries::networks(&client, &[PIP]).await?;
    allowed.push(providers.network());
    step("down and up again", async { instance.restart(&allowed) }).await?;
    until("the hypervisor to answer again", async || {
        Ok(Some(client.alive().await?))
    })
    .await?;
    step("give the box its keys", async { give_keys(&instance, None) }).await?;
    until("the providers to have keys", async || {
        let ready = client.readiness().await?;
        Ok((ready.ready && ready.degraded.is_empty()).then_some(()))
    })
    .await?;
    let mode = WorkspaceSettings {
        provider_mode: Some(ProviderMode::ApiKey),
        ..WorkspaceSettings::default()
    };
    client.patch_workspace(&workspace(), &mode).await?;
    // The mode is for new generations.
    let name = workspace();
    let again = client.ask_slot(&name, Slot::Dev, SlotVerb::Restart, PATIENCE);
    step("start dev anew in this mode", async { Ok(again.await?) }).await?;
    let install = "python3 -m venv ~/venv && ~/venv/bin/pip -q install openai anthropic";
    step("install the SDKs", run(&client, Slot::Dev, install)).await?;
    let write = format!("cat > ~/sdk.py <<'END'\n{SDK}\nEND");
    run(&client, Slot::Dev, &write).await?;

    let told = run(&client, Slot::Dev, "~/venv/bin/python ~/sdk.py").await?;
    let told: Value = serde_json::from_str(&told).with_context(|| told.clone())?;
    shown_rightly(&told)?;
    received_rightly(&providers.seen())?;
    step("look for the keys inside", nothing_inside(&client)).await?;
    let used = step("what was counted", counted(&client)).await?;

    let (requests, of_openai) = (used.0, used.1);
    give_keys(&instance, Some((of_openai, requests - of_openai)))?;
    until("the caps to be in effect", async || {
        let caps = client.usage(None).await?.caps;
        Ok(caps
            .iter()
            .all(|cap| cap.daily_requests == Some(cap.requests))
            .then_some(()))
    })
    .await?;
    providers.forget();
    let told = run(&client, Slot::Dev, "~/venv/bin/python ~/sdk.py refused").await?;
    let told: Value = serde_json::from_str(&told).with_context(|| told.clone())?;
    for provider in ["openai", "anthropic"] {
        let shown = &told[provider];
        let text = shown["text"].as_str().unwrap_or_default();
        let helpful = text.contains("daily_requests") && text.contains("resets at 00:00 UTC");
        ensure!(
            shown["kind"] == "RateLimitError" && shown["status"] == 429 && helpful,
            "{provider}: {shown}"
        );
    }
    ensure!(providers.seen().is_empty(), "a capped request was sent");
    Ok(())
}

/// As an operator does; the caps are for `openai` and `anthropic`.
fn give_keys(instance: &Instance, caps: Option<(u64, u64)>) -> Result<()> {
    let directory = instance.path("providers");
    std::fs::create_dir_all(&directory)?;
    for (name, key) in [("openai", OPENAI_KEY), ("anthropic", ANTHROPIC_KEY)] {
        let file = directory.join(name);
        std::fs::write(&file, key)?;
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600))?;
    }
    instance.reconfigure(|config| {
        let mut section = toml::Table::new();
        section.insert("secrets_dir".to_owned(), directory.display().to_string().into());
        let caps = caps.map(|(openai, anthropic)| [openai, anthropic]);
        for (nth, name) in ["openai", "anthropic"].into_iter().enumerate() {
            let mut provider = toml::Table::new();
            provider.insert("key".to_owned(), name.into());
            if let Some(cap) = caps.and_then(|caps| i64::try_from(caps[nth]).ok()) {
                provider.insert("daily_requests".to_owned(), cap.into());
            }
            section.insert(name.to_owned(), provider.into());
        }
        config.insert("providers".to_owned(), section.into());
    })
}

fn shown_rightly(told: &Value) -> Result<()> {
    let wanted = json!({
        "chat": "Hello!", "chat_stream": "Hello!", "chat_usage": [29], "response": "Hi there!", "response_stream": "Hi there!",
        "embedding": [0.5, -0.25], "models": ["m"], "message": "Hello!", "message_stream": "Hello!", "message_usage": 15,
    });
    for (name, value) in wanted.as_object().context("an object")? {
        ensure!(told[name] == *value, "{name} is {} and not {value}", told[name]);
    }
    let files = told["files"].as_str().unwrap_or_default();
    ensure!(
        files.contains("grants add openai"),
        "the refusal of files says `{files}`"
    );
    Ok(())
}

/// Each request has the box's key in the one right place, and nothing of the placeholders.
fn received_rightly(seen: &[Seen]) -> Result<()> {
    ensure!(seen.len() == 9, "{} requests arrived", seen.len());
    for it in seen {
        let (key, bearer) = (it.header("x-api-key"), it.header("authorization"));
        let right = match it.host.as_str() {
            OPENAI => key.is_empty() && bearer == [format!("Bearer {OPENAI_KEY}")],
            ANTHROPIC => key == [ANTHROPIC_KEY] && bearer.is_empty(),
            _ => false,
        };
        ensure!(right, "{} {} came with {:?}", it.method, it.target, it.headers);
        let all = format!("{:?} {:?}", it.headers, it.body);
        ensure!(!all.contains("placeholder"), "a placeholder came: {all}");
    }
    Ok(())
}

/// Neither in the environment or arguments of any of the user's processes, nor in a file, of root's either.
async fn nothing_inside(client: &Client) -> Result<()> {
    // The control: the same search finds what is planted.
    let plant =
        "echo canary-openai-5b1f > ~/control.txt; PLANTED=canary-openai-5b1f setsid sleep 600 >/dev/null 2>&1 &";
    run(client, Slot::Dev, plant).await?;
    for (part, planted) in [
        ("canary-openai-5b1f", true),
        ("canary-openai-5b1f0c", false),
        ("canary-anthropic-0e6d", false),
    ] {
        // In two halves and by way of a place that is not searched, so that the search does not find itself.
        let (one, two) = part.split_at(8);
        let search = format!(
            "printf %s%s {one} {two} > /dev/shm/wanted; \
             cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n' | grep -ac -f /dev/shm/wanted; \
             sudo grep -rla -f /dev/shm/wanted /home /root /etc /tmp /run /var 2>/dev/null; true"
        );
        let hits = exec(client, Slot::Dev, &search).await?.stdout;
        let (processes, files) = hits.split_once('\n').context("the search says nothing")?;
        ensure!((processes != "0") == planted, "{part} is in {processes} processes");
        ensure!(
            files.contains("control.txt") == planted && files.lines().count() == usize::from(planted),
            "{part} is in {files}"
        );
    }
    Ok(())
}

/// Requests of both, and those of `openai`.
async fn counted(client: &Client) -> Result<(u64, u64)> {
    let rows = until("every token to be counted", async || {
        let rows = client.usage(None).await?.items;
        let tokens: u64 = rows.iter().map(|row| row.input_tokens + row.output_tokens).sum();
        Ok((tokens == 3 * 29 + 2 * 48 + 5 + 2 * 40).then_some(rows))
    })
    .await?;
    let of = |name: &str| -> Result<UsageRow> {
        let row = rows.iter().find(|row| row.provider.as_str() == name);
        row.cloned().with_context(|| format!("nothing was counted of {name}"))
    };
    let (openai, anthropic) = (of("openai")?, of("anthropic")?);
    ensure!(
        (openai.requests, openai.cached_tokens) == (7, 3 * 8 + 2 * 5),
        "counted {openai:?}"
    );
    ensure!(
        (anthropic.requests, anthropic.output_tokens) == (2, 30),
        "counted {anthropic:?}"
    );
    Ok((openai.requests + anthropic.requests, openai.requests))
}

/// Answers as the providers document them.
fn provider(seen: &Seen) -> Answer {
    let asked: Value = serde_json::from_slice(&seen.body).unwrap_or_default();
    let streamed = asked["stream"] == true;
    match (seen.host.as_str(), seen.path(), streamed) {
        (OPENAI, "/v1/chat/completions", false) => json_answer(&json!({
            "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m",
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Hello!"}}],
            "usage": chat_usage(),
        })),
        (OPENAI, "/v1/chat/completions", true) => events(&chat_chunks(&asked), false),
        (OPENAI, "/v1/responses", false) => json_answer(&response("completed")),
        (OPENAI, "/v1/responses", true) => events(&response_events(), true),
        (OPENAI, "/v1/embeddings", _) => json_answer(&json!({
            "object": "list", "model": "m", "data": [{"object": "embedding", "index": 0, "embedding": [0.5, -0.25]}],
            "usage": {"prompt_tokens": 5, "total_tokens": 5},
        })),
        (OPENAI, "/v1/models", _) => json_answer(&json!({
            "object": "list", "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "x"}],
        })),
        (ANTHROPIC, "/v1/messages", false) => json_answer(&json!({
            "id": "msg_1", "type": "message", "role": "assistant", "model": "m", "stop_reason": "end_turn", "stop_sequence": null,
            "content": [{"type": "text", "text": "Hello!"}], "usage": {"input_tokens": 25, "output_tokens": 15},
        })),
        (ANTHROPIC, "/v1/messages", true) => events(&message_events(), true),
        _ => whole(StatusCode::NOT_FOUND, "text/plain", "no such thing"),
    }
}

fn json_answer(body: &Value) -> Answer {
    whole(StatusCode::OK, "application/json", body.to_string())
}

/// One piece an event; Anthropic and the responses API name each.
fn events(all: &[Value], named: bool) -> Answer {
    let event = |value: &Value| match value["type"].as_str() {
        Some(name) if named => Bytes::from(format!("event: {name}\ndata: {value}\n\n")),
        _ => Bytes::from(format!("data: {value}\n\n")),
    };
    let mut frames: Vec<Bytes> = all.iter().map(event).collect();
    if !named {
        frames.push(Bytes::from_static(b"data: [DONE]\n\n"));
    }
    pieces("text/event-stream", frames)
}

fn chat_usage() -> Value {
    json!({"prompt_tokens": 19, "completion_tokens": 10, "total_tokens": 29, "prompt_tokens_details": {"cached_tokens": 8}})
}

fn chat_chunks(asked: &Value) -> Vec<Value> {
    let chunk = |choices: Value, usage: Value| {
        json!({
            "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices,
            "usage": usage,
        })
    };
    let delta = |delta: Value, end: Value| json!([{"index": 0, "delta": delta, "finish_reason": end}]);
    let mut all = vec![
        chunk(
            delta(json!({"role": "assistant", "content": ""}), Value::Null),
            Value::Null,
        ),
        chunk(delta(json!({"content": "Hel"}), Value::Null), Value::Null),
        chunk(delta(json!({"content": "lo!"}), Value::Null), Value::Null),
        chunk(delta(json!({}), json!("stop")), Value::Null),
    ];
    if asked["stream_options"]["include_usage"] == true {
        all.push(chunk(json!([]), chat_usage()));
    }
    all
}

fn response(status: &str) -> Value {
    let done = status == "completed";
    let text = json!({"type": "output_text", "text": "Hi there!", "annotations": []});
    let message =
        json!({"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [text]});
    json!({
        "id": "resp_1", "object": "response", "created_at": 1, "status": status, "model": "m", "error": null,
        "incomplete_details": null, "instructions": null, "metadata": {}, "parallel_tool_calls": true, "temperature": 1.0,
        "tool_choice": "auto", "tools": [], "top_p": 1.0, "output": if done { json!([message]) } else { json!([]) },
        "usage": if done {
            json!({
                "input_tokens": 37, "input_tokens_details": {"cached_tokens": 5}, "output_tokens": 11,
                "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 48,
            })
        } else {
            Value::Null
        },
    })
}

fn response_events() -> Vec<Value> {
    let delta = |n: u64, text: &str| {
        json!({
            "type": "response.output_text.delta", "sequence_number": n, "item_id": "msg_1", "output_index": 0,
            "content_index": 0, "delta": text, "logprobs": [],
        })
    };
    vec![
        json!({"type": "response.created", "sequence_number": 0, "response": response("in_progress")}),
        delta(1, "Hi "),
        delta(2, "there!"),
        json!({"type": "response.completed", "sequence_number": 3, "response": response("completed")}),
    ]
}

fn message_events() -> Vec<Value> {
    let delta =
        |text: &str| json!({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}});
    vec![
        json!({"type": "message_start", "message": {
            "id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [], "stop_reason": null,
            "stop_sequence": null, "usage": {"input_tokens": 25, "output_tokens": 1},
        }}),
        json!({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}),
        json!({"type": "ping"}),
        delta("Hel"),
        delta("lo!"),
        json!({"type": "content_block_stop", "index": 0}),
        json!({"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": null}, "usage": {"output_tokens": 15}}),
        json!({"type": "message_stop"}),
    ]
}
