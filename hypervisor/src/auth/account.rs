//! What a user sees and changes of their own access: passkeys, sessions, recovery codes. It must not reach
//! another user's rows: every store call names the caller.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use choir_store::{Error as StoreError, Session, User};
use serde_json::{Value, json};

use super::{Auth, Caller, secret};
use crate::error::{ApiError, ApiResult};

/// A user as everybody who may know of them sees it.
pub(super) fn user_view(user: &User) -> Value {
    json!({
        "id": user.id,
        "name": user.name,
        "display_name": user.display_name,
        "role": user.role,
        "created_at": user.created_at,
    })
}

pub(super) async fn passkeys(State(auth): State<Auth>, caller: Caller) -> ApiResult<Json<Value>> {
    Ok(Json(
        json!({"items": auth.0.store.passkeys(caller.user.id.clone()).await?}),
    ))
}

pub(super) async fn delete_passkey(
    State(auth): State<Auth>,
    caller: Caller,
    Path(id): Path<String>,
) -> ApiResult<StatusCode> {
    auth.fresh(&caller)?;
    let removed = caller.event("passkey.remove", id.as_str(), auth.now());
    auth.0
        .store
        .delete_passkey(caller.user.id.clone(), id, removed)
        .await
        .map_err(|error| match error {
            StoreError::Conflict(_) => ApiError::conflict(
                "last_passkey",
                "This is your last passkey; add another one before you remove it.",
            ),
            other => other.into(),
        })?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn sessions(State(auth): State<Auth>, caller: Caller) -> ApiResult<Json<Value>> {
    let own = caller.session().ok().map(|session| session.id.clone());
    let view = |session: Session| {
        json!({
            "id": session.id,
            "kind": session.kind,
            "user_agent": session.user_agent,
            "created_at": session.created_at,
            "last_seen_at": session.last_seen_at,
            "expires_at": session.expires_at,
            "current": own.as_ref() == Some(&session.id),
        })
    };
    let all = auth.0.store.sessions(caller.user.id.clone()).await?;
    Ok(Json(json!({"items": all.into_iter().map(view).collect::<Vec<_>>()})))
}

pub(super) async fn delete_session(
    State(auth): State<Auth>,
    caller: Caller,
    Path(id): Path<String>,
) -> ApiResult<StatusCode> {
    let ended = caller.event("session.revoke", id.as_str(), auth.now());
    auth.0
        .store
        .end_session(caller.user.id.clone(), id.clone(), ended)
        .await?;
    auth.0.sessions.end(|session| session.id == id);
    Ok(StatusCode::NO_CONTENT)
}

/// Ends every session of the caller but this one.
pub(super) async fn delete_sessions(State(auth): State<Auth>, caller: Caller) -> ApiResult<StatusCode> {
    let keep = caller.session()?.id.clone();
    let ended = caller.event("session.revoke_others", keep.as_str(), auth.now());
    auth.0
        .store
        .end_other_sessions(caller.user.id.clone(), keep.clone(), ended)
        .await?;
    auth.0
        .sessions
        .end(|session| session.user.id == caller.user.id && session.id != keep);
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn recovery_codes(State(auth): State<Auth>, caller: Caller) -> ApiResult<Json<Value>> {
    Ok(Json(
        json!({"left": auth.0.store.recovery_codes_left(caller.user.id.clone()).await?}),
    ))
}

/// Makes a new set; the old codes are worth nothing from then on.
pub(super) async fn new_recovery_codes(State(auth): State<Auth>, caller: Caller) -> ApiResult<Json<Value>> {
    auth.fresh(&caller)?;
    let (codes, hashes) = secret::recovery_codes(auth.random(), auth.pepper()?);
    let made = caller.event("recovery.codes", caller.user.id.as_str(), auth.now());
    auth.0
        .store
        .replace_recovery_codes(caller.user.id.clone(), hashes, made)
        .await?;
    Ok(Json(json!({"recovery_codes": codes})))
}
