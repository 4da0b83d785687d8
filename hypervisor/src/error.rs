//! The one place where errors become HTTP. It must not let a cause out: that is logged once, the answer is constant.

use std::fmt::Display;

use axum::Json;
use axum::extract::Request;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use choir_broker::VaultError;
use serde_json::json;

use crate::reconcile::{AskError, WakeError};

tokio::task_local! {
    static REQUEST_ID: String;
}

pub type ApiResult<T> = Result<T, ApiError>;

/// What a caller is told when it did not work.
#[derive(Debug, Clone)]
pub struct ApiError {
    pub status: StatusCode,
    /// Stable, for programs.
    pub code: &'static str,
    /// One sentence that says what to do, for people.
    pub message: String,
    retry_after_s: Option<u64>,
    /// A further field of the body, for programs.
    detail: Option<(&'static str, String)>,
}

impl Display for ApiError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl ApiError {
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
            retry_after_s: None,
            detail: None,
        }
    }

    pub fn bad_request(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }

    pub fn unauthenticated() -> Self {
        Self::new(
            StatusCode::UNAUTHORIZED,
            "unauthenticated",
            "Sign in first, or send a valid token.",
        )
    }

    pub fn forbidden(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, code, message)
    }

    /// Also the answer for somebody else's object.
    pub fn not_found() -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "not_found",
            "There is nothing here; check the name or the id.",
        )
    }

    pub fn conflict(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, code, message)
    }

    pub fn too_many(retry_after_s: u64) -> Self {
        let message = format!("Too many requests; wait {retry_after_s} s and try again.");
        Self::new(StatusCode::TOO_MANY_REQUESTS, "too_many_requests", message).retry_after(retry_after_s)
    }

    pub fn unavailable(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, code, message)
    }

    /// Logs the cause; the caller learns nothing of it.
    pub fn internal(cause: impl Display) -> Self {
        tracing::error!(%cause, request.id = request_id(), "a request failed");
        let message = "Something failed on our side; it was logged. Try again, or show the request id to the operator.";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
    }

    pub fn method_not_allowed() -> Self {
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "method_not_allowed",
            "This address does not take this method.",
        )
    }

    /// The hypervisor has started and does not know yet what runs.
    pub fn not_taken_over() -> Self {
        let message = "The hypervisor has just started and cannot reach its containers yet; try again shortly.";
        Self::unavailable("not_ready", message).retry_after(2)
    }

    /// Adds a field to the body's `error`.
    pub fn with(mut self, field: &'static str, value: impl Into<String>) -> Self {
        self.detail = Some((field, value.into()));
        self
    }

    /// Adds a `Retry-After` header, in seconds.
    pub fn retry_after(mut self, seconds: u64) -> Self {
        self.retry_after_s = Some(seconds);
        self
    }
}

impl From<choir_store::Error> for ApiError {
    fn from(error: choir_store::Error) -> Self {
        use choir_store::Error as E;
        match error {
            E::NotFound => Self::not_found(),
            E::Exists => Self::conflict("exists", "This exists already; choose another name."),
            E::Conflict(text) => Self::conflict("conflict", sentence(text)),
            E::Full(cause) => {
                tracing::error!(%cause, request.id = request_id(), "the database cannot be written");
                Self::unavailable(
                    "disk_full",
                    "The server's disk is full or not writable; nothing was changed.",
                )
            }
            other => {
                let cause = std::error::Error::source(&other)
                    .map(|s| format!(": {s}"))
                    .unwrap_or_default();
                Self::internal(format_args!("{other}{cause}"))
            }
        }
    }
}

impl From<AskError> for ApiError {
    fn from(error: AskError) -> Self {
        match error {
            AskError::Store(error) => error.into(),
            AskError::Busy => Self::unavailable("busy", sentence(&error.to_string())).retry_after(10),
            AskError::ShortOfMemory => {
                Self::unavailable("short_of_memory", sentence(&error.to_string())).retry_after(10)
            }
        }
    }
}

/// For a program or a page that waited; somebody else's sandbox is not told of here.
impl From<WakeError> for ApiError {
    fn from(error: WakeError) -> Self {
        let message = sentence(&error.to_string());
        match error {
            WakeError::Deleted => Self::not_found(),
            WakeError::Failed(_) => Self::unavailable("sandbox_failed", message).retry_after(30),
            WakeError::TooLong => Self::unavailable("starting", message).retry_after(2),
            WakeError::InLine(_) => Self::unavailable("in_line", message).retry_after(10),
            WakeError::Busy => Self::unavailable("busy", message).retry_after(10),
            WakeError::ShortOfMemory => Self::unavailable("short_of_memory", message).retry_after(10),
        }
    }
}

impl From<choir_runtime::Error> for ApiError {
    fn from(error: choir_runtime::Error) -> Self {
        use choir_runtime::Error as E;
        match error {
            E::NotFound | E::Busy(_) => Self::conflict("not_running", "The sandbox is not running; start it first."),
            E::Unavailable(_) => {
                tracing::error!(%error, request.id = request_id(), "the container service does not answer");
                Self::unavailable(
                    "runtime_unavailable",
                    "The container service does not answer; try again shortly.",
                )
                .retry_after(5)
            }
            E::NoSpace(_) => {
                tracing::error!(%error, request.id = request_id(), "the disk of the volumes is full");
                Self::unavailable(
                    "no_space",
                    "The disk of the box has no room for this; delete something, or ask who runs it.",
                )
            }
            other => Self::internal(other),
        }
    }
}

impl From<VaultError> for ApiError {
    fn from(error: VaultError) -> Self {
        match error {
            VaultError::Sealed => Self::unavailable(
                "sealed",
                "The server's master key is missing, so secrets are sealed; ask the operator to put the key file back.",
            ),
            VaultError::NotFound => Self::not_found(),
            VaultError::Store(error) => error.into(),
            VaultError::Damaged => Self::internal(error),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut body = json!({"error": {"code": self.code, "message": self.message, "request_id": request_id()}});
        if let Some((field, value)) = self.detail {
            body["error"][field] = value.into();
        }
        let mut response = (self.status, Json(body)).into_response();
        if let Some(seconds) = self.retry_after_s {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

/// Runs a request under an id that its errors, its log lines and the `X-Request-Id` of its response carry.
pub async fn with_request_id(id: String, request: Request, next: Next) -> Response {
    let value = HeaderValue::from_str(&id);
    let mut response = REQUEST_ID.scope(id, next.run(request)).await;
    if let Ok(value) = value {
        response.headers_mut().insert("x-request-id", value);
    }
    response
}

/// The id of the request under way; empty outside of one.
pub fn request_id() -> String {
    REQUEST_ID.try_with(Clone::clone).unwrap_or_default()
}

fn sentence(text: &str) -> String {
    let mut letters = text.chars();
    letters
        .next()
        .map(|first| first.to_uppercase().chain(letters).chain(['.']).collect())
        .unwrap_or_default()
}
