//! The HTTP side of events. It must not know what they mean.

use std::convert::Infallible;
use std::sync::Arc;

use axum::extract::State;
use axum::http::header::ACCEPT;
use axum::http::{HeaderMap, StatusCode};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use choir_api::events::{BEGIN, MISSED};
use futures_util::{StreamExt as _, stream};

use super::Told;
use crate::app::App;
use crate::auth::{Caller, routes};
use crate::error::{ApiError, ApiResult};

const EVENT_STREAM: &[u8] = b"text/event-stream";

routes! {
    pub ROUTES, router -> Arc<App>;
    User GET get "/api/events" => events;
}

async fn events(State(app): State<Arc<App>>, caller: Caller, headers: HeaderMap) -> ApiResult<Response> {
    // What follows for ever is for who asks for that, and not for somebody who opens the address.
    let accepts = headers
        .get(ACCEPT)
        .is_some_and(|kinds| kinds.as_bytes().starts_with(EVENT_STREAM));
    if !accepts {
        let message = "Events come as a stream; ask with `Accept: text/event-stream`.";
        return Err(ApiError::new(StatusCode::NOT_ACCEPTABLE, "not_acceptable", message));
    }
    let after = headers.get("last-event-id").and_then(|id| id.to_str().ok());
    let listener = app.events().listen(&caller.user.id, after);
    let begin = Event::default().event(BEGIN).id(listener.here()).data("{}");
    let news = stream::unfold(listener, |mut listener| async move {
        let (told, id) = listener.next().await;
        let event = match &told {
            Told::Event(event) => Event::default().event(event.name).data(&event.data),
            Told::Missed => Event::default().event(MISSED).data("{}"),
        };
        Some((event.id(id), listener))
    });
    let (ended, stopping) = (app.auth.watch(&caller), app.stopping.clone());
    let all = stream::iter([begin])
        .chain(news)
        .take_until(async move {
            tokio::select! {
                () = ended.cancelled() => {}
                () = stopping.cancelled() => {}
            }
        })
        .map(Ok::<_, Infallible>);
    Ok(Sse::new(all).keep_alive(KeepAlive::default()).into_response())
}
