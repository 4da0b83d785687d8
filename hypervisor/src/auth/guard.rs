//! The middleware in front of every route of the control host: who calls, may they, and is the request really theirs.
//! On by default: a route that no table names needs a full session or token. It must not know what routes do.

use std::collections::HashMap;
use std::sync::Arc;

use axum::Router;
use axum::body::HttpBody as _;
use axum::extract::{MatchedPath, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use choir_store::SessionKind;

use super::secret::{self, Secret, TOKEN_PREFIX};
use super::{Auth, Caller, Credential, TokenRef, cookies};
use crate::error::{ApiError, ApiResult, with_request_id};

/// Who may call a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Anybody; the handler sees who it is, if anyone. All that a session begun by recovery may call.
    Public,
    /// A full session; no token.
    Session,
    /// A full session, or a token with scope `read` (GET and HEAD) or `write`.
    User,
    /// A user with the admin role, by session or by a token with scope `admin`.
    Admin,
}

/// The method of a route that takes all of them.
const ANY: &str = "ANY";

/// One route, as tests and the guard see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    pub access: Access,
    /// In upper case; `ANY` stands for all.
    pub method: &'static str,
    /// With parameters as axum writes them.
    pub path: &'static str,
}

impl Route {
    /// Whether it may change state, and so needs proof that the request was meant.
    pub fn mutates(&self) -> bool {
        self.method != "GET"
    }
}

/// Writes a table of routes once and makes both the `Route` list and the router of it:
/// `routes! { pub TABLE, router -> State; User GET get "/path" => handler; … }`
macro_rules! routes {
    ($vis:vis $table:ident, $router:ident -> $state:ty; $($access:ident $method:ident $verb:ident $path:literal => $handler:path;)*) => {
        #[doc = "Every route of this module, with who may call it."]
        $vis const $table: &[$crate::auth::Route] = &[
            $($crate::auth::Route { access: $crate::auth::Access::$access, method: stringify!($method), path: $path }),*
        ];

        $vis fn $router() -> axum::Router<$state> {
            axum::Router::new()$(.route($path, axum::routing::$verb($handler)))*
        }
    };
}
pub(crate) use routes;

/// Puts the guard, the request id and the security headers around the control host's whole router.
pub fn protect(router: Router, auth: &Auth, tables: &[&[Route]]) -> Router {
    let mut access: HashMap<_, Vec<Route>> = HashMap::new();
    for route in tables.iter().copied().flatten() {
        access.entry(route.path).or_default().push(*route);
    }
    let guard = Guard {
        auth: auth.clone(),
        access: Arc::new(access),
    };
    router
        .layer(middleware::from_fn_with_state(guard, guard_request))
        .layer(middleware::from_fn_with_state(auth.clone(), add_headers))
        .layer(middleware::from_fn_with_state(auth.clone(), add_request_id))
}

#[derive(Clone)]
struct Guard {
    auth: Auth,
    /// By path.
    access: Arc<HashMap<&'static str, Vec<Route>>>,
}

async fn add_request_id(State(auth): State<Auth>, request: Request, next: Next) -> Response {
    with_request_id(secret::public_id(auth.random()), request, next).await
}

async fn guard_request(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    let (mut head, body) = request.into_parts();
    match guard.admit(&head, body.is_end_stream()).await {
        Ok(caller) => {
            if let Some(caller) = caller {
                head.extensions.insert(caller);
            }
            next.run(Request::from_parts(head, body)).await
        }
        Err(error) if error.status == StatusCode::UNAUTHORIZED && is_navigation(&head) => to_login(&head),
        Err(error) => error.into_response(),
    }
}

impl Guard {
    async fn admit(&self, head: &Parts, empty: bool) -> ApiResult<Option<Caller>> {
        let route = self.route_of(head);
        let access = route.map_or(Access::User, |route| route.access);
        let caller = self.auth.caller_of(&head.headers).await?;
        match &caller {
            Some(caller) => permit(access, caller, &head.method)?,
            None if access == Access::Public => {}
            None => return Err(ApiError::unauthenticated()),
        }
        let bearer = matches!(
            &caller,
            Some(Caller {
                by: Credential::Token(_),
                ..
            })
        );
        // Behind a route for all methods is a sandbox, which any request wakes.
        let wakes = route.is_some_and(|route| route.method == ANY);
        self.check_origin(head, empty, bearer, wakes)?;
        Ok(caller)
    }

