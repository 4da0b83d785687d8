//! The audit trail as it is read: what happened, to what, by whom; never a secret.

use choir_core::Name;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// One row of `GET /me/audit` and `GET /admin/audit`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AuditEntry {
    pub id: i64,
    pub at: Timestamp,
    /// A user's id, `system`, or `root`.
    pub actor: String,
    /// The id of the user who may read it.
    pub user: Option<String>,
    pub action: String,
    pub subject: String,
    /// `ok`, a short code of what went wrong, or `intent` before an action whose outcome is a row of its own.
    pub outcome: String,
    /// Which intent this is the outcome of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub intent: Option<i64>,
    /// How many events this row stands for, where that is not one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub times: Option<u64>,
}

/// Which rows to read; newest first.
#[derive(Debug, Clone, Default)]
pub struct AuditQuery {
    /// Of everybody, for admins; else one's own.
    pub everybody: bool,
    /// Of this user only, for admins.
    pub user: Option<Name>,
    /// Only actions that begin with this.
    pub action: Option<String>,
    pub outcome: Option<String>,
    /// Not older than this.
    pub since: Option<Timestamp>,
    /// Older than this.
    pub until: Option<Timestamp>,
    /// The most rows of a page, at most 500.
    pub limit: Option<u32>,
    /// The `next_cursor` of the page before.
    pub cursor: Option<String>,
}

impl AuditQuery {
    /// The path to ask, with its query.
    #[cfg(feature = "client")]
    pub(crate) fn path(&self) -> String {
        let all = self.everybody || self.user.is_some();
        let path = if all { "/admin/audit?" } else { "/me/audit?" };
        let mut query = url::form_urlencoded::Serializer::for_suffix(path.to_owned(), path.len());
        let text = |value: &Option<Timestamp>| value.map(|at| at.to_string());
        for (name, value) in [
            ("user", self.user.as_ref().map(ToString::to_string)),
            ("action", self.action.clone()),
            ("outcome", self.outcome.clone()),
            ("since", text(&self.since)),
            ("until", text(&self.until)),
            ("limit", self.limit.map(|limit| limit.to_string())),
            ("cursor", self.cursor.clone()),
        ] {
            if let Some(value) = value {
                query.append_pair(name, &value);
            }
        }
        query.finish()
    }
}
