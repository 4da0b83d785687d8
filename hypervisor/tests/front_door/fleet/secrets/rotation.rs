//! `choir-hypervisor rotate-key` beside a running hypervisor (G14): nothing that is open closes, and nothing that is
//! derived from the box's own key changes; also where it is killed (F07).

use std::path::Path;
use std::process::Command;

use axum::http::StatusCode;
use serde_json::json;

use super::super::Box;
use super::{put, value};
use crate::support::limited::survives;

/// The configuration with which the program finds the database of a hypervisor that runs.
fn configure(start: &Box) -> &Path {
    let directory = start.directory.path();
    std::fs::write(directory.join("hypervisor.toml"), "[store]\npath = \"choir.db\"\n").unwrap();
    directory
}

/// Runs the program on it.
fn rotate(start: &Box) -> String {
    let directory = configure(start);
    let output = Command::new(env!("CARGO_BIN_EXE_choir-hypervisor"))
        .args(["--config", "hypervisor.toml", "rotate-key"])
        .current_dir(directory)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// How many rows a table of the database has.
fn linked(start: &Box, table: &str) -> i64 {
    let database = rusqlite::Connection::open(start.directory.path().join("choir.db")).unwrap();
    let count = format!("SELECT count(*) FROM {table}");
    database.query_row(&count, [], |row| row.get(0)).unwrap()
}

#[tokio::test]
async fn the_master_key_is_replaced_while_the_hypervisor_runs() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let mut eve = start.member(&mut ada, "eve").await;
    put(&mut ada, "token", json!({"value": "kept"}))
        .await
        .expect(StatusCode::CREATED);
    let key = start.directory.path().join("key");
    let before = std::fs::read_to_string(&key).unwrap();
    let said = rotate(&start);
    assert!(
        said.contains("a new master key is in use") && said.contains("1 users' keys"),
        "{said}"
    );
    let after = std::fs::read_to_string(&key).unwrap();
    assert_eq!(after.lines().count(), 1);
    assert_ne!(after, before);
    // What runs reads the file again when it meets the new key: for a new user's first secret, and for an old secret.
    put(&mut eve, "token", json!({"value": "eve's"}))
        .await
        .expect(StatusCode::CREATED);
    assert_eq!(value(&start, &mut ada, "token").await.unwrap(), "kept");
    put(&mut ada, "token", json!({"value": "new"}))
        .await
        .expect(StatusCode::OK);
    let again = start.restarted().await;
    for browser in [&mut ada, &mut eve] {
        browser.router = again.router.clone();
    }
    assert_eq!(value(&again, &mut ada, "token").await.unwrap(), "new");
    assert_eq!(value(&again, &mut eve, "token").await.unwrap(), "eve's");
    // Recovery codes are hashed under a key that is derived, not under the master key.
    let mut lost = ada.clone();
    lost.cookies.clear();
    let code = ada.recovery_codes[0].clone();
    lost.post("/auth/recovery", json!({"username": "ada", "code": code}))
        .await
        .expect(StatusCode::OK);
    let events = ada.get("/admin/audit?action=key.").await.expect(StatusCode::OK);
    assert_eq!(events["items"].as_array().unwrap().len(), 1, "{events}");
    let rows = linked(&start, "audit");
    assert_eq!(linked(&start, "audit_chain"), rows, "what root did is in the chain");
    // The control: the old key alone opens nothing.
    std::fs::write(&key, before).unwrap();
    assert!(again.restarted().await.app.vault.is_sealed());
}

/// The master keys that the file lists, the one in use first.
fn listed(start: &Box) -> Vec<String> {
    let file = std::fs::read_to_string(start.directory.path().join("key")).unwrap();
    file.lines().map(str::to_owned).collect()
}

#[tokio::test]
async fn a_rotation_killed_at_any_write_leaves_every_secret_open_and_is_finished_by_the_next() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let mut eve = start.member(&mut ada, "eve").await;
    for (browser, secret) in [(&mut ada, "Ada's"), (&mut eve, "Eve's")] {
        put(browser, "token", json!({"value": secret}))
            .await
            .expect(StatusCode::CREATED);
    }
    let before = listed(&start);
    let directory = configure(&start);
    let log = rusqlite::Connection::open(directory.join("choir.db")).unwrap();
    let mut half = false;
    let mut blocks = 8;
    loop {
        // The program has nothing to write before the rotation itself.
        log.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
            .unwrap();
        let lived = survives(directory, blocks, &["rotate-key"]);
        assert_eq!(
            value(&start, &mut ada, "token").await.unwrap(),
            "Ada's",
            "{blocks} blocks"
        );
        assert_eq!(
            value(&start, &mut eve, "token").await.unwrap(),
            "Eve's",
            "{blocks} blocks"
        );
        if lived {
            break;
        }
        if !half && listed(&start).len() == 2 {
            let again = start.restarted().await;
            assert_eq!(value(&again, &mut ada, "token").await.unwrap(), "Ada's");
            half = true;
        }
        blocks += 16;
    }
    assert!(half, "it died between its first step and its last");
    let after = listed(&start);
    assert_eq!(after.len(), 1);
    assert_ne!(after, before);
    let again = start.restarted().await;
    assert_eq!(value(&again, &mut ada, "token").await.unwrap(), "Ada's");
    assert_eq!(value(&again, &mut eve, "token").await.unwrap(), "Eve's");
    assert_eq!(again.app.store.verify_audit(None).await.unwrap().bad, None);
    // The control: the first key opens nothing any more.
    std::fs::write(directory.join("key"), before.join("\n")).unwrap();
    assert!(again.restarted().await.app.vault.is_sealed());
}
