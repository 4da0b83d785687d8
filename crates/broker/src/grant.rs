//! What a grant lets pass: host, method and path of one call, judged so that no way of writing a path widens it. What
//! a key for SSH may sign is judged in `ssh`. Pure; it must not know whose grant it is, nor what the secret says.

use choir_core::{HostName, Inject, Rule};

use crate::{inject, ssh};

/// The header by which a caller chooses among a grant's hosts.
pub const HOST_HEADER: &str = "x-choir-host";

/// Why a grant does not cover a call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    #[error("this grant goes to {allowed} only")]
    Host { allowed: String },
    #[error("this grant allows {allowed} only")]
    Method { allowed: String },
    #[error("this grant allows paths at and below {prefix} only")]
    Path { prefix: String },
    /// Two servers could read the path differently, so nothing can be said about where it leads.
    #[error(
        "the path can be read in more than one way; send it without `.` and `..`, empty and encoded parts of these"
    )]
    Ambiguous,
    #[error("this grant is for SSH, through the agent socket $SSH_AUTH_SOCK, and for nothing else")]
    Ssh,
}

impl Denial {
    /// The rule's field that refused, for programs.
    pub fn rule(&self) -> &'static str {
        match self {
            Self::Host { .. } => "grant.hosts",
            Self::Method { .. } => "grant.methods",
            Self::Path { .. } | Self::Ambiguous => "grant.path_prefix",
            Self::Ssh => "grant.inject",
        }
    }
}

/// A rule that nobody could use, or that would not mean what it says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    #[error("`hosts` needs 1 to 20 names, such as `api.example.com`")]
    Hosts,
    #[error("`methods` needs at least one of {}", METHODS.join(", "))]
    Methods,
    #[error("`path_prefix` must be a plain path such as `/` or `/v1/users`, without `.`, `..`, `//`, `%`, `?` and `#`")]
    Prefix,
    #[error("for SSH, `methods` must be empty and `path_prefix` `/`: nothing is sent by HTTP")]
    NotHttp,
    #[error(transparent)]
    Inject(#[from] inject::TemplateError),
    #[error(transparent)]
    Ssh(#[from] ssh::UseError),
}

const METHODS: [&str; 7] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];
const MOST_HOSTS: usize = 20;

/// Refuses, with a sentence, a rule that is not plain.
pub fn check(rule: &Rule) -> Result<(), RuleError> {
    if let Inject::Ssh { ssh: key } = &rule.inject {
        if !rule.methods.is_empty() || rule.path_prefix != "/" {
            return Err(RuleError::NotHttp);
        }
        if rule.hosts.len() > MOST_HOSTS {
            return Err(RuleError::Hosts);
        }
        return Ok(ssh::check(key, rule.hosts.len())?);
    }
    if rule.hosts.is_empty() || rule.hosts.len() > MOST_HOSTS {
        return Err(RuleError::Hosts);
    }
    if rule.methods.is_empty() || !rule.methods.iter().all(|m| METHODS.contains(&m.as_str())) {
        return Err(RuleError::Methods);
    }
    let plain = rule
        .path_prefix
        .bytes()
        .all(|b| b.is_ascii_graphic() && !b"%?#\\;\"<>^`{|}".contains(&b));
    if !plain || !rule.path_prefix.starts_with('/') || rule.path_prefix.len() > 1024 || !unambiguous(&rule.path_prefix)
    {
        return Err(RuleError::Prefix);
    }
    Ok(inject::check(&rule.inject)?)
}

/// The host that a call goes to, if the rule covers it. `host` is what the caller chose, if anything; `path` is the
/// path as it will be sent, without its query.
pub fn admit<'r>(rule: &'r Rule, method: &str, host: Option<&str>, path: &str) -> Result<&'r HostName, Denial> {
    if matches!(rule.inject, Inject::Ssh { .. }) {
        return Err(Denial::Ssh);
    }
    let mut hosts = rule.hosts.iter();
    let found = match host {
        None => hosts.next(),
        Some(chosen) => hosts.find(|known| known.as_str() == chosen),
    };
    let host = found.ok_or_else(|| Denial::Host {
        allowed: list(rule.hosts.iter().map(HostName::as_str)),
    })?;
    if !rule.methods.iter().any(|allowed| allowed == method) {
        return Err(Denial::Method {
            allowed: list(rule.methods.iter().map(String::as_str)),
        });
    }
    if !below(&rule.path_prefix, path) {
        return Err(Denial::Path {
            prefix: rule.path_prefix.clone(),
        });
    }
    if !unambiguous(path) {
        return Err(Denial::Ambiguous);
    }
    Ok(host)
}

fn list<'a>(items: impl Iterator<Item = &'a str>) -> String {
    items.collect::<Vec<_>>().join(", ")
}