    fn route_of(&self, head: &Parts) -> Option<&Route> {
        let method = if head.method == Method::HEAD {
            "GET"
        } else {
            head.method.as_str()
        };
        let path = head.extensions.get::<MatchedPath>().map(MatchedPath::as_str);
        let routes = path.and_then(|path| self.access.get(path));
        routes?
            .iter()
            .find(|route| route.method == method || route.method == ANY)
    }

    /// What a browser sends for another site's page never gets through.
    fn check_origin(&self, head: &Parts, empty: bool, bearer: bool, wakes: bool) -> ApiResult<()> {
        let headers = &head.headers;
        let ours = exactly(headers, &header::ORIGIN, &self.auth.0.origin);
        let foreign = || ApiError::forbidden("foreign_origin", "This request came from another site and was refused.");
        if bearer {
            return if ours || !headers.contains_key(header::ORIGIN) {
                Ok(())
            } else {
                Err(foreign())
            };
        }
        let mutates = !matches!(head.method, Method::GET | Method::HEAD);
        let site = HeaderName::from_static("sec-fetch-site");
        if !mutates && !is_websocket(headers) {
            let from = headers.get(&site).map(HeaderValue::as_bytes);
            let elsewhere = matches!(from, Some(b"same-site" | b"cross-site"));
            return if wakes && elsewhere { Err(foreign()) } else { Ok(()) };
        }
        if !ours || (headers.contains_key(&site) && !exactly(headers, &site, "same-origin")) {
            return Err(foreign());
        }
        if mutates && !exactly(headers, &HeaderName::from_static("x-choir"), "1") {
            return Err(ApiError::forbidden("csrf", "The header X-Choir: 1 is missing."));
        }
        if mutates && !no_form_sends(headers, empty) {
            return Err(ApiError::forbidden(
                "csrf",
                "The body must be sent as application/json, an archive as application/x-tar.",
            ));
        }
        Ok(())
    }
}

fn permit(access: Access, caller: &Caller, method: &Method) -> ApiResult<()> {
    let reads = matches!(*method, Method::GET | Method::HEAD);
    if let Credential::Session(session) = &caller.by
        && session.kind == SessionKind::Recovery
        && access != Access::Public
    {
        return Err(ApiError::forbidden(
            "recovery_only",
            "Register a new passkey first; this sign-in allows nothing else.",
        ));
    }
    let scope = match access {
        Access::Public => return Ok(()),
        Access::Session => return caller.session().map(drop),
        Access::User if reads => "read",
        Access::User => "write",
        Access::Admin => "admin",
    };
    if access == Access::Admin && !caller.is_admin() {
        return Err(ApiError::forbidden(
            "admin_only",
            "Only an admin of this box may do this.",
        ));
    }
    caller.needs_scope(scope)
}

impl Auth {
    /// Who sends these headers: by the session cookie or by a bearer token, never by both.
    pub async fn caller_of(&self, headers: &HeaderMap) -> ApiResult<Option<Caller>> {
        let Some(authorization) = headers.get(header::AUTHORIZATION) else {
            let session = self.any_session_of(headers).await?;
            return Ok(session.map(|session| Caller {
                user: session.user.clone(),
                by: Credential::Session(session),
            }));
        };
        if cookies::present(headers, cookies::SESSION) {
            let message = "A token and a session cookie came together; send one of them.";
            return Err(ApiError::bad_request("two_credentials", message));
        }
        let Some(secret) = bearer(authorization) else {
            return Ok(None);
        };
        self.token_caller(&secret).await
    }

