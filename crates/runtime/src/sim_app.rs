//! What answers inside a simulated sandbox: an agent's `/health` and `/sweep`, and an app that echoes what it was sent.
//! It must not know the simulated world around it.

use std::convert::Infallible;

use bytes::Bytes;
use choir_core::Generation;
use choir_link::AgentConfig;
use http::{Request, Response, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::io::DuplexStream;

use crate::sweep::{self, Frame};

/// Who answers a connection.
pub(crate) enum Answerer {
    Agent(Inside),
    /// The app, on this port.
    App(u16),
}

/// What a simulated agent knows.
pub(crate) struct Inside {
    pub config: AgentConfig,
    /// What it shows when everything is looked through.
    pub frames: Vec<Frame>,
}

/// Serves one connection.
pub(crate) async fn serve(stream: DuplexStream, generation: Generation, by: Answerer) {
    let by = &by;
    let service = service_fn(|request: Request<Incoming>| {
        let generation = generation.clone();
        async move {
            Ok::<_, Infallible>(match by {
                Answerer::Agent(inside) if request.uri().path() == sweep::ROUTE => shown(&request, inside),
                Answerer::Agent(inside) => health(&request, &generation, &inside.config),
                Answerer::App(port) => echo(request, &generation, *port).await,
            })
        }
    });
    // The peer hanging up is how a connection ends.
    let _ = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

/// Only for who asks as the hypervisor does.
fn shown(request: &Request<Incoming>, inside: &Inside) -> Response<Full<Bytes>> {
    if !request.headers().contains_key(sweep::HEADER) {
        return answer(
            404,
            &json!({"error": {"code": "not_found", "message": "There is nothing here."}}),
        );
    }
    let mut bytes = Vec::new();
    inside.frames.iter().for_each(|frame| frame.write(&mut bytes));
    Response::new(Full::new(bytes.into()))
}

fn health(request: &Request<Incoming>, generation: &Generation, config: &AgentConfig) -> Response<Full<Bytes>> {
    if request.uri().path() != "/health" {
        let body = json!({"error": {"code": "not_found", "message": "The simulated agent only has /health."}});
        return answer(404, &body);
    }
    let body = json!({
        "status": "ok",
        "service": "sandbox",
        "version": "sim",
        "sandbox_id": generation.sandbox,
        "generation": generation.number,
        "nonce": config.nonce,
        "uptime_ms": 0,
    });
    answer(200, &body)
}

/// Tells which sandbox answered, and everything that reached it.
async fn echo(request: Request<Incoming>, generation: &Generation, port: u16) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let Ok(body) = body.collect().await else {
        return answer(400, &json!({"error": "the body broke off"}));
    };
    let headers: Vec<(&str, String)> = head
        .headers
        .iter()
        .map(|(name, value)| (name.as_str(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
        .collect();
    let body = json!({
        "sandbox": generation.sandbox,
        "generation": generation.number,
        "port": port,
        "method": head.method.as_str(),
        "target": head.uri.to_string(),
        "headers": headers,
        "body": String::from_utf8_lossy(&body.to_bytes()),
    });
    answer(200, &body)
}

fn answer(status: u16, body: &serde_json::Value) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body.to_string())));
    *response.status_mut() = http::StatusCode::from_u16(status).unwrap_or_default();
    let json = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}
