//! The guard in front of every route: who may call (C22, C23), from where (A02, A14), and where people are sent (A04,
//! A05, A15).

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Method, Request, StatusCode};
use axum::routing::{get, post};
use choir_hypervisor::auth::{self, Access, ROUTES, Route};
use jiff::SignedDuration;
use serde_json::json;

use crate::support::{Answer, Browser, ORIGIN, SESSION, TestApp, lapses, send};

/// A route's path with something in its parameters.
fn path_of(route: &Route) -> String {
    route
        .path
        .split('/')
        .map(|part| if part.starts_with('{') { "x" } else { part })
        .collect::<Vec<_>>()
        .join("/")
}

fn request(method: &str, path: &str, headers: &[(&str, &str)], body: &'static str) -> Request<Body> {
    let mut request = Request::builder().method(method).uri(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(Body::from(body)).unwrap()
}

const JSON: (&str, &str) = ("content-type", "application/json");
const MEANT: (&str, &str) = ("x-choir", "1");
const OURS: (&str, &str) = ("origin", ORIGIN);

/// What pages of other sites, other ports and plain forms can send.
const FORGED: &[(&str, &[(&str, &str)])] = &[
    ("no origin", &[MEANT, JSON]),
    ("a foreign origin", &[("origin", "https://evil.example"), MEANT, JSON]),
    ("another port", &[("origin", "http://localhost:9292"), MEANT, JSON]),
    ("another scheme", &[("origin", "https://localhost:9090"), MEANT, JSON]),
    (
        "a sandbox",
        &[("origin", "http://live--main--ada.localhost:9090"), MEANT, JSON],
    ),
    (
        "a longer host",
        &[("origin", "http://localhost:9090.evil.example"), MEANT, JSON],
    ),
    ("a null origin", &[("origin", "null"), MEANT, JSON]),
    ("two origins", &[OURS, ("origin", "https://evil.example"), MEANT, JSON]),
    ("same-site", &[OURS, ("sec-fetch-site", "same-site"), MEANT, JSON]),
    ("cross-site", &[OURS, ("sec-fetch-site", "cross-site"), MEANT, JSON]),
    ("no X-Choir", &[OURS, JSON]),
    ("text/plain", &[OURS, MEANT, ("content-type", "text/plain")]),
    (
        "a form",
        &[OURS, MEANT, ("content-type", "application/x-www-form-urlencoded")],
    ),
    (
        "multipart",
        &[OURS, MEANT, ("content-type", "multipart/form-data; boundary=x")],
    ),
    ("no type", &[OURS, MEANT]),
    ("two types", &[OURS, MEANT, JSON, ("content-type", "text/plain")]),
];

#[tokio::test]
async fn forged_requests_change_nothing_on_any_route() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let mutating: Vec<_> = ROUTES.iter().filter(|route| route.mutates()).collect();
    assert!(mutating.len() > 15);
    for route in mutating {
        ada.login().await.expect(StatusCode::OK);
        for (what, headers) in FORGED {
            let answer = ada.send(request(route.method, &path_of(route), headers, "{}")).await;
            assert_eq!(
                answer.status,
                StatusCode::FORBIDDEN,
                "{what} at {} {}: {}",
                route.method,
                route.path,
                answer.text()
            );
            assert!(
                matches!(answer.code().as_str(), "foreign_origin" | "csrf"),
                "{what} at {}",
                route.path
            );
        }
        // Positive control: the same request, meant, gets through to the route.
        let mut other = app.browser();
        other.peer = "192.0.2.77".parse().unwrap();
        other.key = ada.key.clone();
        other.login().await.expect(StatusCode::OK);
        ada.key = other.key.clone();
        let meant = other
            .send(request(route.method, &path_of(route), &[OURS, MEANT, JSON], "{}"))
            .await;
        assert!(
            !matches!(meant.code().as_str(), "foreign_origin" | "csrf"),
            "{}: {}",
            route.path,
            meant.text()
        );
        app.clock.advance(SignedDuration::from_secs(10));
    }
}

