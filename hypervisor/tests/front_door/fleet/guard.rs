//! Every route of the control host, from its tables: who gets in without a session, and what another site can do.

use std::path::PathBuf;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use choir_hypervisor::auth::{Access, Route};
use choir_hypervisor::router::tables;
use jiff::SignedDuration;

use super::Box;
use super::wire::{clock, start_at};
use crate::support::{Answer, Browser, ORIGIN, lapses, send};

/// Routes that answer strangers. A new one fails the test until it is listed here on purpose.
const FOR_STRANGERS: &[&str] = &[
    "GET /healthz",
    "GET /readyz",
    "GET /metrics",
    "GET /internal/tls-ask",
    "GET /assets/{file}",
    // The public program; who wants to sign in with it has no token yet.
    "GET /download",
    "GET /download/{file}",
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

/// The control of the test above: each of those routes is there, and a session opens it.
#[tokio::test]
async fn with_a_session_no_get_answers_401() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    super::workspace(&mut ada).await;
    for route in routes().filter(|route| matches!(route.method, "GET" | "ANY")) {
        let answer = ada.get(&path(route)).await;
        assert_ne!(
            answer.status,
            StatusCode::UNAUTHORIZED,
            "{}: {}",
            route.path,
            answer.text()
        );
        // Nothing stands in the place of an id, and the simulated agent has one route of its own.
        let names = route.path.contains("{id}") || route.path.contains("{*path}") || route.path.contains("{file}");
        assert!(
            names || answer.status != StatusCode::NOT_FOUND,
            "{} is not there",
            route.path
        );
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

/// The database and all else the hypervisor keeps, byte for byte; without what SQLite only uses for locks.
fn files(start: &Box) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = std::fs::read_dir(start.directory.path()).unwrap();
    let kept = entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_file());
    let mut all: Vec<_> = kept
        .filter(|path| !path.ends_with("choir.db-shm"))
        .map(|path| (path.clone(), std::fs::read(&path).unwrap()))
        .collect();
    all.sort();
    all
}

/// A navigation that another site's page, or one of a sandbox on a shared domain, made the browser do.
fn navigation(path: &str, site: &str) -> Request<Body> {
    let request = Request::get(path)
        .header("sec-fetch-site", site)
        .header("sec-fetch-mode", "navigate")
        .header("accept", "text/html");
    request.body(Body::empty()).unwrap()
}

#[tokio::test]
async fn no_get_of_the_control_host_changes_a_byte_of_the_database() {
    let start = start_at(&clock(), |sim| sim).await;
    let mut ada = start.ada().await;
    let sandboxes = super::workspace(&mut ada).await;
    // Volumes are made in the background, which writes; the bytes to compare come after that.
    for id in &sandboxes {
        let handle = start.app.fleet.handle(id).unwrap();
        handle
            .settle(std::time::Duration::from_secs(20), |s| s.observed.name() == "stopped")
            .await;
    }
    start.app.store.check().await.unwrap();
    let before = files(&start);
    assert!(before.len() >= 2, "{:?}", start.directory.path());
    let session = ada.session();
    let mut opened = 0;
    for route in routes().filter(|route| matches!(route.method, "GET" | "ANY")) {
        for site in ["cross-site", "same-site"] {
            ada.send(navigation(&path(route), site)).await;
            let odd = format!("{}?next=//evil.example&host=evil.example&wait_s=1", path(route));
            ada.send(navigation(&odd, site)).await;
            opened += 1;
        }
    }
    assert!(opened > 50, "the tables name only {opened} cases");
    assert_eq!(ada.session(), session);
    // A commit that is under way is over when this is answered.
    start.app.store.check().await.unwrap();
    assert!(files(&start) == before, "a GET changed the database");
    assert_eq!(start.world.starts(), 0, "a GET started a sandbox");
    // The control: a mutation does change the bytes.
    ada.post("/api/workspaces", serde_json::json!({"name": "other"}))
        .await
        .expect(StatusCode::CREATED);
    assert!(files(&start) != before);
}

#[tokio::test]
async fn another_sites_page_cannot_wake_a_sandbox_through_its_api_and_ours_can() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    super::workspace(&mut ada).await;
    let path = "/api/workspaces/main/slots/dev/sandbox/health";
    for site in ["cross-site", "same-site"] {
        let answer = ada.send(navigation(path, site)).await;
        answer.refused(StatusCode::FORBIDDEN, "foreign_origin");
    }
    assert_eq!(start.world.starts(), 0);
    for site in ["none", "same-origin"] {
        ada.send(navigation(path, site)).await.expect(StatusCode::OK);
    }
    assert_eq!(start.world.starts(), 1);
}

#[tokio::test]
async fn no_answer_of_any_table_lets_another_origin_read_or_frame_it() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let probe = |path: &str, method: &str, origin: &str| {
        let request = Request::builder().method(method).uri(path).header("origin", origin);
        let request = request.header("access-control-request-method", "POST");
        request.body(Body::empty()).unwrap()
    };
    let sandbox = "http://live--main--ada.localhost:9090";
    let origins = [
        "null",
        "https://evil.example",
        "http://localhost:9090.evil.example",
        sandbox,
    ];
    for route in routes() {
        for origin in origins {
            for method in ["GET", "OPTIONS"] {
                let answer = ada.send(probe(&path(route), method, origin)).await;
                let found = lapses(&answer.headers);
                // An asset may be shown by other pages of the box; it says nothing of anybody.
                assert!(found.is_empty(), "{method} {} for {origin}: {found:?}", route.path);
            }
        }
    }
    // The control: a server that allows other origins is noticed by the same look.
    let open = axum::middleware::map_response(async |mut answer: axum::response::Response| {
        let any = axum::http::HeaderValue::from_static("*");
        answer.headers_mut().insert("access-control-allow-origin", any);
        answer
    });
    let mut weakened = ada.clone();
    weakened.router = start.router.clone().layer(open);
    let answer = weakened.send(probe("/auth/me", "GET", origins[0])).await;
    assert_eq!(lapses(&answer.headers), ["access-control-allow-origin"]);
}

#[tokio::test]
async fn deleting_a_workspace_needs_a_fresh_assertion() {
    let clock = clock();
    let start = start_at(&clock, |sim| sim).await;
    let mut ada = start.ada().await;
    super::workspace(&mut ada).await;
    clock.advance(SignedDuration::from_secs(5 * 60 + 1));
    ada.delete("/api/workspaces/main")
        .await
        .refused(StatusCode::FORBIDDEN, "step_up_required");
    assert_eq!(start.app.store.all_workspaces().await.unwrap().len(), 1);
    assert_eq!(super::shown(&mut ada).await["name"], "main", "nothing was begun");
    // The control: the same call, after a passkey confirmed it.
    ada.step_up().await.expect(StatusCode::OK);
    ada.delete("/api/workspaces/main").await.expect(StatusCode::ACCEPTED);
}
