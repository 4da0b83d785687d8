//! Passkeys by WebAuthn: discoverable, user verification required, the exact origin. It must not know sessions or HTTP.

use choir_core::UserId;
use choir_store::{NewPasskey, PasskeyUse};
use data_encoding::{BASE32_NOPAD, BASE64URL_NOPAD};
use webauthn_rs::prelude::{
    AuthenticationResult, CreationChallengeResponse, DiscoverableAuthentication, Passkey, PasskeyRegistration,
    PublicKeyCredential, RegisterPublicKeyCredential, RequestChallengeResponse, Uuid, WebauthnError,
};
use webauthn_rs_proto::ResidentKeyRequirement;

use super::Auth;
use crate::error::{ApiError, ApiResult};

impl Auth {
    /// Options for a new passkey of this user, who must not have those in `existing` already.
    pub(super) fn begin_creation(
        &self,
        user: &UserId,
        name: &str,
        display_name: &str,
        existing: &[choir_store::Passkey],
    ) -> ApiResult<(CreationChallengeResponse, PasskeyRegistration)> {
        let exclude = existing
            .iter()
            .filter_map(|key| BASE64URL_NOPAD.decode(key.id.as_bytes()).ok())
            .collect();
        let (mut options, state) = self
            .0
            .webauthn
            .start_passkey_registration(handle(user)?, name, display_name, Some(exclude))
            .map_err(ApiError::internal)?;
        // Without this a security key makes one that a login without a name cannot find.
        let selection = options.public_key.authenticator_selection.get_or_insert_default();
        selection.resident_key = Some(ResidentKeyRequirement::Required);
        selection.require_resident_key = true;
        Ok((options, state))
    }

    /// Checks a new passkey.
    pub(super) fn finish_creation(
        &self,
        credential: &RegisterPublicKeyCredential,
        state: &PasskeyRegistration,
        name: String,
    ) -> ApiResult<NewPasskey> {
        let stored = credential.extensions.cred_props.as_ref().and_then(|props| props.rk);
        if stored == Some(false) {
            let message =
                "This authenticator did not store the passkey; use one that can, such as a phone or a newer key.";
            return Err(ApiError::bad_request("passkey_not_stored", message));
        }
        let passkey = self
            .0
            .webauthn
            .finish_passkey_registration(credential, state)
            .map_err(|error| {
                tracing::info!(%error, "a new passkey was refused");
                ApiError::bad_request(
                    "passkey_refused",
                    "This passkey was not accepted; try again or use another one.",
                )
            })?;
        Ok(NewPasskey {
            id: BASE64URL_NOPAD.encode(passkey.cred_id()),
            name,
            credential: serde_json::to_string(&passkey).map_err(ApiError::internal)?,
        })
    }

    /// Options for an assertion of any passkey of this box: the authenticator says whose it is.
    pub(super) fn begin_discovery(&self) -> ApiResult<(RequestChallengeResponse, DiscoverableAuthentication)> {
        let (mut options, state) = self
            .0
            .webauthn
            .start_discoverable_authentication()
            .map_err(ApiError::internal)?;
        // The page decides how the browser asks.
        options.mediation = None;
        Ok((options, state))
    }

    /// Checks an assertion of any user's passkey: whose it is, and what to write down.
    pub(super) async fn finish_discovery(
        &self,
        credential: &PublicKeyCredential,
        state: DiscoverableAuthentication,
    ) -> ApiResult<(UserId, PasskeyUse)> {
        let webauthn = &self.0.webauthn;
        let (claimed, id) = webauthn
            .identify_discoverable_authentication(credential)
            .map_err(refused)?;
        let stored = self
            .0
            .store
            .passkey(BASE64URL_NOPAD.encode(id))
            .await?
            .ok_or_else(not_accepted)?;
        if handle(&stored.user)? != claimed {
            return Err(not_accepted());
        }
        let passkey = parse(&stored)?;
        let result = webauthn
            .finish_discoverable_authentication_v2(credential, state, &passkey)
            .map_err(refused)?;
        let used = updated(&stored, passkey, &result)?;
        Ok((stored.user, used))
    }
}

/// One answer for every assertion that is not accepted, so that nobody learns which passkeys exist.
fn not_accepted() -> ApiError {
    let message = "This passkey was not accepted; try again, use another one, or use a recovery code.";
    ApiError::new(axum::http::StatusCode::UNAUTHORIZED, "passkey_refused", message)
}

fn refused(error: WebauthnError) -> ApiError {
    tracing::info!(%error, "an assertion was refused");
    not_accepted()
}

fn updated(
    stored: &choir_store::Passkey,
    mut passkey: Passkey,
    result: &AuthenticationResult,
) -> ApiResult<PasskeyUse> {
    passkey.update_credential(result);
    Ok(PasskeyUse {
        id: stored.id.clone(),
        before: stored.credential.clone(),
        after: serde_json::to_string(&passkey).map_err(ApiError::internal)?,
    })
}

fn parse(stored: &choir_store::Passkey) -> ApiResult<Passkey> {
    serde_json::from_str(&stored.credential).map_err(ApiError::internal)
}

/// The user handle that authenticators keep: the same 128 bits as the user's id.
fn handle(user: &UserId) -> ApiResult<Uuid> {
    let text = user.as_str().trim_start_matches("u-").to_ascii_uppercase();
    let bytes = BASE32_NOPAD.decode(text.as_bytes()).map_err(ApiError::internal)?;
    Uuid::from_slice(&bytes).map_err(ApiError::internal)
}
