//! Secrets that are SSH keys: what a grant of one says, the agent protocol's messages, what may be signed, and signing.
//! Of all this only `key` sees a secret. It must not know whose sandbox asks, nor where the messages come from.

mod judge;
mod key;
mod wire;

use choir_core::{HostName, Inject, Rule, SshUse};
use ssh_key::{HashAlg, PublicKey};

pub use judge::{Denial, Session, Signing};
pub use key::{KeyError, public_key, sign};
pub use wire::{Asked, Bind, FAILURE, LONGEST, SUCCESS, Sign, identities, read, signed};

/// What a grant cannot say about a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UseError {
    #[error("for SSH, name the hosts and their keys (`host_keys`), or what may be signed (`namespaces`), or both")]
    Nothing,
    #[error("`hosts` and `host_keys` go together: a host is known by its key only")]
    Unproven,
    #[error(
        "`host_keys` must be 1 to 20 public keys such as `ssh-ed25519 AAAA…`, without the host and not certificates"
    )]
    HostKeys,
    #[error("`users` must be 1 to 16 names such as `git`")]
    Users,
    #[error("`namespaces` must be at most 16 names such as `git`")]
    Namespaces,
}

const MOST_HOST_KEYS: usize = 20;
const MOST_NAMES: usize = 16;

/// Refuses what nobody could use, or what would not mean what it says.
pub fn check(key: &SshUse, hosts: usize) -> Result<(), UseError> {
    if key.host_keys.is_empty() && key.namespaces.is_empty() {
        return Err(UseError::Nothing);
    }
    if key.host_keys.is_empty() != (hosts == 0) {
        return Err(UseError::Unproven);
    }
    if key.host_keys.len() > MOST_HOST_KEYS || key.host_keys.iter().any(|text| host_key(text).is_none()) {
        return Err(UseError::HostKeys);
    }
    let names = |names: &[String]| names.len() <= MOST_NAMES && names.iter().all(|name| is_name(name));
    if !names(&key.users) || key.users.is_empty() {
        return Err(UseError::Users);
    }
    if !names(&key.namespaces) {
        return Err(UseError::Namespaces);
    }
    Ok(())
}

/// A user or a namespace as people write them; others cannot be granted.
fn is_name(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._@+-".contains(&b))
}

/// A host's key as a grant has it: a plain one, of a kind that can be verified.
fn host_key(text: &str) -> Option<PublicKey> {
    let key = PublicKey::from_openssh(text.trim()).ok()?;
    let data = key.key_data();
    let plain = data.is_ed25519() || data.is_ecdsa() || data.is_rsa();
    (plain && text.len() <= 4096 && !text.trim().contains(['\n', '\r'])).then_some(key)
}

/// A public key's fingerprint, as `ssh-keygen -l` shows it; of what is no key, nothing.
pub fn fingerprint(blob: &[u8]) -> Option<String> {
    let key = PublicKey::from_bytes(blob).ok()?;
    Some(key.fingerprint(HashAlg::Sha256).to_string())
}

/// The granted key, as the protocol names it.
pub fn blob(key: &SshUse) -> Option<Vec<u8>> {
    PublicKey::from_openssh(&key.public_key).ok()?.to_bytes().ok()
}

/// The keys that a well-known host publishes (docs.github.com, "GitHub's SSH key fingerprints"; docs.gitlab.com, "SSH host
/// keys fingerprints"); none for others.
pub fn published(host: &HostName) -> Vec<String> {
    let keys: [&str; 2] = match host.as_str() {
        "github.com" => [
            "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl",
            "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBEmKSENjQEezOmxkZMy7opKgwFB9nkt5YRrYMjNu\
             G5N87uRgg6CLrbo5wAdT/y6v0mKV0U2w0WZ2YB/++Tpockg=",
        ],
        "gitlab.com" => [
            "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAfuCHKVTjquxvt6CM6tdG4SLp1Btn/nOeHHE5UOzRdf",
            "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBFSMqzJeV9rUzU4kWitGjeR4PWSa29SPqJ1fVkht\
             j3Hw9xjLVXVYrU9QlYWrOLXBpQ6KWjbjTDTdDkoohFzgbEY=",
        ],
        _ => return Vec::new(),
    };
    keys.map(str::to_owned).to_vec()
}

