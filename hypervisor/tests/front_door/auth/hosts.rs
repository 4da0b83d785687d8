//! Signing in at a sandbox host by ticket (A16), and the end of that with the session (B13, C13).

use axum::http::{HeaderMap, StatusCode};
use choir_hypervisor::auth::{APP_COOKIE, CALLBACK};
use jiff::SignedDuration;
use serde_json::json;

use crate::support::{Browser, TestApp};

const HOST: &str = "live--main--ada.localhost:9090";
const OTHER: &str = "dev--main--ada.localhost:9090";

/// Asks the control host for a ticket; what is in the redirect.
async fn ticket(browser: &mut Browser, next: &str) -> String {
    let answer = browser.open(&format!("/auth/open?host={HOST}&next={next}")).await;
    assert_eq!(answer.status, StatusCode::SEE_OTHER, "{}", answer.text());
    assert_eq!(answer.headers["referrer-policy"], "no-referrer");
    assert_eq!(answer.headers["cache-control"], "no-store");
    let prefix = format!("http://{HOST}{CALLBACK}?");
    answer
        .location()
        .strip_prefix(&prefix)
        .unwrap_or_else(|| panic!("{}", answer.location()))
        .to_owned()
}

/// Shows a ticket at a host; the cookie and where it leads.
async fn show(app: &TestApp, host: &str, query: &str) -> Option<(HeaderMap, String)> {
    let response = app.auth.callback(host, query).await;
    let (head, _) = response.into_parts();
    assert_eq!(head.headers["referrer-policy"], "no-referrer");
    if head.status != StatusCode::SEE_OTHER {
        assert_eq!(head.status, StatusCode::FORBIDDEN);
        assert!(!head.headers.contains_key("set-cookie"));
        return None;
    }
    let cookie = head.headers["set-cookie"].to_str().unwrap();
    assert!(
        cookie.starts_with(APP_COOKIE)
            && cookie.contains("; Secure; HttpOnly; SameSite=Lax")
            && !cookie.contains("Domain")
    );
    let mut headers = HeaderMap::new();
    headers.insert("cookie", cookie.split(';').next().unwrap().parse().unwrap());
    Some((headers, head.headers["location"].to_str().unwrap().to_owned()))
}

#[tokio::test]
async fn a_visitor_is_signed_in_at_one_host_and_led_to_the_path_they_wanted() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let query = ticket(&mut ada, "%2Fa%3Fb%3D1").await;
    let (headers, to) = show(&app, HOST, &query).await.unwrap();
    assert_eq!(to, "/a?b=1");
    let session = app.auth.host_session(&headers, HOST).await.unwrap().unwrap();
    assert_eq!(session.user.name.as_str(), "ada");
    assert!(
        app.auth.host_session(&headers, OTHER).await.unwrap().is_none(),
        "bound to that exact host"
    );
    let restarted = app.restarted();
    assert!(restarted.auth.host_session(&headers, OTHER).await.unwrap().is_none());
    assert!(
        restarted.auth.host_session(&headers, HOST).await.unwrap().is_some(),
        "survives a restart"
    );
}

#[tokio::test]
async fn a_ticket_is_good_once_at_its_host_for_thirty_seconds() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let used = ticket(&mut ada, "/").await;
    show(&app, HOST, &used).await.unwrap();
    assert!(show(&app, HOST, &used).await.is_none(), "used");
    let elsewhere = ticket(&mut ada, "/").await;
    assert!(show(&app, OTHER, &elsewhere).await.is_none(), "another host");
    assert!(
        show(&app, HOST, &elsewhere).await.is_none(),
        "used up by being shown elsewhere"
    );
    let late = ticket(&mut ada, "/").await;
    app.clock.advance(SignedDuration::from_secs(30));
    assert!(show(&app, HOST, &late).await.is_none(), "too old");
    let in_time = ticket(&mut ada, "/").await;
    app.clock.advance(SignedDuration::from_secs(29));
    show(&app, HOST, &in_time).await.unwrap();
    for junk in ["", "ticket=", "ticket=x", "next=/"] {
        assert!(show(&app, HOST, junk).await.is_none());
    }
}

