//! Calls about the caller's grants, and about what sandboxes asked for.

use choir_core::{GrantId, GrantRequestId};
use reqwest::Method;

use super::{Client, ClientError, Request};
use crate::grants::{CreateGrant, DecideRequest, Decision, Grant, GrantRequest};
use crate::workspaces::Page;

impl Client {
    /// # Errors
    /// Any.
    pub async fn grants(&self) -> Result<Page<Grant>, ClientError> {
        self.get("/me/grants").await
    }

    /// # Errors
    /// Any; 409 `granted_already` where the slot has a grant for the capability.
    pub async fn create_grant(&self, grant: &CreateGrant) -> Result<Grant, ClientError> {
        self.post("/me/grants", grant).await
    }

    /// # Errors
    /// Any.
    pub async fn delete_grant(&self, id: &GrantId) -> Result<(), ClientError> {
        self.delete(&format!("/me/grants/{id}")).await
    }

    /// What sandboxes were refused and nobody has decided yet.
    ///
    /// # Errors
    /// Any.
    pub async fn grant_requests(&self) -> Result<Page<GrantRequest>, ClientError> {
        self.get("/me/grants/requests").await
    }

    /// # Errors
    /// Any; 409 `needs_a_grant` where a capability is to be approved.
    pub async fn decide_request(&self, id: &GrantRequestId, decision: Decision) -> Result<(), ClientError> {
        let path = format!("/me/grants/requests/{id}");
        let request = Request::new(Method::POST, path).body(&DecideRequest { decision })?;
        self.send(request).await.map(drop)
    }
}
