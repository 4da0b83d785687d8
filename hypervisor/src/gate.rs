//! Who may pass to a sandbox host, and waking what they came for. It must not know how bytes are carried.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use axum::response::{IntoResponse, Response};
use choir_core::settings::Access;
use choir_core::{Generation, SandboxHost};
use choir_proxy::answer::wants_page;
use choir_proxy::{Admission, Body, Gate, Peer, Visitor};
use http::header::{CACHE_CONTROL, LOCATION, REFERRER_POLICY, RETRY_AFTER};
use http::request::Parts;
use http::{HeaderName, HeaderValue, StatusCode};

use crate::app::{App, HOLD};
use crate::auth::{CALLBACK, SessionRef};
use crate::error::ApiError;
use crate::pages;
use crate::reconcile::{Handle, WakeError};
use crate::table::Entry;

/// How long a page navigation is held before it is shown that the sandbox wakes.
const PAGE_HOLD: Duration = Duration::from_millis(1500);
/// Wakes a minute that visitors without an account may cause on one public slot.
const PUBLIC_WAKES: u32 = 6;

/// Guards every sandbox host.
pub struct Gatekeeper {
    app: Arc<App>,
    /// One visitor per session, shared by its requests.
    visitors: RwLock<HashMap<String, Arc<Visitor>>>,
    nobody: Arc<Visitor>,
    /// Anonymous wakes by sandbox: the minute, and how many.
    public_wakes: Mutex<HashMap<String, (i64, u32)>>,
}

impl Gatekeeper {
    pub fn new(app: Arc<App>) -> Self {
        Self {
            app,
            visitors: RwLock::default(),
            nobody: Arc::default(),
            public_wakes: Mutex::default(),
        }
    }

    async fn decide(&self, host: &SandboxHost, head: &Parts) -> Result<Admission, Response> {
        let name = self.app.hosts.sandbox(host);
        if head.uri.path().starts_with("/_choir/") {
            return Err(self.own_path(&name, head).await);
        }
        let session = self
            .app
            .auth
            .host_session(&head.headers, &name)
            .await
            .map_err(IntoResponse::into_response)?;
        if !self.app.taken_over().await {
            return Err(ApiError::not_taken_over().into_response());
        }
        let (entry, port, generation) = loop {
            let entry = self.app.table.get(&host.user, &host.workspace);
            let Some(entry) = entry.filter(|entry| may_open(entry, host, session.as_deref())) else {
                return Err(self.turn_away(&name, head, session.is_some()));
            };
            let handle = &entry.slot(host.slot).handle;
            if let Some(generation) = handle.ready() {
                let port = entry.port(host);
                break (entry, port, generation);
            }
            self.wake(handle, head, session.is_some()).await?;
            // Once more from the table: what its hosts mean may have changed while it was away.
        };
        let target = entry.slot(host.slot);
        let visitor = match session {
            Some(session) => self.visitor(&session),
            None => self.nobody.clone(),
        };
        Ok(Admission::Pass(target.route(&entry, &generation, port), visitor))
    }

    async fn own_path(&self, host: &str, head: &Parts) -> Response {
        if head.uri.path() == CALLBACK && head.method == http::Method::GET {
            self.app.auth.callback(host, head.uri.query().unwrap_or_default()).await
        } else {
            ApiError::not_found().into_response()
        }
    }

    /// The answer for a host that is not there, and for one that is not this visitor's: the same.
    fn turn_away(&self, host: &str, head: &Parts, signed_in: bool) -> Response {
        if signed_in {
            return ApiError::not_found().into_response();
        }
        let page = wants_page(&head.headers) && head.method == http::Method::GET;
        if !page {
            return ApiError::unauthenticated().into_response();
        }
        let next = head.uri.path_and_query().map_or("/", |p| p.as_str());
        match HeaderValue::try_from(self.app.auth.open_url(host, next)) {
            Ok(to) => {
                let private = [
                    (LOCATION, to),
                    (REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
                    (CACHE_CONTROL, HeaderValue::from_static("no-store")),
                ];
                (StatusCode::SEE_OTHER, private).into_response()
            }
            Err(error) => ApiError::internal(error).into_response(),
        }
    }

    async fn wake(&self, handle: &Handle, head: &Parts, signed_in: bool) -> Result<Generation, Response> {
        if !signed_in && handle.sleeps() && !self.may_wake_anonymously(handle) {
            return Err(ApiError::too_many(60).into_response());
        }
        let page = wants_page(&head.headers) && head.method == http::Method::GET;
        match handle.wake(if page { PAGE_HOLD } else { HOLD }).await {
            Ok(generation) => Ok(generation),
            Err(WakeError::TooLong | WakeError::InLine(_)) if page => Err(waiting_page()),
            Err(error) => {
                if let WakeError::Failed(_) = error {
                    handle.activity.failed();
                }
                Err(ApiError::from(error).into_response())
            }
        }
    }

    fn may_wake_anonymously(&self, handle: &Handle) -> bool {
        let minute = self.app.clock.now().as_second() / 60;
        let mut wakes = self.public_wakes.lock().expect("never poisoned: no panic while held");
        wakes.retain(|_, (at, _)| *at == minute);
        let (_, count) = wakes.entry(handle.id.to_string()).or_insert((minute, 0));
        *count += 1;
        *count <= PUBLIC_WAKES
    }

    fn visitor(&self, session: &Arc<SessionRef>) -> Arc<Visitor> {
        if let Some(visitor) = self
            .visitors
            .read()
            .expect("never poisoned: no panic while held")
            .get(&session.id)
            && !visitor.closed.is_cancelled()
        {
            return visitor.clone();
        }
        let identity = HeaderValue::try_from(session.user.name.as_str())
            .map(|name| vec![(HeaderName::from_static("x-choir-user"), name)])
            .unwrap_or_default();
        let visitor = Arc::new(Visitor {
            identity,
            closed: self.app.auth.watch_session(session),
        });
        let mut visitors = self.visitors.write().expect("never poisoned: no panic while held");
        visitors.retain(|_, v| !v.closed.is_cancelled());
        visitors.insert(session.id.clone(), visitor.clone());
        visitor
    }
}

impl Gate for Gatekeeper {
    async fn admit(&self, host: &SandboxHost, head: &Parts, _peer: &Peer) -> Admission {
        match self.decide(host, head).await {
            Ok(admission) => admission,
            Err(response) => Admission::Answer(response.map(Body::wrap)),
        }
    }
}

fn may_open(entry: &Entry, host: &SandboxHost, session: Option<&SessionRef>) -> bool {
    match entry.access(host) {
        Access::Public => true,
        Access::Members => session.is_some(),
        Access::Private => session.is_some_and(|s| s.user.id == entry.owner),
    }
}

/// Shown to a person while a sandbox wakes; it asks again by itself, without script.
fn waiting_page() -> Response {
    let headers = [
        (RETRY_AFTER, HeaderValue::from_static("1")),
        (HeaderName::from_static("refresh"), HeaderValue::from_static("1")),
        (CACHE_CONTROL, HeaderValue::from_static("no-store")),
    ];
    (StatusCode::SERVICE_UNAVAILABLE, headers, pages::waiting()).into_response()
}
