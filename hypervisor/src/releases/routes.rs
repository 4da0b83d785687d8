//! The HTTP side of releases. It must not make or remove one.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use choir_api::workspaces as api;
use choir_core::{ReleaseConfig, ReleaseId, Slot, UserId};
use choir_store::{Release, ReleaseState, ReleaseUse};
use futures_util::future::BoxFuture;

use super::Wanted;
use crate::app::App;
use crate::auth::extract::{Body, Query};
use crate::auth::{Caller, routes};
use crate::error::{ApiError, ApiResult};
use crate::paging::{Pages, newest_first};
use crate::reconcile::trial::Tried;
use crate::workspaces::routes::Wait;

routes! {
    pub ROUTES, router -> Arc<App>;
    User GET get "/api/releases" => list;
    User POST post "/api/releases" => create;
    User POST post "/api/releases/archive" => upload;
    User GET get "/api/releases/{id}" => show;
    User DELETE delete "/api/releases/{id}" => remove;
}

async fn list(
    State(app): State<Arc<App>>,
    caller: Caller,
    Query(pages): Query<Pages>,
) -> ApiResult<Json<api::Page<api::Release>>> {
    let uses = app.store.release_uses().await?;
    let mut releases = app.store.releases().await?;
    releases.retain(|release| release.is_for(&caller.user.id) && release.state != ReleaseState::Retired);
    let page = pages.cut(releases, |release| newest_first(release.created_at, &release.id));
    let mut items = Vec::new();
    for release in page.items {
        items.push(wire(&app, &caller, release, &uses).await?);
    }
    Ok(Json(api::Page {
        items,
        next_cursor: page.next_cursor,
    }))
}

async fn create(
    State(app): State<Arc<App>>,
    caller: Caller,
    Body(asked): Body<api::CreateRelease>,
) -> ApiResult<(StatusCode, Json<api::Release>)> {
    if let Some(config) = &asked.config {
        check(config)?;
    }
    let name = asked.name.map(named).transpose()?;
    let made = match (asked.image, asked.sandbox) {
        (Some(image), None) => {
            let wanted = Wanted {
                name: name.unwrap_or_else(|| image.chars().take(12).collect()),
                config: asked.config.unwrap_or_default(),
            };
            let made = app.releases.with_config(&caller.user.id, &image, wanted).await?;
            let unknown = || {
                let message = "There is no image with this digest; `choir releases` lists those that are here.";
                ApiError::bad_request("no_such_image", message)
            };
            made.ok_or_else(unknown)?
        }
        (None, Some(sandbox)) => {
            let handle = app.fleet.handle(&sandbox).filter(|h| h.owner == caller.user.id);
            let workspace = handle.ok_or_else(ApiError::not_found)?.workspace;
            let view = app.store.workspace(&workspace).await?;
            let slot = if view.live.id == sandbox { Slot::Live } else { Slot::Dev };
            app.has_files(&view, slot).await?;
            let name = name.unwrap_or_else(|| format!("{}-{slot}", view.workspace.name));
            app.releases.of_slot(&view, slot, name, asked.config).await?
        }
        _ => {
            let message = "A release is made of an `image` or of a `sandbox`: give one of them.";
            return Err(ApiError::bad_request("bad_source", message));
        }
    };
    Ok((StatusCode::CREATED, Json(shown(&app, &caller, made).await?)))
}

async fn upload(
    State(app): State<Arc<App>>,
    caller: Caller,
    Query(asked): Query<api::UploadRelease>,
    request: Request,
) -> ApiResult<(StatusCode, Json<api::Release>)> {
    let config: ReleaseConfig = match &asked.config {
        Some(text) => serde_json::from_str(text).map_err(|e| ApiError::bad_request("bad_config", format!("{e}.")))?,
        None => ReleaseConfig::default(),
    };
    check(&config)?;
    let wanted = Wanted {
        name: named(asked.name)?,
        config,
    };
    let archive = request.into_body().into_data_stream();
    let fleet = app.fleet.clone();
    let trial = |id: ReleaseId, user: UserId| -> BoxFuture<'static, Result<Tried, String>> {
        Box::pin(async move { fleet.try_release(&id, &user).await })
    };
    let making = app.releases.receive(&caller.user.id, wanted, archive, Box::new(trial));
    let id = making.await?;
    let wait = Wait { wait_s: asked.wait_s };
    let made = app.releases.made(&id, wait.duration()).await?;
    let status = match made.state {
        ReleaseState::Importing => StatusCode::ACCEPTED,
        ReleaseState::Rejected => {
            let reason = made.reason.unwrap_or_default();
            let refused = ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "rejected", reason);
            return Err(refused.with("release", made.id.as_str()));
        }
        _ => StatusCode::CREATED,
    };
    Ok((status, Json(shown(&app, &caller, made).await?)))
}

async fn show(State(app): State<Arc<App>>, caller: Caller, Path(id): Path<String>) -> ApiResult<Json<api::Release>> {
    let release = app.store.release(&id_of(&id)?).await?;
    if !release.is_for(&caller.user.id) {
        return Err(ApiError::not_found());
    }
    Ok(Json(shown(&app, &caller, release).await?))
}

async fn remove(State(app): State<Arc<App>>, caller: Caller, Path(id): Path<String>) -> ApiResult<StatusCode> {
    let id = id_of(&id)?;
    app.releases.delete(&caller.user.id, caller.is_admin(), &id).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn id_of(text: &str) -> ApiResult<ReleaseId> {
    text.parse().map_err(|_| ApiError::not_found())
}

fn check(config: &ReleaseConfig) -> ApiResult<()> {
    let bad = |e| ApiError::bad_request("bad_config", format!("{e}."));
    config.validate().map_err(bad)
}

fn named(name: String) -> ApiResult<String> {
    let plain = name.chars().all(|c| !c.is_control());
    if plain && (1..=100).contains(&name.chars().count()) {
        return Ok(name);
    }
    let message = "A release's name has 1 to 100 characters on one line.";
    Err(ApiError::bad_request("bad_name", message))
}

async fn shown(app: &App, caller: &Caller, release: Release) -> ApiResult<api::Release> {
    let uses = app.store.release_uses().await?;
    wire(app, caller, release, &uses).await
}

async fn wire(app: &App, caller: &Caller, release: Release, uses: &[ReleaseUse]) -> ApiResult<api::Release> {
    // What is not known is no error: the release is there.
    let usage = app.fleet.services.volumes.usage(release.id.as_str()).await.ok();
    let (own, other): (Vec<_>, Vec<_>) = uses
        .iter()
        .filter(|used| used.release == release.id)
        .partition(|used| used.user == caller.user.id);
    Ok(api::Release {
        own: release.owner.is_some(),
        bytes: usage.map(|usage| usage.bytes),
        used_by: own
            .iter()
            .map(|used| format!("{}/{}", used.workspace, used.slot))
            .collect(),
        used_elsewhere: other.len(),
        id: release.id,
        name: release.name,
        image_digest: release.image_digest,
        config: release.config,
        state: release.state.as_str().to_owned(),
        reason: release.reason,
        created_at: release.created_at,
    })
}