/// Whether `path` is `prefix` or lies below it, letter by letter.
fn below(prefix: &str, path: &str) -> bool {
    path.strip_prefix(prefix)
        .is_some_and(|rest| rest.is_empty() || prefix.ends_with('/') || rest.starts_with('/'))
}

/// Nobody encodes a path so often but to hide something, and each time costs a pass over all of it.
const MOST_DECODED: usize = 8;

/// Whether every server finds the same parts in this path, none of which leads up: however often it decodes, whether it
/// takes `\` for `/`, merges slashes, or cuts parameters off at `;`. Encoded slashes are fine: what they part is judged
/// like the rest.
fn unambiguous(path: &str) -> bool {
    let mut bytes = path.as_bytes().to_vec();
    let mut rounds = 0;
    loop {
        let decoded = decode(&bytes);
        if decoded == bytes {
            break;
        }
        if rounds == MOST_DECODED {
            return false;
        }
        rounds += 1;
        bytes = decoded;
    }
    // Overlong forms of `.` and `/` are not UTF-8.
    let Ok(text) = std::str::from_utf8(&bytes) else {
        return false;
    };
    let mut parts = text
        .split(['/', '\\'])
        .map(|part| part.split(';').next().unwrap_or_default());
    let rooted = parts.next() == Some("");
    let parts: Vec<&str> = parts.collect();
    // A slash at the end leaves one empty part behind it.
    let inner = parts.len().saturating_sub(1);
    rooted
        && !text.chars().any(char::is_control)
        && parts.iter().all(|part| !matches!(part.trim(), "." | ".."))
        && parts.iter().take(inner).all(|part| !part.is_empty())
}

/// Decodes `%XX` once; what is not such a triple stays.
fn decode(bytes: &[u8]) -> Vec<u8> {
    let digit = |at: usize| bytes.get(at).and_then(|b| char::from(*b).to_digit(16));
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        match (bytes[at], digit(at + 1), digit(at + 2)) {
            // Two hexadecimal digits fit into a byte.
            (b'%', Some(high), Some(low)) => {
                out.push((high << 4 | low) as u8);
                at += 3;
            }
            (byte, ..) => {
                out.push(byte);
                at += 1;
            }
        }
    }
    out
}

