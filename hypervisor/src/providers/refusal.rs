//! What a program inside is told when a provider is not called: in a shape that the SDKs of all kinds of provider show to
//! their users. It must not know why.

use choir_proxy::Body;
use choir_store::Spent;
use http::{HeaderValue, Response, StatusCode, header};
use jiff::civil::Date;
use serde_json::json;

use crate::broker::refusal::{self, Refusal};
use crate::random::{Random, draw};

/// A call that is not made, or whose answer is not handed on.
#[derive(Debug)]
pub(super) struct No {
    refusal: Refusal,
    /// Until when it is of no use to try again, in seconds.
    retry_after_s: Option<u64>,
}

impl From<Refusal> for No {
    fn from(refusal: Refusal) -> Self {
        Self {
            refusal,
            retry_after_s: None,
        }
    }
}

impl No {
    /// As the audit trail has it.
    pub(super) fn outcome(&self) -> &'static str {
        self.refusal.outcome
    }

    pub(super) fn no_such_provider(names: &[&str]) -> Self {
        let message = format!("There is no such provider; there are {}.", names.join(" and "));
        Refusal::failed(StatusCode::NOT_FOUND, "no_provider", message).into()
    }

    pub(super) fn not_for_this_mode(workspace: &str, provider: &str) -> Self {
        let message = format!(
            "The workspace {workspace} does not use this box's key for {provider}; a person can allow it with `choir \
             --workspace {workspace} config set provider_mode=api_key`, or grant a key of their own with `choir --workspace \
             {workspace} grants add {provider} --slot SLOT --secret NAME`."
        );
        Refusal::denied("provider_mode", "provider_mode", message).into()
    }

    pub(super) fn not_this_path(provider: &str, allowed: &str) -> Self {
        let message = format!(
            "This box's key for {provider} is good for {allowed} and nothing else of the account; a person can grant a key of \
             their own with `choir grants add {provider} --slot SLOT --secret NAME`."
        );
        Refusal::denied("provider.paths", "path", message).into()
    }

    /// What is wrong with the file is in the findings of `choir doctor`; a sandbox need not know.
    pub(super) fn no_key(provider: &str) -> Self {
        let message = format!(
            "This box's key for {provider} is missing or cannot be used; its operator sees why with `choir doctor`, and a \
             person can grant a key of their own meanwhile."
        );
        Refusal::failed(StatusCode::SERVICE_UNAVAILABLE, "no_key", message).into()
    }

    /// `day` is the one that the cap is for, in UTC.
    pub(super) fn capped(provider: &str, spent: &Spent, day: Date, seconds_left: u64) -> Self {
        let (of, prefix) = if spent.sandbox {
            ("this sandbox", "sandbox_")
        } else {
            ("its user", "")
        };
        let what = if spent.tokens { "tokens" } else { "requests" };
        let message = format!(
            "The daily cap of this box's key for {provider} is used up: {of} used {used} of {cap} {what} on {day} \
             ([providers.{provider}] {prefix}daily_{what}). It resets at 00:00 UTC, in {seconds_left} s; the operator can \
             raise it, and with a key of one's own granted it does not count.",
            used = spent.used,
            cap = spent.cap,
        );
        Self {
            refusal: Refusal::failed(StatusCode::TOO_MANY_REQUESTS, "daily_cap", message),
            retry_after_s: Some(seconds_left),
        }
    }

    pub(super) fn encoded() -> Self {
        let message = "Send the body without Content-Encoding: it must be read to count what its answer uses.";
        Refusal::failed(StatusCode::UNSUPPORTED_MEDIA_TYPE, "encoded_request", message).into()
    }

    pub(super) fn too_large(most: usize) -> Self {
        let message = format!("The body has over {} MiB; send less.", most >> 20);
        Refusal::failed(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message).into()
    }

    pub(super) fn unreadable() -> Self {
        let message = "The body did not come, or not in time; send it again.";
        Refusal::failed(StatusCode::BAD_REQUEST, "unreadable", message).into()
    }

    pub(super) fn bad_json(error: &dyn std::fmt::Display) -> Self {
        let message = format!("The body is not what this address takes: {error}.");
        Refusal::failed(StatusCode::BAD_REQUEST, "bad_json", message).into()
    }

    pub(super) fn background() -> Self {
        let message = "With this box's key nothing runs in the background, because what it uses could not be counted; send \
                       the request without `background`.";
        Refusal::denied("provider.background", "background", message.to_owned()).into()
    }

    /// OpenAI's clients read `error.message` and `error.code`, Anthropic's `type` and `error.type` besides.
    pub(super) fn response(self, random: &dyn Random) -> Response<Body> {
        let Refusal {
            status,
            code,
            rule,
            message,
            ..
        } = self.refusal;
        let kind = match status {
            StatusCode::BAD_REQUEST | StatusCode::UNSUPPORTED_MEDIA_TYPE => "invalid_request_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::NOT_FOUND => "not_found_error",
            StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            _ => "api_error",
        };
        let id = data_encoding::HEXLOWER.encode(&draw::<8>(random));
        let mut error = json!({"type": kind, "code": code, "message": message, "param": null, "request_id": id});
        if let Some(rule) = rule {
            error["rule"] = rule.into();
        }
        let mut response = refusal::json(&json!({"type": "error", "error": error}));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after_s {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        // The SDKs would try again by themselves, although only a person or the next day can help.
        if matches!(code, "daily_cap" | "no_key") {
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        response
    }
}
