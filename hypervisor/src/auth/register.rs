//! Registering a passkey: of a new user, or one more of a user who is there. The user row is made at the end, not at
//! the start. It must not know SQL: one store transaction makes everything.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use choir_core::Name;
use choir_store::{Error as StoreError, Hash, InviteKind, Registration, SessionKind};
use serde::Deserialize;
use serde_json::json;
use webauthn_rs::prelude::{CreationChallengeResponse, PasskeyRegistration, RegisterPublicKeyCredential};

use super::account::user_view;
use super::ceremonies::{Draft, Purpose, over};
use super::extract::{Body, PeerAddr, UserAgent};
use super::secret::{self, Secret};
use super::{Auth, Caller, RegistrationMode, cookies};
use crate::error::{ApiError, ApiResult};

#[derive(Deserialize)]
pub(super) struct Start {
    #[serde(default)]
    username: String,
    #[serde(default)]
    display_name: String,
    invite: Option<String>,
    passkey_name: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct Finish {
    credential: RegisterPublicKeyCredential,
}

pub(super) async fn start(
    State(auth): State<Auth>,
    peer: PeerAddr,
    caller: Option<Caller>,
    Body(start): Body<Start>,
) -> ApiResult<Response> {
    auth.limit_starts(peer)?;
    let (options, purpose) = match caller {
        Some(caller) if start.invite.is_none() => auth.begin_another(&caller, start).await?,
        // Somebody who was signed in, or had ten minutes to recover, and no longer is.
        None if start.invite.is_none() && start.username.is_empty() => return Err(signed_out()),
        _ => auth.begin_new_user(start).await?,
    };
    let cookie = auth.0.ceremonies.begin(purpose, auth.random(), auth.now());
    Ok(([(header::SET_COOKIE, cookie)], Json(options)).into_response())
}

pub(super) async fn finish(
    State(auth): State<Auth>,
    caller: Option<Caller>,
    UserAgent(agent): UserAgent,
    headers: HeaderMap,
    Body(finish): Body<Finish>,
) -> ApiResult<Response> {
    match auth.0.ceremonies.take(&headers, auth.now())? {
        Purpose::NewUser { state, draft } => auth.finish_new_user(finish, &state, draft, agent).await,
        Purpose::AddPasskey {
            state,
            session_id,
            passkey_name,
        } => {
            let caller = caller.ok_or_else(ApiError::unauthenticated)?;
            if caller.session()?.id != session_id {
                return Err(over());
            }
            auth.finish_another(finish, &state, &caller, passkey_name, agent).await
        }
        _ => Err(over()),
    }
}

impl Auth {
    async fn begin_new_user(&self, start: Start) -> ApiResult<(CreationChallengeResponse, Purpose)> {
        // Who registers gets recovery codes.
        self.pepper()?;
        let name: Name = start
            .username
            .parse()
            .map_err(|error| ApiError::bad_request("bad_name", sentence(error)))?;
        let display_name = text(&start.display_name, 64)?.unwrap_or_else(|| name.to_string());
        let invite = match &start.invite {
            Some(token) => Some(self.good_invite(token).await?),
            None if self.0.registration == RegistrationMode::Open && self.0.store.has_users().await? => None,
            None => return Err(not_invited()),
        };
        // Only who was invited learns this before the end; with open registration names could be tried out.
        if invite.is_some() && self.0.store.user_by_name(name.clone()).await?.is_some() {
            return Err(name_taken());
        }
        let id = self.new_user_id();
        let (options, state) = self.begin_creation(&id, name.as_str(), &display_name, &[])?;
        let draft = Draft {
            id,
            name,
            display_name,
            invite,
            passkey_name: passkey_name(start.passkey_name.as_deref())?,
        };
        Ok((options, Purpose::NewUser { state, draft }))
    }

    async fn begin_another(&self, caller: &Caller, start: Start) -> ApiResult<(CreationChallengeResponse, Purpose)> {
        let session = caller.session()?;
        if session.kind == SessionKind::Full {
            self.fresh(caller)?;
        }
        let user = &caller.user;
        if !start.username.is_empty() && start.username != user.name.as_str() {
            return Err(ApiError::forbidden(
                "other_user",
                "You are signed in as somebody else; sign out first.",
            ));
        }
        let existing = self.0.store.passkeys(user.id.clone()).await?;
        let (options, state) = self.begin_creation(&user.id, user.name.as_str(), &user.display_name, &existing)?;
        let passkey_name = passkey_name(start.passkey_name.as_deref())?;
        Ok((
            options,
            Purpose::AddPasskey {
                state,
                session_id: session.id.clone(),
                passkey_name,
            },
        ))
    }

