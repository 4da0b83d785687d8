//! The HTTP side of what an operator asks. Users, invites and audit are in `auth`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use choir_api::admin::{BoxSandbox, BoxStats};
use choir_api::workspaces::Page;

use crate::app::App;
use crate::auth::routes;
use crate::error::ApiResult;

routes! {
    pub ROUTES, router -> Arc<App>;
    Admin GET get "/admin/stats" => stats;
    Admin GET get "/admin/sandboxes" => sandboxes;
}

async fn stats(State(app): State<Arc<App>>) -> Json<BoxStats> {
    Json(app.stats().await)
}

async fn sandboxes(State(app): State<Arc<App>>) -> ApiResult<Json<Page<BoxSandbox>>> {
    Ok(Json(Page {
        items: app.all_sandboxes().await?,
        next_cursor: None,
    }))
}
