//! The HTTP side of grants and requests. It must not decide anything that `mod.rs` should.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use choir_api::grants as api;
use choir_api::workspaces::Page;
use choir_core::GrantRequestId;

use crate::app::App;
use crate::auth::extract::Body;
use crate::auth::{Caller, routes};
use crate::error::{ApiError, ApiResult};

routes! {
    pub ROUTES, router -> Arc<App>;
    User GET get "/me/grants" => list;
    User POST post "/me/grants" => create;
    User GET get "/me/grants/requests" => requests;
    User GET get "/me/grants/requests/{id}" => request;
    User POST post "/me/grants/requests/{id}" => decide;
    User GET get "/me/grants/{id}" => show;
    User DELETE delete "/me/grants/{id}" => remove;
}

async fn list(State(app): State<Arc<App>>, caller: Caller) -> ApiResult<Json<Page<api::Grant>>> {
    Ok(page(app.grants(&caller.user).await?))
}

async fn create(
    State(app): State<Arc<App>>,
    caller: Caller,
    Body(asked): Body<api::CreateGrant>,
) -> ApiResult<(StatusCode, Json<api::Grant>)> {
    Ok((StatusCode::CREATED, Json(app.create_grant(&caller.user, asked).await?)))
}

async fn show(State(app): State<Arc<App>>, caller: Caller, Path(id): Path<String>) -> ApiResult<Json<api::Grant>> {
    let id = id.parse().map_err(|_| ApiError::not_found())?;
    Ok(Json(app.grant(&caller.user, id).await?))
}

async fn remove(State(app): State<Arc<App>>, caller: Caller, Path(id): Path<String>) -> ApiResult<StatusCode> {
    let id = id.parse().map_err(|_| ApiError::not_found())?;
    app.delete_grant(&caller.user, id).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn requests(State(app): State<Arc<App>>, caller: Caller) -> ApiResult<Json<Page<api::GrantRequest>>> {
    Ok(page(app.grant_requests(&caller.user).await?))
}

async fn request(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(id): Path<String>,
) -> ApiResult<Json<api::GrantRequest>> {
    let id = id.parse().map_err(|_| ApiError::not_found())?;
    Ok(Json(app.grant_request(&caller.user, id).await?))
}

async fn decide(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(id): Path<String>,
    asked: Result<Body<api::DecideRequest>, ApiError>,
) -> ApiResult<StatusCode> {
    let id: GrantRequestId = id.parse().map_err(|_| ApiError::not_found())?;
    // Somebody else's request is not there, whatever the body says.
    app.grant_request(&caller.user, id.clone()).await?;
    let Body(asked) = asked?;
    app.decide_request(&caller.user, id, asked.decision).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn page<T>(items: Vec<T>) -> Json<Page<T>> {
    Json(Page {
        items,
        next_cursor: None,
    })
}
