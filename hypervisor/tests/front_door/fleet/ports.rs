//! Hosts of single ports (B16): what is dialled is that port of that sandbox and by one way of writing it, and a slot that
//! is public makes no second port public.

use std::collections::HashSet;

use axum::http::{Method, StatusCode};
use choir_core::{Generation, SandboxId, Slot};
use serde_json::json;

use super::access::{HOST, sandbox_cookie};
use super::wire::{Served, status};
use super::{Box, change, workspace};
use crate::support::Browser;

/// Something listens there in every sandbox.
const OPEN: [u16; 6] = [1, 22, 80, 3000, 5173, 65535];
/// There, too; no host leads to them.
const RESERVED: [u16; 3] = [8080, 9091, 9092];

/// What stands in the place of a port and is none, and how it is answered.
const NONE: &[(&str, u16)] = &[
    ("", 421),
    ("0", 421),
    ("00", 421),
    ("65536", 421),
    ("131152", 421),
    ("4294967376", 421),
    ("99999999999999999999", 421),
    ("-1", 421),
    ("-80", 421),
    ("+80", 421),
    ("08080", 421),
    ("080", 421),
    ("03000", 421),
    ("8_0", 421),
    ("0x50", 421),
    ("8e1", 421),
    ("80.0", 421),
    ("80.", 421),
    ("80:80", 421),
    ("8%30", 421),
    ("http", 421),
    ("ip", 421),
    ("live", 421),
    ("localhost", 421),
    ("127.0.0.1", 421),
    ("10.0.0.1", 421),
    ("::1", 421),
    ("[::1]", 421),
    ("xn--80", 421),
    ("xn--3-0ga", 421),
    ("localhost@", 400),
    ("80@", 400),
    ("80,22", 400),
    ("80/", 400),
    ("80?", 400),
    ("80#", 400),
    ("80\\", 400),
    ("80 ", 400),
    ("80\t", 400),
    ("\u{ff18}\u{ff10}", 400),
    ("\u{668}\u{660}", 400),
    ("8\u{2080}", 400),
];

struct World {
    start: Box,
    server: Served,
    ada: Browser,
    /// Live first; both run.
    sandboxes: [SandboxId; 2],
}

async fn world() -> World {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let sandboxes = workspace(&mut ada).await;
    for slot in Slot::ALL {
        assert_eq!(change(&mut ada, slot, "start").await["state"], "ready");
    }
    for port in OPEN.into_iter().chain(RESERVED) {
        start.world.listen(port);
    }
    let server = Served::over(&start).await;
    World {
        start,
        server,
        ada,
        sandboxes,
    }
}

impl World {
    /// A request with these further lines.
    async fn get(&self, host: &str, lines: &str) -> String {
        let head = format!("GET / HTTP/1.1\r\nHost: {host}\r\n{lines}Connection: close\r\n\r\n");
        self.server.raw(head).await
    }

    /// The line with which Ada is let in at a host.
    async fn cookie(&self, host: &str) -> String {
        format!("Cookie: {}\r\n", sandbox_cookie(&self.start, &self.ada, host).await)
    }

    async fn set(&mut self, settings: serde_json::Value) {
        self.ada
            .fetch(Method::PATCH, "/api/workspaces/main", Some(settings))
            .await
            .expect(StatusCode::OK);
    }
}

fn host(port: impl std::fmt::Display, slot: Slot) -> String {
    format!("{port}--{slot}--main--ada.localhost:9090")
}

#[tokio::test]
async fn each_port_has_one_name_which_leads_into_its_own_sandbox_and_no_other_name_is_dialled() {
    let world = world().await;
    let mut wanted = world.start.world.dialled();
    for (slot, sandbox) in Slot::ALL.into_iter().zip(&world.sandboxes) {
        for port in OPEN {
            let host = host(port, slot);
            let answer = world.get(&host, &world.cookie(&host).await).await;
            assert_eq!(status(&answer), 200, "{host}: {answer}");
            assert!(
                answer.contains(&format!("\"sandbox\":\"{sandbox}\"")),
                "{host}: {answer}"
            );
            let generation = Generation {
                sandbox: sandbox.clone(),
                number: 1,
            };
            wanted.insert((generation, port));
            assert_eq!(world.start.world.dialled(), wanted, "{host}");
        }
    }
    // With a cookie that is good at the app's own host.
    let cookie = world.cookie(HOST).await;
    assert_eq!(status(&world.get(HOST, &cookie).await), 200);
    for (label, expected) in NONE {
        let answer = world.get(&host(label, Slot::Live), &cookie).await;
        assert_eq!(status(&answer), *expected, "{label:?}: {answer}");
    }
    for port in RESERVED {
        let answer = world.get(&host(port, Slot::Live), &cookie).await;
        assert_eq!(status(&answer), 404, "{port}: {answer}");
        assert!(answer.contains("reserved_port"), "{port}: {answer}");
    }
    assert_eq!(world.start.world.dialled(), wanted, "nothing else was dialled");
}

#[tokio::test]
async fn a_public_slot_makes_no_other_port_public_and_a_port_that_is_shared_opens_alone() {
    let mut world = world().await;
    // What lets in at the app's host lets in nowhere else.
    let cookie = world.cookie(HOST).await;
    world.set(json!({"access": {"live": "public"}})).await;
    let private = |open: &[u16]| -> Vec<u16> { OPEN.into_iter().filter(|port| !open.contains(port)).collect() };
    let dialled = |world: &World| -> HashSet<u16> {
        let dialled = world.start.world.dialled();
        dialled.into_iter().map(|(_, port)| port).collect()
    };
    let before = dialled(&world);
    for port in private(&[]) {
        for lines in ["", cookie.as_str()] {
            let answer = world.get(&host(port, Slot::Live), lines).await;
            assert_eq!(status(&answer), 401, "{port}: {answer}");
        }
    }
    assert_eq!(dialled(&world), before);
    // The controls: the app's host is open to everybody, and the owner comes to each port.
    assert_eq!(status(&world.get(HOST, "").await), 200);
    let owned = host(5173, Slot::Live);
    assert_eq!(status(&world.get(&owned, &world.cookie(&owned).await).await), 200);

    world.set(json!({"ports": {"22": "public"}})).await;
    assert_eq!(status(&world.get(&host(22, Slot::Live), "").await), 200);
    for port in private(&[22]) {
        let answer = world.get(&host(port, Slot::Live), "").await;
        assert_eq!(status(&answer), 401, "{port}: {answer}");
    }
    for port in RESERVED {
        let shared = json!({"ports": {port.to_string(): "public"}});
        let refused = world
            .ada
            .fetch(Method::PATCH, "/api/workspaces/main", Some(shared))
            .await;
        assert_eq!(refused.status, StatusCode::BAD_REQUEST, "{port}");
        assert_eq!(status(&world.get(&host(port, Slot::Live), "").await), 404, "{port}");
    }
}
