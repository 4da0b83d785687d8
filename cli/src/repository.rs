//! Where a Git repository is, as people write it: `https://host/path`, `ssh://user@host/path` or `git@host:path`. It must
//! not know what is done with it.

use std::str::FromStr;

use choir_core::{HostName, Name};
use url::Url;

/// An address that can be cloned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repository {
    /// As it was written.
    pub url: String,
    pub host: HostName,
    /// As whom to sign in over SSH; over HTTPS there is nobody.
    pub user: Option<String>,
    path: String,
}

impl Repository {
    pub fn is_ssh(&self) -> bool {
        self.user.is_some()
    }

    /// What its last part makes as a workspace's name.
    pub fn name(&self) -> Option<Name> {
        let last = self.path.trim_end_matches('/').rsplit('/').next()?;
        let last = last.strip_suffix(".git").unwrap_or(last).to_ascii_lowercase();
        let words = last
            .split(|c: char| !c.is_ascii_alphanumeric())
            .filter(|word| !word.is_empty());
        let whole = words.collect::<Vec<_>>().join("-");
        let short: String = whole.chars().take(20).collect();
        short.trim_end_matches('-').parse().ok()
    }
}

impl FromStr for Repository {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unknown =
            || format!("{text:?} is no repository's address; write it like https://host/path.git or git@host:path.git");
        if text.starts_with('-') || text.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err(unknown());
        }
        let (host, user, path) = if text.contains("://") {
            let url = Url::parse(text).map_err(|_| unknown())?;
            let host = url.host_str().ok_or_else(unknown)?.to_owned();
            let user = match (url.scheme(), url.username()) {
                _ if url.password().is_some() => return Err(HAS_SECRET.to_owned()),
                ("ssh", "") => Some("git".to_owned()),
                ("ssh", user) => Some(user.to_owned()),
                ("https", "") => None,
                ("https", _) => return Err(HAS_SECRET.to_owned()),
                _ => return Err(unknown()),
            };
            (host, user, url.path().to_owned())
        } else {
            let (at, path) = text.split_once(':').ok_or_else(unknown)?;
            let (user, host) = at.split_once('@').ok_or_else(unknown)?;
            (host.to_owned(), Some(user.to_owned()), path.to_owned())
        };
        if path.trim_matches('/').is_empty() {
            return Err(unknown());
        }
        Ok(Self {
            url: text.to_owned(),
            host: host.parse().map_err(|_| unknown())?,
            user,
            path,
        })
    }
}

const HAS_SECRET: &str = "the address has a user or a password in it, which would stay in the clone; store the password \
                          with `choir secrets set` and name it with --secret";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_git_reads_them() {
        for (text, host, user, name) in [
            ("https://github.com/ada/Blog.git", "github.com", None, "blog"),
            ("https://git.example.com:8443/a/b/", "git.example.com", None, "b"),
            ("git@github.com:ada/blog.git", "github.com", Some("git"), "blog"),
            (
                "ssh://git.example.com:2222/~/a_b.c.git",
                "git.example.com",
                Some("git"),
                "a-b-c",
            ),
            ("ssh://me@git.example.com/x", "git.example.com", Some("me"), "x"),
            (
                "git@h.example:the-longest-name-of--them-all.git",
                "h.example",
                Some("git"),
                "the-longest-name-of",
            ),
        ] {
            let read: Repository = text.parse().unwrap();
            assert_eq!((read.host.as_str(), read.user.as_deref()), (host, user), "{text}");
            assert_eq!(read.name().unwrap().as_str(), name);
        }
    }

    #[test]
    fn what_is_no_address_or_holds_a_password_is_refused() {
        for bad in [
            "",
            "blog",
            "/srv/blog",
            "file:///srv/blog",
            "http://h.example/x",
            "git@h.example:",
            "-u@h.example:x",
        ] {
            assert!(
                bad.parse::<Repository>()
                    .unwrap_err()
                    .contains("no repository's address"),
                "{bad}"
            );
        }
        for secret in [
            "https://me:hunter2@h.example/x",
            "https://ghp_x@h.example/x",
            "ssh://a:b@h.example/x",
        ] {
            let told = secret.parse::<Repository>().unwrap_err();
            assert!(told.contains("--secret") && !told.contains("hunter2"), "{told}");
        }
    }
}
