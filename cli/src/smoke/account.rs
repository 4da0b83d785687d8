//! The throw-away user: registering, logging in and out, recovering. It must not keep anything on disk.

use choir_api::client::{Credential, DevicePoll, Registered};
use serde_json::{Value, json};

use super::browser::Browser;
use super::passkey::Device;
use crate::failure::Failure;

/// Somebody with a passkey and recovery codes.
pub struct Account {
    pub username: String,
    device: Device,
    codes: Vec<String>,
}

impl Account {
    pub async fn register(browser: &mut Browser, username: &str, invite: Option<&str>) -> Result<Self, Failure> {
        let mut device = Device::default();
        let start = json!({ "username": username, "display_name": "Smoke test", "invite": invite });
        let registered = make_passkey(browser, &mut device, &start).await?;
        expect(
            registered.recovery_codes.len() == 10,
            "registering gave other than 10 recovery codes",
        )?;
        Ok(Self {
            username: username.to_owned(),
            device,
            codes: registered.recovery_codes,
        })
    }

    pub async fn logout(&self, browser: &mut Browser) -> Result<(), Failure> {
        browser.ceremony("logout", &json!({})).await?;
        expect(
            !browser.session().me().await?.authenticated,
            "the session is still good after logging out",
        )
    }

    pub async fn login(&mut self, browser: &mut Browser) -> Result<(), Failure> {
        let options = browser.ceremony("login/start", &json!({})).await?;
        let signed = self.device.authenticate(browser.control(), &options).await?;
        browser
            .ceremony("login/finish", &json!({ "credential": signed }))
            .await?;
        self.is_me(browser).await
    }

    /// With a code, a new passkey on a new device; the old device is lost.
    pub async fn recover(&mut self, browser: &mut Browser) -> Result<(), Failure> {
        let code = self.codes.pop().unwrap_or_default();
        let used = json!({ "username": self.username, "code": code });
        browser.ceremony("recovery", &used).await?;
        let mut device = Device::default();
        make_passkey(browser, &mut device, &json!({})).await?;
        self.device = device;
        self.login(browser).await?;
        self.logout(browser).await?;
        let again = browser.ceremony("recovery", &used).await;
        expect(again.is_err(), "a recovery code was good twice")?;
        self.login(browser).await
    }

    /// What `choir login` and `choir logout` do, with the approval that a person gives in the browser.
    pub async fn device(&self, browser: &mut Browser) -> Result<(), Failure> {
        let token = self.token(browser, "choir smoke").await?;
        let client = browser.session().with_credential(Credential::Token(token));
        let user = client.me().await?.user;
        expect(
            user.is_some_and(|u| u.name == self.username),
            "the device's token is not this user's",
        )?;
        client.end_token().await?;
        let ended = client.workspaces().await;
        expect(
            ended.is_err_and(|e| e.status() == Some(401)),
            "the device's token is still good after logging out",
        )
    }

    /// A token that the passkey approved.
    pub async fn token(&self, browser: &mut Browser, device: &str) -> Result<String, Failure> {
        let anonymous = browser.session().with_credential(Credential::None);
        let start = anonymous.device_start(device).await?;
        let pending = anonymous.device_poll(&start.device_code).await?;
        expect(
            matches!(pending, DevicePoll::Pending),
            "a device code was good before anybody approved it",
        )?;
        let approval = json!({ "user_code": start.user_code });
        browser.ceremony("device/approve", &approval).await?;
        match anonymous.device_poll(&start.device_code).await? {
            DevicePoll::Granted { token, .. } => Ok(token),
            _ => Err(Failure::Failed("an approved device code gave no token".to_owned())),
        }
    }

    async fn is_me(&self, browser: &Browser) -> Result<(), Failure> {
        let me = browser.session().me().await?;
        let is_me = me.user.is_some_and(|user| user.name == self.username);
        expect(is_me, "logging in did not make a session of this user")
    }
}

async fn make_passkey(browser: &mut Browser, device: &mut Device, start: &Value) -> Result<Registered, Failure> {
    let options = browser.ceremony("register/start", start).await?;
    let credential = device.register(browser.control(), &options).await?;
    let answer = browser
        .ceremony("register/finish", &json!({ "credential": credential }))
        .await?;
    serde_json::from_value(answer)
        .map_err(|e| Failure::Failed(format!("the answer to the new passkey is not understood: {e}")))
}

/// Fails with `otherwise` where something is not so.
pub fn expect(is_so: bool, otherwise: &str) -> Result<(), Failure> {
    if is_so {
        Ok(())
    } else {
        Err(Failure::Failed(otherwise.to_owned()))
    }
}
