//! The typed client of the hypervisor's HTTP API. It must not know of terminals, files or configuration, keeps no
//! state between calls, and never puts a secret into an error.

mod account;
mod audit;
mod dial;
mod download;
mod error;
mod events;
mod grants;
mod prove;
mod sandbox;
mod secrets;
mod socket;
mod usage;
mod visit;
mod workspaces;

use std::fmt;
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{ACCEPT, AUTHORIZATION, COOKIE, HeaderMap, HeaderValue, ORIGIN};
use reqwest::{Method, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use url::Url;

pub use account::{CreateInvite, DevicePoll, DeviceStart, Invite, Me, NewInvite, Proof, Registered, Token, User};
pub use download::Download;
pub use error::ClientError;
pub use events::{Events, ServerEvent};
pub use prove::{Search, Step};
pub use reqwest::header;
pub use sandbox::{ExecEvent, ExecStream, Sandbox, TaskStream};
pub use socket::{Frame, Socket};
pub use visit::{Readiness, Visit};
pub use workspaces::SlotVerb;

use crate::error::ErrorBody;

/// How long a connection may take to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Shorter than the 10 s after which the hypervisor closes an idle connection, so that none is used as it closes.
const KEPT_IDLE: Duration = Duration::from_secs(5);

/// How long an answer may keep silent before its first byte, beyond what the caller asked the server to wait.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// How much of an archive is read at once, in bytes.
const PART: usize = 256 << 10;

/// What proves who is calling. It cannot be printed.
#[derive(Clone, Default)]
pub enum Credential {
    #[default]
    None,
    /// `choir_…`.
    Token(String),
    /// A `Cookie` header's value, as a browser would send it. Mutations then carry `Origin` and `X-Choir: 1`.
    Session(String),
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Token(_) => "Token(…)",
            Self::Session(_) => "Session(…)",
        })
    }
}

/// One hypervisor, called as one person.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    base: Url,
    credential: Credential,
    tls: Arc<rustls::ClientConfig>,
}

impl Client {
    /// A client of the hypervisor at `base`: scheme, host and port of its control host.
    ///
    /// # Errors
    /// [`ClientError::Url`] where `base` is not such an address, [`ClientError::Tls`] where the system's
    /// certificates cannot be read.
    pub fn new(base: &str, credential: Credential) -> Result<Self, ClientError> {
        let url = parse_base(base)?;
        let tls = dial::tls(&url)?;
        Ok(Self {
            http: dial::http(&url, &tls)?,
            base: url,
            credential,
            tls,
        })
    }

    /// The same hypervisor, called as somebody else.
    pub fn with_credential(&self, credential: Credential) -> Self {
        Self {
            credential,
            ..self.clone()
        }
    }

    /// The control host's origin, without a slash at its end.
    pub fn origin(&self) -> String {
        self.base.origin().ascii_serialization()
    }

    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.json(Method::GET, path, None::<&()>).await
    }

    pub(crate) async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        self.json(Method::POST, path, Some(body)).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Result<(), ClientError> {
        self.send(Request::new(Method::DELETE, path)).await.map(drop)
    }

    pub(crate) async fn json<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, ClientError> {
        let mut request = Request::new(method, path);
        if let Some(body) = body {
            request = request.body(body)?;
        }
        read(self.send(request).await?).await
    }

    /// Whether a hypervisor answers there.
    ///
    /// # Errors
    /// Any.
    pub async fn alive(&self) -> Result<(), ClientError> {
        self.send(Request::new(Method::GET, "/healthz")).await.map(drop)
    }

    /// Sends and returns only successes.
    pub(crate) async fn send(&self, request: Request) -> Result<Response, ClientError> {
        let answer = self.raw(request).await?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        let status = answer.status();
        let bytes = answer.bytes().await.unwrap_or_default();
        Err(refusal(status, &bytes))
    }

    async fn raw(&self, request: Request) -> Result<Response, ClientError> {
        let url = self.base.join(&request.path).map_err(|_| ClientError::Path)?;
        let mut headers = self.identity(&request.method)?;
        headers.extend(request.headers);
        headers
            .entry(ACCEPT)
            .or_insert(HeaderValue::from_static("application/json"));
        let mut builder = self.http.request(request.method, url).headers(headers);
        if let Some(body) = request.body {
            builder = builder.body(body);
        }
        // Not reqwest's own timeout: that would also cut a stream that is followed for hours.
        match (request.silence, builder.send()) {
            (Some(limit), sending) => tokio::time::timeout(limit, sending)
                .await
                .map_err(|_| ClientError::Silent {
                    url: self.origin(),
                    seconds: limit.as_secs(),
                })?,
            (None, sending) => sending.await,
        }
        .map_err(|e| self.broken(&e))
    }

    /// The headers that say who is calling, and, with a cookie, that it was meant.
    pub(crate) fn identity(&self, method: &Method) -> Result<HeaderMap, ClientError> {
        let mut headers = HeaderMap::new();
        let secret = |text: &str| {
            let mut value = HeaderValue::from_str(text).map_err(|_| ClientError::Credential)?;
            value.set_sensitive(true);
            Ok(value)
        };
        match &self.credential {
            Credential::Token(token) => {
                headers.insert(AUTHORIZATION, secret(&format!("Bearer {token}"))?);
            }
            Credential::Session(cookie) => {
                headers.insert(COOKIE, secret(cookie)?);
            }
            Credential::None => {}
        }
        if !matches!(self.credential, Credential::Token(_)) && method != Method::GET {
            let origin = HeaderValue::from_str(&self.origin()).map_err(|_| ClientError::Path)?;
            headers.insert(ORIGIN, origin);
            headers.insert("x-choir", HeaderValue::from_static("1"));
        }
        Ok(headers)
    }

    fn broken(&self, error: &reqwest::Error) -> ClientError {
        ClientError::unreachable(&self.origin(), error)
    }
}

