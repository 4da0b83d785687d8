//! What can go wrong with a call, as sentences for people. It must not carry secrets.

use crate::error::ErrorDetail;

/// Why a call gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address is not scheme, host and port alone.
    #[error("`{0}` is not the address of a hypervisor; write it like http://localhost:9090")]
    Url(String),
    #[error("the request's address or a header is not valid; check the names in it")]
    Path,
    #[error("the token has characters that no token has; run `choir login` again")]
    Credential,
    #[error("the system's certificates cannot be used ({0}); install the package ca-certificates")]
    Tls(String),
    /// No connection, or it broke.
    #[error("cannot reach {url}: {reason}; check that the hypervisor runs and that the address is right")]
    Unreachable { url: String, reason: String },
    #[error("{url} gave no answer within {seconds} s; check its `/readyz`, then try again")]
    Silent { url: String, seconds: u64 },
    /// The hypervisor, or the agent behind it, said no.
    #[error("{}", .detail.message)]
    Refused { status: u16, detail: Box<ErrorDetail> },
    /// An error status without our error body: something else answered.
    #[error("the server answered with HTTP status {0} and no reason; check that the address is a ChoirOS hypervisor")]
    Status(u16),
    #[error(
        "the answer is not one this version understands ({0}); check that client and hypervisor are the same version"
    )]
    Unexpected(String),
}

impl ClientError {
    /// The innermost reason says what happened; the layers above it only name libraries.
    pub(crate) fn unreachable(url: &str, error: &reqwest::Error) -> Self {
        let mut reason: &dyn std::error::Error = error;
        while let Some(inner) = reason.source() {
            reason = inner;
        }
        Self::Unreachable {
            url: url.to_owned(),
            reason: reason.to_string(),
        }
    }

    /// The HTTP status, where there was an answer.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Refused { status, .. } | Self::Status(status) => Some(*status),
            _ => None,
        }
    }

    /// The error's code for programs, such as `deployment_open`.
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Refused { detail, .. } => Some(&detail.code),
            _ => None,
        }
    }
}
