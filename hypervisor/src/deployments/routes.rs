//! The HTTP side of deployments. It must not carry one out.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use choir_api::workspaces as api;
use choir_store::{Deployment, WorkspaceView};

use super::Wish;
use crate::app::App;
use crate::auth::extract::{self, Query};
use crate::auth::{Caller, routes};
use crate::error::{ApiError, ApiResult};
use crate::paging::Pages;
use crate::workspaces::routes::Wait;

routes! {
    pub ROUTES, router -> Arc<App>;
    User POST post "/api/workspaces/{ws}/swap" => swap;
    User POST post "/api/workspaces/{ws}/rollback" => rollback;
    User POST post "/api/workspaces/{ws}/fork" => fork;
    User POST post "/api/workspaces/{ws}/slots/{slot}/deploy" => deploy;
    User GET get "/api/workspaces/{ws}/deployments" => list;
    User GET get "/api/workspaces/{ws}/deployments/{id}" => show;
}

async fn swap(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(ws): Path<String>,
    Query(wait): Query<Wait>,
    headers: HeaderMap,
) -> ApiResult<Answer> {
    let view = app.workspace(&caller.user, &ws).await?;
    begin(&app, &view, Wish::Swap, &headers, &wait).await
}

async fn rollback(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(ws): Path<String>,
    Query(wait): Query<Wait>,
    headers: HeaderMap,
    extract::Body(asked): extract::Body<api::Rollback>,
) -> ApiResult<Answer> {
    let view = app.workspace(&caller.user, &ws).await?;
    begin(&app, &view, Wish::Rollback(asked.to), &headers, &wait).await
}

async fn fork(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(ws): Path<String>,
    Query(wait): Query<Wait>,
    headers: HeaderMap,
    extract::Body(asked): extract::Body<api::Fork>,
) -> ApiResult<Answer> {
    let view = app.workspace(&caller.user, &ws).await?;
    begin(&app, &view, Wish::Fork(asked.from), &headers, &wait).await
}

async fn deploy(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((ws, slot)): Path<(String, String)>,
    Query(wait): Query<Wait>,
    headers: HeaderMap,
    extract::Body(asked): extract::Body<api::Deploy>,
) -> ApiResult<Answer> {
    let view = app.workspace(&caller.user, &ws).await?;
    let slot = slot.parse().map_err(|_| ApiError::not_found())?;
    begin(&app, &view, Wish::Deploy(slot, asked.release), &headers, &wait).await
}

pub type Answer = (StatusCode, Json<api::Deployment>);

/// Begins what is wished, and answers with how far it is after the wait.
pub async fn begin(
    app: &Arc<App>,
    view: &WorkspaceView,
    wish: Wish,
    headers: &HeaderMap,
    wait: &Wait,
) -> ApiResult<Answer> {
    let key = idempotency_key(headers)?;
    let deployment = app.begin_deployment(view, wish, key).await?;
    let deployment = app
        .await_deployment(&view.workspace.id, &deployment.id, wait.duration())
        .await?;
    let status = if deployment.finished_at.is_some() {
        StatusCode::OK
    } else {
        StatusCode::ACCEPTED
    };
    Ok((status, Json(wire(deployment))))
}

fn idempotency_key(headers: &HeaderMap) -> ApiResult<Option<String>> {
    let Some(value) = headers.get("idempotency-key") else {
        return Ok(None);
    };
    match value.to_str() {
        Ok(key) if (1..=200).contains(&key.len()) => Ok(Some(key.to_owned())),
        _ => Err(ApiError::bad_request(
            "bad_key",
            "An Idempotency-Key has 1 to 200 visible ASCII characters.",
        )),
    }
}

async fn list(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(ws): Path<String>,
    Query(pages): Query<Pages>,
) -> ApiResult<Json<api::Page<api::Deployment>>> {
    let view = app.workspace(&caller.user, &ws).await?;
    let before = pages.cursor.map(|c| {
        c.parse()
            .map_err(|_| ApiError::bad_request("bad_cursor", "The cursor is not one this list gave."))
    });
    let before = before.transpose()?;
    let limit = pages.limit.unwrap_or(50).clamp(1, 200);
    let found = app.store.deployments(&view.workspace.id, before, limit).await?;
    let full = found.len() == limit as usize;
    let next_cursor = found.last().filter(|_| full).map(|d| d.created_at.to_string());
    Ok(Json(api::Page {
        items: found.into_iter().map(wire).collect(),
        next_cursor,
    }))
}

async fn show(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((ws, id)): Path<(String, String)>,
) -> ApiResult<Json<api::Deployment>> {
    let view = app.workspace(&caller.user, &ws).await?;
    let id = id.parse().map_err(|_| ApiError::not_found())?;
    Ok(Json(wire(app.store.deployment(&view.workspace.id, &id).await?)))
}

fn wire(deployment: Deployment) -> api::Deployment {
    let mut before = deployment.created_at;
    let steps = deployment.steps.iter().map(|passed| {
        let took = passed.at.duration_since(before).as_millis();
        before = passed.at;
        api::DeploymentStep {
            step: passed.step,
            at: passed.at,
            took_ms: u64::try_from(took).unwrap_or(0),
        }
    });
    api::Deployment {
        id: deployment.id.clone(),
        kind: deployment.kind,
        slot: deployment.slot,
        step: deployment.step,
        created_at: deployment.created_at,
        finished_at: deployment.finished_at,
        reason: deployment.reason.clone(),
        steps: steps.collect(),
    }
}