    async fn good_invite(&self, token: &str) -> ApiResult<Hash> {
        let hash = Secret::parse(token.as_bytes()).ok_or_else(not_invited)?.hash();
        let invite = self
            .0
            .store
            .usable_invite(hash, self.now())
            .await?
            .ok_or_else(not_invited)?;
        match (invite.kind, self.0.store.has_users().await?) {
            (InviteKind::Claim, false) | (InviteKind::Invite, true) => Ok(hash),
            _ => Err(not_invited()),
        }
    }

    async fn finish_new_user(
        &self,
        finish: Finish,
        state: &PasskeyRegistration,
        draft: Draft,
        agent: String,
    ) -> ApiResult<Response> {
        let passkey = self.finish_creation(&finish.credential, state, draft.passkey_name)?;
        let (codes, hashes) = secret::recovery_codes(self.random(), self.pepper()?);
        let (cookie, session) = self.new_session(&draft.id, agent);
        let registration = Registration {
            at: self.now(),
            id: draft.id,
            name: draft.name,
            display_name: draft.display_name,
            invite: draft.invite,
            passkey,
            recovery_codes: hashes,
            session,
        };
        let user = self.0.store.register(registration).await.map_err(|error| match error {
            StoreError::NotFound => not_invited(),
            StoreError::Exists => name_taken(),
            other => other.into(),
        })?;
        Ok(self.signed_in(&cookie, json!({"user": user_view(&user), "recovery_codes": codes})))
    }

    async fn finish_another(
        &self,
        finish: Finish,
        state: &PasskeyRegistration,
        caller: &Caller,
        passkey_name: String,
        agent: String,
    ) -> ApiResult<Response> {
        let passkey = self.finish_creation(&finish.credential, state, passkey_name)?;
        let (now, user) = (self.now(), &caller.user);
        let answer = json!({"user": user_view(user), "recovery_codes": []});
        if caller.session()?.kind == SessionKind::Full {
            let event = caller.event("passkey.add", passkey.id.as_str(), now);
            self.0.store.add_passkey(user.id.clone(), passkey, event).await?;
            return Ok(([(header::SET_COOKIE, cookies::clear(cookies::CEREMONY))], Json(answer)).into_response());
        }
        let (cookie, session) = self.new_session(&user.id, agent);
        self.0
            .store
            .finish_recovery(user.id.clone(), passkey, session, now)
            .await?;
        self.0.sessions.end(|session| session.user.id == user.id);
        self.0.sessions.end_tokens(&user.id, None);
        Ok(self.signed_in(&cookie, answer))
    }

    /// An answer that begins a full session.
    pub(super) fn signed_in(&self, cookie: &Secret, answer: serde_json::Value) -> Response {
        let mut response = Json(answer).into_response();
        let headers = response.headers_mut();
        headers.append(
            header::SET_COOKIE,
            cookies::set(cookies::SESSION, cookie, self.0.session_absolute),
        );
        headers.append(header::SET_COOKIE, cookies::clear(cookies::CEREMONY));
        response
    }
}

/// A text that a person wrote, trimmed; `None` when there is nothing left.
pub(super) fn text(typed: &str, most: usize) -> ApiResult<Option<String>> {
    let typed = typed.trim();
    if typed.chars().count() > most || typed.chars().any(|c| c.is_control() || is_bidi_control(c)) {
        let message = format!("Use at most {most} characters without control characters.");
        return Err(ApiError::bad_request("bad_text", message));
    }
    Ok((!typed.is_empty()).then(|| typed.to_owned()))
}

/// They make a name look like another.
fn is_bidi_control(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn passkey_name(typed: Option<&str>) -> ApiResult<String> {
    Ok(text(typed.unwrap_or_default(), 64)?.unwrap_or_else(|| "Passkey".into()))
}

/// The same for no invite, a wrong, used or old one, and a name that exists.
fn not_invited() -> ApiError {
    let message = "Registering needs a valid link: the claim link that the server printed, or an invite of an admin.";
    ApiError::forbidden("invite_required", message)
}

fn signed_out() -> ApiError {
    let message = "You are not signed in any more; sign in, or use another recovery code.";
    ApiError::new(StatusCode::UNAUTHORIZED, "signed_out", message)
}

fn name_taken() -> ApiError {
    ApiError::conflict("name_taken", "This name is taken; choose another one.")
}

fn sentence(error: choir_core::name::NameError) -> String {
    let text = error.to_string();
    format!("{}{}.", text[..1].to_uppercase(), &text[1..])
}
