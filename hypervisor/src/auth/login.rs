//! Signing in with a passkey, confirming with one, signing out, and who am I. It must not know how passkeys are checked.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use choir_store::{AuditFilter, SessionKind};
use jiff::SignedDuration;
use serde::Deserialize;
use serde_json::{Value, json};
use webauthn_rs::prelude::PublicKeyCredential;

use super::account::user_view;
use super::ceremonies::{Purpose, over};
use super::extract::{Body, PeerAddr, UserAgent};
use super::secret::Secret;
use super::{Auth, Caller, Credential, cookies, event};
use crate::error::{ApiError, ApiResult};

/// How long a recovery is shown to the user.
const NOTICE: SignedDuration = SignedDuration::from_hours(14 * 24);

#[derive(Deserialize)]
pub(super) struct Finish {
    credential: PublicKeyCredential,
}

pub(super) async fn start(State(auth): State<Auth>, peer: PeerAddr) -> ApiResult<Response> {
    auth.limit_starts(peer)?;
    let (options, state) = auth.begin_discovery()?;
    let cookie = auth
        .0
        .ceremonies
        .begin(Purpose::Login { state }, auth.random(), auth.now());
    Ok(([(header::SET_COOKIE, cookie)], Json(options)).into_response())
}

pub(super) async fn finish(
    State(auth): State<Auth>,
    UserAgent(agent): UserAgent,
    headers: HeaderMap,
    Body(finish): Body<Finish>,
) -> ApiResult<Response> {
    let Purpose::Login { state } = auth.0.ceremonies.take(&headers, auth.now())? else {
        return Err(over());
    };
    let (id, used) = auth.finish_discovery(&finish.credential, state).await?;
    let user = auth.0.store.user_by_id(id).await?.ok_or_else(ApiError::not_found)?;
    let (cookie, session) = auth.new_session(&user.id, agent);
    // The session that this browser had ends here, so that an old cookie never outlives a new sign-in.
    let replaces = cookies::read(&headers, cookies::SESSION)?.map(|old| old.hash());
    let begun = event(&user.id, "session.begin", session.id.as_str(), auth.now());
    auth.0.store.login(used, session, replaces, begun).await?;
    auth.0.sessions.end(|session| Some(session.hash) == replaces);
    Ok(auth.signed_in(&cookie, json!({"user": user_view(&user)})))
}

pub(super) async fn step_up_start(State(auth): State<Auth>, peer: PeerAddr, caller: Caller) -> ApiResult<Response> {
    auth.limit_starts(peer)?;
    let (options, state) = auth.begin_discovery()?;
    let purpose = Purpose::StepUp {
        state,
        session_id: caller.session()?.id.clone(),
    };
    let cookie = auth.0.ceremonies.begin(purpose, auth.random(), auth.now());
    Ok(([(header::SET_COOKIE, cookie)], Json(options)).into_response())
}

pub(super) async fn step_up_finish(
    State(auth): State<Auth>,
    caller: Caller,
    headers: HeaderMap,
    Body(finish): Body<Finish>,
) -> ApiResult<Response> {
    let Purpose::StepUp { state, session_id } = auth.0.ceremonies.take(&headers, auth.now())? else {
        return Err(over());
    };
    let session = caller.session()?;
    let (user, used) = auth.finish_discovery(&finish.credential, state).await?;
    if session.id != session_id || user != caller.user.id {
        return Err(ApiError::forbidden(
            "other_user",
            "This passkey is of another user; confirm with one of yours.",
        ));
    }
    let (now, cookie) = (auth.now(), Secret::draw(auth.random()));
    let confirmed = caller.event("session.step_up", session_id, now);
    auth.0
        .store
        .step_up(used, session.hash, cookie.hash(), confirmed)
        .await?;
    auth.0.sessions.rotate(&session.hash, cookie.hash(), now);
    let mut response = auth.signed_in(&cookie, json!({"verified_at": now}));
    let left = cookies::set(cookies::SESSION, &cookie, session.expires_at.duration_since(now));
    response.headers_mut().insert(header::SET_COOKIE, left);
    Ok(response)
}

/// Works for a recovery session, too, and without any session.
pub(super) async fn logout(State(auth): State<Auth>, caller: Option<Caller>) -> ApiResult<Response> {
    if let Some(caller) = caller {
        let session = caller.session()?;
        let ended = caller.event("session.end", session.id.as_str(), auth.now());
        match auth
            .0
            .store
            .end_session(caller.user.id.clone(), session.id.clone(), ended)
            .await
        {
            Err(choir_store::Error::NotFound) => {}
            other => other?,
        }
        auth.0.sessions.end(|other| other.id == session.id);
    }
    Ok((
        StatusCode::NO_CONTENT,
        [(header::SET_COOKIE, cookies::clear(cookies::SESSION))],
    )
        .into_response())
}

pub(super) async fn me(State(auth): State<Auth>, caller: Option<Caller>) -> ApiResult<Json<Value>> {
    let Some(caller) = caller else {
        return Ok(Json(json!({"authenticated": false})));
    };
    let (kind, session) = match &caller.by {
        Credential::Token(token) => ("token", json!({"id": token.id, "expires_at": token.expires_at})),
        Credential::Session(session) => {
            let kind = if session.kind == SessionKind::Full {
                "session"
            } else {
                "recovery"
            };
            let of = json!({"id": session.id, "expires_at": session.expires_at, "verified_at": session.verified_at});
            (kind, of)
        }
    };
    Ok(Json(json!({
        "authenticated": true,
        "user": user_view(&caller.user),
        "by": kind,
        "session": session,
        "notices": auth.notices(&caller).await?,
    })))
}

impl Auth {
    /// What a user should see although they did not ask: that somebody recovered the account, that codes run out.
    pub(super) async fn notices(&self, caller: &Caller) -> ApiResult<Vec<Value>> {
        let user = &caller.user.id;
        let filter = AuditFilter {
            user: Some(user.clone()),
            action: Some("recovery.finish".into()),
            since: Some(self.now() - NOTICE),
            limit: 1,
            ..AuditFilter::default()
        };
        let mut notices = Vec::new();
        if let Some(row) = self.0.store.audit_rows(filter).await?.first() {
            let message =
                "Your account was recovered and a new passkey was added. If this was not you, remove that passkey.";
            notices.push(json!({"code": "recovered", "at": row.at, "message": message}));
        }
        let left = self.0.store.recovery_codes_left(user.clone()).await?;
        if left < 4 {
            let message = format!("You have {left} recovery codes left; make new ones.");
            notices.push(json!({"code": "few_recovery_codes", "at": self.now(), "message": message}));
        }
        Ok(notices)
    }
}
