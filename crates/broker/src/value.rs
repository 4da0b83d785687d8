//! A secret's plaintext: it cannot be printed, cloned or serialized, and is wiped when it goes.

use zeroize::Zeroizing;

/// The bytes of a secret. Not text: whatever a person stores comes back as it was.
pub struct SecretValue(Zeroizing<Vec<u8>>);

impl SecretValue {
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// The plaintext, for the one place that needs it. Whoever copies it must wipe the copy.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}