/// The lines that make a program inside know the hosts of a rule, on whichever port.
pub fn known_hosts(rule: &Rule) -> String {
    let Inject::Ssh { ssh: key } = &rule.inject else {
        return String::new();
    };
    let mut lines = String::new();
    for host in &rule.hosts {
        for key in key.host_keys.iter().filter_map(|text| host_key(text)) {
            // Written anew, so that a comment cannot be more than that.
            let bare = PublicKey::from(key.key_data().clone()).to_openssh().unwrap_or_default();
            lines.push_str(&format!("{host},[{host}]:* {}\n", bare.trim_end()));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAfuCHKVTjquxvt6CM6tdG4SLp1Btn/nOeHHE5UOzRdf";

    fn at(host_keys: &[&str], namespaces: &[&str]) -> SshUse {
        SshUse {
            host_keys: host_keys.iter().map(|text| (*text).to_owned()).collect(),
            namespaces: namespaces.iter().map(|text| (*text).to_owned()).collect(),
            ..SshUse::default()
        }
    }

    #[test]
    fn a_use_that_could_not_mean_what_it_says_is_refused() {
        assert_eq!(check(&at(&[KEY], &[]), 1), Ok(()));
        assert_eq!(check(&at(&[&format!("{KEY} a comment")], &["git"]), 2), Ok(()));
        assert_eq!(check(&at(&[], &["git"]), 0), Ok(()));
        assert_eq!(check(&at(&[], &[]), 0), Err(UseError::Nothing));
        assert_eq!(check(&at(&[KEY], &[]), 0), Err(UseError::Unproven));
        assert_eq!(check(&at(&[], &["git"]), 1), Err(UseError::Unproven));
        let with_host = format!("gitlab.com {KEY}");
        let two = format!("{KEY}\n{KEY}");
        for bad in ["", "ssh-ed25519", "ssh-ed25519 AAAA", &KEY[12..], &with_host, &two] {
            assert_eq!(check(&at(&[bad], &[]), 1), Err(UseError::HostKeys), "{bad}");
        }
        for bad in ["", "a b", "a\n", "ä"] {
            assert_eq!(check(&at(&[], &[bad]), 0), Err(UseError::Namespaces), "{bad:?}");
            let user = SshUse {
                users: vec![bad.into()],
                ..at(&[KEY], &[])
            };
            assert_eq!(check(&user, 1), Err(UseError::Users), "{bad:?}");
        }
        let nobody = SshUse {
            users: vec![],
            ..at(&[KEY], &[])
        };
        assert_eq!(check(&nobody, 1), Err(UseError::Users));
    }

    #[test]
    fn the_published_keys_have_the_published_fingerprints() {
        for (host, fingerprints) in [
            (
                "github.com",
                [
                    "SHA256:+DiY3wvvV6TuJJhbpZisF/zLDA0zPMSvHdkr4UvCOqU",
                    "SHA256:p2QAMXNIC1TJYWeIOttrVc98/R1BUFWu3/LiyKgUfQM",
                ],
            ),
            (
                "gitlab.com",
                [
                    "SHA256:eUXGGm1YGsMAS7vkcx6JOJdOGHPem5gQp4taiCfCLB8",
                    "SHA256:HbW3g8zUjNSksFbqTiUWPWg2Bq1x8xdGUrliXFzSnUw",
                ],
            ),
        ] {
            let keys = published(&host.parse().unwrap());
            let shown = keys
                .iter()
                .map(|key| fingerprint(&host_key(key).unwrap().to_bytes().unwrap()).unwrap());
            assert_eq!(shown.collect::<Vec<_>>(), fingerprints);
        }
        assert!(published(&"git.example.com".parse().unwrap()).is_empty());
    }

    #[test]
    fn known_hosts_has_each_host_with_each_key_on_any_port_and_no_comment() {
        let rule = Rule {
            hosts: vec!["a.example".parse().unwrap(), "b.example".parse().unwrap()],
            methods: vec![],
            path_prefix: "/".into(),
            inject: Inject::Ssh {
                ssh: at(&[&format!("{KEY} * other")], &[]),
            },
        };
        assert_eq!(
            known_hosts(&rule),
            format!("a.example,[a.example]:* {KEY}\nb.example,[b.example]:* {KEY}\n")
        );
    }
}
