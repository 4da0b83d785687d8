//! What a program inside is told when the broker does not do it: which rule refused and how a person can allow it. It
//! must not tell apart a grant that never was from one that ended.

use choir_broker::VaultError;
use choir_broker::grant::Denial;
use choir_core::Capability;
use choir_proxy::Body;
use choir_proxy::egress::Refused;
use choir_store::{Grant, Standing};
use http::{HeaderValue, Response, StatusCode, header};
use serde_json::{Value, json};

use crate::egress::Lost;
use crate::random::{Random, draw};

/// A call that is not made, or whose answer is not handed on.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    pub(crate) code: &'static str,
    /// The rule that refused, where one did.
    pub(crate) rule: Option<&'static str>,
    pub(crate) message: String,
    /// As the audit trail has it.
    pub(crate) outcome: &'static str,
}

impl Refusal {
    pub(crate) fn denied(rule: &'static str, outcome: &'static str, message: String) -> Self {
        Self {
            status: StatusCode::FORBIDDEN,
            code: "denied",
            rule: Some(rule),
            message,
            outcome,
        }
    }

    pub(crate) fn failed(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            rule: None,
            message: message.into(),
            outcome: code,
        }
    }

    pub(crate) fn nothing_here() -> Self {
        let message =
            "Nothing is here; GET /v1/capabilities lists what is granted, and calls go to /v1/egress/CAPABILITY/…";
        Self::failed(StatusCode::NOT_FOUND, "not_found", message)
    }

    pub(super) fn not_upgraded() -> Self {
        let message =
            "This is the SSH agent: programs find it at $SSH_AUTH_SOCK, which asks with `Upgrade: ssh-agent`.";
        Self::failed(StatusCode::UPGRADE_REQUIRED, "upgrade_required", message)
    }

    pub(crate) fn nowhere() -> Self {
        let message = "This sandbox is in no slot, so nothing is granted to it; its workspace is being deleted.";
        Self::denied("grant", "no_grant", message.to_owned())
    }

    pub(crate) fn not_granted(standing: &Standing, wanted: Option<&Capability>) -> Self {
        let message = match wanted {
            Some(capability) => format!(
                "{capability} is not granted to the {slot} slot of {workspace}; a person can allow it with `choir --workspace \
                 {workspace} grants add {capability} --slot {slot} --secret NAME`, and sees this request at /me/grants/requests.",
                slot = standing.slot,
                workspace = standing.workspace_name,
            ),
            None => "This cannot name a capability; GET /v1/capabilities lists what is granted.".to_owned(),
        };
        Self::denied("grant", "no_grant", message)
    }

    pub(crate) fn not_covered(denial: &Denial, grant: &Grant) -> Self {
        let (rule, capability) = (denial.rule(), &grant.capability);
        let outcome = rule.strip_prefix("grant.").unwrap_or(rule);
        let message = format!(
            "The grant of {capability} does not cover this call: {denial}; a person can make a wider one with `choir grants`."
        );
        Self::denied(rule, outcome, message)
    }

    pub(crate) fn not_revealed(grant: &Grant) -> Self {
        let message = format!(
            "The value of {capability} is not given out; call /v1/egress/{capability}/… instead, or a person can store the \
             secret anew with reveal.",
            capability = grant.capability
        );
        Self::denied("secret.reveal", "not_revealed", message)
    }

    /// A secret of the box has no grant.
    pub(crate) fn unsearchable(grant: Option<&Grant>) -> Self {
        let of = grant.map_or_else(|| "this box".to_owned(), |grant| grant.capability.to_string());
        let message = format!(
            "The secret of {of} is too short or too long to be searched for in an answer, so it is not sent; a person can \
             store one of {} to {} bytes.",
            choir_broker::scan::SHORTEST,
            choir_broker::scan::LONGEST
        );
        Self::denied("secret.length", "length", message)
    }

    pub(crate) fn unfit(error: &choir_broker::inject::InjectError) -> Self {
        Self::denied("secret.form", "unfit", format!("The call was not made: {error}."))
    }

    pub(crate) fn from_vault(error: &VaultError, standing: &Standing, grant: &Grant) -> Self {
        match error {
            VaultError::Sealed => Self::failed(
                StatusCode::SERVICE_UNAVAILABLE,
                "sealed",
                "The server's master key is missing, so no secret can be used; its operator must put the key file back.",
            ),
            // As if the grant had gone with its secret.
            VaultError::NotFound => Self::not_granted(standing, Some(&grant.capability)),
            VaultError::Store(_) | VaultError::Damaged => {
                tracing::error!(%error, capability = %grant.capability, "a granted secret cannot be opened");
                Self::unavailable()
            }
        }
    }

    pub(crate) fn unavailable() -> Self {
        let message = "The server cannot look this up right now; try again later.";
        Self::failed(StatusCode::SERVICE_UNAVAILABLE, "unavailable", message)
    }

    pub(crate) fn no_audit() -> Self {
        let message = "The use of a secret cannot be recorded right now, so none is released; try again later.";
        Self::failed(StatusCode::SERVICE_UNAVAILABLE, "audit_unavailable", message)
    }

    /// What a program wrote that two servers could read differently.
    pub(crate) fn malformed(message: &str) -> Self {
        Self::failed(
            StatusCode::BAD_REQUEST,
            "bad_request",
            format!("It was not sent: {message}."),
        )
    }

    pub(crate) fn broken(host: &str) -> Self {
        let message = format!("{host} broke the connection off before it answered; try again.");
        Self::failed(StatusCode::BAD_GATEWAY, "broken", message)
    }

    pub(crate) fn switched(host: &str) -> Self {
        let message = format!(
            "{host} switches protocols although the program did not ask it to; ask for a websocket with a GET."
        );
        Self::failed(StatusCode::BAD_GATEWAY, "switched", message)
    }

    pub(crate) fn encoded(host: &str) -> Self {
        let message = format!("{host} sent an encoded answer although none was asked for, so it cannot be searched.");
        Self::failed(StatusCode::BAD_GATEWAY, "encoded", message)
    }

    pub(crate) fn reflected(host: &str) -> Self {
        let message = format!("The answer of {host} contains the secret itself, so it is not handed on.");
        Self::failed(StatusCode::BAD_GATEWAY, "reflected", message)
    }

    pub(crate) fn response(self, random: &dyn Random) -> Response<Body> {
        let id = data_encoding::HEXLOWER.encode(&draw::<8>(random));
        let mut error = json!({"code": self.code, "message": self.message, "request_id": id});
        if let Some(rule) = self.rule {
            error["rule"] = rule.into();
        }
        let mut response = json(&json!({ "error": error }));
        *response.status_mut() = self.status;
        response
    }
}

impl From<Lost> for Refusal {
    fn from(lost: Lost) -> Self {
        let failed = |code| Self::failed(StatusCode::BAD_GATEWAY, code, format!("It was not sent: {lost}."));
        match &lost {
            Lost::Refused(Refused::Denied { .. }) => {
                Self::denied("egress.address", "address", format!("The call was not made: {lost}."))
            }
            Lost::Refused(Refused::Unresolved(_)) => failed("unresolved"),
            Lost::Refused(_) => failed("unreachable"),
            Lost::Untrusted(_) => failed("untrusted"),
            Lost::Broken(host) => Self::broken(host),
        }
    }
}

/// A JSON answer of the broker's own.
pub(crate) fn json(value: &Value) -> Response<Body> {
    let mut response = Response::new(Body::full(format!("{value}\n")));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