/// The same routes with and without the guard: without it, the attack works.
#[tokio::test]
async fn without_the_guard_a_forged_request_gets_through() {
    let app = TestApp::new();
    let evil = || request("POST", "/auth/login/start", &[("origin", "https://evil.example")], "");
    let guarded = send(&app.router, [192, 0, 2, 1].into(), evil()).await;
    guarded.refused(StatusCode::FORBIDDEN, "foreign_origin");
    let bare = send(&app.auth.router(), [192, 0, 2, 1].into(), evil()).await;
    bare.expect(StatusCode::OK);
}

#[tokio::test]
async fn every_route_but_the_listed_ones_needs_a_session() {
    // A new public route must be added here on purpose.
    let public = [
        "GET /assets/{file}",
        "GET /auth/me",
        "GET /login",
        "GET /recover",
        "GET /register",
        "POST /auth/device/poll",
        "POST /auth/device/start",
        "POST /auth/login/finish",
        "POST /auth/login/start",
        "POST /auth/logout",
        "POST /auth/recovery",
        "POST /auth/register/finish",
        "POST /auth/register/start",
    ];
    let app = TestApp::new();
    let mut ada = app.ada().await;
    for route in ROUTES {
        let name = format!("{} {}", route.method, route.path);
        let mut nobody = app.browser();
        let answer = nobody
            .send(request(route.method, &path_of(route), &[OURS, MEANT, JSON], "{}"))
            .await;
        if public.contains(&name.as_str()) {
            assert_ne!(answer.code(), "unauthenticated", "{name}");
        } else {
            answer.refused(StatusCode::UNAUTHORIZED, "unauthenticated");
            assert_eq!(answer.headers["content-type"], "application/json", "{name}");
        }
        if route.method == "GET" {
            let signed_in = ada.send(request("GET", &path_of(route), &[MEANT], "")).await;
            assert_ne!(signed_in.status, StatusCode::UNAUTHORIZED, "positive control: {name}");
        }
    }
    let listed = ROUTES.iter().filter(|route| route.access == Access::Public).count();
    assert_eq!(listed, public.len());
}

#[tokio::test]
async fn a_route_that_no_table_names_needs_a_session() {
    let app = TestApp::new();
    let ada = app.ada().await;
    let router = Router::new()
        .route("/new", get(async || "secret"))
        .route("/new", post(async || "changed"));
    let router = auth::protect(router, &app.auth, &[ROUTES]);
    let mut nobody = app.browser();
    nobody.router = router.clone();
    nobody
        .get("/new")
        .await
        .refused(StatusCode::UNAUTHORIZED, "unauthenticated");
    nobody
        .get("/absent")
        .await
        .refused(StatusCode::UNAUTHORIZED, "unauthenticated");
    let mut signed_in = ada.clone();
    signed_in.router = router;
    assert_eq!(signed_in.get("/new").await.text(), "secret");
    assert_eq!(signed_in.get("/absent").await.status, StatusCode::NOT_FOUND);
    signed_in
        .send(request("POST", "/new", &[("origin", "null")], ""))
        .await
        .refused(StatusCode::FORBIDDEN, "foreign_origin");
    assert_eq!(signed_in.post("/new", json!({})).await.text(), "changed");
}

#[tokio::test]
async fn admin_routes_are_for_admins() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let mut bob = app.member(&mut ada, "bob").await;
    let admin: Vec<_> = ROUTES.iter().filter(|route| route.path.starts_with("/admin")).collect();
    assert!(admin.len() >= 5);
    for route in admin {
        assert_eq!(route.access, Access::Admin, "{}", route.path);
        let call = async |browser: &mut Browser| {
            browser
                .send(request(route.method, &path_of(route), &[OURS, MEANT, JSON], "{}"))
                .await
        };
        call(&mut app.browser())
            .await
            .refused(StatusCode::UNAUTHORIZED, "unauthenticated");
        call(&mut bob).await.refused(StatusCode::FORBIDDEN, "admin_only");
        assert_ne!(call(&mut ada).await.status, StatusCode::FORBIDDEN);
    }
}

