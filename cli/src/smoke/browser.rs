//! As much of a browser as logging in to a sandbox's host takes: cookies per host, redirects, websockets. It must not
//! send a host's cookie to another host.

use std::collections::BTreeMap;

use choir_api::client::header::{ACCEPT, COOKIE, HeaderMap, HeaderValue, LOCATION, ORIGIN};
use choir_api::client::{Client, Credential, Frame, Socket, Visit};
use serde_json::Value;
use url::Url;

use crate::failure::Failure;

/// A login to a sandbox's host takes three; more is a loop.
const MAX_REDIRECTS: usize = 8;

/// Cookies and the one client they go out with.
pub struct Browser {
    client: Client,
    control: Url,
    /// By host and port: `__Host-` cookies belong to exactly one host, and we are stricter than browsers on ports.
    jar: BTreeMap<String, BTreeMap<String, String>>,
}

impl Browser {
    pub fn new(client: Client) -> Result<Self, Failure> {
        let control = Url::parse(&client.origin()).map_err(|e| Failure::Failed(e.to_string()))?;
        Ok(Self {
            client,
            control,
            jar: BTreeMap::new(),
        })
    }

    pub fn control(&self) -> &Url {
        &self.control
    }

    /// A client that calls with what the control host has set.
    pub fn session(&self) -> Client {
        let credential = self.cookie(&self.control).map_or(Credential::None, Credential::Session);
        self.client.with_credential(credential)
    }

    /// One POST below `/auth`, keeping the cookies of the answer.
    pub async fn ceremony(&mut self, step: &str, body: &Value) -> Result<Value, Failure> {
        let (answer, cookies) = self.session().ceremony(step, body).await?;
        let control = self.control.clone();
        self.keep(&control, cookies);
        Ok(answer)
    }

    /// Goes to a page as a person would, through any redirects.
    pub async fn navigate(&mut self, url: &Url) -> Result<Visit, Failure> {
        let mut url = url.clone();
        for _ in 0..MAX_REDIRECTS {
            let visit = self.client.visit(&url, self.headers(&url)?).await?;
            self.keep(&url, visit.cookies());
            let location = visit.headers.get(LOCATION).and_then(|l| l.to_str().ok());
            match (visit.status, location) {
                (301..=303 | 307 | 308, Some(location)) => {
                    url = url.join(location).map_err(|_| {
                        Failure::Failed(format!("{url} redirects to `{location}`, which is no address"))
                    })?;
                }
                _ => return Ok(visit),
            }
        }
        Err(Failure::Failed(format!("{url} redirects without end")))
    }

    /// Sends `text` over a websocket to a host that was navigated to before, and returns what comes back.
    pub async fn echo(&self, url: &Url, text: &str) -> Result<String, Failure> {
        let mut headers = HeaderMap::new();
        if let Some(cookie) = self.cookie(url) {
            headers.insert(COOKIE, secret(&cookie)?);
        }
        headers.insert(ORIGIN, secret(&url.origin().ascii_serialization())?);
        let mut socket: Socket = self.client.socket_at(url, headers).await?;
        socket.send_text(text.to_owned()).await?;
        let frame = socket.next().await?;
        socket.close().await;
        match frame {
            Frame::Text(text) => Ok(text),
            other => Err(Failure::Failed(format!(
                "the websocket of {url} answered {other:?} and no text"
            ))),
        }
    }

    /// What a browser sends with a navigation that a person began.
    fn headers(&self, url: &Url) -> Result<HeaderMap, Failure> {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static("text/html,*/*;q=0.8"));
        headers.insert("sec-fetch-mode", HeaderValue::from_static("navigate"));
        headers.insert("sec-fetch-dest", HeaderValue::from_static("document"));
        headers.insert("sec-fetch-site", HeaderValue::from_static("none"));
        if let Some(cookie) = self.cookie(url) {
            headers.insert(COOKIE, secret(&cookie)?);
        }
        Ok(headers)
    }

    fn cookie(&self, url: &Url) -> Option<String> {
        let cookies = self.jar.get(&host(url)).filter(|c| !c.is_empty())?;
        let pairs: Vec<String> = cookies.iter().map(|(name, value)| format!("{name}={value}")).collect();
        Some(pairs.join("; "))
    }

    fn keep(&mut self, url: &Url, cookies: Vec<(String, String)>) {
        let jar = self.jar.entry(host(url)).or_default();
        for (name, value) in cookies {
            if value.is_empty() {
                jar.remove(&name);
            } else {
                jar.insert(name, value);
            }
        }
    }
}

fn host(url: &Url) -> String {
    url.origin().ascii_serialization()
}

fn secret(text: &str) -> Result<HeaderValue, Failure> {
    let mut value =
        HeaderValue::from_str(text).map_err(|_| Failure::Failed("a cookie has characters no cookie has".to_owned()))?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cookie_stays_with_its_host_until_it_is_cleared() {
        let client = Client::new("http://localhost:9090", Credential::None).unwrap();
        let mut browser = Browser::new(client).unwrap();
        let control = browser.control().clone();
        let sandbox = Url::parse("http://live--a--b.localhost:9090/").unwrap();
        browser.keep(&control, vec![("a".into(), "1".into()), ("b".into(), "2".into())]);
        assert_eq!(browser.cookie(&control).as_deref(), Some("a=1; b=2"));
        assert_eq!(browser.cookie(&sandbox), None);
        browser.keep(&control, vec![("a".into(), String::new())]);
        assert_eq!(browser.cookie(&control).as_deref(), Some("b=2"));
    }
}
