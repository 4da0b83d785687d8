//! The HTTP side of snapshots. It must not make or remove one.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use choir_api::workspaces as api;
use choir_core::snapshot::Diff;
use choir_core::{Slot, SnapshotId};
use choir_store::{Snapshot, SnapshotState, TakenFor, WorkspaceView};
use serde::Deserialize;

use crate::app::App;
use crate::auth::extract::Query;
use crate::auth::{Caller, routes};
use crate::deployments::Wish;
use crate::deployments::routes::{Answer, begin};
use crate::error::{ApiError, ApiResult};
use crate::paging::{Pages, newest_first};
use crate::workspaces::routes::Wait;

routes! {
    pub ROUTES, router -> Arc<App>;
    User GET get "/api/workspaces/{ws}/slots/{slot}/snapshots" => list;
    User POST post "/api/workspaces/{ws}/slots/{slot}/snapshots" => take;
    User POST post "/api/workspaces/{ws}/slots/{slot}/snapshots/archive" => receive;
    User GET get "/api/workspaces/{ws}/slots/{slot}/snapshots/{id}" => show;
    User DELETE delete "/api/workspaces/{ws}/slots/{slot}/snapshots/{id}" => remove;
    User GET get "/api/workspaces/{ws}/slots/{slot}/snapshots/{id}/archive" => send;
    User GET get "/api/workspaces/{ws}/slots/{slot}/snapshots/{id}/diff" => diff;
    User POST post "/api/workspaces/{ws}/slots/{slot}/snapshots/{id}/restore" => restore;
}

async fn find(app: &App, caller: &Caller, ws: &str, slot: &str) -> ApiResult<(WorkspaceView, Slot)> {
    let view = app.workspace(&caller.user, ws).await?;
    let slot = slot.parse().map_err(|_| ApiError::not_found())?;
    Ok((view, slot))
}

fn id_of(text: &str) -> ApiResult<SnapshotId> {
    text.parse().map_err(|_| ApiError::not_found())
}

async fn list(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((ws, slot)): Path<(String, String)>,
    Query(pages): Query<Pages>,
) -> ApiResult<Json<api::Page<api::Snapshot>>> {
    let (view, slot) = find(&app, &caller, &ws, &slot).await?;
    let mut snapshots = app.store.snapshots(&view.workspace.id).await?;
    snapshots.retain(|snapshot| snapshot.slot == slot && snapshot.state == SnapshotState::Ready);
    let page = pages.cut(snapshots, |snapshot| newest_first(snapshot.created_at, &snapshot.id));
    let mut items = Vec::new();
    for snapshot in page.items {
        items.extend(wire(&app, snapshot).await?);
    }
    Ok(Json(api::Page {
        items,
        next_cursor: page.next_cursor,
    }))
}

async fn take(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((ws, slot)): Path<(String, String)>,
) -> ApiResult<(StatusCode, Json<api::Snapshot>)> {
    let (view, slot) = find(&app, &caller, &ws, &slot).await?;
    let snapshot = app.take_snapshot(&view, slot).await?;
    let shown = wire(&app, snapshot).await?.ok_or_else(ApiError::not_found)?;
    Ok((StatusCode::CREATED, Json(shown)))
}

async fn receive(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((ws, slot)): Path<(String, String)>,
    request: Request,
) -> ApiResult<(StatusCode, Json<api::Snapshot>)> {
    let (view, slot) = find(&app, &caller, &ws, &slot).await?;
    let archive = request.into_body().into_data_stream();
    let ended = app.auth.watch(&caller);
    let snapshot = app.import_snapshot(&view, slot, archive, ended).await?;
    let shown = wire(&app, snapshot).await?.ok_or_else(ApiError::not_found)?;
    Ok((StatusCode::CREATED, Json(shown)))
}

type OnePath = Path<(String, String, String)>;

async fn show(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((ws, slot, id)): OnePath,
) -> ApiResult<Json<api::Snapshot>> {
    let (view, _) = find(&app, &caller, &ws, &slot).await?;
    let snapshot = app.store.snapshot(&view.workspace.id, &id_of(&id)?).await?;
    let shown = wire(&app, snapshot).await?.ok_or_else(ApiError::not_found)?;
    Ok(Json(shown))
}

async fn remove(State(app): State<Arc<App>>, caller: Caller, Path((ws, slot, id)): OnePath) -> ApiResult<StatusCode> {
    let (view, _) = find(&app, &caller, &ws, &slot).await?;
    app.delete_snapshot(&view, &id_of(&id)?).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn send(State(app): State<Arc<App>>, caller: Caller, Path((ws, slot, id)): OnePath) -> ApiResult<Response> {
    app.auth.confirm(&caller)?;
    // All files at once are more than what a token that only looks is made for.
    caller.needs_scope("write")?;
    let (view, _) = find(&app, &caller, &ws, &slot).await?;
    let id = id_of(&id)?;
    let ended = app.auth.watch(&caller);
    let archive = app.export_snapshot(&view, &id, ended).await?;
    let headers = [
        (header::CONTENT_TYPE, "application/x-tar".to_owned()),
        (
            header::CONTENT_DISPOSITION,
            format!("attachment; filename=\"{id}.tar\""),
        ),
    ];
    Ok((headers, Body::from_stream(archive)).into_response())
}

#[derive(Debug, Deserialize)]
struct Against {
    /// Another snapshot; what the slot holds now where missing.
    to: Option<String>,
}

async fn diff(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((ws, slot, id)): OnePath,
    Query(against): Query<Against>,
) -> ApiResult<Json<Diff>> {
    let (view, slot) = find(&app, &caller, &ws, &slot).await?;
    let to = against.to.as_deref().map(id_of).transpose()?;
    let diff = app.diff_snapshots(&view, &id_of(&id)?, to.as_ref(), slot).await?;
    Ok(Json(diff))
}

async fn restore(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((ws, slot, id)): OnePath,
    Query(wait): Query<Wait>,
    headers: HeaderMap,
) -> ApiResult<Answer> {
    let (view, slot) = find(&app, &caller, &ws, &slot).await?;
    begin(&app, &view, Wish::Restore(slot, id_of(&id)?), &headers, &wait).await
}

/// `None` for one that was deleted meanwhile.
async fn wire(app: &App, snapshot: Snapshot) -> ApiResult<Option<api::Snapshot>> {
    let usage = match app.fleet.services.volumes.usage(snapshot.id.as_str()).await {
        Err(choir_runtime::Error::NotFound) => return Ok(None),
        usage => usage?,
    };
    let scheduled = snapshot.taken_for == TakenFor::Schedule;
    let (deployment, taken_for) = match snapshot.taken_for {
        TakenFor::Deployment(id) => {
            let deployment = app.store.deployment(&snapshot.workspace, &id).await;
            (Some(id), deployment.ok().map(|d| d.kind))
        }
        TakenFor::Somebody | TakenFor::Schedule => (None, None),
    };
    Ok(Some(api::Snapshot {
        bytes: usage.bytes,
        id: snapshot.id,
        slot: snapshot.slot,
        sandbox: snapshot.sandbox,
        release: snapshot.release,
        deployment,
        taken_for,
        scheduled,
        created_at: snapshot.created_at,
    }))
}
