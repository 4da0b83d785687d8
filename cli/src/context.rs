//! What every verb is given: where to call, as whom, about which workspace, and how to answer. It must not know any
//! verb.

use std::env;
use std::fs;
use std::path::PathBuf;

use choir_api::client::{Client, Credential, Sandbox};
use choir_core::{Name, Slot};
use jiff::Timestamp;
use serde::Serialize;
use url::Url;

use crate::args::DEFAULT_URL;
use crate::config::{self, Config};
use crate::failure::Failure;
use crate::output;

/// The surroundings of one run.
pub struct Context {
    /// The hypervisor's origin.
    pub url: String,
    pub workspace: Name,
    pub json: bool,
    pub now: Timestamp,
    pub config: Config,
    pub config_path: PathBuf,
}

impl Context {
    /// `url` is what was asked for on the command line or in `CHOIR_URL`.
    pub fn new(url: Option<String>, workspace: Name, json: bool, now: Timestamp) -> Result<Self, Failure> {
        let directory = |name: &str| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let config_path = config::path(directory("XDG_CONFIG_HOME"), directory("HOME"))?;
        let config = Config::load(&config_path)?;
        let url = url
            .or_else(|| config.url.clone())
            .unwrap_or_else(|| DEFAULT_URL.to_owned());
        Ok(Self {
            url: Client::new(&url, Credential::None)?.origin(),
            workspace,
            json,
            now,
            config,
            config_path,
        })
    }

    /// A client that calls as the person who logged in.
    pub fn client(&self) -> Result<Client, Failure> {
        let token = match token_from_file()? {
            Some(token) => token,
            None => {
                let login = self.config.logins.get(&self.url);
                let login = login.ok_or_else(|| {
                    Failure::Failed(format!(
                        "you are not logged in to {0}; run `choir login --url {0}`",
                        self.url
                    ))
                })?;
                login.token.clone()
            }
        };
        Ok(Client::new(&self.url, Credential::Token(token))?)
    }

    /// A client that calls as nobody.
    pub fn anonymous(&self) -> Result<Client, Failure> {
        Ok(Client::new(&self.url, Credential::None)?)
    }

    pub fn sandbox<'a>(&self, client: &'a Client, slot: Slot) -> Sandbox<'a> {
        client.sandbox(&self.workspace, slot)
    }

    /// Shows a result: as JSON where that was asked for, else as the text.
    pub fn show(&self, value: &impl Serialize, text: impl FnOnce() -> String) -> Result<(), Failure> {
        if self.json {
            return output::json(value);
        }
        let text = text();
        if text.is_empty() { Ok(()) } else { output::line(&text) }
    }

    /// A slot's address as a full URL, also where the hypervisor gave the host alone.
    pub fn absolute(&self, address: &str) -> Result<Url, Failure> {
        let scheme = self.url.split(':').next().unwrap_or("http");
        let full = if address.contains("://") {
            address.to_owned()
        } else {
            format!("{scheme}://{address}")
        };
        Url::parse(&full).map_err(|_| Failure::Failed(format!("the hypervisor gave `{address}`, which is no address")))
    }
}

/// The token in the file that `CHOIR_TOKEN_FILE` names, where it is set.
fn token_from_file() -> Result<Option<String>, Failure> {
    let Some(path) = env::var_os("CHOIR_TOKEN_FILE")
        .filter(|v| !v.is_empty())
        .map(PathBuf::from)
    else {
        return Ok(None);
    };
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(e) => Err(Failure::Failed(format!(
            "cannot read the token file {}: {e}; correct CHOIR_TOKEN_FILE or unset it",
            path.display()
        ))),
    }
}
