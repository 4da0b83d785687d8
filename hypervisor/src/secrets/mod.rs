//! What a user does with secrets: store, list, delete. It must not know how they are sealed, nor what uses them.

use choir_api::secrets as api;
use choir_broker::{NewValue, SecretValue};
use choir_core::SecretName;
use choir_store::{AuditEvent, User};

use crate::app::App;
use crate::error::{ApiError, ApiResult};
use crate::grants;

pub mod routes;

/// The most a value may have, in bytes: a key file with its chain of certificates fits.
const MOST_BYTES: usize = 64 << 10;

impl App {
    pub async fn secrets(&self, user: &User) -> ApiResult<Vec<api::Secret>> {
        let found = self.vault.list(&user.id).await?;
        Ok(found.into_iter().map(view).collect())
    }

    /// Stores a value in the place of the one before; the secret as it is then.
    pub async fn put_secret(&self, user: &User, name: &SecretName, put: api::PutSecret) -> ApiResult<api::Secret> {
        let bytes = put.value.expose().len();
        if bytes == 0 || bytes > MOST_BYTES {
            let message = format!("A secret has 1 to {MOST_BYTES} bytes; this one has {bytes}.");
            return Err(ApiError::bad_request("bad_secret", message));
        }
        let new = NewValue {
            user: &user.id,
            name,
            value: &SecretValue::new(put.value.expose().as_bytes().to_vec()),
            reveal: put.reveal,
            at: self.clock.now(),
        };
        let action = if put.reveal { "secret.put_reveal" } else { "secret.put" };
        self.vault.put(new, self.secret_event(user, name, action)).await?;
        Ok(view(self.vault.describe(&user.id, name).await?))
    }

    /// Deletes a secret, and says which grants ended with it.
    pub async fn delete_secret(&self, user: &User, name: &SecretName) -> ApiResult<api::DeletedSecret> {
        let event = self.secret_event(user, name, "secret.delete");
        let ended = self.vault.delete(&user.id, name, event).await?;
        Ok(api::DeletedSecret {
            name: name.clone(),
            ended_grants: ended.into_iter().map(grants::view).collect(),
        })
    }

    fn secret_event(&self, user: &User, name: &SecretName, action: &'static str) -> AuditEvent {
        AuditEvent {
            at: self.clock.now(),
            actor: user.id.to_string(),
            user: Some(user.id.clone()),
            action,
            subject: name.to_string(),
            outcome: "ok",
        }
    }
}

fn view(secret: choir_store::Secret) -> api::Secret {
    api::Secret {
        name: secret.name,
        version: secret.version,
        reveal: secret.reveal,
        created_at: secret.created_at,
        updated_at: secret.updated_at,
        last_used_at: secret.last_used_at,
    }
}
