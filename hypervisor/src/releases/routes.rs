//! The HTTP side of releases.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use choir_api::workspaces as api;
use choir_store::Release;

use crate::app::App;
use crate::auth::extract::Body;
use crate::auth::{Caller, routes};
use crate::error::{ApiError, ApiResult};

routes! {
    pub ROUTES, router -> Arc<App>;
    User GET get "/api/releases" => list;
    User POST post "/api/releases" => create;
    User GET get "/api/releases/{id}" => show;
}

async fn list(State(app): State<Arc<App>>, _caller: Caller) -> ApiResult<Json<api::Page<api::Release>>> {
    let items = app.store.releases().await?.into_iter().map(wire).collect();
    Ok(Json(api::Page {
        items,
        next_cursor: None,
    }))
}

async fn create(
    State(app): State<Arc<App>>,
    _caller: Caller,
    Body(asked): Body<api::CreateRelease>,
) -> ApiResult<(StatusCode, Json<api::Release>)> {
    asked
        .config
        .validate()
        .map_err(|e| ApiError::bad_request("bad_config", format!("{e}.")))?;
    let made = app.releases.with_config(&asked.image, asked.config).await?;
    let unknown = || {
        let message = "There is no image with this digest; `choir releases` lists those that are here.";
        ApiError::bad_request("no_such_image", message)
    };
    Ok((StatusCode::CREATED, Json(wire(made.ok_or_else(unknown)?))))
}

async fn show(State(app): State<Arc<App>>, _caller: Caller, Path(id): Path<String>) -> ApiResult<Json<api::Release>> {
    let id = id.parse().map_err(|_| ApiError::not_found())?;
    Ok(Json(wire(app.store.release(&id).await?)))
}

fn wire(release: Release) -> api::Release {
    api::Release {
        id: release.id,
        name: release.name,
        image_digest: release.image_digest,
        config: release.config,
        state: release.state.as_str().to_owned(),
        created_at: release.created_at,
    }
}