#[tokio::test]
async fn only_page_navigations_are_sent_to_the_login_page() {
    let app = TestApp::new();
    let mut nobody = app.browser();
    let page = nobody.open("/account?x=1&y=%2F").await;
    assert_eq!(
        (page.status, page.location()),
        (StatusCode::SEE_OTHER, "/login?next=%2Faccount%3Fx%3D1%26y%3D%252F")
    );
    let html = ("accept", "text/html,*/*");
    let navigate = ("sec-fetch-mode", "navigate");
    for (method, headers) in [
        ("GET", &[][..]),
        ("GET", &[html, MEANT]),
        ("GET", &[html, ("sec-fetch-mode", "cors")]),
        ("GET", &[navigate, ("authorization", "Bearer x")]),
        ("GET", &[navigate, ("upgrade", "websocket")]),
        ("DELETE", &[navigate, html]),
    ] {
        let answer = nobody.send(request(method, "/me/sessions", headers, "")).await;
        answer.refused(StatusCode::UNAUTHORIZED, "unauthenticated");
    }
    let old_browser = nobody.send(request("GET", "/account", &[html], "")).await;
    assert_eq!(old_browser.status, StatusCode::SEE_OTHER);
}

#[tokio::test]
async fn a_websocket_needs_our_origin() {
    let app = TestApp::new();
    let ada = app.ada().await;
    let router = auth::protect(Router::new().route("/socket", get(async || "open")), &app.auth, &[]);
    let cookie = format!("{SESSION}={}", ada.session());
    let open = async |origin: Option<&str>, cookie: Option<&str>| -> Answer {
        let mut headers = vec![("upgrade", "websocket"), ("connection", "upgrade")];
        headers.extend(origin.map(|origin| ("origin", origin)));
        headers.extend(cookie.map(|cookie| ("cookie", cookie)));
        send(&router, [192, 0, 2, 1].into(), request("GET", "/socket", &headers, "")).await
    };
    for origin in [
        None,
        Some("null"),
        Some("http://localhost:9292"),
        Some("http://live--main--ada.localhost:9090"),
    ] {
        open(origin, Some(&cookie))
            .await
            .refused(StatusCode::FORBIDDEN, "foreign_origin");
    }
    open(Some(ORIGIN), None)
        .await
        .refused(StatusCode::UNAUTHORIZED, "unauthenticated");
    assert_eq!(open(Some(ORIGIN), Some(&cookie)).await.status, StatusCode::OK);
}

#[tokio::test]
async fn no_answer_lets_another_origin_read_or_frame_it() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    for route in ROUTES.iter().filter(|route| route.method == "GET") {
        for origin in [
            "null",
            "https://evil.example",
            "http://localhost:9090.evil.example",
            ORIGIN,
        ] {
            let answer = ada
                .send(request("GET", &path_of(route), &[("origin", origin)], ""))
                .await;
            check_headers(route.path, &answer.headers);
        }
    }
    let missing = app.browser().get("/nowhere").await;
    check_headers("an error", &missing.headers);
    let preflight = request(
        "OPTIONS",
        "/me/tokens",
        &[
            ("origin", "https://evil.example"),
            ("access-control-request-method", "POST"),
        ],
        "",
    );
    check_headers("a preflight", &app.browser().send(preflight).await.headers);
}

#[track_caller]
fn check_headers(what: &str, headers: &HeaderMap) {
    let found = lapses(headers);
    assert!(found.is_empty(), "{what}: {found:?}");
    assert!(!headers.contains_key("strict-transport-security"), "not over http");
}

