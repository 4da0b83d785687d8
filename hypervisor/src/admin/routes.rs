//! The HTTP side of what an operator asks. Users, invites and audit are in `auth`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use choir_api::admin::{BoxSandbox, BoxStats, Finding};
use choir_api::workspaces::Page;

use crate::app::App;
use crate::auth::extract::Query;
use crate::auth::routes;
use crate::error::{ApiError, ApiResult};
use crate::paging::Pages;

routes! {
    pub ROUTES, router -> Arc<App>;
    Admin GET get "/admin/stats" => stats;
    Admin GET get "/admin/sandboxes" => sandboxes;
    Admin GET get "/admin/fsck" => fsck;
}

async fn stats(State(app): State<Arc<App>>) -> Json<BoxStats> {
    Json(app.stats().await)
}

async fn fsck(State(app): State<Arc<App>>) -> ApiResult<Json<Page<Finding>>> {
    let found = app.fsck().await.map_err(ApiError::internal)?;
    let items = found.into_iter().map(|finding| finding.told).collect();
    Ok(Json(Page {
        items,
        next_cursor: None,
    }))
}

async fn sandboxes(State(app): State<Arc<App>>, Query(pages): Query<Pages>) -> ApiResult<Json<Page<BoxSandbox>>> {
    let all = app.all_sandboxes().await?;
    let key = |shown: &BoxSandbox| format!("{}/{}/{}", shown.user, shown.workspace, shown.slot);
    Ok(Json(pages.cut(all, key)))
}
