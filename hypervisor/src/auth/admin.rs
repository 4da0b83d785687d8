//! What admins do about people: invites, users. The guard lets nobody else in; it must not know
//! sandboxes.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use choir_store::{InviteKind, Role};
use jiff::SignedDuration;
use serde::Deserialize;
use serde_json::{Value, json};

use super::account::user_view;
use super::extract::Body;
use super::secret::Secret;
use super::{Auth, Caller};
use crate::error::{ApiError, ApiResult};

const DAY_S: i64 = 24 * 60 * 60;
const DEFAULT_LIFETIME_S: i64 = 7 * DAY_S;
const LONGEST_LIFETIME_S: i64 = 30 * DAY_S;

#[derive(Deserialize)]
pub(super) struct NewInvite {
    role: Option<Role>,
    expires_in_s: Option<i64>,
}

pub(super) async fn users(State(auth): State<Auth>) -> ApiResult<Json<Value>> {
    let users = auth.0.store.users().await?;
    Ok(Json(json!({"items": users.iter().map(user_view).collect::<Vec<_>>()})))
}

pub(super) async fn invites(State(auth): State<Auth>) -> ApiResult<Json<Value>> {
    Ok(Json(json!({"items": auth.0.store.invites().await?})))
}

/// The link is shown once.
pub(super) async fn invite(
    State(auth): State<Auth>,
    caller: Caller,
    Body(new): Body<NewInvite>,
) -> ApiResult<Response> {
    let lifetime = new.expires_in_s.unwrap_or(DEFAULT_LIFETIME_S);
    if !(60..=LONGEST_LIFETIME_S).contains(&lifetime) {
        let message =
            format!("An invite lives for 60 to {LONGEST_LIFETIME_S} seconds; choose expires_in_s in between.");
        return Err(ApiError::bad_request("bad_expiry", message));
    }
    let (now, secret) = (auth.now(), Secret::draw(auth.random()));
    let ends = now + SignedDuration::from_secs(lifetime);
    let role = new.role.unwrap_or(Role::Member);
    let invite = auth.invite(&secret, InviteKind::Invite, role, Some(caller.user.id.clone()), ends);
    let answer = json!({
        "id": invite.id,
        "role": role,
        "invite": secret.expose(),
        "url": auth.register_url(&secret),
        "expires_at": ends,
    });
    let made = caller.event("invite.create", invite.id.as_str(), now);
    auth.0.store.add_invite(invite, made).await?;
    Ok((StatusCode::CREATED, Json(answer)).into_response())
}

pub(super) async fn delete_invite(
    State(auth): State<Auth>,
    caller: Caller,
    Path(id): Path<String>,
) -> ApiResult<StatusCode> {
    let deleted = caller.event("invite.delete", id.as_str(), auth.now());
    auth.0.store.delete_invite(id, deleted).await?;
    Ok(StatusCode::NO_CONTENT)
}