#[tokio::test]
async fn pages_have_no_inline_script_or_style_and_their_assets_are_there() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let mut assets = std::collections::BTreeSet::new();
    for page in [
        "/login",
        "/register",
        "/recover",
        "/account",
        "/auth/device",
        "/auth/device?code=BCDF-GHJK",
    ] {
        let mut browser = if page == "/login" { app.browser() } else { ada.clone() };
        let answer = browser.open(page).await;
        answer.expect_page();
        let html = answer.text();
        for inline in ["<style", " style=", " onclick", " onload", "javascript:"] {
            assert!(!html.contains(inline), "{page} has {inline}");
        }
        for tag in html.split("<script").skip(1) {
            assert!(
                tag.starts_with(" type=\"module\" src=\"/assets/") && tag.contains("></script>"),
                "{page}"
            );
        }
        // A form that is sent before the script listens puts a recovery code into the address.
        let controls = html
            .find("<fieldset id=\"controls\" disabled>")
            .expect("controls are off at first");
        assert!(html.find("<form").is_none_or(|form| form > controls), "{page}");
        assets.extend(
            html.split('"')
                .filter(|part| part.starts_with("/assets/"))
                .map(str::to_owned),
        );
    }
    assets.insert("/assets/api.js".into());
    for asset in assets {
        assert_eq!(app.browser().get(&asset).await.status, StatusCode::OK, "{asset}");
    }
    ada.get("/assets/none.js")
        .await
        .refused(StatusCode::NOT_FOUND, "not_found");
}

#[tokio::test]
async fn what_people_write_is_text_on_pages() {
    let app = TestApp::new();
    let mut browser = app.browser();
    let claim = app.claim().await;
    let start = json!({"username": "ada", "display_name": "<script>alert(1)</script>", "invite": claim});
    browser.register_with(start).await.expect(StatusCode::OK);
    let page = browser.open("/account").await.text();
    assert!(page.contains("&lt;script&gt;alert(1)") && !page.contains("<script>alert"));
    let page = browser.open("/auth/device?code=%22%3E%3Cscript%3E").await.text();
    assert!(!page.contains("<script>"));
}

#[tokio::test]
async fn opening_any_page_changes_nothing_in_the_database() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let before = app.files();
    for route in ROUTES.iter().filter(|route| route.method == "GET") {
        ada.open(&path_of(route)).await;
        ada.open(&format!("{}?next=//evil.example&host=evil.example", path_of(route)))
            .await;
    }
    assert!(ada.is_signed_in().await);
    assert!(
        before == app.files(),
        "positive control below: a mutation does change the files"
    );
    ada.post("/me/recovery-codes", json!({})).await.expect(StatusCode::OK);
    assert!(before != app.files());
}

#[tokio::test]
async fn after_signing_in_only_a_path_of_this_host_is_opened() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    for bad in [
        "//evil.example",
        "/%5Cevil.example",
        "https:evil.example",
        "%2509//e",
        "/%252fevil.example",
        "%2F%2Fe",
        "%2F%09%2Fe",
    ] {
        let page = ada.open(&format!("/login?next={bad}")).await;
        assert_eq!((page.status, page.location()), (StatusCode::SEE_OTHER, "/"), "{bad}");
        let page = app.browser().open(&format!("/login?next={bad}")).await.text();
        assert!(page.contains("data-next=\"/\""), "{bad}: {page}");
    }
    assert_eq!(ada.open("/login?next=/account").await.location(), "/account");
    let page = app.browser().open("/login?next=/account").await.text();
    assert!(page.contains("data-next=\"/account\""));
}

#[tokio::test]
async fn head_is_guarded_like_get() {
    let app = TestApp::new();
    let head = Request::builder()
        .method(Method::HEAD)
        .uri("/me/sessions")
        .body(Body::empty())
        .unwrap();
    assert_eq!(app.browser().send(head).await.status, StatusCode::UNAUTHORIZED);
}
