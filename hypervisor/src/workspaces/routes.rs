//! The HTTP side of workspaces and slots. It must not decide anything that `mod.rs` or `slots.rs` should.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Request, State};
use axum::http::{StatusCode, Uri};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use choir_api::workspaces as api;
use choir_core::{Door, Slot, WorkspaceSettings};
use choir_proxy::{Body, Face, Peer, Route, Via, Visitor};
use choir_store::WorkspaceView;
use futures_util::StreamExt;
use serde::Deserialize;

use super::slots::Change;
use crate::app::{App, HOLD};
use crate::auth::extract::{self, Query};
use crate::auth::{Caller, routes};
use crate::error::{ApiError, ApiResult};
use crate::paging::Pages;

routes! {
    pub ROUTES, router -> Arc<App>;
    User GET get "/api/workspaces" => list;
    User POST post "/api/workspaces" => create;
    User GET get "/api/workspaces/{ws}" => show;
    User PATCH patch "/api/workspaces/{ws}" => change;
    User DELETE delete "/api/workspaces/{ws}" => remove;
    User GET get "/api/workspaces/{ws}/config" => config;
    User POST post "/api/workspaces/{ws}/slots/{slot}/start" => start;
    User POST post "/api/workspaces/{ws}/slots/{slot}/stop" => stop;
    User POST post "/api/workspaces/{ws}/slots/{slot}/restart" => restart;
    User POST post "/api/workspaces/{ws}/slots/{slot}/pause" => pause;
    User GET get "/api/workspaces/{ws}/slots/{slot}/logs" => logs;
    User GET get "/api/workspaces/{ws}/slots/{slot}/stats" => stats;
    User ANY any "/api/workspaces/{ws}/slots/{slot}/sandbox/{*path}" => sandbox;
}

/// How long a client may ask to wait, in seconds.
const MOST_WAIT_S: u64 = 120;

#[derive(Deserialize)]
pub struct Wait {
    pub wait_s: Option<u64>,
}

impl Wait {
    pub fn duration(&self) -> Duration {
        Duration::from_secs(self.wait_s.unwrap_or(0).min(MOST_WAIT_S))
    }
}

async fn list(
    State(app): State<Arc<App>>,
    caller: Caller,
    Query(pages): Query<Pages>,
) -> ApiResult<Json<api::Page<api::Workspace>>> {
    let views = app.store.workspaces_of(&caller.user.id).await?;
    let page = pages.cut(views, |view| view.workspace.name.to_string());
    let mut items = Vec::new();
    for view in &page.items {
        items.push(app.show(view).await);
    }
    Ok(Json(api::Page {
        items,
        next_cursor: page.next_cursor,
    }))
}

async fn create(
    State(app): State<Arc<App>>,
    caller: Caller,
    extract::Body(asked): extract::Body<api::CreateWorkspace>,
) -> ApiResult<(StatusCode, Json<api::Workspace>)> {
    let view = app.create_workspace(&caller.user, asked).await?;
    Ok((StatusCode::CREATED, Json(app.show(&view).await)))
}

async fn show(State(app): State<Arc<App>>, caller: Caller, Path(ws): Path<String>) -> ApiResult<Json<api::Workspace>> {
    let view = app.workspace(&caller.user, &ws).await?;
    Ok(Json(app.show(&view).await))
}

async fn change(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(ws): Path<String>,
    extract::Body(patch): extract::Body<WorkspaceSettings>,
) -> ApiResult<Json<api::Workspace>> {
    let view = app.workspace(&caller.user, &ws).await?;
    let after = app.patch_workspace(&view, patch).await?;
    Ok(Json(app.show(&after).await))
}

async fn remove(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(ws): Path<String>,
    Query(wait): Query<Wait>,
) -> ApiResult<StatusCode> {
    let view = app.workspace(&caller.user, &ws).await?;
    app.auth.confirm(&caller)?;
    Ok(match app.delete_workspace(&view, wait.duration()).await? {
        true => StatusCode::NO_CONTENT,
        false => StatusCode::ACCEPTED,
    })
}

#[derive(Deserialize)]
struct WhichSlot {
    slot: Option<Slot>,
}

async fn config(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(ws): Path<String>,
    Query(which): Query<WhichSlot>,
) -> ApiResult<Json<api::EffectiveConfig>> {
    let view = app.workspace(&caller.user, &ws).await?;
    Ok(Json(app.effective(&view, which.slot.unwrap_or(Slot::Live)).await?))
}

type SlotPath = Path<(String, String)>;

/// The caller's workspace and the slot that a path names.
async fn find(app: &App, caller: &Caller, Path((ws, slot)): SlotPath) -> ApiResult<(WorkspaceView, Slot)> {
    let view = app.workspace(&caller.user, &ws).await?;
    let slot = slot.parse().map_err(|_| ApiError::not_found())?;
    Ok((view, slot))
}

async fn changed(app: &App, caller: &Caller, path: SlotPath, wait: &Wait, change: Change) -> ApiResult<Response> {
    let (view, slot) = find(app, caller, path).await?;
    app.change_slot(&view, slot, change, wait.duration()).await?;
    Ok((StatusCode::ACCEPTED, Json(app.show_slot(&view, slot).await)).into_response())
}

