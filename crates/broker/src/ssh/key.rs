//! A secret that is an OpenSSH private key: its public half, and signatures with it. Nothing of the private half leaves
//! this file, and what is read of it is wiped. It must not decide what may be signed.

use choir_core::SshUse;
use signature::Signer as _;
use ssh_key::encoding::Encode as _;
use ssh_key::private::KeypairData;
use ssh_key::{Algorithm, Error, HashAlg, PrivateKey, PublicKey, Signature};

use super::judge::Signing;
use crate::SecretValue;

/// Why a secret cannot sign.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    #[error(
        "the secret is no OpenSSH private key; make one with `ssh-keygen -t ed25519` and store the file that does not \
         end in `.pub`"
    )]
    NotAKey,
    #[error(
        "the key has a passphrase, and nobody is there to type it; take it off a copy with `ssh-keygen -p` and store that"
    )]
    Encrypted,
    #[error("keys of this kind cannot be used; make one with `ssh-keygen -t ed25519`")]
    Kind,
    #[error("the secret holds another key than when the grant was made; delete the grant and make it anew")]
    Changed,
    #[error("the key does not sign")]
    Broken,
}

/// The public half, as `ssh-keygen -y` shows it, without a comment.
///
/// # Errors
/// The secret is no key that could sign.
pub fn public_key(secret: &SecretValue) -> Result<String, KeyError> {
    let key = open(secret)?;
    // One signature now, so that a key that cannot sign is noticed when it is granted.
    signature(&key, Some(HashAlg::Sha512), b"")?;
    let bare = PublicKey::from(key.public_key().key_data().clone());
    bare.to_openssh().map_err(|_| KeyError::Broken)
}

/// The signature over what was judged, as the agent protocol wants it.
///
/// # Errors
/// The secret is not the key that the grant was made for, or does not sign.
pub fn sign(secret: &SecretValue, granted: &SshUse, signing: &Signing) -> Result<Vec<u8>, KeyError> {
    let key = open(secret)?;
    let expected = PublicKey::from_openssh(&granted.public_key).map_err(|_| KeyError::Changed)?;
    if key.public_key().key_data() != expected.key_data() {
        return Err(KeyError::Changed);
    }
    let signature = signature(&key, signing.hash(), signing.data())?;
    signature.encode_vec().map_err(|_| KeyError::Broken)
}

fn open(secret: &SecretValue) -> Result<PrivateKey, KeyError> {
    let key = PrivateKey::from_openssh(secret.expose()).map_err(|error| match error {
        Error::AlgorithmUnknown | Error::AlgorithmUnsupported { .. } => KeyError::Kind,
        _ => KeyError::NotAKey,
    })?;
    match key.key_data() {
        KeypairData::Encrypted(_) => Err(KeyError::Encrypted),
        KeypairData::Ed25519(_) | KeypairData::Ecdsa(_) | KeypairData::Rsa(_) => Ok(key),
        _ => Err(KeyError::Kind),
    }
}

/// `hash` is for RSA, the only kind that leaves a choice.
fn signature(key: &PrivateKey, hash: Option<HashAlg>, data: &[u8]) -> Result<Signature, KeyError> {
    let signed = match key.key_data() {
        KeypairData::Rsa(pair) => (pair, hash).try_sign(data),
        _ => key.try_sign(data),
    };
    signed.map_err(|_| KeyError::Broken)
}

/// What a signature of this key is called in the protocol, with the flags of the request.
pub(super) fn scheme(algorithm: &Algorithm, flags: u32) -> Option<(String, Option<HashAlg>)> {
    // RFC 9987, section 3.6.1: SHA-256 and SHA-512 with RSA. Without a flag it would be SHA-1.
    const SHA_256: u32 = 2;
    const SHA_512: u32 = 4;
    let hash = match algorithm {
        Algorithm::Rsa { .. } if flags & SHA_512 != 0 => Some(HashAlg::Sha512),
        Algorithm::Rsa { .. } if flags & SHA_256 != 0 => Some(HashAlg::Sha256),
        Algorithm::Rsa { .. } => return None,
        other => return Some((other.as_str().to_owned(), None)),
    };
    Some((Algorithm::Rsa { hash }.as_str().to_owned(), hash))
}
