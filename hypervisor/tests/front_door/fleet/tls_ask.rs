//! Which hosts a proxy may get certificates for, and who may ask.

use axum::body::Body;
use axum::http::{Method, Request, StatusCode};
use serde_json::json;

use super::{Box, workspace};
use crate::support::{Answer, Browser, send};

const HOSTS: [&str; 4] = [
    "localhost",
    "live--main--ada.localhost",
    "dev--main--ada.localhost",
    "5173--dev--main--ada.localhost",
];

/// What nobody has, and what is no name of a host.
const NONE: [&str; 12] = [
    "",
    "evil.example",
    "127.0.0.1",
    "localhost:9090",
    "live--main--ada.localhost:9090",
    "LIVE--main--ada.localhost",
    "main--ada.localhost",
    "live--other--ada.localhost",
    "live--main--eve.localhost",
    "5174--dev--main--ada.localhost",
    "9092--live--main--ada.localhost",
    "a.live--main--ada.localhost",
];

async fn ask(start: &Box, peer: &str, domain: &str) -> Answer {
    let request = Request::get(format!("/internal/tls-ask?domain={domain}"));
    send(
        &start.router,
        peer.parse().unwrap(),
        request.body(Body::empty()).unwrap(),
    )
    .await
}

/// A box with one workspace, which names a port.
async fn started() -> (Box, Browser) {
    let start = Box::with(|config| config.listen.trusted_proxies = vec!["10.0.0.2/32".parse().unwrap()]).await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    let patch = json!({"ports": {"5173": "private"}});
    ada.fetch(Method::PATCH, "/api/workspaces/main", Some(patch))
        .await
        .expect(StatusCode::OK);
    (start, ada)
}

#[tokio::test]
async fn a_host_that_a_workspace_has_may_get_a_certificate_and_no_other() {
    let (start, mut ada) = started().await;
    for host in HOSTS {
        assert_eq!(ask(&start, "127.0.0.1", host).await.status, StatusCode::OK, "{host}");
    }
    for name in NONE {
        let answer = ask(&start, "127.0.0.1", name).await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND, "{name}: {}", answer.text());
    }
    assert_eq!(start.world.starts(), 0, "asking started a sandbox");
    ada.delete("/api/workspaces/main").await.expect(StatusCode::ACCEPTED);
    let answer = ask(&start, "127.0.0.1", HOSTS[1]).await;
    answer.refused(StatusCode::NOT_FOUND, "not_found");
}

#[tokio::test]
async fn whoever_is_no_proxy_of_the_box_learns_of_no_host_by_asking() {
    let (start, _) = started().await;
    for peer in ["192.0.2.9", "10.0.0.3", "2001:db8::1"] {
        for name in HOSTS.iter().chain(&NONE) {
            let answer = ask(&start, peer, name).await;
            answer.refused(StatusCode::FORBIDDEN, "tls_ask");
        }
    }
    // The control: the same question, from where a proxy is.
    for peer in ["127.0.0.1", "::1", "10.0.0.2"] {
        let answer = ask(&start, peer, HOSTS[1]).await;
        assert_eq!(answer.status, StatusCode::OK, "{peer}: {}", answer.text());
    }
}