    async fn token_caller(&self, secret: &Secret) -> ApiResult<Option<Caller>> {
        let (now, hash) = (self.now(), secret.hash());
        let Some((token, user)) = self.0.store.token(hash, now).await? else {
            return Ok(None);
        };
        // Once a minute is fine enough for a list, and costs a busy script nothing.
        if token
            .last_used_at
            .is_none_or(|at| now.duration_since(at).as_secs() >= 60)
        {
            self.0.store.touch_token(hash, now).await?;
        }
        let token = TokenRef {
            id: token.id,
            scopes: token.scopes,
            expires_at: token.expires_at,
        };
        Ok(Some(Caller {
            user: Arc::new(user),
            by: Credential::Token(Arc::new(token)),
        }))
    }
}

fn bearer(value: &HeaderValue) -> Option<Secret> {
    let text = value.to_str().ok()?;
    let (scheme, token) = text.split_once(' ')?;
    let token = token.trim().strip_prefix(TOKEN_PREFIX)?;
    if scheme.eq_ignore_ascii_case("bearer") {
        Secret::parse(token.as_bytes())
    } else {
        None
    }
}

/// One header line with exactly this value.
fn exactly(headers: &HeaderMap, name: &HeaderName, value: &str) -> bool {
    let mut lines = headers.get_all(name).iter();
    lines.next().is_some_and(|line| line.as_bytes() == value.as_bytes()) && lines.next().is_none()
}

/// Whether the body is of a type that another site's page cannot send without asking first.
fn no_form_sends(headers: &HeaderMap, empty: bool) -> bool {
    let mut types = headers.get_all(header::CONTENT_TYPE).iter();
    match (types.next(), types.next()) {
        (None, None) => empty,
        (Some(kind), None) => kind.to_str().is_ok_and(|kind| {
            let essence = kind.split(';').next().unwrap_or_default().trim();
            ["application/json", "application/x-tar"]
                .iter()
                .any(|allowed| essence.eq_ignore_ascii_case(allowed))
        }),
        _ => false,
    }
}

fn is_websocket(headers: &HeaderMap) -> bool {
    headers.contains_key(header::UPGRADE)
}

/// A page that a person opens, as opposed to a call of a program or script.
fn is_navigation(head: &Parts) -> bool {
    let headers = &head.headers;
    let programs = [
        HeaderName::from_static("x-choir"),
        header::AUTHORIZATION,
        header::UPGRADE,
    ];
    if head.method != Method::GET || programs.iter().any(|name| headers.contains_key(name)) {
        return false;
    }
    match headers.get("sec-fetch-mode") {
        Some(mode) => mode == "navigate",
        None => headers
            .get(header::ACCEPT)
            .and_then(|v| v.to_str().ok())
            .is_some_and(|v| v.contains("text/html")),
    }
}

fn to_login(head: &Parts) -> Response {
    let here = head.uri.path_and_query().map_or("/", |path| path.as_str());
    let query = url::form_urlencoded::Serializer::new(String::new())
        .append_pair("next", here)
        .finish();
    (StatusCode::SEE_OTHER, [(header::LOCATION, format!("/login?{query}"))]).into_response()
}

const POLICY: &str = "default-src 'self'; script-src 'self'; frame-ancestors 'none'; base-uri 'none'; \
                      form-action 'self'; object-src 'none'";

/// Headers that hold for every answer of the control host; what a handler set itself stays.
async fn add_headers(State(auth): State<Auth>, request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    let mut add = |name: HeaderName, value: &'static str| {
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    };
    add(header::CONTENT_SECURITY_POLICY, POLICY);
    add(header::X_CONTENT_TYPE_OPTIONS, "nosniff");
    add(header::X_FRAME_OPTIONS, "DENY");
    add(header::REFERRER_POLICY, "same-origin");
    add(HeaderName::from_static("cross-origin-opener-policy"), "same-origin");
    add(HeaderName::from_static("cross-origin-resource-policy"), "same-origin");
    add(header::CACHE_CONTROL, "no-store");
    if auth.scheme() == "https" {
        add(header::STRICT_TRANSPORT_SECURITY, "max-age=31536000");
    }
    response
}
