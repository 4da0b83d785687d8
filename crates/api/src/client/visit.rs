//! Plain GETs of any host the hypervisor serves, as a browser makes them one by one. It must not follow redirects or
//! keep cookies itself.

use std::collections::BTreeMap;

use reqwest::header::{HeaderMap, SET_COOKIE};
use serde::Deserialize;
use url::Url;

use super::{ANSWER_TIMEOUT, Client, ClientError};

/// One answer, whatever its status.
#[derive(Debug)]
pub struct Visit {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: String,
}

impl Visit {
    /// The `name=value` of each cookie it sets.
    pub fn cookies(&self) -> Vec<(String, String)> {
        set_cookies(&self.headers)
    }
}

/// `GET /readyz`.
#[derive(Debug, Clone, Deserialize)]
pub struct Readiness {
    pub ready: bool,
    /// Each part and `ok`, or what is the matter with it.
    pub parts: BTreeMap<String, String>,
    /// What does not work though the box does, as in `provider openai`.
    #[serde(default)]
    pub degraded: Vec<String>,
}

impl Readiness {
    /// The parts that are not ready, as in `release: importing`.
    pub fn missing(&self) -> Vec<String> {
        let missing = self.parts.iter().filter(|(_, state)| *state != "ok");
        missing.map(|(part, state)| format!("{part}: {state}")).collect()
    }
}

impl Client {
    /// Which parts are ready; that some are not is no error.
    ///
    /// # Errors
    /// Any.
    pub async fn readiness(&self) -> Result<Readiness, ClientError> {
        let url = self.base.join("/readyz").map_err(|_| ClientError::Path)?;
        let visit = self.visit(&url, HeaderMap::new()).await?;
        serde_json::from_str(&visit.body).map_err(|_| ClientError::Status(visit.status))
    }

    /// Gets a URL with exactly these headers; nobody's credential goes with it.
    ///
    /// # Errors
    /// [`ClientError::Unreachable`] and [`ClientError::Silent`]; a status is none.
    pub async fn visit(&self, url: &Url, headers: HeaderMap) -> Result<Visit, ClientError> {
        let origin = url.origin().ascii_serialization();
        let unreachable = |e: reqwest::Error| ClientError::unreachable(&origin, &e);
        let sending = self.http.get(url.clone()).headers(headers).send();
        let silent = |_| ClientError::Silent {
            url: origin.clone(),
            seconds: ANSWER_TIMEOUT.as_secs(),
        };
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, sending)
            .await
            .map_err(silent)?
            .map_err(unreachable)?;
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        let body = answer.bytes().await.map_err(unreachable)?;
        Ok(Visit {
            status,
            headers,
            body: String::from_utf8_lossy(&body).into_owned(),
        })
    }
}

pub(super) fn set_cookies(headers: &HeaderMap) -> Vec<(String, String)> {
    headers
        .get_all(SET_COOKIE)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .filter_map(|text| text.split(';').next()?.split_once('='))
        .map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned()))
        .collect()
}
