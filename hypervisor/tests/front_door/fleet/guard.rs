//! Every route of the control host, from its tables: who gets in without a session, and what another site can do.

use axum::body::Body;
use axum::http::{Request, StatusCode};
use choir_hypervisor::auth::{Access, Route};
use choir_hypervisor::router::tables;

use super::Box;
use crate::support::{Answer, Browser, ORIGIN, send};

/// Routes that answer strangers. A new one fails the test until it is listed here on purpose.
const FOR_STRANGERS: &[&str] = &[
    "GET /healthz",
    "GET /readyz",
    "GET /metrics",
    "GET /assets/{file}",
    "GET /login",
    "GET /register",
    "GET /recover",
    "GET /auth/me",
    "POST /auth/register/start",
    "POST /auth/register/finish",
    "POST /auth/login/start",
    "POST /auth/login/finish",
    "POST /auth/recovery",
    "POST /auth/logout",
    "POST /auth/device/start",
    "POST /auth/device/poll",
];

fn routes() -> impl Iterator<Item = &'static Route> {
    tables().into_iter().flatten()
}

fn method(route: &Route) -> &'static str {
    if route.method == "ANY" { "POST" } else { route.method }
}

/// A path of the route, with something in each parameter.
fn path(route: &Route) -> String {
    let parts = route.path.split('/').map(|part| match part {
        "{slot}" => "live",
        "{*path}" => "exec",
        part if part.starts_with('{') => "main",
        part => part,
    });
    parts.collect::<Vec<_>>().join("/")
}

#[tokio::test]
async fn without_a_session_every_route_but_the_listed_ones_answers_401() {
    let start = Box::new().await;
    for route in routes() {
        let name = format!("{} {}", route.method, route.path);
        let listed = FOR_STRANGERS.contains(&name.as_str());
        assert_eq!(route.access == Access::Public, listed, "{name} is not as the list says");
        let request = Request::builder()
            .method(method(route))
            .uri(path(route))
            .header("origin", ORIGIN)
            .header("x-choir", "1")
            .header("content-type", "application/json")
            .body(Body::from("{}"))
            .unwrap();
        let answer = send(&start.router, "192.0.2.9".parse().unwrap(), request).await;
        if !listed {
            answer.refused(StatusCode::UNAUTHORIZED, "unauthenticated");
        }
    }
}

/// What browsers send for a page that is not ours: changes to the headers of an honest request.
const FORGERIES: &[(&str, &[(&str, &str)])] = &[
    ("no origin", &[("origin", "")]),
    ("foreign origin", &[("origin", "https://evil.example")]),
    ("null origin", &[("origin", "null")]),
    (
        "a sandbox's origin",
        &[("origin", "http://live--main--ada.localhost:9090")],
    ),
    ("another port", &[("origin", "http://localhost:9292")]),
    ("same site", &[("sec-fetch-site", "same-site")]),
    ("cross site", &[("sec-fetch-site", "cross-site")]),
    ("no X-Choir", &[("x-choir", "")]),
    ("text", &[("content-type", "text/plain")]),
    ("a form", &[("content-type", "application/x-www-form-urlencoded")]),
    ("multipart", &[("content-type", "multipart/form-data; boundary=x")]),
];

#[tokio::test]
async fn no_route_that_changes_something_takes_what_another_site_can_send() {
    let start = Box::new().await;
    let ada = start.ada().await;
    let cookie = format!("{}={}", crate::support::SESSION, ada.session());
    let send_to = async |route: &Route, changes: &[(&str, &str)]| -> Answer {
        let mut request = Request::builder()
            .method(method(route))
            .uri(path(route))
            .header("cookie", &cookie);
        let honest = [
            ("origin", ORIGIN),
            ("sec-fetch-site", "same-origin"),
            ("x-choir", "1"),
            ("content-type", "application/json"),
        ];
        for (name, value) in honest {
            let value = changes
                .iter()
                .find(|(changed, _)| *changed == name)
                .map_or(value, |(_, to)| to);
            if !value.is_empty() {
                request = request.header(name, value);
            }
        }
        send(
            &start.router,
            "192.0.2.9".parse().unwrap(),
            request.body(Body::from("{}")).unwrap(),
        )
        .await
    };
    let mut checked = 0;
    for route in routes().filter(|route| route.mutates()) {
        for (name, changes) in FORGERIES {
            let answer = send_to(route, changes).await;
            assert_eq!(
                answer.status,
                StatusCode::FORBIDDEN,
                "{} {} with {name}",
                route.method,
                route.path
            );
            checked += 1;
        }
        // The control: unchanged, the same request is not taken for a forgery. Logging out would end the test's session.
        if route.path != "/auth/logout" {
            let answer = send_to(route, &[]).await;
            let forged =
                answer.status == StatusCode::FORBIDDEN && ["csrf", "foreign_origin"].contains(&answer.code().as_str());
            assert!(!forged, "{} {} refuses its own page", route.method, route.path);
        }
    }
    assert!(checked > 100, "the tables name only {checked} cases");
}

#[tokio::test]
async fn what_concerns_the_whole_box_is_for_admins() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let mut eve = start.member(&mut ada, "eve").await;
    let mut checked = 0;
    for route in routes().filter(|route| route.access == Access::Admin) {
        let ask = async |browser: &mut Browser| {
            let body = (method(route) != "GET").then(|| serde_json::json!({}));
            browser.fetch(method(route).parse().unwrap(), &path(route), body).await
        };
        ask(&mut eve).await.refused(StatusCode::FORBIDDEN, "admin_only");
        assert_ne!(
            ask(&mut ada).await.status,
            StatusCode::FORBIDDEN,
            "{} {}",
            route.method,
            route.path
        );
        checked += 1;
    }
    assert!(checked >= 7, "the tables name only {checked} admin routes");
}

#[tokio::test]
async fn no_get_of_the_control_host_changes_anything() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    super::workspace(&mut ada).await;
    // Volumes are made in the background, which writes; the state to compare comes after that.
    for id in super::shown(&mut ada).await["slots"].as_object().unwrap().values() {
        let handle = start
            .app
            .fleet
            .handle(&id["sandbox"].as_str().unwrap().parse().unwrap())
            .unwrap();
        handle
            .settle(std::time::Duration::from_secs(20), |s| s.observed.name() == "stopped")
            .await;
    }
    let state = async |ada: &mut Browser| {
        let mut all = Vec::new();
        for path in [
            "/api/workspaces",
            "/me/sessions",
            "/me/passkeys",
            "/me/tokens",
            "/admin/users",
            "/admin/invites",
        ] {
            all.push(ada.get(path).await.expect(StatusCode::OK));
        }
        let audit = ada.get("/me/audit").await.expect(StatusCode::OK)["items"]
            .as_array()
            .map(Vec::len);
        (all, audit)
    };
    let before = state(&mut ada).await;
    let session = ada.session();
    for route in routes().filter(|route| route.method == "GET") {
        ada.open(&path(route)).await;
    }
    assert_eq!(ada.session(), session);
    assert_eq!(state(&mut ada).await, before);
    // The control: a change is noticed by the same comparison.
    ada.post("/api/workspaces", serde_json::json!({"name": "other"}))
        .await
        .expect(StatusCode::CREATED);
    assert_ne!(state(&mut ada).await, before);
}
