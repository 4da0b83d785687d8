//! Sealing: XChaCha20-Poly1305 under a random nonce, bound to the row it is for. It must not know where blobs are kept.
//!
//! A blob is `1 | key id (8) | nonce (24) | ciphertext and tag (16)`. The associated data names scheme, table, user,
//! row, version and key, so that a blob opens only in the row it was made for.

use chacha20poly1305::aead::{Aead as _, KeyInit as _, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use choir_store::KeyIdBytes;

use crate::keys::{Fill, Key};
use crate::value::SecretValue;

const SCHEME: u8 = 1;
const KEY_ID: std::ops::Range<usize> = 1..9;
const NONCE: std::ops::Range<usize> = 9..33;

/// Which row a blob is for.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    pub table: &'a str,
    /// Empty where the row is nobody's.
    pub user: &'a str,
    pub row: &'a str,
    pub version: u64,
    /// What else must not change without the value: for a secret, whether it may be revealed.
    pub flag: bool,
}

/// The blob was changed, was made for another row, or is not sealed under this key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a sealed value cannot be opened: it is damaged or not this row's")]
pub struct Damaged;

/// Seals `plaintext` for a place under a new nonce.
pub fn seal(key: &Key, place: Place<'_>, plaintext: &[u8], random: &Fill) -> Vec<u8> {
    let mut blob = vec![0; NONCE.end];
    blob[0] = SCHEME;
    blob[KEY_ID].copy_from_slice(&key.id());
    random(&mut blob[NONCE]);
    let associated = associated(key, place);
    let payload = Payload {
        msg: plaintext,
        aad: &associated,
    };
    let nonce = XNonce::try_from(&blob[NONCE]).expect("a nonce has 24 bytes");
    let sealed = cipher(key).encrypt(&nonce, payload);
    blob.extend(sealed.expect("a plaintext in memory is shorter than the cipher allows"));
    blob
}

/// Opens what was sealed for this place under this key.
///
/// # Errors
/// Anything is otherwise than it was sealed.
pub fn open(key: &Key, place: Place<'_>, blob: &[u8]) -> Result<SecretValue, Damaged> {
    if key_id(blob)? != key.id() {
        return Err(Damaged);
    }
    let nonce = XNonce::try_from(&blob[NONCE]).map_err(|_| Damaged)?;
    let associated = associated(key, place);
    let payload = Payload {
        msg: &blob[NONCE.end..],
        aad: &associated,
    };
    let opened = cipher(key).decrypt(&nonce, payload).map_err(|_| Damaged)?;
    Ok(SecretValue::new(opened))
}

/// Which key a blob is sealed under.
///
/// # Errors
/// It is no blob of this scheme.
fn key_id(blob: &[u8]) -> Result<KeyIdBytes, Damaged> {
    if blob.len() < NONCE.end || blob[0] != SCHEME {
        return Err(Damaged);
    }
    blob[KEY_ID].try_into().map_err(|_| Damaged)
}

fn cipher(key: &Key) -> XChaCha20Poly1305 {
    XChaCha20Poly1305::new(key.bytes().into())
}

/// Each part after its length, so that no two places give the same bytes.
fn associated(key: &Key, place: Place<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in [
        b"choir sealed v1",
        place.table.as_bytes(),
        place.user.as_bytes(),
        place.row.as_bytes(),
        &place.version.to_be_bytes(),
        &[u8::from(place.flag)],
        &key.id(),
    ] {
        bytes.extend((part.len() as u64).to_be_bytes());
        bytes.extend(part);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::keys::Keyring;

    const PLACE: Place<'_> = Place {
        table: "secrets",
        user: "u",
        row: "r",
        version: 1,
        flag: false,
    };

    /// G15, short of the database: some ten minutes without optimisation, and 240 MB for the nonces.
    #[test]
    #[ignore = "slow"]
    fn of_the_nonces_of_ten_million_values_none_comes_twice() {
        const VALUES: usize = 10_000_000;
        let random: Fill = Arc::new(|bytes| getrandom::fill(bytes).unwrap());
        let key = Keyring::new(&random).first().clone();
        let sealed = |_| -> [u8; 24] { seal(&key, PLACE, b"value", &random)[NONCE].try_into().unwrap() };
        let mut nonces: Vec<_> = (0..VALUES).map(sealed).collect();
        let repeated = |nonces: &mut Vec<[u8; 24]>| {
            nonces.sort_unstable();
            nonces.windows(2).filter(|pair| pair[0] == pair[1]).count()
        };
        assert_eq!((nonces.len(), repeated(&mut nonces)), (VALUES, 0));
        // The control: a single one that comes twice among them is noticed.
        nonces[0] = nonces[VALUES / 2];
        assert_eq!(repeated(&mut nonces), 1);
    }
}