/// One request; paths begin with `/` and are already escaped. Its body may hold a secret, so it cannot be printed.
pub(crate) struct Request {
    method: Method,
    path: String,
    headers: HeaderMap,
    body: Option<reqwest::Body>,
    /// How long the answer's head may take; `None` for as long as it takes.
    silence: Option<Duration>,
}

impl Request {
    pub(crate) fn new(method: Method, path: impl Into<String>) -> Self {
        Self {
            method,
            path: path.into(),
            headers: HeaderMap::new(),
            body: None,
            silence: Some(ANSWER_TIMEOUT),
        }
    }

    pub(crate) fn body(mut self, body: &impl Serialize) -> Result<Self, ClientError> {
        let bytes = serde_json::to_vec(body).map_err(|e| ClientError::Unexpected(e.to_string()))?;
        self.body = Some(bytes.into());
        self.header("content-type", "application/json")
    }

    /// An archive, read as it is sent. Where it cannot be read to its end, the request breaks off.
    pub(crate) fn archive(mut self, archive: impl Read + Send + 'static) -> Result<Self, ClientError> {
        let parts = futures_util::stream::try_unfold(archive, |mut archive| async move {
            let mut part = vec![0; PART];
            let read = archive.read(&mut part)?;
            part.truncate(read);
            Ok::<_, std::io::Error>((read > 0).then_some((part, archive)))
        });
        self.body = Some(reqwest::Body::wrap_stream(parts));
        self.header("content-type", "application/x-tar")
    }

    pub(crate) fn header(mut self, name: &'static str, value: &str) -> Result<Self, ClientError> {
        let value = HeaderValue::from_str(value).map_err(|_| ClientError::Path)?;
        self.headers.insert(name, value);
        Ok(self)
    }

    /// For answers that come when the work is done.
    pub(crate) fn patient(mut self, longer: Option<Duration>) -> Self {
        self.silence = longer.map(|l| l + ANSWER_TIMEOUT);
        self
    }
}

pub(crate) async fn read<T: DeserializeOwned>(answer: Response) -> Result<T, ClientError> {
    let bytes = answer
        .bytes()
        .await
        .map_err(|e| ClientError::Unexpected(e.to_string()))?;
    let text: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
    serde_json::from_slice(text).map_err(|e| ClientError::Unexpected(e.to_string()))
}

fn refusal(status: StatusCode, bytes: &[u8]) -> ClientError {
    match serde_json::from_slice::<ErrorBody>(bytes) {
        Ok(body) => ClientError::Refused {
            status: status.as_u16(),
            detail: Box::new(body.error),
        },
        Err(_) => ClientError::Status(status.as_u16()),
    }
}

fn parse_base(text: &str) -> Result<Url, ClientError> {
    let wrong = || ClientError::Url(text.to_owned());
    let url = Url::parse(text).map_err(|_| wrong())?;
    let plain = matches!(url.scheme(), "http" | "https")
        && url.host_str().is_some()
        && url.username().is_empty()
        && url.password().is_none()
        && matches!(url.path(), "" | "/")
        && url.query().is_none();
    if plain { Ok(url) } else { Err(wrong()) }
}

/// One segment of a path, so that no name can climb out of its place.
pub(crate) fn segment(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'~') {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_with_a_path_a_password_or_another_scheme_is_refused() {
        for bad in [
            "localhost:9090",
            "ftp://a",
            "http://",
            "http://a/b",
            "http://u:p@a",
            "http://a/?q",
        ] {
            assert!(parse_base(bad).is_err(), "{bad}");
        }
        for good in ["http://localhost:9090", "https://choir.example.com/"] {
            assert!(parse_base(good).is_ok(), "{good}");
        }
    }

    #[test]
    fn a_name_cannot_climb_out_of_its_segment() {
        assert_eq!(segment("../a b?"), "%2E%2E%2Fa%20b%3F");
        assert_eq!(segment("d-abc234"), "d-abc234");
    }

    #[test]
    fn a_credential_is_never_printed() {
        let client = Client::new("http://localhost:1", Credential::Token("choir_canary".into())).unwrap();
        assert!(!format!("{client:?}").contains("canary"));
        let headers = client.identity(&Method::POST).unwrap();
        assert!(!format!("{headers:?}").contains("canary"));
    }

    #[test]
    fn a_cookie_goes_with_origin_and_intent_and_a_token_without() {
        let base = Client::new("http://localhost:1", Credential::Session("a=b".into())).unwrap();
        let headers = base.identity(&Method::POST).unwrap();
        assert_eq!(headers["origin"], "http://localhost:1");
        assert_eq!(headers["x-choir"], "1");
        let token = base.with_credential(Credential::Token("t".into()));
        assert!(!token.identity(&Method::POST).unwrap().contains_key("origin"));
    }
}
