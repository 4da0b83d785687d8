//! What a grant says, as data: which secret may go where, and how it is put in. What a grant lets pass is decided in
//! the broker; it must not hold a secret's value.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::egress::HostName;

/// The name by which a sandbox asks for something, such as `github`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Capability(String);

/// Text that cannot name a capability.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a capability has 1 to 32 of a-z, 0-9, `-` and `_`, and begins with a letter or a digit")]
pub struct CapabilityError;

impl Capability {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Capability {
    type Err = CapabilityError;

    fn from_str(text: &str) -> Result<Self, CapabilityError> {
        let ok = (1..=32).contains(&text.len())
            && text
                .bytes()
                .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_'))
            && !text.starts_with(['-', '_']);
        if ok {
            Ok(Self(text.to_owned()))
        } else {
            Err(CapabilityError)
        }
    }
}

impl TryFrom<String> for Capability {
    type Error = CapabilityError;

    fn try_from(text: String) -> Result<Self, CapabilityError> {
        text.parse()
    }
}

impl From<Capability> for String {
    fn from(capability: Capability) -> String {
        capability.0
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How a secret is put into a request, or used otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
pub enum Inject {
    /// As a header; `{secret}` in the format is replaced by the value.
    Header { header: String, format: String },
    /// As HTTP basic authentication: the value is the password of this user name.
    Basic { basic: String },
    /// As a parameter of the query.
    Query { query: String },
    /// Not at all: the secret is an OpenSSH private key, which signs for the sandbox's SSH agent.
    Ssh { ssh: SshUse },
}

/// What a key may sign: sign-ins at hosts that prove to hold one of `host_keys`, and signatures over data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SshUse {
    /// As in a known-hosts file, without the host: `ssh-ed25519 AAAA…`. Each of the grant's hosts may show any of them.
    #[serde(default)]
    pub host_keys: Vec<String>,
    /// As whom to sign in.
    #[serde(default = "git_user")]
    pub users: Vec<String>,
    /// What signatures may be for, as `ssh-keygen -Y sign -n` says it; `git` for commits and tags.
    #[serde(default)]
    pub namespaces: Vec<String>,
    /// The secret's public half, which the hypervisor finds when the grant is made. What a person says here is ignored.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub public_key: String,
}

fn git_user() -> Vec<String> {
    vec!["git".to_owned()]
}

impl Default for SshUse {
    fn default() -> Self {
        Self {
            host_keys: Vec::new(),
            users: git_user(),
            namespaces: Vec::new(),
            public_key: String::new(),
        }
    }
}

/// What a grant permits: the secret goes to these hosts over TLS on port 443, with these methods, at and below this path.
/// A key for SSH goes nowhere; there `hosts` are those with its host keys, and methods and path mean nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// The first is meant where a call names none.
    pub hosts: Vec<HostName>,
    /// In upper case. Empty permits none, as for SSH.
    pub methods: Vec<String>,
    /// Begins with a slash. `/v1/x` permits itself and what is below it; not `/v1/xy`.
    pub path_prefix: String,
    pub inject: Inject,
}
