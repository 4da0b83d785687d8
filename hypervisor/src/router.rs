//! Every route of the control host on one page.

use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, State};
use axum::middleware::{self, Next};
use axum::response::IntoResponse;
use choir_proxy::{Body, Control, Peer};
use http::{Request, Response};
use tower::ServiceExt;

use crate::app::App;
use crate::auth::extract::PeerAddr;
use crate::auth::{self, Route};
use crate::error::ApiError;
use crate::{
    admin, deployments, downloads, events, grants, health, pages, prove, providers, releases, secrets, snapshots,
    tls_ask, workspaces,
};

/// The most a JSON body may have, in bytes. The sandbox API streams and is not bound by it.
const MOST_BODY: usize = 1 << 20;

/// Who may call what: all tables.
pub fn tables() -> Vec<&'static [Route]> {
    vec![
        auth::ROUTES,
        health::ROUTES,
        pages::status::ROUTES,
        workspaces::routes::ROUTES,
        deployments::routes::ROUTES,
        snapshots::routes::ROUTES,
        releases::routes::ROUTES,
        events::routes::ROUTES,
        admin::routes::ROUTES,
        secrets::routes::ROUTES,
        grants::routes::ROUTES,
        providers::routes::ROUTES,
        prove::routes::ROUTES,
        downloads::ROUTES,
        tls_ask::ROUTES,
    ]
}

/// The whole control host behind its guard.
pub fn router(app: &Arc<App>) -> Router {
    let own = pages::status::router()
        .merge(workspaces::routes::router())
        .merge(deployments::routes::router())
        .merge(snapshots::routes::router())
        .merge(releases::routes::router())
        .merge(admin::routes::router())
        .merge(prove::routes::router())
        .merge(tls_ask::router())
        .route_layer(middleware::from_fn_with_state(app.clone(), after_take_over))
        .merge(health::router())
        .merge(downloads::router())
        .merge(events::routes::router())
        .merge(secrets::routes::router())
        .merge(grants::routes::router())
        .merge(providers::routes::router())
        .with_state(app.clone());
    let router = own
        .merge(app.auth.router())
        .fallback(async || ApiError::not_found())
        .method_not_allowed_fallback(async || ApiError::method_not_allowed())
        .layer(DefaultBodyLimit::max(MOST_BODY));
    auth::protect(router, &app.auth, &tables())
}

/// Holds what concerns sandboxes until the hypervisor knows what runs.
async fn after_take_over(
    State(app): State<Arc<App>>,
    request: Request<axum::body::Body>,
    next: Next,
) -> axum::response::Response {
    if app.taken_over().await {
        next.run(request).await
    } else {
        ApiError::not_taken_over().into_response()
    }
}

/// The router as the proxy's control host.
pub struct ControlHost(pub Router);

impl Control for ControlHost {
    async fn serve(&self, mut request: Request<Body>) -> Response<Body> {
        if let Some(peer) = request.extensions().get::<Peer>() {
            let peer = PeerAddr(peer.addr);
            request.extensions_mut().insert(peer);
        }
        let answer = self.0.clone().oneshot(request.map(axum::body::Body::new)).await;
        answer.unwrap_or_else(|never| match never {}).map(Body::wrap)
    }
}
