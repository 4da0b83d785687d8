//! The HTTP side of what was used. It must not decide anything that `mod.rs` should.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use choir_api::usage::Usage;
use choir_core::Name;
use jiff::civil::Date;
use serde::Deserialize;

use crate::app::App;
use crate::auth::extract::Query;
use crate::auth::{Caller, routes};
use crate::error::{ApiError, ApiResult};

routes! {
    pub ROUTES, router -> Arc<App>;
    User GET get "/me/usage" => own;
    Admin GET get "/admin/usage" => everybodys;
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Own {
    /// The first day to show, in UTC.
    since: Option<Date>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Everybodys {
    since: Option<Date>,
    /// Only this user's.
    user: Option<Name>,
}

async fn own(State(app): State<Arc<App>>, caller: Caller, Query(asked): Query<Own>) -> ApiResult<Json<Usage>> {
    Ok(Json(app.usage(Some(caller.user.id.clone()), asked.since).await?))
}

async fn everybodys(State(app): State<Arc<App>>, Query(asked): Query<Everybodys>) -> ApiResult<Json<Usage>> {
    let of = match asked.user {
        Some(name) => Some(app.store.user_by_name(name).await?.ok_or_else(ApiError::not_found)?.id),
        None => None,
    };
    Ok(Json(app.usage(of, asked.since).await?))
}
