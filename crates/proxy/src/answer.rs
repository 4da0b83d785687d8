//! What the proxy says when it does not forward: JSON for programs, a small page without script for navigations.
//! It must not know why a request was refused.

use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use http::header::{ACCEPT, CACHE_CONTROL, CONNECTION, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY};
use http::{HeaderMap, HeaderValue, Response, StatusCode};

use crate::Body;

/// Writes answers, each with an id that log lines share.
pub struct Answers {
    prefix: String,
    count: AtomicU64,
}

/// Why a request is not forwarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    pub status: StatusCode,
    /// `snake_case`, stable.
    pub code: &'static str,
    /// One sentence that says what to do.
    pub message: &'static str,
    /// Whether the connection can no longer be trusted to be in step.
    pub close: bool,
}

impl Refusal {
    pub(crate) const fn new(status: StatusCode, code: &'static str, message: &'static str) -> Self {
        Self {
            status,
            code,
            message,
            close: false,
        }
    }

    pub(crate) fn status(&self) -> StatusCode {
        self.status
    }

    pub(crate) const fn closing(mut self) -> Self {
        self.close = true;
        self
    }
}

impl Answers {
    /// `prefix` makes request ids of different runs differ.
    pub fn new(prefix: String) -> Self {
        Self {
            prefix,
            count: AtomicU64::new(0),
        }
    }

    /// A new request id.
    pub fn request_id(&self) -> String {
        format!("{}-{:x}", self.prefix, self.count.fetch_add(1, Ordering::Relaxed))
    }

    /// An error answer in the form that suits the asker. `head` are the request's headers.
    pub fn error(&self, head: &HeaderMap, status: StatusCode, code: &str, message: &str) -> Response<Body> {
        let id = self.request_id();
        tracing::debug!(request.id = %id, status = status.as_u16(), code, "answered by the proxy");
        let (kind, text) = if wants_page(head) {
            ("text/html; charset=utf-8", page(status, message, &id))
        } else {
            let body = serde_json::json!({"error": {"code": code, "message": message, "request_id": id}});
            ("application/json", body.to_string())
        };
        let mut response = Response::new(Body::full(Bytes::from(text)));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
        headers.insert(
            http::header::X_CONTENT_TYPE_OPTIONS,
            HeaderValue::from_static("nosniff"),
        );
        headers.insert(
            CONTENT_SECURITY_POLICY,
            HeaderValue::from_static("default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"),
        );
        response
    }

    pub(crate) fn refuse(&self, head: &HeaderMap, refusal: &Refusal) -> Response<Body> {
        let mut response = self.error(head, refusal.status, refusal.code, refusal.message);
        if refusal.close {
            response
                .headers_mut()
                .insert(CONNECTION, HeaderValue::from_static("close"));
        }
        if refusal.status == StatusCode::METHOD_NOT_ALLOWED {
            response
                .headers_mut()
                .insert(http::header::ALLOW, HeaderValue::from_static(crate::head::METHODS));
        }
        response
    }
}

/// Whether a person looks at the answer, by what the browser says of the request.
pub fn wants_page(head: &HeaderMap) -> bool {
    match head.get("sec-fetch-mode") {
        Some(mode) => mode == "navigate",
        None => head
            .get(ACCEPT)
            .and_then(|accept| accept.to_str().ok())
            .is_some_and(|accept| accept.contains("text/html")),
    }
}

fn page(status: StatusCode, message: &str, id: &str) -> String {
    let message = escape(message);
    let title = status.canonical_reason().unwrap_or("Error");
    format!(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\">\
         <title>{title}</title><style>body{{font:1.1rem/1.5 system-ui;max-width:34rem;margin:20vh auto;padding:0 1rem}}\
         small{{color:#777}}</style><h1>{title}</h1><p>{message}</p><p><small>{id}</small></p></html>"
    )
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_navigations_get_a_page() {
        let head = |pairs: &[(&'static str, &'static str)]| -> HeaderMap {
            pairs
                .iter()
                .map(|(n, v)| (n.parse().unwrap(), v.parse().unwrap()))
                .collect()
        };
        assert!(wants_page(&head(&[("sec-fetch-mode", "navigate")])));
        assert!(wants_page(&head(&[("accept", "text/html,*/*")])));
        assert!(!wants_page(&head(&[
            ("accept", "text/html"),
            ("sec-fetch-mode", "cors")
        ])));
        assert!(!wants_page(&head(&[("accept", "*/*")])));
    }

    #[test]
    fn a_message_cannot_carry_markup() {
        assert!(page(StatusCode::NOT_FOUND, "<script>&\"", "r-1").contains("&lt;script&gt;&amp;&quot;"));
    }
}
