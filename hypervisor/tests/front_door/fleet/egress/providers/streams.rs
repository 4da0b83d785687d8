//! Streamed answers of each API: event by event, counted, and without what the caller did not ask for.

use axum::http::{HeaderValue, StatusCode};
use http::Response;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::super::outdoors::{plain, streamed};
use super::{CHAT, Gate, MESSAGES, post, rest};

const RESPONSES: &str = "/v1/providers/openai/v1/responses";
const USAGE: &str = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":4,\
                     \"prompt_tokens_details\":{\"cached_tokens\":2}}}\n\n";
const HELLO: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"hello\"}}],\"usage\":null}\n\n";

/// The next answers stream what is sent here.
fn stream(gate: &Gate) -> mpsc::Sender<&'static str> {
    let (send, body) = streamed();
    gate.outdoors.answers(move |_| {
        let mut answer = Response::new(body());
        let kind = HeaderValue::from_static("text/event-stream; charset=utf-8");
        answer.headers_mut().insert("content-type", kind);
        answer
    });
    send
}

#[tokio::test]
async fn a_completion_passes_event_by_event_without_the_usage_that_its_caller_did_not_ask_for() {
    let mut gate = Gate::new().await;
    let send = stream(&gate);
    let begun = gate.begin(choir_core::Slot::Dev, post(CHAT, json!({"model": "m", "stream": true})));
    let mut begun = begun.await;
    assert_eq!(begun.0.headers()["content-type"], "text/event-stream; charset=utf-8");
    for _ in 0..3 {
        send.send(HELLO).await.unwrap();
        assert_eq!(begun.next().await, HELLO);
    }
    send.send(USAGE).await.unwrap();
    send.send("data: [DONE]\n\n").await.unwrap();
    drop(send);
    assert_eq!(rest(begun).await, "data: [DONE]\n\n");
    let sent: Value = serde_json::from_slice(&gate.outdoors.seen()[0].body).unwrap();
    assert_eq!(
        sent,
        json!({"model": "m", "stream": true, "stream_options": {"include_usage": true}})
    );
    gate.used(json!([["dev openai platform", 1, 9, 2, 4]])).await;

    // The control: who asks for the usage has it.
    let send = stream(&gate);
    let asked = json!({"stream": true, "stream_options": {"include_usage": true}});
    let begun = gate.begin(choir_core::Slot::Dev, post(CHAT, asked.clone())).await;
    send.send(USAGE).await.unwrap();
    drop(send);
    assert_eq!(rest(begun).await, USAGE);
    let sent: Value = serde_json::from_slice(&gate.outdoors.seen()[1].body).unwrap();
    assert_eq!(sent, asked);
    gate.used(json!([["dev openai platform", 2, 18, 4, 8]])).await;
}

#[tokio::test]
async fn responses_and_messages_pass_whole_and_are_counted() {
    let mut gate = Gate::new().await;
    let completed = "event: response.completed\ndata: {\"type\":\"response.completed\",\"response\":{\"output\":[],\
                     \"usage\":{\"input_tokens\":7,\"input_tokens_details\":{\"cached_tokens\":1},\"output_tokens\":3}}}\n\n";
    let send = stream(&gate);
    let begun = gate
        .begin(choir_core::Slot::Dev, post(RESPONSES, json!({"stream": true})))
        .await;
    send.send(completed).await.unwrap();
    drop(send);
    assert_eq!(rest(begun).await, completed);
    let events = [
        "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":25,\
         \"cache_read_input_tokens\":100,\"output_tokens\":1}}}\n\n",
        "event: message_delta\ndata: {\"type\":\"message_delta\",\"usage\":{\"output_tokens\":15}}\n\n",
    ];
    let send = stream(&gate);
    let mut begun = gate
        .begin(choir_core::Slot::Dev, post(MESSAGES, json!({"stream": true})))
        .await;
    for event in events {
        send.send(event).await.unwrap();
        assert_eq!(begun.next().await, event);
    }
    drop(send);
    assert_eq!(rest(begun).await, "");
    gate.used(json!([
        ["dev anthropic platform", 1, 125, 100, 15],
        ["dev openai platform", 1, 7, 1, 3]
    ]))
    .await;
    let bodies: Vec<_> = gate.outdoors.seen().into_iter().map(|it| it.body).collect();
    assert_eq!(
        bodies,
        [json!({"stream": true}).to_string(), json!({"stream": true}).to_string()]
    );
}

#[tokio::test]
async fn an_answer_that_is_broken_off_is_counted_by_what_was_seen() {
    let mut gate = Gate::new().await;
    let body = json!({"stream": true, "messages": [{"role": "user", "content": "a".repeat(400)}]});
    let send = stream(&gate);
    let mut begun = gate.begin(choir_core::Slot::Dev, post(CHAT, body.clone())).await;
    for _ in 0..5 {
        send.send(HELLO).await.unwrap();
        begun.next().await;
    }
    // The program inside goes away before the usage comes.
    drop(begun);
    let input = body.to_string().len() / 4;
    gate.used(json!([["dev openai platform", 1, input, 0, 5]])).await;
}

#[tokio::test]
async fn plain_answers_are_counted_and_errors_of_the_provider_cost_no_tokens() {
    let mut gate = Gate::new().await;
    let text = "{\"data\":[{\"embedding\":[0.5]}],\"usage\":{\"prompt_tokens\":5,\"total_tokens\":5}}";
    gate.outdoors.answers(move |_| plain(text));
    let told = gate
        .ask(post("/v1/providers/openai/v1/embeddings", json!({"input": "x"})))
        .await;
    assert_eq!((told.status, told.text().as_str()), (StatusCode::OK, text));
    gate.used(json!([["dev openai platform", 1, 5, 0, 0]])).await;
    gate.outdoors.answers(|_| {
        let mut answer = plain("{\"error\":{\"message\":\"slow down\"}}");
        *answer.status_mut() = StatusCode::TOO_MANY_REQUESTS;
        answer
    });
    let told = gate.chat().await;
    assert_eq!(told.status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(told.json()["error"]["message"], "slow down");
    gate.used(json!([["dev openai platform", 2, 5, 0, 0]])).await;
}

#[tokio::test]
async fn what_could_not_be_counted_is_not_sent_with_the_boxs_key() {
    let mut gate = Gate::new().await;
    let refused = |path: &'static str, body: &'static str| {
        let mut request = post(path, json!({}));
        *request.body_mut() = axum::body::Body::from(body);
        request
    };
    let told = gate.ask(refused(RESPONSES, "{\"background\":true}")).await;
    told.denied("provider.background");
    for body in ["", "[]", "{\"stream\":false,\"stream\":true}", "{\"stream\":\"yes\"}"] {
        let told = gate.ask(refused(CHAT, body)).await;
        told.refused(StatusCode::BAD_REQUEST, "bad_json");
    }
    let mut encoded = post(CHAT, json!({}));
    encoded
        .headers_mut()
        .insert("content-encoding", HeaderValue::from_static("gzip"));
    gate.ask(encoded)
        .await
        .refused(StatusCode::UNSUPPORTED_MEDIA_TYPE, "encoded_request");
    assert!(gate.outdoors.dialled.lock().unwrap().is_empty());
    gate.used(json!([])).await;
    // What is refused alike is one row, with a count.
    assert_eq!(gate.audited("provider.use").await.len(), 3);
    // The control: with a key of one's own it is the caller's affair.
    gate.own(choir_core::Slot::Dev, "openai", super::OPENAI).await;
    let told = gate.ask(refused(RESPONSES, "{\"background\":true}")).await;
    assert_eq!(told.status, StatusCode::OK);
}