/// A rule for one host, for the templates.
pub(crate) fn rule(hosts: &[&str], methods: &[&str], inject: Inject) -> Rule {
    Rule {
        hosts: hosts.iter().filter_map(|host| host.parse().ok()).collect(),
        methods: methods.iter().map(|m| (*m).to_owned()).collect(),
        path_prefix: "/".to_owned(),
        inject,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bearer() -> Inject {
        Inject::Header {
            header: "authorization".into(),
            format: "Bearer {secret}".into(),
        }
    }

    fn scoped(prefix: &str) -> Rule {
        Rule {
            path_prefix: prefix.into(),
            ..rule(&["api.a.example", "uploads.a.example"], &["POST"], bearer())
        }
    }

    #[test]
    fn a_call_within_its_scope_passes_to_the_host_it_chose() {
        let rule = scoped("/v1/x");
        assert_eq!(admit(&rule, "POST", None, "/v1/x").unwrap().as_str(), "api.a.example");
        assert_eq!(
            admit(&rule, "POST", Some("uploads.a.example"), "/v1/x/y")
                .unwrap()
                .as_str(),
            "uploads.a.example"
        );
        for fine in [
            "/v1/x/",
            "/v1/x/a.b/..c",
            "/v1/x/%41",
            "/v1/x/group%2Fproject",
            "/v1/x/a;v=1",
            "/v1/x/100%25",
        ] {
            assert!(admit(&rule, "POST", None, fine).is_ok(), "{fine}");
        }
    }

    #[test]
    fn another_method_host_or_path_is_denied_and_the_rule_is_named() {
        let rule = scoped("/v1/x");
        for (method, host, path, named) in [
            ("GET", None, "/v1/x", "grant.methods"),
            ("post", None, "/v1/x", "grant.methods"),
            ("POST", Some("b.example"), "/v1/x", "grant.hosts"),
            ("POST", Some("api.a.example:8443"), "/v1/x", "grant.hosts"),
            ("POST", Some("API.A.EXAMPLE"), "/v1/x", "grant.hosts"),
            ("POST", Some(""), "/v1/x", "grant.hosts"),
            ("POST", None, "/v1/xy", "grant.path_prefix"),
            ("POST", None, "/v1", "grant.path_prefix"),
            ("POST", None, "/V1/X", "grant.path_prefix"),
            ("POST", None, "//v1/x", "grant.path_prefix"),
            ("POST", None, "/v1//x", "grant.path_prefix"),
            ("POST", None, "/%761/x", "grant.path_prefix"),
            ("POST", None, "/", "grant.path_prefix"),
            ("POST", None, "*", "grant.path_prefix"),
        ] {
            assert_eq!(
                admit(&rule, method, host, path).unwrap_err().rule(),
                named,
                "{method} {host:?} {path}"
            );
        }
    }

    const CLIMBS: [&str; 22] = [
        "/v1/x/../y",
        "/v1/x/..",
        "/v1/x/./y",
        "/v1/x//y",
        "/v1/x//",
        "/v1/x/%2e%2e/y",
        "/v1/x/%2E%2e/y",
        "/v1/x/.%2e/y",
        "/v1/x/%252e%252e/y",
        "/v1/x/%25252e%25252e/y",
        "/v1/x/..%2fy",
        "/v1/x/..%5cy",
        "/v1/x/..\\y",
        "/v1/x/..;/y",
        "/v1/x/..;a=b/y",
        "/v1/x/%2e%2e%3b/y",
        "/v1/x/a%2f..%2f..%2fy",
        "/v1/x/%2f%2fy",
        "/v1/x/%00",
        "/v1/x/a%0d%0ab",
        "/v1/x/%c0%ae%c0%ae/y",
        "/v1/x/..%20/y",
    ];

    #[test]
    fn no_way_of_writing_a_path_leads_out_of_its_prefix() {
        let rule = scoped("/v1/x");
        for path in CLIMBS {
            assert_eq!(admit(&rule, "POST", None, path), Err(Denial::Ambiguous), "{path}");
            // The control: the letters alone, which is all that a plain comparison sees, are below the prefix.
            assert!(below("/v1/x", path), "{path}");
        }
    }

    #[test]
    fn a_rule_that_is_not_plain_is_refused_when_it_is_made() {
        assert_eq!(check(&scoped("/v1/x")), Ok(()));
        for bad in [
            "", "v1", "/v1/../x", "//", "/v1/%2e", "/v1?x", "/v1#x", "/v1\\x", "/v1/x y", "/a;b", "/ä", "/./",
        ] {
            assert_eq!(check(&scoped(bad)), Err(RuleError::Prefix), "{bad}");
        }
        assert_eq!(
            check(&Rule {
                methods: vec![],
                ..scoped("/")
            }),
            Err(RuleError::Methods)
        );
        assert_eq!(
            check(&Rule {
                methods: vec!["get".into()],
                ..scoped("/")
            }),
            Err(RuleError::Methods)
        );
        assert_eq!(
            check(&Rule {
                hosts: vec![],
                ..scoped("/")
            }),
            Err(RuleError::Hosts)
        );
    }

    /// Where a careless server ends up: decoded `times` times, with `\` as `/`, without parameters, dots resolved.
    fn resolved(path: &str, times: usize, cut: bool) -> Vec<String> {
        let mut bytes = path.as_bytes().to_vec();
        for _ in 0..times {
            bytes = decode(&bytes);
        }
        let text = String::from_utf8_lossy(&bytes).replace('\\', "/");
        let mut at = Vec::new();
        for part in text.split('/') {
            let part = if cut {
                part.split(';').next().unwrap_or_default()
            } else {
                part
            };
            match part {
                "" | "." => {}
                ".." => drop(at.pop()),
                part => at.push(part.to_owned()),
            }
        }
        at
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn whatever_is_admitted_stays_below_the_prefix_for_every_careless_server(
            parts in proptest::collection::vec(
                proptest::sample::select(vec![
                    "/", "//", "..", ".", "%2e", "%2E", "%2f", "%5c", "\\", "%25", "%252e", "%252f", ";", "%3b", "a", "v1", "x", "%61", "%",
                ]), 0..12),
        ) {
            let path = format!("/v1/x{}", parts.concat());
            if admit(&scoped("/v1/x"), "POST", None, &path).is_ok() {
                for times in 0..4 {
                    for cut in [false, true] {
                        let at = resolved(&path, times, cut);
                        let inside = at.len() >= 2 && at[0] == "v1" && (at[1] == "x" || at[1].starts_with("x;"));
                        prop_assert!(inside, "{} is {:?} after {} decodings", path, at, times);
                    }
                }
            }
        }

        #[test]
        fn a_plain_path_below_the_prefix_is_admitted(rest in "(/[a-zA-Z0-9_@~-][a-zA-Z0-9._@~-]{0,8}){0,4}/?") {
            let path = format!("/v1/x{rest}");
            prop_assert!(admit(&scoped("/v1/x"), "POST", None, &path).is_ok(), "{}", path);
        }

        #[test]
        fn no_text_makes_the_judgement_panic(path in "\\PC{0,60}", method in "\\PC{0,8}", host in "\\PC{0,20}") {
            let _ = admit(&scoped("/"), &method, Some(&host), &path);
        }
    }

    #[test]
    fn a_path_that_decodes_again_and_again_is_refused_in_a_few_rounds() {
        let often = |n: usize| format!("/%{}61", "25".repeat(n));
        assert!(unambiguous(&often(3)));
        assert!(!unambiguous(&often(30_000)));
    }
}
