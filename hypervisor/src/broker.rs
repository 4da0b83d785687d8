//! The broker's door inside a sandbox, as far as it goes today: no capability is granted, so none is listed and every
//! other call is refused. It must not hold a secret.

use std::convert::Infallible;

use choir_proxy::Io;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};

/// Serves one connection from inside.
pub async fn serve<S: Io>(stream: S) {
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(std::time::Duration::from_secs(10))
        .serve_connection(
            TokioIo::new(stream),
            service_fn(async |request| Ok::<_, Infallible>(answer(&request))),
        );
    if let Err(error) = connection.await {
        tracing::debug!(%error, "a broker connection ended");
    }
}

fn answer(request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let (status, body) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/v1/capabilities") => (StatusCode::OK, r#"{"items":[]}"#),
        _ => (
            StatusCode::FORBIDDEN,
            r#"{"error":{"code":"no_grant","message":"no capability is granted to this sandbox; its owner can grant one","request_id":""}}"#,
        ),
    };
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
