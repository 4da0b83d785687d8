//! The one shape of every error.

use serde::{Deserialize, Serialize};

/// Body of every answer that is not a success.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ErrorBody {
    pub error: ErrorDetail,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ErrorDetail {
    /// Snake case; for programs.
    pub code: String,
    /// One sentence that says what to do; for people.
    pub message: String,
    #[serde(default)]
    pub request_id: String,
    /// Further fields, such as the open deployment's id.
    #[serde(flatten)]
    pub more: serde_json::Map<String, serde_json::Value>,
}
