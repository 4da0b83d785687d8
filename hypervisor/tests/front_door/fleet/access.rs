//! Whose workspace it is, who may open a sandbox host, and input that cannot be.

use axum::http::{Method, Request, StatusCode};
use choir_core::{SandboxHost, Slot, Target};
use choir_hypervisor::gate::Gatekeeper;
use choir_proxy::{Admission, Gate, Peer};
use serde_json::{Value, json};

use super::{Box, change, workspace};
use crate::support::Browser;

pub(super) const HOST: &str = "live--main--ada.localhost:9090";

#[tokio::test]
async fn names_that_cannot_be_are_refused_and_lose_nothing() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let long = "a".repeat(10 << 20);
    for name in ["", "..", "a/b", "a\0b", "-a", "a--b", "A", &long[..300]] {
        let answer = ada.post("/api/workspaces", json!({"name": name})).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{name:.20}");
    }
    let answer = ada.post("/api/workspaces", json!({"name": long})).await;
    assert!([StatusCode::BAD_REQUEST, StatusCode::PAYLOAD_TOO_LARGE].contains(&answer.status));
    for path in ["/api/workspaces/..%2f", "/api/workspaces/a%00", "/api/workspaces/A"] {
        assert_eq!(ada.get(path).await.status, StatusCode::BAD_REQUEST, "{path}");
    }
    assert_eq!(
        ada.get("/api/workspaces").await.expect(StatusCode::OK)["items"],
        json!([])
    );
    workspace(&mut ada).await;
}

#[tokio::test]
async fn settings_that_cannot_be_are_refused_and_change_nothing() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    for bad in [
        json!({"app_port": 9092}),
        json!({"colour": 1}),
        json!({"limits": {"memory": 1}}),
        json!({"timezone": "x"}),
        json!({"env": {"CHOIR_SLOT": "x"}}),
    ] {
        let answer = ada
            .fetch(Method::PATCH, "/api/workspaces/main", Some(bad.clone()))
            .await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{bad}");
    }
    let good = json!({"app_port": 5173, "limits": {"memory": 1 << 29}});
    let after = ada
        .fetch(Method::PATCH, "/api/workspaces/main", Some(good))
        .await
        .expect(StatusCode::OK);
    assert_eq!(after["slots"]["live"]["app_port"], 5173);
    assert_eq!(after["slots"]["dev"]["limits"]["memory"], 1 << 29);
    let config = ada.get("/api/workspaces/main/config").await.expect(StatusCode::OK);
    assert_eq!(
        config["settings"]["app_port"],
        json!({"value": 5173, "from": "workspace"})
    );
    assert_eq!(config["settings"]["limits.pids"]["from"], "default");
}

#[tokio::test]
async fn a_release_brings_settings_that_the_workspaces_own_win_over() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let plain = ada.get("/api/releases").await.expect(StatusCode::OK)["items"][0].clone();
    let config = json!({"app_port": 5173, "start": "true", "limits": {"pids": 100, "memory": 1 << 29}});
    let asked = json!({"image": plain["image_digest"], "config": config});
    let release = ada.post("/api/releases", asked).await.expect(StatusCode::CREATED);
    let made = json!({"name": "main", "release": release["id"]});
    let workspace = ada.post("/api/workspaces", made).await.expect(StatusCode::CREATED);
    assert_eq!(workspace["slots"]["dev"]["app_port"], 5173);
    assert_eq!(workspace["slots"]["dev"]["limits"]["pids"], 100);
    let patch = json!({"limits": {"pids": 200}});
    ada.fetch(Method::PATCH, "/api/workspaces/main", Some(patch))
        .await
        .expect(StatusCode::OK);
    let config = ada
        .get("/api/workspaces/main/config?slot=dev")
        .await
        .expect(StatusCode::OK)["settings"]
        .clone();
    assert_eq!(config["limits.pids"], json!({"value": 200, "from": "workspace"}));
    assert_eq!(config["limits.memory"], json!({"value": 1 << 29, "from": "release"}));
    assert_eq!(config["start"], json!({"value": "true", "from": "release"}));
    for bad in [
        json!({"image": "0", "config": {}}),
        json!({"image": plain["image_digest"], "config": {"app_port": 0}}),
    ] {
        assert_eq!(ada.post("/api/releases", bad).await.status, StatusCode::BAD_REQUEST);
    }
    change(&mut ada, Slot::Dev, "start").await;
}

