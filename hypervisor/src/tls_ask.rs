//! Whether there is such a host: what a proxy asks before it gets a certificate for a name that somebody opened. It must
//! not tell strangers which users and workspaces there are.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use choir_core::Target;
use serde::Deserialize;

use crate::app::App;
use crate::auth::extract::{PeerAddr, Query};
use crate::auth::routes;
use crate::error::{ApiError, ApiResult};

routes! {
    pub ROUTES, router -> Arc<App>;
    Public GET get "/internal/tls-ask" => tls_ask;
}

#[derive(Deserialize)]
struct Ask {
    /// A host's name without a port.
    domain: String,
}

async fn tls_ask(State(app): State<Arc<App>>, peer: PeerAddr, Query(ask): Query<Ask>) -> ApiResult<StatusCode> {
    let trusted = &app.config.listen.trusted_proxies;
    if !peer.0.is_loopback() && !trusted.iter().any(|net| net.contains(&peer.0)) {
        return Err(ApiError::forbidden(
            "tls_ask",
            "Only this machine and its proxies may ask; name the proxy in [listen] trusted_proxies.",
        ));
    }
    if app.may_have_certificate(&ask.domain) {
        Ok(StatusCode::OK)
    } else {
        Err(ApiError::not_found())
    }
}

impl App {
    /// An authority gives a domain some dozens of certificates a week and a slot has 65,535 ports, so that a stranger
    /// could use them up: of the ports only those count that the workspace's settings name.
    fn may_have_certificate(&self, name: &str) -> bool {
        match self.hosts.parse_name(name) {
            Ok(Target::Control) => true,
            Ok(Target::Sandbox(host)) => self
                .table
                .get(&host.user, &host.workspace)
                .is_some_and(|entry| host.port.is_none_or(|port| entry.ports.contains_key(&port))),
            Ok(Target::Loopback) | Err(_) => false,
        }
    }
}
