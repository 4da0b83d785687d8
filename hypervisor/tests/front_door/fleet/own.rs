//! `choir.toml`: what a home says of how to run its sandbox, when it is in effect and when it is not.

use std::time::Duration;

use axum::http::{Method, StatusCode};
use choir_core::Slot;
use serde_json::{Value, json};

use super::undo::MAIN;
use super::wire::{Served, status};
use super::{Box, change, shown, workspace};
use crate::support::Browser;

async fn patched(ada: &mut Browser, patch: Value) {
    ada.fetch(Method::PATCH, MAIN, Some(patch)).await.expect(StatusCode::OK);
}

async fn answers(served: &Served, slot: Slot) -> u16 {
    let host = format!("{slot}--main--ada.localhost:9090");
    let ask = format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    status(&served.raw(&ask).await)
}

async fn config(ada: &mut Browser, slot: Slot) -> Value {
    let path = format!("{MAIN}/config?slot={slot}");
    ada.get(&path).await.expect(StatusCode::OK)
}

/// The memory that a slot's sandbox may use, once it is this.
async fn memory_is(ada: &mut Browser, slot: Slot, bytes: u64) {
    let path = format!("{MAIN}/slots/{slot}/stats");
    let reached = async {
        while ada.get(&path).await.expect(StatusCode::OK)["memory_limit"] != bytes {
            tokio::task::yield_now().await;
        }
    };
    let soon = tokio::time::timeout(Duration::from_secs(20), reached).await;
    soon.unwrap_or_else(|_| panic!("the limit never became {bytes}"));
}

#[tokio::test]
async fn a_home_names_the_port_of_its_app_over_the_workspace_and_takes_that_along_in_a_swap_and_a_restart() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [_, dev] = workspace(&mut ada).await;
    start.world.listen(5173);
    start.world.say(&dev, Ok("app_port = 5173"));
    patched(
        &mut ada,
        json!({"app_port": 4000, "access": {"live": "public", "dev": "public"}}),
    )
    .await;
    for slot in Slot::ALL {
        change(&mut ada, slot, "start").await;
    }
    let served = Served::over(&start).await;
    assert_eq!(
        (answers(&served, Slot::Live).await, answers(&served, Slot::Dev).await),
        (502, 200)
    );
    let of_dev = config(&mut ada, Slot::Dev).await;
    assert_eq!(
        of_dev["settings"]["app_port"],
        json!({"value": 5173, "from": "choir.toml"})
    );
    assert_eq!(of_dev["choir_toml"], json!({"state": "in_effect"}));
    let of_live = config(&mut ada, Slot::Live).await;
    assert_eq!(
        of_live["settings"]["app_port"],
        json!({"value": 4000, "from": "workspace"})
    );
    assert_eq!(of_live["choir_toml"], Value::Null);
    assert_eq!(shown(&mut ada).await["slots"]["dev"]["app_port"], 5173);

    let swapped = ada.post(&format!("{MAIN}/swap?wait_s=60"), json!({})).await;
    assert_eq!(swapped.expect(StatusCode::OK)["step"], "succeeded");
    assert_eq!(
        (answers(&served, Slot::Live).await, answers(&served, Slot::Dev).await),
        (200, 502)
    );

    let again = start.restarted().await;
    let served = Served::over(&again).await;
    assert_eq!(
        answers(&served, Slot::Live).await,
        200,
        "its agent tells the next hypervisor, too"
    );
}

