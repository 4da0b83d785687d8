//! Websockets over real connections end with what they were opened by (B13), and traffic on them keeps no session alive
//! (C14): at a sandbox host, and at the control host's sandbox API.

use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use choir_core::Slot;
use choir_hypervisor::clock::MockClock;
use jiff::SignedDuration;
use serde_json::json;

use super::access::sandbox_cookie;
use super::wire::{CONTROL, Served, Socket, Sockets, clock, control_cookie, start_at};
use super::{Box, change, workspace};
use crate::support::Browser;

const HOST: &str = "live--main--ada.localhost:9090";
const TERMINAL: &str = "/api/workspaces/main/slots/live/sandbox/terminals/t1/attach";
/// What a person may wait for until a session that ended lets go of what is open.
const WITHIN: Duration = Duration::from_secs(5);
/// RFC 6455: a close frame with code 1008, policy.
const CLOSED: [u8; 4] = [0x88, 2, 0x03, 0xf0];

struct World {
    clock: Arc<MockClock>,
    start: Box,
    server: Served,
    ada: Browser,
}

/// Ada is signed in, and live runs and takes websockets.
async fn world() -> World {
    let clock = clock();
    let start = start_at(&clock, |sim| Arc::new(Sockets(sim))).await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    change(&mut ada, Slot::Live, "start").await;
    let server = Served::over(&start).await;
    World {
        clock,
        start,
        server,
        ada,
    }
}

/// What one session has open: one socket at the sandbox host and one at a terminal.
struct Open([Socket; 2]);

impl Open {
    async fn by(world: &World, browser: &Browser) -> Self {
        let app = sandbox_cookie(&world.start, browser, HOST).await;
        let sockets = [
            world.server.websocket(HOST, "/", &app).await.expect("at the app"),
            world
                .server
                .websocket(CONTROL, TERMINAL, &control_cookie(browser))
                .await
                .expect("at the terminal"),
        ];
        let mut open = Self(sockets);
        open.check().await;
        open
    }

    async fn check(&mut self) {
        for socket in &mut self.0 {
            assert!(socket.is_open().await);
        }
    }

    async fn closes(self) {
        for socket in self.0 {
            let rest = socket
                .end(WITHIN)
                .await
                .expect("the socket is closed within five seconds");
            assert_eq!(rest, CLOSED);
        }
    }
}

/// Ada in another browser: the same user, a session of its own.
async fn elsewhere(world: &mut World) -> Browser {
    let mut other = world.start.browser();
    other.key = world.ada.key.clone();
    other.login().await.expect(StatusCode::OK);
    world.ada.key = other.key.clone();
    other
}

#[tokio::test]
async fn signing_out_closes_the_sockets_of_that_session_and_no_others() {
    let mut world = world().await;
    let other = elsewhere(&mut world).await;
    let ours = Open::by(&world, &world.ada).await;
    let mut theirs = Open::by(&world, &other).await;
    world
        .ada
        .post("/auth/logout", json!({}))
        .await
        .expect(StatusCode::NO_CONTENT);
    ours.closes().await;
    theirs.check().await;
}

#[tokio::test]
async fn revoking_a_session_from_another_closes_its_sockets_and_no_others() {
    let mut world = world().await;
    let mut lost = elsewhere(&mut world).await;
    let id = lost.get("/auth/me").await.expect(StatusCode::OK)["session"]["id"].clone();
    let gone = Open::by(&world, &lost).await;
    let mut kept = Open::by(&world, &world.ada).await;
    world
        .ada
        .delete(&format!("/me/sessions/{}", id.as_str().unwrap()))
        .await
        .expect(StatusCode::NO_CONTENT);
    gone.closes().await;
    kept.check().await;
    // All others at once.
    let third = elsewhere(&mut world).await;
    let gone = Open::by(&world, &third).await;
    world.ada.delete("/me/sessions").await.expect(StatusCode::NO_CONTENT);
    gone.closes().await;
    kept.check().await;
}

#[tokio::test]
async fn a_recovery_closes_every_socket_of_that_user_and_no_others() {
    let mut world = world().await;
    let other = elsewhere(&mut world).await;
    let open = [Open::by(&world, &world.ada).await, Open::by(&world, &other).await];
    let access = json!({"access": {"live": "members"}});
    world
        .ada
        .fetch(axum::http::Method::PATCH, "/api/workspaces/main", Some(access))
        .await
        .expect(StatusCode::OK);
    let eve = world.start.member(&mut world.ada, "eve").await;
    let cookie = sandbox_cookie(&world.start, &eve, HOST).await;
    let mut hers = world.server.websocket(HOST, "/", &cookie).await.unwrap();
    assert!(hers.is_open().await);
    let mut lost = world.start.browser();
    let code = json!({"username": "ada", "code": world.ada.recovery_codes[0]});
    lost.post("/auth/recovery", code).await.expect(StatusCode::OK);
    lost.register_with(json!({})).await.expect(StatusCode::OK);
    for sockets in open {
        sockets.closes().await;
    }
    assert!(hers.is_open().await);
}

#[tokio::test]
async fn a_session_that_runs_out_is_not_kept_by_pings_and_its_sockets_close() {
    let mut world = world().await;
    let mut busy = elsewhere(&mut world).await;
    let mut pinged = Open::by(&world, &world.ada).await;
    let mut used = Open::by(&world, &busy).await;
    for _ in 0..3 {
        world.clock.advance(SignedDuration::from_mins(7 * 60 + 59));
        pinged.check().await;
        used.check().await;
        // The control: a request, and nothing else that the other session did not do, keeps it.
        assert!(busy.is_signed_in().await);
    }
    world.clock.advance(SignedDuration::from_mins(3));
    pinged.closes().await;
    assert!(!world.ada.is_signed_in().await);
    used.check().await;
    assert!(busy.is_signed_in().await);
}

#[tokio::test]
async fn a_deleted_token_closes_the_terminal_it_opened() {
    let mut world = world().await;
    let made = world
        .ada
        .post("/me/tokens", json!({"name": "ci", "scopes": ["read", "write"]}))
        .await
        .expect(StatusCode::CREATED);
    let bearer = format!("x\r\nAuthorization: Bearer {}", made["token"].as_str().unwrap());
    let mut by_token = world.server.websocket(CONTROL, TERMINAL, &bearer).await.unwrap();
    assert!(by_token.is_open().await);
    let mut by_session = Open::by(&world, &world.ada).await;
    let path = format!("/me/tokens/{}", made["item"]["id"].as_str().unwrap());
    world.ada.delete(&path).await.expect(StatusCode::NO_CONTENT);
    assert_eq!(by_token.end(WITHIN).await.expect("closed within five seconds"), CLOSED);
    by_session.check().await;
}
