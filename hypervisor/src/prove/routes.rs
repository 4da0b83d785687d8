//! The HTTP side of `prove`. It must not decide anything that `mod.rs` should.

use std::convert::Infallible;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use choir_api::prove::{PublicKey, Scope, event};
use futures_util::StreamExt as _;

use super::Told;
use crate::app::App;
use crate::auth::{Caller, routes};
use crate::error::ApiResult;

routes! {
    pub ROUTES, router -> Arc<App>;
    User POST post "/me/prove" => own;
    Admin POST post "/admin/prove" => whole;
    User GET get "/api/prove/key" => key;
}

async fn own(State(app): State<Arc<App>>, caller: Caller) -> ApiResult<Response> {
    search(&app, &caller, Scope::Own).await
}

async fn whole(State(app): State<Arc<App>>, caller: Caller) -> ApiResult<Response> {
    search(&app, &caller, Scope::Box).await
}

async fn key(State(app): State<Arc<App>>) -> ApiResult<Json<PublicKey>> {
    Ok(Json(app.prove_key().await?))
}

/// A report has no value in it, so that no fresh assertion is asked for.
async fn search(app: &Arc<App>, caller: &Caller, scope: Scope) -> ApiResult<Response> {
    let mut told = app.begin_prove(&caller.user, scope).await?;
    let (ended, stopping) = (app.auth.watch(caller), app.stopping.clone());
    let events = futures_util::stream::poll_fn(move |cx| told.poll_recv(cx))
        .take_until(async move {
            tokio::select! {
                () = ended.cancelled() => {}
                () = stopping.cancelled() => {}
            }
        })
        .map(|told| {
            let named = |name| Event::default().event(name);
            let event = match &told {
                Told::Progress(progress) => named(event::PROGRESS).json_data(progress),
                Told::Report(signed) => named(event::REPORT).json_data(signed),
                Told::Failed(detail) => named(event::FAILED).json_data(detail),
            };
            Ok::<_, Infallible>(event.unwrap_or_default())
        });
    Ok(Sse::new(events).keep_alive(KeepAlive::default()).into_response())
}
