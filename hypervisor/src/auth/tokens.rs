//! API tokens: made under a fresh passkey assertion, shown once. It must not know who uses them for what.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use choir_store::{NewToken, Role, User};
use jiff::SignedDuration;
use serde::Deserialize;
use serde_json::{Value, json};

use super::extract::Body;
use super::register::text;
use super::secret::{self, Secret, TOKEN_PREFIX};
use super::{Auth, Caller, event};
use crate::error::{ApiError, ApiResult};

const DAY_S: i64 = 24 * 60 * 60;
const DEFAULT_LIFETIME_S: i64 = 90 * DAY_S;
const LONGEST_LIFETIME_S: i64 = 366 * DAY_S;

#[derive(Deserialize)]
pub(super) struct New {
    name: String,
    scopes: Vec<String>,
    expires_in_s: Option<i64>,
}

pub(super) async fn list(State(auth): State<Auth>, caller: Caller) -> ApiResult<Json<Value>> {
    Ok(Json(
        json!({"items": auth.0.store.tokens(caller.user.id.clone(), auth.now()).await?}),
    ))
}

pub(super) async fn create(State(auth): State<Auth>, caller: Caller, Body(new): Body<New>) -> ApiResult<Response> {
    auth.fresh(&caller)?;
    let allowed = scopes_of(&caller.user);
    if new.scopes.is_empty() || !new.scopes.iter().all(|scope| allowed.contains(&scope.as_str())) {
        let message = format!("Give at least one scope, out of: {}.", allowed.join(", "));
        return Err(ApiError::bad_request("bad_scopes", message));
    }
    let name = text(&new.name, 64)?.ok_or_else(|| ApiError::bad_request("bad_text", "Give the token a name."))?;
    let lifetime = new.expires_in_s.unwrap_or(DEFAULT_LIFETIME_S);
    if !(60..=LONGEST_LIFETIME_S).contains(&lifetime) {
        let message = format!("A token lives for 60 to {LONGEST_LIFETIME_S} seconds; choose expires_in_s in between.");
        return Err(ApiError::bad_request("bad_expiry", message));
    }
    let (token, view) = auth.make_token(&caller.user, name, new.scopes, lifetime).await?;
    Ok((StatusCode::CREATED, Json(json!({"token": token, "item": view}))).into_response())
}

pub(super) async fn delete(State(auth): State<Auth>, caller: Caller, Path(id): Path<String>) -> ApiResult<StatusCode> {
    let deleted = caller.event("token.delete", id.as_str(), auth.now());
    auth.0
        .store
        .delete_token(caller.user.id.clone(), id.clone(), deleted)
        .await?;
    auth.0.sessions.end_tokens(&caller.user.id, Some(&id));
    Ok(StatusCode::NO_CONTENT)
}

/// What a user may put into a token.
fn scopes_of(user: &User) -> &'static [&'static str] {
    match user.role {
        Role::Admin => &["read", "write", "admin"],
        Role::Member => &["read", "write"],
    }
}

impl Auth {
    /// A token for a program that acts as this user; for the device login.
    pub(super) async fn device_token(&self, user: &User, name: String) -> ApiResult<String> {
        let scopes = scopes_of(user).iter().map(|scope| (*scope).to_owned()).collect();
        Ok(self.make_token(user, name, scopes, DEFAULT_LIFETIME_S).await?.0)
    }

    async fn make_token(
        &self,
        user: &User,
        name: String,
        scopes: Vec<String>,
        lifetime_s: i64,
    ) -> ApiResult<(String, Value)> {
        let (now, secret) = (self.now(), Secret::draw(self.random()));
        let new = NewToken {
            hash: secret.hash(),
            id: secret::public_id(self.random()),
            user: user.id.clone(),
            name,
            scopes,
            created_at: now,
            expires_at: now + SignedDuration::from_secs(lifetime_s),
        };
        let view = json!({"id": new.id, "name": new.name, "scopes": new.scopes, "expires_at": new.expires_at});
        let made = event(&user.id, "token.create", new.id.as_str(), now);
        self.0.store.add_token(new, made).await?;
        Ok((format!("{TOKEN_PREFIX}{}", secret.expose()), view))
    }
}
