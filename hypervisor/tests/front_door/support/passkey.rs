//! A software passkey that also does what an attacker's would: other origins, other relying parties, no verification.

use data_encoding::BASE64URL_NOPAD;
use passkey::authenticator::{Authenticator, UiHint, UserCheck, UserValidationMethod};
use passkey::crypto::rust_crypto::RustCryptoBackend;
use passkey::types::Passkey;
use passkey::types::ctap2::{Aaguid, Ctap2Error, get_assertion, make_credential};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// What an authenticator or a browser gets told; honest by default.
#[derive(Clone)]
pub struct Behaviour {
    pub origin: String,
    pub rp_id: String,
    pub verifies_user: bool,
    /// `type` of the client data; the right one when absent.
    pub kind: Option<&'static str>,
}

/// One passkey in software. A clone is a copied key, with its counter.
#[derive(Clone)]
pub struct SoftKey {
    pub passkey: Option<Passkey>,
    pub counts: bool,
}

struct Person {
    verified: bool,
}

#[async_trait::async_trait]
impl UserValidationMethod for Person {
    type PasskeyItem = Passkey;

    async fn check_user<'a>(
        &self,
        _hint: UiHint<'a, Passkey>,
        _presence: bool,
        _verification: bool,
    ) -> Result<UserCheck, Ctap2Error> {
        Ok(UserCheck {
            presence: true,
            verification: self.verified,
        })
    }

    fn is_presence_enabled(&self) -> bool {
        true
    }

    fn is_verification_enabled(&self) -> Option<bool> {
        Some(true)
    }
}

impl SoftKey {
    pub fn new() -> Self {
        Self {
            passkey: None,
            counts: true,
        }
    }

    fn authenticator(&self, verified: bool) -> Authenticator<Option<Passkey>, Person, RustCryptoBackend> {
        let mut made = Authenticator::new(
            Aaguid::new_empty(),
            self.passkey.clone(),
            Person { verified },
            RustCryptoBackend,
        );
        made.set_make_credentials_with_signature_counter(self.counts);
        made
    }

    /// Answers `/auth/register/start`.
    pub async fn create(&mut self, options: &Value, with: &Behaviour) -> Value {
        let options = &options["publicKey"];
        let selection = &options["authenticatorSelection"];
        assert_eq!(selection["residentKey"], "required", "{options}");
        assert_eq!(selection["userVerification"], "required", "{options}");
        let client_data = client_data(options, with, "webauthn.create");
        let mut authenticator = self.authenticator(with.verifies_user);
        let made = authenticator
            .make_credential(make_credential::Request {
                client_data_hash: Sha256::digest(&client_data).to_vec().into(),
                rp: make_credential::PublicKeyCredentialRpEntity {
                    id: with.rp_id.clone(),
                    name: None,
                },
                user: serde_json::from_value(options["user"].clone()).unwrap(),
                pub_key_cred_params: serde_json::from_value(options["pubKeyCredParams"].clone()).unwrap(),
                exclude_list: None,
                extensions: None,
                options: make_credential::Options {
                    rk: true,
                    up: true,
                    uv: with.verifies_user,
                },
                pin_auth: None,
                pin_protocol: None,
            })
            .await
            .expect("the software authenticator makes a passkey");
        self.passkey = authenticator.store().clone();
        let id = encode(&self.passkey.as_ref().unwrap().credential_id);
        json!({
            "id": id,
            "rawId": id,
            "type": "public-key",
            "response": {
                "attestationObject": encode(&made.as_webauthn_bytes()),
                "clientDataJSON": encode(&client_data),
                "transports": ["internal"],
            },
            "clientExtensionResults": {"credProps": {"rk": true}},
        })
    }

    /// Answers `/auth/login/start` and `/auth/step-up/start`.
    pub async fn assert(&mut self, options: &Value, with: &Behaviour) -> Value {
        let options = &options["publicKey"];
        assert_eq!(options["userVerification"], "required", "{options}");
        let client_data = client_data(options, with, "webauthn.get");
        let mut authenticator = self.authenticator(with.verifies_user);
        let made = authenticator
            .get_assertion(get_assertion::Request {
                rp_id: with.rp_id.clone(),
                client_data_hash: Sha256::digest(&client_data).to_vec().into(),
                allow_list: None,
                extensions: None,
                options: get_assertion::Options {
                    up: true,
                    uv: with.verifies_user,
                },
                pin_auth: None,
                pin_protocol: None,
            })
            .await
            .expect("the software authenticator has a passkey");
        self.passkey = authenticator.store().clone();
        let key = self.passkey.as_ref().unwrap();
        let id = encode(&key.credential_id);
        json!({
            "id": id,
            "rawId": id,
            "type": "public-key",
            "response": {
                "authenticatorData": encode(&made.auth_data.to_vec()),
                "clientDataJSON": encode(&client_data),
                "signature": encode(&made.signature),
                "userHandle": made.user.map(|user| encode(&user.id)),
            },
            "clientExtensionResults": {},
        })
    }
}

fn client_data(options: &Value, with: &Behaviour, kind: &str) -> Vec<u8> {
    let data = json!({
        "type": with.kind.unwrap_or(kind),
        "challenge": options["challenge"],
        "origin": with.origin,
        "crossOrigin": false,
    });
    serde_json::to_vec(&data).unwrap()
}

fn encode(bytes: &[u8]) -> String {
    BASE64URL_NOPAD.encode(bytes)
}
