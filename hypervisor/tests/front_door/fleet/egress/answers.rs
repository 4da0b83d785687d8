//! What comes back: streams stay streams, and an answer that repeats the secret is cut.

use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, Request, StatusCode};
use choir_core::Slot;
use data_encoding::{BASE64, HEXUPPER};
use http::Response;
use serde_json::json;

use super::outdoors::{plain, streamed};
use super::{SECRET, Scene};

#[tokio::test]
async fn events_pass_as_they_come_and_the_stream_is_cut_where_the_secret_begins() {
    let mut scene = Scene::new().await;
    scene.grant(json!({})).await;
    let (send, body) = streamed();
    scene.outdoors.answers(move |_| {
        let mut answer = Response::new(body());
        answer
            .headers_mut()
            .insert("content-type", HeaderValue::from_static("text/event-stream"));
        answer
    });
    let request = Request::get("/v1/egress/github/events").body(Body::empty()).unwrap();
    let mut begun = scene.begin(Slot::Dev, request).await;
    for event in ["data: one\n\n", "data: two\n\n"] {
        send.send(event).await.unwrap();
        assert_eq!(begun.next().await, event);
    }
    let (early, late) = SECRET.split_at(10);
    send.send("data: ").await.unwrap();
    assert_eq!(begun.next().await, "data: ");
    send.send(early).await.unwrap();
    send.send(late).await.unwrap();
    let rest = begun.whole().await;
    assert!(rest.cut && rest.body.is_empty(), "{rest:?}");
    scene.until("secret.use", "reflected").await;
}

#[tokio::test]
async fn an_answer_that_repeats_the_secret_in_any_form_or_place_is_not_handed_on() {
    let mut scene = Scene::new().await;
    scene.grant(json!({})).await;
    let forms = [
        SECRET.to_owned(),
        BASE64.encode(format!("user:{SECRET}").as_bytes()),
        HEXUPPER.encode(SECRET.as_bytes()),
    ];
    for form in &forms {
        let text = format!("{{\"headers\":{{\"Authorization\":\"{form}\"}}}}");
        let shown = text.clone();
        scene.outdoors.answers(move |_| plain(shown.clone()));
        let told = scene.get("/v1/egress/github/echo").await;
        assert_eq!(told.json()["error"]["code"], "reflected");
        assert!(!told.has(form));
        let shown = form.clone();
        scene.outdoors.answers(move |_| {
            let mut answer = plain("fine");
            answer
                .headers_mut()
                .insert("x-echo", HeaderValue::try_from(&shown).unwrap());
            answer
        });
        let told = scene.get("/v1/egress/github/echo").await;
        assert_eq!(
            (told.status, &told.json()["error"]["code"]),
            (StatusCode::BAD_GATEWAY, &json!("reflected"))
        );
        assert!(!told.has(form));
    }
    scene.outdoors.answers(|_| {
        let mut answer = plain("fine");
        let name = HeaderName::try_from(SECRET.to_lowercase()).unwrap();
        answer.headers_mut().insert(name, HeaderValue::from_static("1"));
        answer
    });
    assert!(!scene.get("/v1/egress/github/echo").await.has(SECRET));
    scene.outdoors.answers(|_| {
        let mut answer = plain("fine");
        let reason = hyper::ext::ReasonPhrase::from_static(b"ghp_Canary0Canary1Canary2");
        answer.extensions_mut().insert(reason);
        answer
    });
    let told = scene.get("/v1/egress/github/echo").await;
    assert_eq!((told.text().as_str(), told.has(SECRET)), ("fine", false));
    // The control: what is not the secret passes in the same places, whole.
    scene.outdoors.answers(|_| {
        let mut answer = plain("{\"Authorization\":\"ghp_Canary0Canary1Canary3\"}");
        answer
            .headers_mut()
            .insert("x-echo", HeaderValue::from_static("ghp_Canary0Canary1Canary3"));
        answer
    });
    let told = scene.get("/v1/egress/github/echo").await;
    assert!(
        !told.cut && told.has("x-echo") && told.text().ends_with("Canary3\"}"),
        "{told:?}"
    );
}

#[tokio::test]
async fn an_answer_whose_head_has_gone_is_cut_where_the_secret_begins() {
    let mut scene = Scene::new().await;
    scene.grant(json!({})).await;
    let (send, body) = streamed();
    scene.outdoors.answers(move |_| Response::new(body()));
    for chunk in ["a log line\n", "token: ", SECRET, " end"] {
        send.send(chunk).await.unwrap();
    }
    let told = scene.get("/v1/egress/github/log").await;
    assert!(told.cut && told.text() == "a log line\ntoken: ", "{told:?}");
}

#[tokio::test]
async fn an_answer_that_cannot_be_searched_is_not_handed_on() {
    let mut scene = Scene::new().await;
    scene.grant(json!({})).await;
    scene.outdoors.answers(|seen| {
        let mut answer = plain("\u{1f}not really");
        if seen.uri == "/always" || seen.headers["accept-encoding"] != "identity" {
            answer
                .headers_mut()
                .insert("content-encoding", HeaderValue::from_static("gzip"));
        }
        answer
    });
    let told = scene.get("/v1/egress/github/always").await;
    assert_eq!(
        (told.status, &told.json()["error"]["code"]),
        (StatusCode::BAD_GATEWAY, &json!("encoded"))
    );
    let asked = Request::get("/v1/egress/github/asked").header("accept-encoding", "gzip");
    assert_eq!(
        scene.ask(asked.body(Body::empty()).unwrap()).await.status,
        StatusCode::OK
    );
}

#[tokio::test]
async fn a_secret_too_short_to_be_found_again_or_unfit_for_a_header_is_not_sent() {
    let mut scene = Scene::new().await;
    scene.store("short", "1234567", false).await;
    scene.store("lines", "first line\nsecond: line", false).await;
    scene.grant(json!({"capability": "short", "secret": "short"})).await;
    scene.grant(json!({"capability": "lines", "secret": "lines"})).await;
    scene.get("/v1/egress/short/").await.denied("secret.length");
    scene.get("/v1/egress/lines/").await.denied("secret.form");
    assert!(scene.outdoors.dialled.lock().unwrap().is_empty());
    scene.store("short", "12345678", false).await;
    assert_eq!(scene.get("/v1/egress/short/").await.status, StatusCode::OK);
}
