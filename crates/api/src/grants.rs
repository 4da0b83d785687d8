//! Grants and requests for them as they go over the wire. It must not know what a grant lets pass.

use choir_core::{Capability, GrantId, GrantRequestId, HostName, Inject, Name, SecretName, Slot};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// `POST /me/grants`. What is said here wins over the template; where there is none, hosts and a way to inject are needed.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateGrant {
    pub workspace: Name,
    pub slot: Slot,
    pub capability: Capability,
    pub secret: SecretName,
    /// `github`, `gitlab`, `openai`, `anthropic`, `npm`, `pypi`, `crates-io`, `claude`, `codex`, `gh`; or only the way to use
    /// it: `bearer`, `basic:USER`, `header:NAME`, `query:NAME`, `ssh`. The one called like the capability, if any, where
    /// this is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosts: Option<Vec<HostName>>,
    /// `GET` and `HEAD` where neither this nor the template says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub methods: Option<Vec<String>>,
    /// `/` where neither this nor the template says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_prefix: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inject: Option<Inject>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
}

/// `GET /me/grants/{id}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Grant {
    pub id: GrantId,
    pub workspace: Name,
    pub slot: Slot,
    pub capability: Capability,
    pub secret: SecretName,
    pub hosts: Vec<HostName>,
    pub methods: Vec<String>,
    pub path_prefix: String,
    pub inject: Inject,
    pub created_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
}

/// `GET /me/grants/requests`: what a sandbox was refused. Either a host, a capability, or a use of a key for SSH.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantRequest {
    pub id: GrantRequestId,
    pub workspace: Name,
    pub slot: Slot,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capability: Option<Capability>,
    /// In words: `sign in as root`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ssh: Option<String>,
    /// How often it was asked for.
    pub count: u64,
    pub first_at: Timestamp,
    pub last_at: Timestamp,
    pub expires_at: Timestamp,
}

/// `POST /me/grants/requests/{id}`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DecideRequest {
    pub decision: Decision,
}

/// What a person makes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// Puts the host on the workspace's allow list.
    Approve,
    Dismiss,
}

/// One row of the broker's `GET /v1/capabilities`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GrantedCapability {
    pub capability: Capability,
    /// Calls go to `$CHOIR_BROKER_URL` and this path, followed by the path at the host. For SSH it is where the agent
    /// socket `$SSH_AUTH_SOCK` leads.
    pub path: String,
    pub hosts: Vec<HostName>,
    pub methods: Vec<String>,
    pub path_prefix: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
}
