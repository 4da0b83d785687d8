//! The HTTP side of secrets. It must not decide anything that `mod.rs` should.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use choir_api::secrets as api;
use choir_api::workspaces::Page;
use choir_core::SecretName;

use crate::app::App;
use crate::auth::extract::Body;
use crate::auth::{Caller, routes};
use crate::error::{ApiError, ApiResult};

routes! {
    pub ROUTES, router -> Arc<App>;
    User GET get "/me/secrets" => list;
    User PUT put "/me/secrets/{name}" => store;
    User DELETE delete "/me/secrets/{name}" => remove;
}

async fn list(State(app): State<Arc<App>>, caller: Caller) -> ApiResult<Json<Page<api::Secret>>> {
    let items = app.secrets(&caller.user).await?;
    Ok(Json(Page {
        items,
        next_cursor: None,
    }))
}

async fn store(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(name): Path<String>,
    Body(put): Body<api::PutSecret>,
) -> ApiResult<(StatusCode, Json<api::Secret>)> {
    let name: SecretName = name.parse().map_err(|error: choir_core::name::SecretNameError| {
        ApiError::bad_request("bad_name", format!("The name is refused: {error}."))
    })?;
    if put.reveal {
        app.auth.confirm(&caller)?;
    }
    let stored = app.put_secret(&caller.user, &name, put).await?;
    let status = if stored.version == 1 {
        StatusCode::CREATED
    } else {
        StatusCode::OK
    };
    Ok((status, Json(stored)))
}

async fn remove(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(name): Path<String>,
) -> ApiResult<Json<api::DeletedSecret>> {
    // What cannot be a name is no secret either.
    let name: SecretName = name.parse().map_err(|_| ApiError::not_found())?;
    Ok(Json(app.delete_secret(&caller.user, &name).await?))
}