#[tokio::test]
async fn somebody_elses_workspace_is_answered_like_one_that_is_not_there() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    let mut eve = start.member(&mut ada, "eve").await;
    let swapped = ada
        .post("/api/workspaces/main/swap?wait_s=60", json!({}))
        .await
        .expect(StatusCode::OK);
    let deployment = swapped["id"].as_str().unwrap().to_owned();
    for (method, path) in [
        (Method::GET, "/api/workspaces/main".to_owned()),
        (Method::PATCH, "/api/workspaces/main".to_owned()),
        (Method::DELETE, "/api/workspaces/main".to_owned()),
        (Method::GET, "/api/workspaces/main/config".to_owned()),
        (Method::POST, "/api/workspaces/main/swap".to_owned()),
        (Method::GET, "/api/workspaces/main/deployments".to_owned()),
        (Method::GET, format!("/api/workspaces/main/deployments/{deployment}")),
        (Method::POST, "/api/workspaces/main/slots/live/start".to_owned()),
        (Method::POST, "/api/workspaces/main/slots/live/stop".to_owned()),
        (Method::POST, "/api/workspaces/main/slots/live/restart".to_owned()),
        (Method::POST, "/api/workspaces/main/slots/live/pause".to_owned()),
        (Method::GET, "/api/workspaces/main/slots/live/logs".to_owned()),
        (Method::GET, "/api/workspaces/main/slots/live/stats".to_owned()),
        (Method::POST, "/api/workspaces/main/slots/live/sandbox/exec".to_owned()),
    ] {
        let body = (method != Method::GET).then(|| json!({}));
        let hers = eve.fetch(method.clone(), &path, body.clone()).await;
        let nobodys = eve
            .fetch(method.clone(), &path.replace("main", "nowhere"), body.clone())
            .await;
        assert_eq!(
            (hers.status, hers.code()),
            (StatusCode::NOT_FOUND, nobodys.code()),
            "{method} {path}"
        );
        assert_eq!(hers.json()["error"]["message"], nobodys.json()["error"]["message"]);
    }
    // The owner gets through where she may: the same routes are there.
    ada.get("/api/workspaces/main").await.expect(StatusCode::OK);
}

/// What the gate says to a visitor with these cookies; the status of its answer, or 200 when it lets through.
pub(super) async fn knock(
    gate: &Gatekeeper,
    start: &Box,
    host: &str,
    browser: Option<&Browser>,
    page: bool,
) -> (u16, String) {
    let Ok(Target::Sandbox(target)) = start.app.hosts.parse(host) else {
        panic!("{host}")
    };
    let mut request = Request::get("/x?y=1").header("host", host);
    if page {
        request = request
            .header("sec-fetch-mode", "navigate")
            .header("accept", "text/html");
    }
    if let Some(browser) = browser {
        request = request.header("cookie", sandbox_cookie(start, browser, host).await);
    }
    let (head, ()) = request.body(()).unwrap().into_parts();
    let peer = Peer {
        addr: "192.0.2.1".parse().unwrap(),
        https: false,
    };
    match gate.admit(&target, &head, &peer).await {
        Admission::Pass(route, visitor) => {
            let user = visitor.identity.first().map(|(_, v)| v.to_str().unwrap().to_owned());
            (200, format!("{} {}", route.generation, user.unwrap_or_default()))
        }
        Admission::Answer(answer) => {
            let location = answer.headers().get("location").map(|v| v.to_str().unwrap().to_owned());
            (answer.status().as_u16(), location.unwrap_or_default())
        }
    }
}

