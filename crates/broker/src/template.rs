//! Ready-made rules for well-known services, so that a grant names a service and a secret and nothing else.
//! It must not know who uses them.

use choir_core::{Inject, Rule, SshUse};

use crate::grant::rule;

const READ: &[&str] = &["GET", "HEAD"];
const CALL: &[&str] = &["GET", "HEAD", "POST"];
const ALL: &[&str] = &["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"];

/// Every template's name.
pub const NAMES: [&str; 12] = [
    "github",
    "github-git",
    "gitlab",
    "gitlab-git",
    "openai",
    "anthropic",
    "npm",
    "pypi",
    "crates-io",
    "claude",
    "codex",
    "gh",
];

/// The rule of a template; `None` where there is none of this name.
pub fn template(name: &str) -> Option<Rule> {
    Some(match name {
        "github" => rule(
            &["api.github.com", "uploads.github.com", "raw.githubusercontent.com"],
            ALL,
            bearer(),
        ),
        // Git over HTTPS and its large files: the password is a token, and the user's name is the service's own choice.
        "github-git" => rule(&["github.com"], CALL, basic("x-access-token")),
        "gitlab-git" => rule(&["gitlab.com"], CALL, basic("oauth2")),
        "gitlab" => rule(&["gitlab.com"], ALL, header("private-token", "{secret}")),
        "openai" => Rule {
            path_prefix: "/v1".to_owned(),
            ..rule(&["api.openai.com"], ALL, bearer())
        },
        "anthropic" => Rule {
            path_prefix: "/v1".to_owned(),
            ..rule(&["api.anthropic.com"], CALL, header("x-api-key", "{secret}"))
        },
        "npm" => rule(
            &["registry.npmjs.org"],
            &["GET", "HEAD", "PUT", "POST", "DELETE"],
            bearer(),
        ),
        "pypi" => Rule {
            path_prefix: "/legacy/".to_owned(),
            ..rule(&["upload.pypi.org"], &["POST"], basic("__token__"))
        },
        "crates-io" => Rule {
            path_prefix: "/api/v1/crates".to_owned(),
            ..rule(
                &["crates.io"],
                &["GET", "HEAD", "PUT", "DELETE"],
                header("authorization", "{secret}"),
            )
        },
        // What these tools send where a person has logged in, rather than set a key.
        "claude" => rule(&["api.anthropic.com"], CALL, bearer()),
        "codex" => Rule {
            path_prefix: "/backend-api/codex".to_owned(),
            ..rule(&["chatgpt.com"], CALL, bearer())
        },
        "gh" => rule(
            &["api.github.com", "uploads.github.com"],
            ALL,
            header("authorization", "token {secret}"),
        ),
        _ => return None,
    })
}

/// How a secret is used where only the way is said: `bearer`, `basic:USER`, `header:NAME`, `query:NAME` or `ssh`.
pub fn way(text: &str) -> Option<Inject> {
    match text.split_once(':') {
        None if text == "bearer" => Some(bearer()),
        None if text == "ssh" => Some(Inject::Ssh { ssh: SshUse::default() }),
        Some(("basic", user)) => Some(basic(user)),
        Some(("header", name)) => Some(header(name, "{secret}")),
        Some(("query", name)) => Some(Inject::Query { query: name.to_owned() }),
        _ => None,
    }
}

/// What a rule permits where its maker named no methods: looking.
pub fn default_methods() -> Vec<String> {
    READ.iter().map(|m| (*m).to_owned()).collect()
}

fn bearer() -> Inject {
    header("authorization", "Bearer {secret}")
}

fn basic(user: &str) -> Inject {
    Inject::Basic { basic: user.to_owned() }
}

fn header(name: &str, format: &str) -> Inject {
    Inject::Header {
        header: name.to_owned(),
        format: format.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grant::check;

    #[test]
    fn every_template_is_a_rule_that_could_have_been_typed() {
        for name in NAMES {
            let rule = template(name).unwrap();
            assert_eq!(check(&rule), Ok(()), "{name}");
        }
        assert_eq!(
            template("github").unwrap().hosts.len(),
            3,
            "a host that does not parse would be left out"
        );
        assert!(template("nowhere").is_none());
        for login in choir_core::logins::LOGINS {
            assert!(
                login.template.is_none_or(|name| NAMES.contains(&name)),
                "{}",
                login.tool
            );
        }
    }

    #[test]
    fn a_way_is_read_as_it_is_typed() {
        assert_eq!(way("bearer"), Some(bearer()));
        assert_eq!(way("basic:me"), Some(Inject::Basic { basic: "me".into() }));
        assert_eq!(way("header:x-api-key"), Some(header("x-api-key", "{secret}")));
        assert_eq!(way("query:key"), Some(Inject::Query { query: "key".into() }));
        assert_eq!(way("ssh"), Some(Inject::Ssh { ssh: SshUse::default() }));
        for bad in ["", "basic", "bearer:x", "cookie:a"] {
            assert_eq!(way(bad), None, "{bad}");
        }
    }
}