#[tokio::test]
async fn a_ticket_dies_with_its_session() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let query = ticket(&mut ada, "/").await;
    ada.post("/auth/logout", json!({})).await.expect(StatusCode::NO_CONTENT);
    assert!(show(&app, HOST, &query).await.is_none());
}

#[tokio::test]
async fn tickets_are_for_sandbox_hosts_of_this_box_and_paths_on_them() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    for host in [
        "evil.example",
        "localhost:9090",
        "live--main--ada.localhost",
        "127.0.0.1:9090",
        "a@live--main--ada.localhost:9090",
        "",
    ] {
        ada.open(&format!("/auth/open?host={host}"))
            .await
            .refused(StatusCode::NOT_FOUND, "not_found");
    }
    for next in ["%2F%2Fevil.example", "https:%2F%2Fevil.example", "%2F%5Cevil.example"] {
        let query = ticket(&mut ada, next).await;
        let (_, to) = show(&app, HOST, &query).await.unwrap();
        assert_eq!(to, "/");
        let forged = format!("{}&next={next}", ticket(&mut ada, "/").await.split('&').next().unwrap());
        assert_eq!(show(&app, HOST, &forged).await.unwrap().1, "/");
    }
    let mut nobody = app.browser();
    let page = nobody.open(&format!("/auth/open?host={HOST}&next=/a")).await;
    assert!(page.location().starts_with("/login?next=%2Fauth%2Fopen"));
    let api = nobody.get(&format!("/auth/open?host={HOST}")).await;
    api.refused(StatusCode::UNAUTHORIZED, "unauthenticated");
}

#[tokio::test]
async fn the_host_cookie_outlives_a_step_up_and_ends_with_the_session() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let query = ticket(&mut ada, "/").await;
    let (headers, _) = show(&app, HOST, &query).await.unwrap();
    let session = app.auth.host_session(&headers, HOST).await.unwrap().unwrap();
    let ended = app.auth.watch_session(&session);
    ada.step_up().await.expect(StatusCode::OK);
    assert!(app.auth.host_session(&headers, HOST).await.unwrap().is_some());
    assert!(
        app.restarted()
            .auth
            .host_session(&headers, HOST)
            .await
            .unwrap()
            .is_some()
    );
    assert!(!ended.is_cancelled());
    ada.post("/auth/logout", json!({})).await.expect(StatusCode::NO_CONTENT);
    assert!(ended.is_cancelled(), "open tunnels are told at once");
    assert!(app.auth.host_session(&headers, HOST).await.unwrap().is_none());
    assert!(
        app.restarted()
            .auth
            .host_session(&headers, HOST)
            .await
            .unwrap()
            .is_none()
    );
}

#[tokio::test]
async fn using_a_sandbox_host_keeps_the_session_alive_and_an_open_socket_does_not() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let query = ticket(&mut ada, "/").await;
    let (headers, _) = show(&app, HOST, &query).await.unwrap();
    for _ in 0..2 {
        app.clock.advance(SignedDuration::from_hours(20));
        assert!(app.auth.host_session(&headers, HOST).await.unwrap().is_some());
    }
    assert!(ada.is_signed_in().await);
    let session = app.auth.host_session(&headers, HOST).await.unwrap().unwrap();
    let ended = app.auth.watch_session(&session);
    app.clock.advance(SignedDuration::from_hours(24));
    let timer = tokio::spawn(app.auth.clone().run());
    ended.cancelled().await;
    timer.abort();
    assert!(app.auth.host_session(&headers, HOST).await.unwrap().is_none());
}

#[tokio::test]
async fn the_control_cookie_opens_no_sandbox_host_and_the_other_way_round() {
    let app = TestApp::new();
    let mut ada = app.ada().await;
    let query = ticket(&mut ada, "/").await;
    let (headers, _) = show(&app, HOST, &query).await.unwrap();
    let app_cookie = headers["cookie"]
        .to_str()
        .unwrap()
        .split_once('=')
        .unwrap()
        .1
        .to_owned();
    let mut control = HeaderMap::new();
    control.insert("cookie", format!("{APP_COOKIE}={}", ada.session()).parse().unwrap());
    assert!(app.auth.host_session(&control, HOST).await.unwrap().is_none());
    let mut thief = app.browser();
    thief.cookies.insert("__Host-choir".into(), app_cookie);
    assert!(!thief.is_signed_in().await);
}