async fn start(
    State(app): State<Arc<App>>,
    caller: Caller,
    path: SlotPath,
    Query(wait): Query<Wait>,
) -> ApiResult<Response> {
    changed(&app, &caller, path, &wait, Change::Start).await
}

async fn stop(
    State(app): State<Arc<App>>,
    caller: Caller,
    path: SlotPath,
    Query(wait): Query<Wait>,
) -> ApiResult<Response> {
    changed(&app, &caller, path, &wait, Change::Stop).await
}

async fn restart(
    State(app): State<Arc<App>>,
    caller: Caller,
    path: SlotPath,
    Query(wait): Query<Wait>,
) -> ApiResult<Response> {
    changed(&app, &caller, path, &wait, Change::Restart).await
}

async fn pause(
    State(app): State<Arc<App>>,
    caller: Caller,
    path: SlotPath,
    Query(wait): Query<Wait>,
) -> ApiResult<Response> {
    changed(&app, &caller, path, &wait, Change::Pause).await
}

#[derive(Deserialize)]
struct LogQuery {
    tail: Option<usize>,
    #[serde(default)]
    follow: bool,
}

/// The most lines of one answer.
const MOST_LINES: usize = 10_000;

async fn logs(
    State(app): State<Arc<App>>,
    caller: Caller,
    path: SlotPath,
    Query(query): Query<LogQuery>,
) -> ApiResult<Response> {
    let (view, slot) = find(&app, &caller, path).await?;
    let generation = app.handle(&view, slot)?.present().ok_or_else(not_running)?;
    let tail = query.tail.unwrap_or(200).min(MOST_LINES);
    let mut lines = app.fleet.services.runtime.logs(&generation, tail, query.follow).await?;
    let wire = |line: choir_runtime::LogLine| api::LogLine {
        stream: line.stream,
        line: line.line,
    };
    if query.follow {
        let (ended, stopping) = (app.auth.watch(&caller), app.stopping.clone());
        let events = futures_util::stream::poll_fn(move |cx| lines.poll_recv(cx))
            .take_until(async move {
                tokio::select! {
                    () = ended.cancelled() => {}
                    () = stopping.cancelled() => {}
                }
            })
            .map(move |line| {
                Ok::<_, Infallible>(Event::default().event("line").json_data(wire(line)).unwrap_or_default())
            });
        return Ok(Sse::new(events).keep_alive(KeepAlive::default()).into_response());
    }
    let mut items = Vec::new();
    while let Some(line) = lines.recv().await {
        items.push(wire(line));
    }
    Ok(Json(api::Page {
        items,
        next_cursor: None,
    })
    .into_response())
}

async fn stats(State(app): State<Arc<App>>, caller: Caller, path: SlotPath) -> ApiResult<Json<api::SlotStats>> {
    let (view, slot) = find(&app, &caller, path).await?;
    let handle = app.handle(&view, slot)?;
    let usage = app.fleet.services.volumes.usage(handle.id.as_str()).await?;
    let now = match handle.present() {
        Some(generation) => app.fleet.services.runtime.stats(&generation).await?,
        None => choir_runtime::Stats::default(),
    };
    Ok(Json(api::SlotStats {
        cpu_ns: now.cpu_ns,
        memory: now.memory,
        memory_limit: now.memory_limit,
        pids: now.pids,
        disk: usage.bytes,
        disk_limit: usage.limit.filter(|_| usage.enforced),
    }))
}

fn not_running() -> ApiError {
    ApiError::conflict("not_running", "The slot is not running; start it first.")
}

/// Carries a request to the agent of the slot's sandbox, which is woken if need be.
async fn sandbox(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((ws, slot, path)): Path<(String, String, String)>,
    request: Request,
) -> ApiResult<Response> {
    let (view, slot) = find(&app, &caller, Path((ws, slot))).await?;
    let handle = app.handle(&view, slot)?;
    let generation = handle.wake(HOLD).await?;
    let peer = request
        .extensions()
        .get::<Peer>()
        .cloned()
        .ok_or_else(|| ApiError::internal("no peer"))?;
    let route = Arc::new(Route {
        generation,
        door: Door::Agent,
        service_workers: false,
        forward_authorization: false,
        listens_by: None,
        judged: false,
        activity: handle.activity.clone(),
    });
    let visitor = Arc::new(Visitor {
        identity: Vec::new(),
        closed: app.auth.watch(&caller),
    });
    let request = to_agent(request, &path)?;
    let via = Via {
        route: &route,
        visitor: &visitor,
        peer: &peer,
        face: Face::Api,
    };
    Ok(app.forwarder.forward(request, via).await.map(axum::body::Body::new))
}

/// The same request with the agent's own path. The path is taken from the raw URI, so that nothing is decoded twice.
fn to_agent(request: Request, path: &str) -> ApiResult<http::Request<Body>> {
    let (mut parts, body) = request.into_parts();
    let raw = parts.uri.path();
    let start = raw
        .match_indices('/')
        .nth(6)
        .map(|(at, _)| at)
        .unwrap_or(raw.len() - path.len().min(raw.len()));
    let query = parts.uri.query().map(|q| format!("?{q}")).unwrap_or_default();
    parts.uri = format!("{}{query}", &raw[start..])
        .parse::<Uri>()
        .map_err(|_| ApiError::bad_request("bad_path", "This path cannot be sent to the sandbox."))?;
    Ok(http::Request::from_parts(parts, Body::wrap(body)))
}
