//! The keys of a host in a known-hosts file, as sshd(8) describes it: names in clear or hashed, ports in brackets. It
//! must not decide whom to trust: what is in the file is what its owner has confirmed.

use std::fs;
use std::path::{Path, PathBuf};

use data_encoding::BASE64;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha1::Sha1;

use crate::failure::Failure;

/// The file that `ssh` writes what a person confirms to.
pub fn own() -> Option<PathBuf> {
    let home = std::env::var_os("HOME").filter(|home| !home.is_empty())?;
    Some(Path::new(&home).join(".ssh/known_hosts"))
}

/// The keys of this host in a file, without comments.
///
/// # Errors
/// The file cannot be read, or does not know the host.
pub fn of(host: &str, file: &Path) -> Result<Vec<String>, Failure> {
    let text = fs::read_to_string(file)
        .map_err(|error| Failure::Failed(format!("cannot read {}: {error}; name another file", file.display())))?;
    let found = keys(host, &text);
    if found.is_empty() {
        let message = format!(
            "{} has no key of {host}; confirm it once with `ssh {host}`, or give it with --host-key",
            file.display()
        );
        return Err(Failure::Failed(message));
    }
    Ok(found)
}

fn keys(host: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some(names), Some(kind), Some(key)) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        // Comments, and the markers of authorities and of keys that were revoked.
        if names.starts_with(['#', '@']) || !names.split(',').any(|name| is_named(host, name)) {
            continue;
        }
        let line = format!("{kind} {key}");
        if !found.contains(&line) {
            found.push(line);
        }
    }
    found
}

/// On whichever port: a grant does not name one.
fn is_named(host: &str, name: &str) -> bool {
    if let Some(hashed) = name.strip_prefix("|1|") {
        return hash_is(hashed, host).unwrap_or(false);
    }
    let bare = name.strip_prefix('[').and_then(|rest| rest.split_once("]:"));
    bare.map_or(name, |(bare, _)| bare) == host
}

fn hash_is(hashed: &str, host: &str) -> Option<bool> {
    let (salt, hash) = hashed.split_once('|')?;
    let mut mac = Hmac::<Sha1>::new_from_slice(&BASE64.decode(salt.as_bytes()).ok()?).ok()?;
    mac.update(host.as_bytes());
    Some(mac.verify_slice(&BASE64.decode(hash.as_bytes()).ok()?).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_found_in_clear_hashed_and_with_a_port_and_no_other_is() {
        // The third line is `ssh-keygen -H` of `git.example.com`.
        let mac = |host: &str| {
            let mut mac = Hmac::<Sha1>::new_from_slice(b"salt").unwrap();
            mac.update(host.as_bytes());
            BASE64.encode(&mac.finalize().into_bytes())
        };
        let text = format!(
            "# git.example.com ssh-rsa comment\na.example,git.example.com ssh-ed25519 AAAA1 me@here\n|1|{}|{} \
             ecdsa-sha2-nistp256 AAAA2\n[git.example.com]:2222 ssh-ed25519 AAAA3\n@revoked git.example.com ssh-ed25519 \
             AAAA4\nother.git.example.com ssh-ed25519 AAAA5\n|1|c2FsdA==|AAAA ssh-ed25519 AAAA6\n",
            BASE64.encode(b"salt"),
            mac("git.example.com")
        );
        assert_eq!(
            keys("git.example.com", &text),
            ["ssh-ed25519 AAAA1", "ecdsa-sha2-nistp256 AAAA2", "ssh-ed25519 AAAA3"]
        );
        assert!(keys("example.com", &text).is_empty());
    }
}
