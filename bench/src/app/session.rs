//! The check behind the peers' proxies: as much work as our own session check does, a SHA-256 and a look-up. It must
//! not know cookies in the clear.

use std::collections::HashSet;

use anyhow::{Context, Result};
use data_encoding::HEXLOWER;
use sha2::{Digest, Sha256};

use crate::echo::header;

/// Other people's sessions beside the one that is used.
const OTHERS: u32 = 1000;

/// Hashes of the cookies that are let in.
pub struct Sessions {
    cookie: String,
    hashes: HashSet<[u8; 32]>,
}

impl Sessions {
    pub fn new(cookie: &str, hash: &str) -> Result<Self> {
        let hash = HEXLOWER
            .decode(hash.as_bytes())
            .context("the hash is not hexadecimal")?;
        let ours: [u8; 32] = hash.try_into().ok().context("the hash has not 32 bytes")?;
        let others = (0..OTHERS).map(|n| Sha256::digest(n.to_be_bytes()).into());
        Ok(Self {
            cookie: cookie.to_owned(),
            hashes: others.chain([ours]).collect(),
        })
    }

    /// Whether the request's cookie is a session's.
    pub fn has(&self, head: &[u8]) -> bool {
        let Some(cookies) = std::str::from_utf8(head).ok().and_then(|head| header(head, "cookie")) else {
            return false;
        };
        let mut pairs = cookies.split(';').filter_map(|pair| pair.trim().split_once('='));
        let value = pairs.find(|(name, _)| *name == self.cookie).map(|(_, value)| value);
        value.is_some_and(|value| self.hashes.contains::<[u8; 32]>(&Sha256::digest(value).into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_cookie_with_the_hash_is_let_in() {
        let sessions = Sessions::new("s", &HEXLOWER.encode(&Sha256::digest("secret"))).unwrap();
        assert!(sessions.has(b"GET / HTTP/1.1\r\nCookie: a=b; s=secret\r\n\r\n"));
        for head in ["Cookie: s=other", "Cookie: t=secret", "X: s=secret"] {
            assert!(
                !sessions.has(format!("GET / HTTP/1.1\r\n{head}\r\n\r\n").as_bytes()),
                "{head}"
            );
        }
    }
}
