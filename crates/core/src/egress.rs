//! Where a sandbox may connect to by name, and the names themselves. Addresses are judged elsewhere; it must not resolve.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The name of a host outside, as certificates and allow lists write it: lower case, without a dot at its end, and not
/// an address.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostName(String);

/// Text that does not name a host outside.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a host name such as `api.example.com`, in lower case, without a scheme, port or path")]
pub struct HostNameError(String);

impl HostName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for HostName {
    type Err = HostNameError;

    /// RFC 1123 names of at least two labels; the last has a letter, so that nothing reads it as an address.
    fn from_str(text: &str) -> Result<Self, HostNameError> {
        let label_ok = |label: &str| {
            (1..=63).contains(&label.len())
                && label
                    .bytes()
                    .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_'))
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        let last = text.rsplit('.').next().unwrap_or_default();
        let ok = text.len() <= 253
            && text.contains('.')
            && text.split('.').all(label_ok)
            && last.bytes().any(|b| b.is_ascii_lowercase())
            && !last.starts_with("0x");
        if ok {
            Ok(Self(text.to_owned()))
        } else {
            Err(HostNameError(text.chars().take(80).collect()))
        }
    }
}

impl TryFrom<String> for HostName {
    type Error = HostNameError;

    fn try_from(text: String) -> Result<Self, HostNameError> {
        text.parse()
    }
}

impl From<HostName> for String {
    fn from(host: HostName) -> String {
        host.0
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One entry of an allow list: a host, every host below one (`*.example.com`, not `example.com` itself), or an address.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum HostPattern {
    Host(HostName),
    Below(HostName),
    Address(IpAddr),
}

impl HostPattern {
    /// Whether this lets a program connect to `host`, written as programs write it.
    pub fn matches(&self, host: &str) -> bool {
        let host = normal(host);
        match self {
            Self::Host(name) => host == name.as_str(),
            Self::Below(name) => host
                .strip_suffix(name.as_str())
                .is_some_and(|rest| rest.len() > 1 && rest.ends_with('.')),
            Self::Address(address) => host.parse() == Ok(*address),
        }
    }
}

/// A host as it is compared: in lower case, without brackets and without the dot that ends an absolute name.
pub fn normal(host: &str) -> String {
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    bare.strip_suffix('.').unwrap_or(bare).to_ascii_lowercase()
}

impl FromStr for HostPattern {
    type Err = HostNameError;

    fn from_str(text: &str) -> Result<Self, HostNameError> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        match text.strip_prefix("*.") {
            Some(parent) => parent.parse().map(Self::Below),
            None => text.parse().map(Self::Host),
        }
    }
}

impl TryFrom<String> for HostPattern {
    type Error = HostNameError;

    fn try_from(text: String) -> Result<Self, HostNameError> {
        text.parse()
    }
}

impl From<HostPattern> for String {
    fn from(pattern: HostPattern) -> String {
        pattern.to_string()
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(name) => write!(f, "{name}"),
            Self::Below(name) => write!(f, "*.{name}"),
            Self::Address(address) => write!(f, "{address}"),
        }
    }
}

/// Where a workspace's sandboxes may connect to. Whatever it says, refused addresses stay refused, and a grant's own
/// hosts may be called through the broker.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EgressPolicy {
    /// The public internet.
    #[default]
    Open,
    /// Only these; an empty list means nothing.
    Allowlist(Vec<HostPattern>),
    /// Nothing.
    Locked,
}

/// Entries of one allow list.
pub const MOST_HOSTS: usize = 500;

