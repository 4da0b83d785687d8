//! Tokens and codes: how they are drawn, written for people, and hashed. It must not know what they open.

use choir_store::Hash;
use data_encoding::{BASE32_NOPAD, BASE64URL_NOPAD};
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

use crate::random::{Random, draw};

/// 256 random bits as base64url. It has no `Debug`, `Clone` or `Serialize`, so that it does not leak by accident.
pub struct Secret(String);

impl Secret {
    pub(super) fn draw(random: &dyn Random) -> Self {
        Self(BASE64URL_NOPAD.encode(&draw::<32>(random)))
    }

    /// Reads what a cookie or a link carries; `None` when it cannot be one of ours.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        (bytes.len() == 43 && BASE64URL_NOPAD.decode(bytes).is_ok())
            .then(|| Self(String::from_utf8_lossy(bytes).into_owned()))
    }

    /// The text itself, for the one place that hands it out.
    pub fn expose(&self) -> &str {
        &self.0
    }

    pub(super) fn hash(&self) -> Hash {
        Sha256::digest(self.0.as_bytes()).into()
    }
}

/// What API tokens begin with, so that scanners find leaked ones.
pub(super) const TOKEN_PREFIX: &str = "choir_";

/// A short public id, such as a session's in a list.
pub(super) fn public_id(random: &dyn Random) -> String {
    BASE32_NOPAD.encode(&draw::<10>(random)).to_ascii_lowercase()
}

/// How many recovery codes a user has.
pub(super) const RECOVERY_CODES: usize = 10;

/// Draws a set of recovery codes, 128 bits each: as people read them, and as they are stored.
pub(super) fn recovery_codes(random: &dyn Random, pepper: &[u8; 32]) -> (Vec<String>, Vec<Hash>) {
    (0..RECOVERY_CODES)
        .map(|_| {
            let plain = BASE32_NOPAD.encode(&draw::<16>(random));
            let hash = recovery_hash(pepper, &plain);
            (grouped(&plain, 4), hash)
        })
        .unzip()
}

/// The keyed hash of a code as somebody typed it: case, spaces, hyphens and look-alike digits do not matter.
pub(super) fn recovery_hash(pepper: &[u8; 32], typed: &str) -> Hash {
    let mut mac = Hmac::<Sha256>::new_from_slice(pepper).expect("HMAC takes a key of any length");
    let normal = typed
        .chars()
        .filter(char::is_ascii_alphanumeric)
        .map(|letter| match letter.to_ascii_uppercase() {
            '0' => 'O',
            '1' => 'I',
            '8' => 'B',
            other => other,
        });
    let normal: String = normal.take(64).collect();
    mac.update(normal.as_bytes());
    mac.finalize().into_bytes().into()
}

/// Eight consonants in two groups: easy to read out, spells nothing.
pub(super) fn user_code(random: &dyn Random) -> String {
    const LETTERS: &[u8; 20] = b"BCDFGHJKLMNPQRSTVWXZ";
    let mut code = String::new();
    while code.len() < 8 {
        let [byte] = draw::<1>(random);
        // 240 is the largest multiple of 20 in a byte: every letter is equally likely.
        if byte < 240 {
            code.push(char::from(LETTERS[usize::from(byte % 20)]));
        }
    }
    grouped(&code, 4)
}

fn grouped(text: &str, by: usize) -> String {
    let mut out = String::with_capacity(text.len() + text.len() / by);
    for (index, letter) in text.chars().enumerate() {
        if index > 0 && index % by == 0 {
            out.push('-');
        }
        out.push(letter);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::OsRandom;

    #[test]
    fn a_recovery_code_is_the_same_however_it_is_typed() {
        let pepper = [7; 32];
        let (codes, hashes) = recovery_codes(&OsRandom, &pepper);
        assert_eq!(codes.len(), RECOVERY_CODES);
        let typed = format!(
            " {} ",
            codes[0]
                .to_lowercase()
                .replace('-', " ")
                .replace('o', "0")
                .replace('i', "1")
        );
        assert_eq!(recovery_hash(&pepper, &typed), hashes[0]);
        assert_ne!(recovery_hash(&pepper, &codes[1]), hashes[0]);
        assert_ne!(
            recovery_hash(&[8; 32], &codes[0]),
            hashes[0],
            "without the pepper the hash says nothing"
        );
    }

    #[test]
    fn only_256_bits_of_base64url_read_as_a_secret() {
        let secret = Secret::draw(&OsRandom);
        assert!(Secret::parse(secret.expose().as_bytes()).is_some());
        for bad in ["", "abc", &"a".repeat(44), &"+".repeat(43), &" ".repeat(43)] {
            assert!(Secret::parse(bad.as_bytes()).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn user_codes_have_two_groups_of_four_consonants() {
        let code = user_code(&OsRandom);
        assert_eq!(code.len(), 9);
        assert!(
            code.bytes()
                .enumerate()
                .all(|(i, b)| if i == 4 { b == b'-' } else { b.is_ascii_uppercase() })
        );
    }
}