/// The cookie a browser holds for a sandbox host after the ticket redirect.
pub(super) async fn sandbox_cookie(start: &Box, browser: &Browser, host: &str) -> String {
    let mut browser = browser.clone();
    let to = browser.open(&format!("/auth/open?host={host}&next=%2F")).await;
    assert_eq!(to.status, StatusCode::SEE_OTHER);
    let location = to.location().to_owned();
    let ticket = location.split("ticket=").nth(1).unwrap().split('&').next().unwrap();
    let cookie = start.app.auth.redeem(ticket, host).await.unwrap();
    assert!(
        start.app.auth.redeem(ticket, host).await.is_err(),
        "a ticket is good once"
    );
    cookie.to_str().unwrap().split(';').next().unwrap().to_owned()
}

#[tokio::test]
async fn a_private_host_opens_for_its_owner_alone() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    let eve = start.member(&mut ada, "eve").await;
    let gate = Gatekeeper::new(start.app.clone());
    let (status, to) = knock(&gate, &start, HOST, None, true).await;
    assert_eq!(status, 303);
    assert!(
        to.starts_with("http://localhost:9090/auth/open?host=live--main--ada.localhost"),
        "{to}"
    );
    assert_eq!(knock(&gate, &start, HOST, None, false).await.0, 401);
    assert_eq!(knock(&gate, &start, HOST, Some(&eve), true).await.0, 404);
    let absent = "live--nowhere--ada.localhost:9090";
    assert_eq!(
        knock(&gate, &start, absent, None, true).await.0,
        303,
        "a stranger does not learn what exists"
    );
    assert_eq!(knock(&gate, &start, absent, Some(&eve), true).await.0, 404);
    let (status, who) = knock(&gate, &start, HOST, Some(&ada), false).await;
    assert_eq!(status, 200);
    assert!(who.ends_with(" ada"), "{who}");
}

#[tokio::test]
async fn members_and_public_hosts_open_wider_and_never_for_a_second_port() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    let eve = start.member(&mut ada, "eve").await;
    change(&mut ada, Slot::Live, "start").await;
    let gate = Gatekeeper::new(start.app.clone());
    let mut open = async |access: Value| {
        ada.fetch(Method::PATCH, "/api/workspaces/main", Some(json!({"access": access})))
            .await
            .expect(StatusCode::OK)
    };
    open(json!({"live": "members"})).await;
    assert_eq!(knock(&gate, &start, HOST, Some(&eve), true).await.0, 200);
    assert_eq!(knock(&gate, &start, HOST, None, false).await.0, 401);
    open(json!({"live": "public"})).await;
    assert_eq!(knock(&gate, &start, HOST, None, false).await.0, 200);
    let port = SandboxHost {
        port: Some(5173),
        slot: Slot::Live,
        workspace: "main".parse().unwrap(),
        user: "ada".parse().unwrap(),
    };
    let port = start.app.hosts.sandbox(&port);
    assert_eq!(knock(&gate, &start, &port, None, false).await.0, 401);
    assert_eq!(knock(&gate, &start, &port, Some(&eve), true).await.0, 404);
    open(json!({"live": "private"})).await;
    assert_eq!(knock(&gate, &start, HOST, Some(&eve), true).await.0, 404);
}

#[tokio::test]
async fn strangers_wake_a_public_sandbox_at_most_six_times_a_minute() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    let access = json!({"access": {"live": "public"}});
    ada.fetch(Method::PATCH, "/api/workspaces/main", Some(access))
        .await
        .expect(StatusCode::OK);
    let gate = Gatekeeper::new(start.app.clone());
    let mut statuses = Vec::new();
    for _ in 0..14 {
        statuses.push(knock(&gate, &start, HOST, None, false).await.0);
        change(&mut ada, Slot::Live, "stop").await;
    }
    // Fourteen tries span at most two minutes of the clock.
    let woken = statuses.iter().filter(|s| **s == 200).count();
    assert!((6..=12).contains(&woken) && statuses.contains(&429), "{statuses:?}");
    assert_eq!(
        knock(&gate, &start, HOST, Some(&ada), false).await.0,
        200,
        "its owner is not bound by that"
    );
}