impl EgressPolicy {
    /// The rule that refuses `host`, if one does.
    pub fn refuses(&self, host: &str) -> Option<&'static str> {
        match self {
            Self::Open => None,
            Self::Allowlist(hosts) if hosts.iter().any(|pattern| pattern.matches(host)) => None,
            Self::Allowlist(_) => Some("egress.allowlist"),
            Self::Locked => Some("egress.locked"),
        }
    }

    /// This policy, and `host` too. What lets everything through stays as it is.
    pub fn allowing(self, host: HostPattern) -> Self {
        let mut hosts = match self {
            Self::Open => return Self::Open,
            Self::Allowlist(hosts) => hosts,
            Self::Locked => Vec::new(),
        };
        if !hosts.contains(&host) {
            hosts.push(host);
        }
        Self::Allowlist(hosts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn list(hosts: &[&str]) -> EgressPolicy {
        EgressPolicy::Allowlist(hosts.iter().map(|h| h.parse().unwrap()).collect())
    }

    #[test]
    fn text_that_is_not_a_plain_host_name_is_refused() {
        let long = format!("{}.example", "a".repeat(64));
        for bad in [
            "",
            "localhost",
            ".",
            "a.",
            ".a.b",
            "a..b",
            "A.example",
            "https://a.example",
            "a.example:443",
            "a.example/",
            "a b.example",
            "-a.example",
            "a-.example",
            "127.0.0.1",
            "10.1",
            "0x7f.0x1",
            "[::1]",
            "*.example.com",
            "ä.example",
            "a.example\0",
            long.as_str(),
        ] {
            assert!(bad.parse::<HostName>().is_err(), "{bad:?}");
        }
        for good in [
            "api.github.com",
            "a.co",
            "xn--bcher-kva.example",
            "_dmarc.example.com",
            "1.example",
        ] {
            assert!(good.parse::<HostName>().is_ok(), "{good:?}");
        }
    }

    #[test]
    fn an_allow_list_lets_through_what_it_names_and_nothing_that_only_looks_alike() {
        let policy = list(&["api.example.com", "*.cdn.example", "1.1.1.1", "2606:4700::1111"]);
        for fine in [
            "api.example.com",
            "API.Example.Com",
            "api.example.com.",
            "a.cdn.example",
            "a.b.cdn.example",
            "1.1.1.1",
            "[2606:4700::1111]",
            "2606:4700:0::1111",
        ] {
            assert_eq!(policy.refuses(fine), None, "{fine}");
        }
        for refused in [
            "example.com",
            "evil-api.example.com",
            "api.example.com.evil.example",
            "cdn.example",
            "acdn.example",
            ".cdn.example",
            "1.1.1.2",
            "",
            "api.example.com..",
            "api.example.com:443",
        ] {
            assert_eq!(policy.refuses(refused), Some("egress.allowlist"), "{refused}");
        }
        assert_eq!(list(&[]).refuses("api.example.com"), Some("egress.allowlist"));
        assert_eq!(EgressPolicy::Locked.refuses("api.example.com"), Some("egress.locked"));
        // The control: without a policy the same name passes.
        assert_eq!(EgressPolicy::Open.refuses("evil-api.example.com"), None);
    }

    #[test]
    fn a_policy_is_one_word_or_a_list() {
        for (text, policy) in [
            (r#""open""#, EgressPolicy::Open),
            (r#""locked""#, EgressPolicy::Locked),
            (
                r#"{"allowlist":["a.example","*.b.example"]}"#,
                list(&["a.example", "*.b.example"]),
            ),
        ] {
            assert_eq!(serde_json::from_str::<EgressPolicy>(text).unwrap(), policy);
            assert_eq!(serde_json::to_string(&policy).unwrap(), text);
        }
        for bad in [
            r#""closed""#,
            r#"{"allowlist":["*"]}"#,
            r#"{"allowlist":["https://a.example"]}"#,
        ] {
            assert!(serde_json::from_str::<EgressPolicy>(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn allowing_a_host_lets_it_through_and_takes_nothing_away(
            names in proptest::collection::vec("[a-c]{1,2}\\.[a-c]{1,2}", 0..4), new in "[a-c]{1,2}\\.[a-c]{1,2}", other in "[a-c]{1,2}\\.[a-c]{1,2}",
        ) {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            for before in [EgressPolicy::Open, EgressPolicy::Locked, list(&names)] {
                let after = before.clone().allowing(new.parse().unwrap());
                prop_assert_eq!(after.refuses(&new), None);
                prop_assert!(before.refuses(&other).is_some() || after.refuses(&other).is_none());
                prop_assert!(other == new || before.refuses(&other).is_none() == after.refuses(&other).is_none());
            }
        }
    }
}
