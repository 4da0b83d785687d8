//! Liveness, readiness and metrics. It must not tell strangers more than which part is not ready.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use subtle::ConstantTimeEq;

use crate::app::App;
use crate::auth::extract::PeerAddr;
use crate::auth::routes;
use crate::doctor;
use crate::error::{ApiError, ApiResult};
use crate::releases::DefaultRelease;

routes! {
    pub ROUTES, router -> Arc<App>;
    Public GET get "/healthz" => healthz;
    Public GET get "/readyz" => readyz;
    Public GET get "/metrics" => metrics;
}

/// How long one part may take to say that it is ready.
const PART_WITHIN: Duration = Duration::from_secs(2);

async fn healthz() -> Json<Value> {
    Json(json!({"status": "ok", "service": "hypervisor"}))
}

async fn readyz(State(app): State<Arc<App>>) -> Response {
    let parts = app.parts().await;
    let ready = parts.values().all(|part| *part == "ok");
    let status = if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let degraded = app.providers.degraded().await.into_iter().map(|(name, _)| name);
    let mut degraded: Vec<String> = degraded.map(|name| format!("provider {name}")).collect();
    if app.config.metrics.token_file.is_some() && app.metrics_token.is_none() {
        degraded.push("metrics token".to_owned());
    }
    if doctor::disks(&app.config).any(|disk| disk.is_err()) {
        degraded.push("disk".to_owned());
    }
    (
        status,
        Json(json!({"ready": ready, "parts": parts, "degraded": degraded})),
    )
        .into_response()
}

impl App {
    /// Each part and whether it is `ok`.
    async fn parts(&self) -> BTreeMap<&'static str, &'static str> {
        let services = &self.fleet.services;
        let within = |ok: Option<bool>| if ok == Some(true) { "ok" } else { "not ready" };
        let timed = |part| tokio::time::timeout(PART_WITHIN, part);
        let (store, runtime, volumes) = tokio::join!(
            timed(async { self.store.check().await.is_ok() }),
            tokio::time::timeout(PART_WITHIN, async { services.runtime.ping().await.is_ok() }),
            tokio::time::timeout(PART_WITHIN, async { services.volumes.backend().await.is_ok() }),
        );
        let release = match self.releases.default_state() {
            DefaultRelease::Ready => "ok",
            DefaultRelease::Importing => "importing",
            DefaultRelease::Missing => "missing",
            DefaultRelease::Failed(_) => "failed",
        };
        BTreeMap::from([
            ("store", within(store.ok())),
            ("runtime", within(runtime.ok())),
            ("volumes", within(volumes.ok())),
            ("release", release),
            (
                "sandboxes",
                if *self.adopted.borrow() {
                    "ok"
                } else {
                    "being taken over"
                },
            ),
            ("audit", within(Some(!self.store.audit_is_failing()))),
            ("keys", if self.vault.is_sealed() { "sealed" } else { "ok" }),
        ])
    }

    /// What `/metrics` says.
    pub(crate) fn metrics_text(&self) -> String {
        let mut states: BTreeMap<&'static str, usize> = BTreeMap::new();
        let (mut in_flight, mut tunnels) = (0, 0);
        for handle in self.fleet.handles() {
            *states.entry(handle.status.borrow().observed.name()).or_default() += 1;
            in_flight += handle.present().map_or(0, |g| self.forwarder.in_flight(&g));
            tunnels += handle.activity.tunnels();
        }
        let mut text = String::new();
        let mut gauge = |name: &str, help: &str, rows: &[(String, String)]| {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge");
            for (labels, value) in rows {
                let _ = writeln!(text, "{name}{labels} {value}");
            }
        };
        let rows: Vec<_> = states
            .iter()
            .map(|(s, n)| (format!("{{state=\"{s}\"}}"), n.to_string()))
            .collect();
        gauge("choir_sandboxes", "Sandboxes by observed state.", &rows);
        let one = |value: String| [(String::new(), value)];
        gauge(
            "choir_workspaces",
            "Workspaces with a route.",
            &one(self.table.len().to_string()),
        );
        gauge(
            "choir_requests_in_flight",
            "Requests being carried into sandboxes.",
            &one(in_flight.to_string()),
        );
        gauge(
            "choir_tunnels",
            "Open websockets into sandboxes.",
            &one(tunnels.to_string()),
        );
        gauge(
            "choir_audit_failing",
            "1 while the audit trail cannot be written, so that no secret is used.",
            &one(u8::from(self.store.audit_is_failing()).to_string()),
        );
        gauge(
            "choir_short_of_memory",
            "1 while the box is short of memory, so that dev slots wait.",
            &one(u8::from(self.fleet.admission.is_short_of_memory()).to_string()),
        );
        gauge(
            "choir_resident_bytes",
            "Resident memory of the hypervisor.",
            &one(resident_bytes().to_string()),
        );
        text
    }

    /// Whether this caller may read metrics: from this machine, or with the token.
    fn may_read_metrics(&self, peer: PeerAddr, headers: &HeaderMap) -> bool {
        let Some(token) = &self.metrics_token else {
            return peer.0.is_loopback();
        };
        let sent = headers.get(header::AUTHORIZATION).map_or(&[][..], |v| v.as_bytes());
        let want = format!("Bearer {token}");
        peer.0.is_loopback() || bool::from(sent.ct_eq(want.as_bytes()))
    }
}

async fn metrics(State(app): State<Arc<App>>, peer: PeerAddr, headers: HeaderMap) -> ApiResult<Response> {
    if !app.may_read_metrics(peer, &headers) {
        return Err(ApiError::forbidden(
            "metrics",
            "Metrics are for this machine, or for the metrics token.",
        ));
    }
    Ok((
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4")],
        app.metrics_text(),
    )
        .into_response())
}

/// From `/proc/self/statm`; 0 where that cannot be read.
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split(' ').nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}
