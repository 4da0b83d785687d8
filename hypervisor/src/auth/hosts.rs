//! Signing in at a sandbox host: a ticket from the control host, exchanged there for a cookie of that host alone. It
//! must not know who may see which sandbox; that is decided at every request.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use choir_core::Target;
use choir_store::Hash;
use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;

use super::extract::Query;
use super::next::safe_next;
use super::secret::Secret;
use super::sessions::SessionRef;
use super::{Auth, Caller, cookies};
use crate::error::{ApiError, ApiResult};
use crate::pages;

/// How long a redirect may take.
const LIFETIME: SignedDuration = SignedDuration::from_secs(30);
/// Tickets at once.
const MOST: usize = 4096;

/// Where a sandbox host takes tickets.
pub const CALLBACK: &str = "/_choir/callback";

#[derive(Default)]
pub(super) struct Tickets(Mutex<HashMap<Hash, Ticket>>);

struct Ticket {
    session_id: String,
    /// The session's absolute end.
    session_ends: Timestamp,
    host: String,
    until: Timestamp,
}

impl Auth {
    /// A single-use ticket for one host and one session, good for 30 s.
    pub fn ticket(&self, session: &SessionRef, host: &str) -> ApiResult<Secret> {
        let now = self.now();
        let secret = Secret::draw(self.random());
        let mut tickets = self.0.tickets.0.lock().expect("no holder of this lock panics");
        tickets.retain(|_, ticket| ticket.until > now);
        if tickets.len() >= MOST {
            return Err(ApiError::too_many(LIFETIME.as_secs().unsigned_abs()));
        }
        let ticket = Ticket {
            session_id: session.id.clone(),
            session_ends: session.expires_at,
            host: host.to_owned(),
            until: now + LIFETIME,
        };
        tickets.insert(secret.hash(), ticket);
        Ok(secret)
    }

    /// Exchanges a ticket for the `Set-Cookie` value of `host`. A ticket that was shown is used up, wherever it was.
    pub async fn redeem(&self, ticket: &str, host: &str) -> ApiResult<HeaderValue> {
        let now = self.now();
        let used = || {
            ApiError::forbidden(
                "ticket_used",
                "This link was used or is too old; open the address again.",
            )
        };
        let secret = Secret::parse(ticket.as_bytes()).ok_or_else(used)?;
        let ticket = self
            .0
            .tickets
            .0
            .lock()
            .expect("no holder of this lock panics")
            .remove(&secret.hash());
        let ticket = ticket
            .filter(|t| t.until > now && t.host == host && self.0.sessions.is_live(&t.session_id, now))
            .ok_or_else(used)?;
        let cookie = Secret::draw(self.random());
        match self
            .0
            .store
            .add_host_session(cookie.hash(), ticket.session_id, ticket.host, now)
            .await
        {
            Err(choir_store::Error::NotFound) => Err(used()),
            other => Ok(other.map(|()| cookies::set(cookies::APP, &cookie, ticket.session_ends.duration_since(now)))?),
        }
    }

    /// The session behind this sandbox host's own cookie.
    pub async fn host_session(&self, headers: &HeaderMap, host: &str) -> ApiResult<Option<Arc<SessionRef>>> {
        match cookies::read(headers, cookies::APP)? {
            Some(cookie) => Ok(self.0.sessions.by_host(cookie.hash(), host, self.now()).await?),
            None => Ok(None),
        }
    }

    /// Where the control host signs a visitor of `host` in; for the redirect from a sandbox host.
    pub fn open_url(&self, host: &str, next: &str) -> String {
        let query = url::form_urlencoded::Serializer::new(String::new())
            .append_pair("host", host)
            .append_pair("next", next)
            .finish();
        format!("{}/auth/open?{query}", self.0.origin)
    }

    /// Answers `/_choir/callback?ticket=…&next=…` on a sandbox host.
    pub async fn callback(&self, host: &str, query: &str) -> Response {
        let pairs: HashMap<_, _> = url::form_urlencoded::parse(query.as_bytes()).collect();
        let ticket = pairs.get("ticket").map_or("", AsRef::as_ref);
        let next = safe_next(pairs.get("next").map(AsRef::as_ref));
        match self.redeem(ticket, host).await {
            Ok(cookie) => ([(header::SET_COOKIE, cookie)], redirect(next)).into_response(),
            Err(error) if error.status == StatusCode::FORBIDDEN => {
                let page = pages::message("Please open it again", &error.message, &self.open_url(host, next));
                (StatusCode::FORBIDDEN, private(), page).into_response()
            }
            Err(error) => (private(), error).into_response(),
        }
    }
}

#[derive(Deserialize)]
pub(super) struct Open {
    host: String,
    next: Option<String>,
}

/// Sends a signed-in visitor back to the sandbox host with a ticket.
pub(super) async fn open(State(auth): State<Auth>, caller: Caller, Query(open): Query<Open>) -> ApiResult<Response> {
    if !matches!(auth.0.hosts.parse(&open.host), Ok(Target::Sandbox(_))) {
        return Err(ApiError::not_found());
    }
    let ticket = auth.ticket(caller.session()?, &open.host)?;
    let query = url::form_urlencoded::Serializer::new(String::new())
        .append_pair("ticket", ticket.expose())
        .append_pair("next", safe_next(open.next.as_deref()))
        .finish();
    Ok(redirect(&format!(
        "{}://{}{CALLBACK}?{query}",
        auth.scheme(),
        open.host
    )))
}

/// A redirect that leaves no trace of where it came from.
fn redirect(to: &str) -> Response {
    match HeaderValue::try_from(to) {
        Ok(to) => (StatusCode::SEE_OTHER, private(), [(header::LOCATION, to)]).into_response(),
        Err(error) => ApiError::internal(error).into_response(),
    }
}

fn private() -> [(header::HeaderName, HeaderValue); 2] {
    [
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
    ]
}
