//! Getting back in with a recovery code or link: ten minutes in which one new passkey may be registered, nothing else.
//! It must not tell an unknown name from a wrong code.

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use choir_store::{RecoverySession, RecoveryTry};
use jiff::SignedDuration;
use serde::Deserialize;
use serde_json::json;

use super::account::user_view;
use super::extract::{Body, PeerAddr, UserAgent};
use super::secret::{self, Secret};
use super::{Auth, cookies};
use crate::error::{ApiError, ApiResult};

const LIFETIME: SignedDuration = SignedDuration::from_mins(10);

#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum Try {
    Code { username: String, code: String },
    Link { link: String },
}

pub(super) async fn recover(
    State(auth): State<Auth>,
    peer: PeerAddr,
    UserAgent(user_agent): UserAgent,
    Body(by): Body<Try>,
) -> ApiResult<Response> {
    let now = auth.now();
    auth.0.recoveries.take(peer.0, now).map_err(ApiError::too_many)?;
    let cookie = Secret::draw(auth.random());
    let session = RecoverySession {
        hash: cookie.hash(),
        id: secret::public_id(auth.random()),
        user_agent,
        expires_at: now + LIFETIME,
    };
    let by = match by {
        Try::Code { username, code } => {
            let name = username.chars().take(64).collect();
            RecoveryTry::Code {
                name,
                hash: secret::recovery_hash(auth.pepper()?, &code),
            }
        }
        Try::Link { link } => RecoveryTry::Link {
            hash: Secret::parse(link.as_bytes()).ok_or_else(refused)?.hash(),
        },
    };
    let user = auth.0.store.recover(by, session, now).await?.ok_or_else(refused)?;
    let answer = json!({"user": user_view(&user), "expires_in_s": LIFETIME.as_secs()});
    Ok((
        [(header::SET_COOKIE, cookies::set(cookies::SESSION, &cookie, LIFETIME))],
        Json(answer),
    )
        .into_response())
}

fn refused() -> ApiError {
    let message = "The name or the code is not right, or there were too many tries; after ten wait an hour.";
    ApiError::forbidden("recovery_refused", message)
}
