//! Signs what the box says of itself (Ed25519, RFC 8032), so that it can be shown to somebody who was not there. It must
//! not know what is signed.

use ed25519_dalek::{Signer as _, SigningKey};
use zeroize::Zeroizing;

use crate::keys::derive;
use crate::vault::{Vault, VaultError};

/// What the key is derived under from the box's own key, so that it is the same as long as the database is.
pub(crate) const LABEL: &str = "choir report signature";

/// The box's signing key; it is wiped when it goes.
pub struct Signer(SigningKey);

impl Signer {
    /// The key with which others check a signature.
    pub fn public(&self) -> [u8; 32] {
        self.0.verifying_key().to_bytes()
    }

    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.0.sign(message).to_bytes()
    }
}

impl Vault {
    /// Names the box; the same as long as its database is, and says nothing of its keys.
    ///
    /// # Errors
    /// As [`Self::signer`].
    pub async fn box_id(&self) -> Result<String, VaultError> {
        let id: [u8; 8] = derive(&self.own_key().await?, "choir box id");
        Ok(data_encoding::HEXLOWER.encode(&id))
    }

    /// # Errors
    /// Sealed, damaged, or the database failed.
    pub async fn signer(&self) -> Result<Signer, VaultError> {
        let seed = Zeroizing::new(derive::<32>(&self.own_key().await?, LABEL));
        Ok(Signer(SigningKey::from_bytes(&seed)))
    }
}
