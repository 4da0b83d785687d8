//! The first user of a new ChoirOS, as far as a benchmark needs one: registers with a passkey in software, and is let
//! in at a sandbox's host. It must not keep anything on disk.

use std::collections::BTreeMap;

use anyhow::{Context, Result, anyhow, bail};
use choir_api::client::header::{ACCEPT, COOKIE, HeaderMap, HeaderValue, LOCATION};
use choir_api::client::{Client, Credential};
use passkey::authenticator::{Authenticator, UiHint, UserCheck, UserValidationMethod};
use passkey::client::DefaultClientData;
use passkey::crypto::rust_crypto::RustCryptoBackend;
use passkey::types::Passkey;
use passkey::types::ctap2::{Aaguid, Ctap2Error};
use passkey::types::webauthn::CredentialCreationOptions;
use serde_json::{Value, json};
use url::Url;

/// A login to a sandbox's host takes three; more is a loop.
const MAX_REDIRECTS: usize = 8;

/// Cookies by origin.
#[derive(Default)]
pub struct Person {
    jar: BTreeMap<String, BTreeMap<String, String>>,
}

impl Person {
    /// Registers `name` with an invite. Returns a client that calls with the new session.
    pub async fn register(&mut self, anonymous: &Client, name: &str, invite: &str) -> Result<Client> {
        let origin = Url::parse(&anonymous.origin())?;
        let asked = json!({ "username": name, "display_name": "Benchmark", "invite": invite });
        let options = self.ceremony(anonymous, &origin, "register/start", &asked).await?;
        let authenticator = Authenticator::new(Aaguid::new_empty(), None::<Passkey>, Present, RustCryptoBackend);
        let mut device = passkey::client::Client::new(authenticator).allows_insecure_localhost(true);
        let options: CredentialCreationOptions = serde_json::from_value(options)?;
        let made = device.register(&origin, options, DefaultClientData).await;
        let made = made.map_err(|error| anyhow!("the passkey cannot be made: {error:?}"))?;
        let body = json!({ "credential": serde_json::to_value(made)? });
        self.ceremony(anonymous, &origin, "register/finish", &body).await?;
        let cookie = self.cookie(&origin).context("registering gave no session")?;
        Ok(anonymous.with_credential(Credential::Session(cookie)))
    }

    /// Opens a sandbox's host as a browser does; the `Cookie` header it is opened with from now on.
    pub async fn open(&mut self, client: &Client, host: &Url) -> Result<String> {
        let mut url = host.clone();
        for _ in 0..MAX_REDIRECTS {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, HeaderValue::from_static("text/html"));
            headers.insert("sec-fetch-mode", HeaderValue::from_static("navigate"));
            headers.insert("sec-fetch-dest", HeaderValue::from_static("document"));
            headers.insert("sec-fetch-site", HeaderValue::from_static("none"));
            if let Some(cookie) = self.cookie(&url) {
                headers.insert(COOKIE, HeaderValue::try_from(cookie)?);
            }
            let visit = client.visit(&url, headers).await?;
            self.keep(&url, visit.cookies());
            match visit.headers.get(LOCATION) {
                Some(location) if (300..400).contains(&visit.status) => url = url.join(location.to_str()?)?,
                _ => return self.cookie(host).context("the sandbox's host gave no cookie"),
            }
        }
        bail!("{host} redirects without end")
    }

    async fn ceremony(&mut self, client: &Client, origin: &Url, step: &str, body: &Value) -> Result<Value> {
        let credential = self.cookie(origin).map_or(Credential::None, Credential::Session);
        let (answer, cookies) = client.with_credential(credential).ceremony(step, body).await?;
        self.keep(origin, cookies);
        Ok(answer)
    }

    fn keep(&mut self, url: &Url, cookies: Vec<(String, String)>) {
        let jar = self.jar.entry(url.origin().ascii_serialization()).or_default();
        for (name, value) in cookies {
            if value.is_empty() {
                jar.remove(&name);
            } else {
                jar.insert(name, value);
            }
        }
    }

    fn cookie(&self, url: &Url) -> Option<String> {
        let jar = self
            .jar
            .get(&url.origin().ascii_serialization())
            .filter(|jar| !jar.is_empty())?;
        let pairs: Vec<_> = jar.iter().map(|(name, value)| format!("{name}={value}")).collect();
        Some(pairs.join("; "))
    }
}

/// Somebody who is there and proves it.
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

/// A name for what must not meet what another run left behind.
pub fn random_name() -> Result<String> {
    let mut bytes = [0; 5];
    getrandom::fill(&mut bytes).map_err(|error| anyhow!("the system gives no randomness: {error}"))?;
    Ok(data_encoding::BASE32_NOPAD.encode(&bytes).to_ascii_lowercase())
}
