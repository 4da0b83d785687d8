//! Calls about who is calling: device login, passkey ceremonies, tokens, users and invites. It must not know where a
//! token is kept, nor how a passkey signs.

use jiff::Timestamp;
use reqwest::{Method, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::visit::set_cookies;
use super::{Client, ClientError, Request, read, segment};
use crate::workspaces::Page;

/// Who is calling: `GET /auth/me`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Me {
    pub authenticated: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<User>,
    /// `session`, `recovery` or `token`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<Proof>,
}

/// The session or token a call was made with.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Proof {
    pub id: String,
    pub expires_at: Timestamp,
}

/// A person with an account.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct User {
    pub id: String,
    pub name: String,
    pub display_name: String,
    /// `admin` or `member`.
    pub role: String,
    pub created_at: Timestamp,
}

/// `POST /auth/device/start`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeviceStart {
    pub device_code: String,
    pub user_code: String,
    pub verification_uri: String,
    pub verification_uri_complete: String,
    pub interval_s: u64,
    pub expires_in_s: u64,
}

/// `POST /auth/device/poll`.
#[derive(Debug, Clone)]
pub enum DevicePoll {
    Pending,
    Granted { token: String, user: User },
    Expired,
}

#[derive(Deserialize)]
struct Granted {
    token: String,
    user: User,
}

/// `POST /auth/register/finish`. The codes are given only with an account's first passkey.
#[derive(Debug, Clone, Deserialize)]
pub struct Registered {
    pub user: User,
    #[serde(default)]
    pub recovery_codes: Vec<String>,
}

/// `GET /me/tokens`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Token {
    pub id: String,
    pub name: String,
    pub scopes: Vec<String>,
    pub created_at: Timestamp,
    pub expires_at: Timestamp,
    pub last_used_at: Option<Timestamp>,
}

/// `GET /admin/invites`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Invite {
    pub id: String,
    /// `claim`, `invite` or `recover`.
    pub kind: String,
    pub role: String,
    pub created_at: Timestamp,
    pub expires_at: Timestamp,
    pub used_at: Option<Timestamp>,
}

/// `POST /admin/invites`.
#[derive(Debug, Clone, Serialize)]
pub struct CreateInvite {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
}

/// An invite, the one time its link is shown.
#[derive(Clone, Serialize, Deserialize)]
pub struct NewInvite {
    pub id: String,
    pub role: String,
    pub url: String,
    pub expires_at: Timestamp,
}

impl Client {
    /// # Errors
    /// Any; not being signed in is none.
    pub async fn me(&self) -> Result<Me, ClientError> {
        self.get("/auth/me").await
    }

    /// # Errors
    /// Any.
    pub async fn device_start(&self, client_name: &str) -> Result<DeviceStart, ClientError> {
        let body = serde_json::json!({ "client_name": client_name });
        self.post("/auth/device/start", &body).await
    }

    /// # Errors
    /// Any; a code that is pending, refused or expired is none.
    pub async fn device_poll(&self, device_code: &str) -> Result<DevicePoll, ClientError> {
        let body = serde_json::json!({ "device_code": device_code });
        let request = Request::new(Method::POST, "/auth/device/poll").body(&body)?;
        match self.send(request).await {
            Ok(answer) if answer.status() == StatusCode::ACCEPTED => Ok(DevicePoll::Pending),
            Ok(answer) => read::<Granted>(answer).await.map(|g| DevicePoll::Granted {
                token: g.token,
                user: g.user,
            }),
            Err(e) if e.status() == Some(410) => Ok(DevicePoll::Expired),
            Err(e) => Err(e),
        }
    }

    /// Ends the token this client calls with; a token that has ended already is no error.
    ///
    /// # Errors
    /// Any.
    pub async fn end_token(&self) -> Result<(), ClientError> {
        let me = match self.me().await {
            Err(e) if e.status() == Some(401) => return Ok(()),
            other => other?,
        };
        match (me.by.as_deref(), me.session) {
            (Some("token"), Some(token)) => self.revoke_token(&token.id).await,
            _ => Ok(()),
        }
    }

    /// One step of a passkey ceremony or of a recovery: a JSON body to a path below `/auth`. Returns the answer and
    /// the cookies it sets, as `name=value` pairs (an empty value clears).
    ///
    /// # Errors
    /// Any.
    pub async fn ceremony(&self, step: &str, body: &Value) -> Result<(Value, Vec<(String, String)>), ClientError> {
        let request = Request::new(Method::POST, format!("/auth/{step}")).body(body)?;
        let answer = self.send(request).await?;
        let cookies = set_cookies(answer.headers());
        Ok((read(answer).await?, cookies))
    }

    /// # Errors
    /// Any.
    pub async fn tokens(&self) -> Result<Page<Token>, ClientError> {
        self.get("/me/tokens").await
    }

    /// # Errors
    /// Any.
    pub async fn revoke_token(&self, id: &str) -> Result<(), ClientError> {
        self.delete(&format!("/me/tokens/{}", segment(id))).await
    }

    /// Where database, containers, volumes and routes do not fit together.
    ///
    /// # Errors
    /// Any; 403 for those who are not admins.
    pub async fn fsck(&self) -> Result<Page<crate::admin::Finding>, ClientError> {
        self.get("/admin/fsck").await
    }

    /// Versions, states and findings of the whole box.
    ///
    /// # Errors
    /// Any; 403 for those who are not admins.
    pub async fn box_stats(&self) -> Result<crate::admin::BoxStats, ClientError> {
        self.get("/admin/stats").await
    }

    /// # Errors
    /// Any; 403 for those who are not admins.
    pub async fn users(&self) -> Result<Page<User>, ClientError> {
        self.get("/admin/users").await
    }

    /// # Errors
    /// Any; 403 for those who are not admins.
    pub async fn invites(&self) -> Result<Page<Invite>, ClientError> {
        self.get("/admin/invites").await
    }

    /// # Errors
    /// Any; 403 for those who are not admins.
    pub async fn create_invite(&self, invite: &CreateInvite) -> Result<NewInvite, ClientError> {
        self.post("/admin/invites", invite).await
    }

    /// # Errors
    /// Any; 403 for those who are not admins.
    pub async fn revoke_invite(&self, id: &str) -> Result<(), ClientError> {
        self.delete(&format!("/admin/invites/{}", segment(id))).await
    }
}
