//! A passkey in software: what a person's phone does in a ceremony. It keeps its key in memory alone and must not know
//! of HTTP.

use passkey::authenticator::{Authenticator, UiHint, UserCheck, UserValidationMethod};
use passkey::client::{Client, DefaultClientData};
use passkey::crypto::rust_crypto::RustCryptoBackend;
use passkey::types::Passkey;
use passkey::types::ctap2::{Aaguid, Ctap2Error};
use passkey::types::webauthn::{CredentialCreationOptions, CredentialRequestOptions};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use url::Url;

use crate::failure::Failure;

/// A person who is there and proves it.
struct Present;

#[async_trait::async_trait]
impl UserValidationMethod for Present {
    type PasskeyItem = Passkey;

    async fn check_user<'a>(
        &self,
        _hint: UiHint<'a, Passkey>,
        _presence: bool,
        _verification: bool,
    ) -> Result<UserCheck, Ctap2Error> {
        Ok(UserCheck {
            presence: true,
            verification: true,
        })
    }

    fn is_presence_enabled(&self) -> bool {
        true
    }

    fn is_verification_enabled(&self) -> Option<bool> {
        Some(true)
    }
}

/// An authenticator with room for one passkey.
#[derive(Default)]
pub struct Device {
    passkey: Option<Passkey>,
}

impl Device {
    /// Makes a passkey for `origin`, as the answer of a `register/start` asks.
    pub async fn register(&mut self, origin: &Url, options: &Value) -> Result<Value, Failure> {
        let request: CredentialCreationOptions = read(options)?;
        let mut client = Client::new(self.authenticator()).allows_insecure_localhost(true);
        let made = client.register(origin, request, DefaultClientData).await;
        let credential = made.map_err(|e| Failure::Failed(format!("the passkey cannot be made: {e:?}")))?;
        self.passkey.clone_from(client.authenticator().store());
        write(&credential)
    }

    /// Signs, as the answer of a `login/start` asks.
    pub async fn authenticate(&mut self, origin: &Url, options: &Value) -> Result<Value, Failure> {
        let request: CredentialRequestOptions = read(options)?;
        let mut client = Client::new(self.authenticator()).allows_insecure_localhost(true);
        let made = client.authenticate(origin, request, DefaultClientData).await;
        let credential = made.map_err(|e| Failure::Failed(format!("the passkey does not sign: {e:?}")))?;
        self.passkey.clone_from(client.authenticator().store());
        write(&credential)
    }

    fn authenticator(&self) -> Authenticator<Option<Passkey>, Present, RustCryptoBackend> {
        let store = self.passkey.clone();
        let mut authenticator = Authenticator::new(Aaguid::new_empty(), store, Present, RustCryptoBackend);
        authenticator.set_make_credentials_with_signature_counter(true);
        authenticator
    }
}

fn read<T: DeserializeOwned>(options: &Value) -> Result<T, Failure> {
    serde_json::from_value(options.clone())
        .map_err(|e| Failure::Failed(format!("the ceremony's options are not WebAuthn's: {e}")))
}

fn write(credential: &impl Serialize) -> Result<Value, Failure> {
    serde_json::to_value(credential).map_err(|e| Failure::Failed(e.to_string()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn a_device_signs_with_the_passkey_it_made_and_says_the_person_was_verified() {
        let origin = Url::parse("http://localhost:9090").unwrap();
        let mut device = Device::default();
        let options = json!({"publicKey": {
            "rp": {"id": "localhost", "name": "choir"},
            "user": {"id": "AAAA", "name": "ada", "displayName": "Ada"},
            "challenge": "AAECAwQFBgcICQoLDA0ODw",
            "pubKeyCredParams": [{"type": "public-key", "alg": -7}],
            "authenticatorSelection":
                {"residentKey": "required", "requireResidentKey": true, "userVerification": "required"},
            "attestation": "none",
            "extensions": {"credProps": true},
        }});
        let made = device.register(&origin, &options).await.unwrap();
        assert_eq!(made["type"], "public-key");
        assert!(made["response"]["attestationObject"].is_string());
        let options = json!({"publicKey": {
            "challenge": "AAECAwQFBgcICQoLDA0ODw", "rpId": "localhost", "userVerification": "required",
            "allowCredentials": [],
        }});
        let signed = device.authenticate(&origin, &options).await.unwrap();
        assert_eq!(signed["rawId"], made["rawId"]);
        assert_eq!(signed["response"]["userHandle"], "AAAA");
        let data = signed["response"]["authenticatorData"].as_str().unwrap();
        let data = data_encoding::BASE64URL_NOPAD.decode(data.as_bytes()).unwrap();
        let (present, verified) = (data[32] & 1, data[32] & 4);
        assert_eq!((present, verified), (1, 4));
    }

    #[tokio::test]
    async fn another_site_gets_no_signature() {
        let origin = Url::parse("http://evil.example").unwrap();
        let options = json!({"publicKey": {"challenge": "AAAA", "rpId": "localhost"}});
        assert!(Device::default().authenticate(&origin, &options).await.is_err());
    }
}