#[tokio::test]
async fn a_file_that_cannot_be_read_changes_nothing_and_is_shown_with_its_reason_until_a_start_finds_a_better_one() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [_, dev] = workspace(&mut ada).await;
    for (file, says) in [
        (Ok("app_port = 5173\nstrat = \"x\""), "line 2: unknown field `strat`"),
        (Ok("[env]\nCHOIR_BROKER_URL = \"http://evil.example\""), "reserved"),
        (
            Err("it is a link that leaves the home"),
            "it is a link that leaves the home",
        ),
    ] {
        start.world.say(&dev, file);
        let slot = change(&mut ada, Slot::Dev, "restart").await;
        assert_eq!(
            (&slot["state"], &slot["app_port"]),
            (&json!("ready"), &json!(3000)),
            "{slot}"
        );
        assert_eq!(slot["choir_toml"]["state"], "refused");
        assert!(slot["choir_toml"]["reason"].as_str().unwrap().contains(says), "{slot}");
        assert_eq!(config(&mut ada, Slot::Dev).await["choir_toml"], slot["choir_toml"]);
    }
    start.world.say(&dev, Ok("app_port = 5173"));
    assert_eq!(
        shown(&mut ada).await["slots"]["dev"]["app_port"],
        3000,
        "not before the next start"
    );
    let slot = change(&mut ada, Slot::Dev, "restart").await;
    assert_eq!(
        (&slot["app_port"], &slot["choir_toml"]["state"]),
        (&json!(5173), &json!("in_effect"))
    );
    let slot = change(&mut ada, Slot::Dev, "stop").await;
    assert_eq!(slot["choir_toml"], Value::Null, "of what is not there nothing is known");
}

#[tokio::test]
async fn a_home_can_lower_its_limits_and_not_raise_them() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [_, dev] = workspace(&mut ada).await;
    start
        .world
        .say(&dev, Ok("[limits]\nmemory = 268435456\npids = 1000000\ncpus = 200"));
    change(&mut ada, Slot::Dev, "start").await;
    memory_is(&mut ada, Slot::Dev, 256 << 20).await;
    let shown = config(&mut ada, Slot::Dev).await["settings"].clone();
    assert_eq!(
        shown["limits.memory"],
        json!({"value": 256 << 20, "from": "choir.toml"})
    );
    for limit in ["limits.pids", "limits.cpus"] {
        assert_eq!(shown[limit]["from"], "default", "{shown}");
    }
    patched(&mut ada, json!({"limits": {"memory": 128 << 20}})).await;
    memory_is(&mut ada, Slot::Dev, 128 << 20).await;
    patched(&mut ada, json!({"limits": {"memory": 1 << 30}})).await;
    memory_is(&mut ada, Slot::Dev, 256 << 20).await;
    start.world.say(&dev, Ok(""));
    change(&mut ada, Slot::Dev, "restart").await;
    memory_is(&mut ada, Slot::Dev, 1 << 30).await;
}

#[tokio::test]
async fn the_check_that_a_home_names_decides_whether_it_may_become_live() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let [live, dev] = workspace(&mut ada).await;
    start.world.say(&dev, Ok("[health]\nport = 4444\ntimeout_s = 1"));
    change(&mut ada, Slot::Dev, "start").await;
    let swap = format!("{MAIN}/swap?wait_s=60");
    let refused = ada.post(&swap, json!({})).await.expect(StatusCode::OK);
    assert_eq!(refused["step"], "failed", "{refused}");
    assert!(refused["reason"].as_str().unwrap().contains("port 4444"), "{refused}");
    assert_eq!(super::sandbox(&shown(&mut ada).await, Slot::Live), live);

    start.world.say(&dev, Ok("[health]\npath = \"/up\"\ntimeout_s = 1"));
    change(&mut ada, Slot::Dev, "restart").await;
    let swapped = ada.post(&swap, json!({})).await.expect(StatusCode::OK);
    assert_eq!(swapped["step"], "succeeded", "{swapped}");
    let named: Vec<String> = config(&mut ada, Slot::Live).await["settings"]
        .as_object()
        .unwrap()
        .iter()
        .filter(|(_, setting)| setting["from"] == "choir.toml")
        .map(|(name, _)| name.clone())
        .collect();
    assert_eq!(named, ["health.expect", "health.path", "health.timeout_s"]);
}

#[tokio::test]
async fn environment_that_no_agent_could_be_told_of_is_the_reason_why_a_slot_does_not_start() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    let long = "x".repeat(32 << 10);
    patched(&mut ada, json!({"env": {"A": long, "B": long}})).await;
    let path = format!("{MAIN}/slots/dev/start");
    ada.post(&path, json!({})).await.expect(StatusCode::ACCEPTED);
    let told = async {
        loop {
            let slot = shown(&mut ada).await["slots"]["dev"].clone();
            if slot["reason"]
                .as_str()
                .is_some_and(|why| why.contains("environment and services are"))
            {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), told)
        .await
        .expect("it says why");
}
