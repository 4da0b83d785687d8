//! The policy of a workspace at the proxy that programs use (D10, D13), and what its owner makes of refusals.

use axum::http::{Method, StatusCode};
use choir_core::Slot;
use choir_runtime::ListenerKind;
use jiff::SignedDuration;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::outdoors::PUBLIC;
use super::{API, Scene};

impl Scene {
    /// The head, and what follows at once, of the proxy's answer to a program in dev.
    pub(super) async fn proxied(&self, request: &str) -> String {
        let generation = self.generation(Slot::Dev);
        let mut stream = self.start.sim.connect_inside(&generation, ListenerKind::Egress).await;
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut got = Vec::new();
        while !got.windows(4).any(|end| end == b"\r\n\r\n") {
            got.push(stream.read_u8().await.unwrap());
        }
        String::from_utf8(got).unwrap()
    }

    async fn connect(&self, to: &str) -> String {
        self.proxied(&format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n\r\n"))
            .await
    }

    async fn set(&mut self, egress: Value) {
        let patch = json!({ "egress": egress });
        let answer = self.ada.fetch(Method::PATCH, "/api/workspaces/main", Some(patch)).await;
        answer.expect(StatusCode::OK);
    }

    async fn requests(&mut self) -> Vec<Value> {
        let page = self.ada.get("/me/grants/requests").await.expect(StatusCode::OK);
        page["items"].as_array().unwrap().clone()
    }
}

#[tokio::test]
async fn what_a_sandbox_does_outside_counts_as_its_use() {
    let scene = Scene::new().await;
    let activity = |slot: Slot| {
        let sandbox = scene.generation(slot).sandbox;
        scene.start.app.fleet.handle(&sandbox).unwrap().activity.last_ms()
    };
    let [live, dev] = [Slot::Live, Slot::Dev].map(activity);
    let used = async {
        while activity(Slot::Dev) == dev {
            assert!(scene.connect(&format!("{API}:443")).await.starts_with("HTTP/1.1 200"));
        }
    };
    let waited = tokio::time::timeout(std::time::Duration::from_secs(20), used).await;
    assert!(waited.is_ok(), "dev was last used at {dev} ms, and is still");
    assert_eq!(activity(Slot::Live), live, "live did nothing");
}

#[tokio::test]
async fn what_the_policy_does_not_name_is_refused_before_it_is_resolved_and_recorded() {
    let mut scene = Scene::new().await;
    scene.outdoors.host("evil.example", "93.184.215.66");
    // The control: under the default policy it is reached.
    assert!(scene.connect("evil.example:443").await.starts_with("HTTP/1.1 200"));
    scene.outdoors.resolved.lock().unwrap().clear();
    for (policy, rule) in [
        (json!({"allowlist": [API]}), "egress.allowlist"),
        (json!({"allowlist": []}), "egress.allowlist"),
        (json!("locked"), "egress.locked"),
    ] {
        scene.set(policy).await;
        for to in [
            "evil.example:443",
            "EVIL.example.:443",
            "93.184.215.66:443",
            "api.a.example.evil.example:443",
        ] {
            let got = scene.connect(to).await;
            assert!(got.starts_with("HTTP/1.1 403") && got.contains(rule), "{to}: {got}");
            assert!(got.contains("/me/grants/requests"), "{got}");
        }
        let got = scene
            .proxied("GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n")
            .await;
        assert!(got.starts_with("HTTP/1.1 403") && got.contains(rule), "{got}");
    }
    assert!(scene.outdoors.resolved.lock().unwrap().is_empty());
    let rows = scene.audited("egress.connect").await;
    let of = |outcome: &str| rows.iter().filter(|(_, o)| o == outcome).count();
    assert_eq!((of("ok"), of("allowlist"), of("locked")), (1, 5, 5), "{rows:?}");
    assert_eq!(scene.outdoors.dialled.lock().unwrap().len(), 1);
    scene
        .set(json!({"allowlist": ["*.evil.example", "evil.example"]}))
        .await;
    assert!(scene.connect("evil.example:443").await.starts_with("HTTP/1.1 200"));
    // The second allow list refused what the first had: that is told of, too.
    assert_eq!(scene.told_in_the_end("egress.connect", "allowlist", 10).await.len(), 10);
}

#[tokio::test]
async fn a_refused_host_waits_for_its_owner_who_lets_it_through_or_not() {
    let mut scene = Scene::new().await;
    scene.outdoors.host("b.example", "93.184.215.15");
    scene.set(json!("locked")).await;
    for to in ["api.a.example:443", "API.A.EXAMPLE:8443", "b.example:443"] {
        assert!(scene.connect(to).await.starts_with("HTTP/1.1 403"));
    }
    let open = scene.requests().await;
    let find = |host: &str| open.iter().find(|r| r["host"] == host).unwrap();
    assert_eq!(
        (open.len(), &find(API)["count"], &find(API)["slot"]),
        (2, &json!(2), &json!("dev"))
    );
    let path = |host: &str| format!("/me/grants/requests/{}", find(host)["id"].as_str().unwrap());
    let yes = json!({"decision": "approve"});
    scene
        .ada
        .post(&path(API), yes.clone())
        .await
        .expect(StatusCode::NO_CONTENT);
    scene
        .ada
        .post(&path("b.example"), json!({"decision": "dismiss"}))
        .await
        .expect(StatusCode::NO_CONTENT);
    assert!(scene.requests().await.is_empty());
    assert!(scene.connect("api.a.example:443").await.starts_with("HTTP/1.1 200"));
    assert!(scene.connect("b.example:443").await.starts_with("HTTP/1.1 403"));
    let shown = scene.ada.get("/api/workspaces/main").await.expect(StatusCode::OK);
    assert_eq!(shown["settings"]["egress"], json!({"allowlist": [API]}));
    let config = scene
        .ada
        .get("/api/workspaces/main/config")
        .await
        .expect(StatusCode::OK);
    assert_eq!(
        config["settings"]["egress.allowlist"],
        json!({"value": [API], "from": "workspace"})
    );
    assert!(config["settings"]["egress"].is_null());
    scene
        .ada
        .post(&path(API), yes)
        .await
        .refused(StatusCode::NOT_FOUND, "not_found");
    // Nobody decided: after a week it is gone, and refused all the same.
    assert_eq!(scene.requests().await.len(), 1);
    scene.clock.advance(SignedDuration::from_hours(7 * 24));
    scene.ada.login().await.expect(StatusCode::OK);
    assert!(scene.requests().await.is_empty());
}

#[tokio::test]
async fn a_refused_capability_waits_until_it_is_granted() {
    let mut scene = Scene::new().await;
    scene.get("/v1/egress/github/").await.denied("grant");
    let open = scene.requests().await;
    assert_eq!((open.len(), &open[0]["capability"]), (1, &json!("github")));
    let path = format!("/me/grants/requests/{}", open[0]["id"].as_str().unwrap());
    let yes = json!({"decision": "approve"});
    scene
        .ada
        .post(&path, yes)
        .await
        .refused(StatusCode::CONFLICT, "needs_a_grant");
    scene.grant(json!({})).await;
    assert!(scene.requests().await.is_empty());
}

#[tokio::test]
async fn a_sandbox_that_asks_for_everything_fills_nothing() {
    let mut scene = Scene::new().await;
    scene.set(json!("locked")).await;
    for n in 0..500 {
        let refused = scene.connect(&format!("h{n}.example:443")).await;
        assert!(refused.starts_with("HTTP/1.1 403"), "{refused}");
    }
    assert_eq!(scene.requests().await.len(), 100);
    // The first ones have a row each, the others one together.
    let rows = scene.told_in_the_end("egress.connect", "locked", 500).await;
    assert_eq!(rows.len(), 201);
    assert_eq!(
        (rows[0].times, rows[0].subject.as_str()),
        (Some(300), "main/dev (too many different ones)")
    );
}

#[tokio::test]
async fn a_sandbox_that_asks_again_and_again_for_the_same_has_two_rows_however_often() {
    let mut scene = Scene::new().await;
    scene.set(json!("locked")).await;
    for _ in 0..300 {
        assert!(scene.connect("h.example:443").await.starts_with("HTTP/1.1 403"));
    }
    // The first is told at once, and how often it was asked for.
    assert_eq!(scene.audited("egress.connect").await.len(), 1);
    assert_eq!(scene.requests().await[0]["count"], 300);
    let rows = scene.told_in_the_end("egress.connect", "locked", 300).await;
    assert_eq!((rows.len(), rows[0].times), (2, Some(299)));
    assert_eq!(scene.start.app.store.verify_audit(None).await.unwrap().bad, None);
}

#[tokio::test]
async fn the_proxy_connects_to_no_address_of_the_box_or_its_network() {
    let mut scene = Scene::new().await;
    let mut inside: Vec<String> = [
        "127.0.0.1",
        "10.0.0.5",
        "169.254.169.254",
        "100.64.0.1",
        "192.168.0.1",
        "::1",
        "fd00:ec2::254",
    ]
    .map(str::to_owned)
    .to_vec();
    inside.extend(
        choir_hypervisor::places::own_addresses()
            .iter()
            .map(ToString::to_string),
    );
    for address in &inside {
        let literal = if address.contains(':') {
            format!("[{address}]")
        } else {
            address.clone()
        };
        scene.outdoors.name("inside.example", &[&[address.as_str()]]);
        for host in [literal.as_str(), "inside.example"] {
            let got = scene.connect(&format!("{host}:80")).await;
            assert!(
                got.starts_with("HTTP/1.1 403") && got.contains("may not be reached"),
                "{host}: {got}"
            );
        }
    }
    assert!(scene.outdoors.dialled.lock().unwrap().is_empty());
    assert!(scene.requests().await.is_empty(), "no owner can allow these");
    scene.outdoors.host("inside.example", PUBLIC);
    assert!(scene.connect("inside.example:80").await.starts_with("HTTP/1.1 200"));
}
