//! The HTTP API: every route on one page, how it is served, and the one place where errors become answers.
//! It must not know what the routes do.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, FromRequest, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use choir_api::error::{ErrorBody, ErrorDetail};
use choir_api::sandbox::Health;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tower::ServiceExt;

use crate::agent::Agent;
use crate::{attach, exec, task_events, tasks, terminals};

/// The largest request body, in bytes.
const MAX_BODY: usize = 10 << 20;
/// Connections at once on each listener.
const MAX_CONNECTIONS: usize = 256;
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Every route.
pub fn router(agent: Arc<Agent>) -> Router {
    Router::new()
        .route("/health", get(health))
        .route("/exec", post(exec::run))
        .route("/tasks", get(tasks::list).post(tasks::create))
        .route("/tasks/{id}", get(tasks::get).delete(tasks::cancel))
        .route("/tasks/{id}/events", get(task_events::follow))
        .route("/terminals", get(terminals::list).post(terminals::create))
        .route("/terminals/{id}", get(terminals::get).delete(terminals::close))
        .route("/terminals/{id}/attach", get(attach::attach))
        .fallback(async || {
            ApiError::new(
                Status::NOT_FOUND,
                "no_such_route",
                "There is nothing here; see the API docs.",
            )
        })
        .method_not_allowed_fallback(async || {
            let message = "This route has no such method; see the API docs.";
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
        })
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(agent)
}

async fn health(State(agent): State<Arc<Agent>>) -> axum::Json<Health> {
    let config = agent.config();
    axum::Json(Health {
        status: if agent.is_stopping() { "stopping" } else { "ok" }.to_owned(),
        service: "sandbox".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        sandbox_id: config.sandbox_id.clone(),
        generation: config.generation,
        nonce: config.nonce.clone(),
        uptime_ms: u64::try_from(agent.uptime().as_millis()).unwrap_or(u64::MAX),
    })
}

/// The statuses that errors use, short.
pub struct Status;

impl Status {
    pub const BAD_REQUEST: StatusCode = StatusCode::BAD_REQUEST;
    pub const NOT_FOUND: StatusCode = StatusCode::NOT_FOUND;
    pub const UNAVAILABLE: StatusCode = StatusCode::SERVICE_UNAVAILABLE;
}

/// Why a request was not done.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    status: StatusCode,
    code: &'static str,
    message: String,
}

impl ApiError {
    /// `message` is one sentence that says what to do.
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { status, code, message }
    }
}

impl IntoResponse for ApiError {
    /// The body is written when the request's id is known, in `answer`.
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// A JSON body.
pub struct Json<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let kind = request.headers().get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
        if !kind.is_some_and(|k| k.starts_with(b"application/json")) {
            let message = "Send the body as JSON with Content-Type: application/json.";
            return Err(ApiError::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "json_expected",
                message,
            ));
        }
        let bytes = bytes::Bytes::from_request(request, state).await.map_err(|e| {
            let message = "The body is over 10 MiB or was cut off; send less.";
            ApiError::new(e.status(), "body_refused", message)
        })?;
        serde_json::from_slice(&bytes).map(Json).map_err(|e| {
            let message = format!("The body is not what this route takes: {e}.");
            ApiError::new(Status::BAD_REQUEST, "bad_body", message)
        })
    }
}

/// The query of a request.
pub fn query<T: DeserializeOwned>(uri: &axum::http::Uri) -> Result<T, ApiError> {
    axum::extract::Query::try_from_uri(uri).map(|q| q.0).map_err(|e| {
        let message = format!("The query is not what this route takes: {}.", e.body_text());
        ApiError::new(Status::BAD_REQUEST, "bad_query", message)
    })
}

/// Who may call on a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Callers {
    /// Whoever can open the socket.
    All,
    /// TCP on loopback: programs, but not web pages in a browser inside the sandbox.
    NotBrowsers,
}

/// Where the API is served.
#[derive(Debug)]
pub enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// Accepts until dropped. Connections accepted by then go on.
pub async fn serve(listener: Listener, router: Router, callers: Callers) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            return;
        };
        let router = router.clone();
        let accepted = match &listener {
            Listener::Unix(l) => l.accept().await.map(|(s, _)| {
                tokio::spawn(async move {
                    connection(s, router, callers).await;
                    drop(permit);
                })
            }),
            Listener::Tcp(l) => l.accept().await.map(|(s, _)| {
                tokio::spawn(async move {
                    connection(s, router, callers).await;
                    drop(permit);
                })
            }),
        };
        if accepted.is_err() {
            // Out of descriptors, most likely: trying again at once would only spin.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

async fn connection(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, router: Router, callers: Callers) {
    let service = hyper::service::service_fn(move |request: hyper::Request<Incoming>| {
        let router = router.clone();
        async move { Ok::<_, Infallible>(answer(request, router, callers).await) }
    });
    // A connection that breaks is the peer's affair.
    let _ = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades()
        .await;
}

async fn answer(request: hyper::Request<Incoming>, router: Router, callers: Callers) -> Response {
    static COUNT: AtomicU64 = AtomicU64::new(1);
    let id = request.headers().get(REQUEST_ID).cloned().unwrap_or_else(|| {
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        HeaderValue::try_from(format!("agent-{count}")).expect("letters and digits are a header value")
    });
    let response = if callers == Callers::NotBrowsers && may_be_a_page(request.headers()) {
        let message = "Web pages may not call the sandbox's API; use the socket or a program without an Origin header.";
        ApiError::new(StatusCode::FORBIDDEN, "not_for_pages", message).into_response()
    } else {
        router.oneshot(request.map(Body::new)).await.into_response()
    };
    finish(response, &id)
}

/// A page sends an Origin with whatever changes something; one that rebinds a DNS name sends that name as Host.
fn may_be_a_page(headers: &HeaderMap) -> bool {
    let host = headers.get(header::HOST).and_then(|h| h.to_str().ok());
    let name = host.map(|h| h.rsplit_once(':').map_or(h, |(name, _)| name));
    headers.contains_key(header::ORIGIN) || !matches!(name, Some("127.0.0.1" | "localhost"))
}

fn finish(mut response: Response, id: &HeaderValue) -> Response {
    response.headers_mut().insert(REQUEST_ID, id.clone());
    let Some(error) = response.extensions_mut().remove::<ApiError>() else {
        return response;
    };
    let body = ErrorBody {
        error: ErrorDetail {
            code: error.code.to_owned(),
            message: error.message,
            request_id: id.to_str().unwrap_or_default().to_owned(),
            more: serde_json::Map::new(),
        },
    };
    let (mut parts, _) = response.into_parts();
    let json = axum::Json(body).into_response();
    parts.headers.remove(header::CONTENT_LENGTH);
    parts
        .headers
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Response::from_parts(parts, json.into_body())
}
