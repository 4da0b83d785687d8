//! Calls about the caller's secrets. It must not know where a value comes from.

use choir_core::SecretName;
use reqwest::Method;

use super::{Client, ClientError, segment};
use crate::secrets::{DeletedSecret, PutSecret, Secret};
use crate::workspaces::Page;

fn path(name: &SecretName) -> String {
    format!("/me/secrets/{}", segment(name.as_str()))
}

impl Client {
    /// The caller's secrets, without their values.
    ///
    /// # Errors
    /// Any.
    pub async fn secrets(&self) -> Result<Page<Secret>, ClientError> {
        self.get("/me/secrets").await
    }

    /// Stores a value in the place of the one before.
    ///
    /// # Errors
    /// Any; 503 `sealed` while the server's master key is missing.
    pub async fn put_secret(&self, name: &SecretName, secret: &PutSecret) -> Result<Secret, ClientError> {
        self.json(Method::PUT, &path(name), Some(secret)).await
    }

    /// Deletes a secret; says which grants ended with it.
    ///
    /// # Errors
    /// Any; 503 `sealed` while the server's master key is missing.
    pub async fn delete_secret(&self, name: &SecretName) -> Result<DeletedSecret, ClientError> {
        self.json(Method::DELETE, &path(name), None::<&()>).await
    }
}
