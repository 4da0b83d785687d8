//! `choir export` and what `choir import` refuses: what is asked for, what is written, and that nothing half is left.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::*;

const SNAPSHOTS: &str = "POST /api/workspaces/main/slots/live/snapshots";
const ARCHIVE: &str = "GET /api/workspaces/main/slots/live/snapshots/p-aaaaaaaaaaaaaaaaaaaaaaaaaa/archive";
const TAKEN: &str = "DELETE /api/workspaces/main/slots/live/snapshots/p-aaaaaaaaaaaaaaaaaaaaaaaaaa";
const MADE: &str = "POST /api/workspaces";
const UNMADE: &str = "DELETE /api/workspaces/main?wait_s=120";

fn id(prefix: &str) -> String {
    format!("{prefix}{}", "a".repeat(26))
}

fn main_workspace() -> Value {
    let limits = json!({"memory": 1, "cpus": 1.0, "pids": 1, "disk": 1});
    let slot = |slot: &str| {
        json!({
            "slot": slot, "sandbox": id("s-"), "release": id("r-"), "desired": "running", "state": "ready",
            "address": "x", "limits": limits, "app_port": 3000,
        })
    };
    json!({
        "id": id("w-"), "name": "main", "user": "ada", "created_at": "2026-01-01T00:00:00Z", "settings": {},
        "slots": {"live": slot("live"), "dev": slot("dev")},
    })
}

/// What the server has of the files: of several parts of age's, also when compressed.
fn files() -> String {
    let mut state = 1_u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        char::from(b'a' + (state >> 24) as u8 % 26)
    };
    std::iter::repeat_with(next).take(400_000).collect()
}

async fn server() -> Server {
    let release = json!({
        "id": id("r-"), "name": "site", "own": true, "image_digest": "x", "config": {}, "state": "verified",
        "created_at": "2026-01-01T00:00:00Z",
    });
    let snapshot = json!({
        "id": id("p-"), "slot": "live", "sandbox": id("s-"), "release": id("r-"),
        "created_at": "2026-01-01T00:00:00Z", "bytes": 1,
    });
    Server::start(Answers::from([
        ("GET /api/workspaces/main", ok(main_workspace())),
        (SNAPSHOTS, ok(snapshot)),
        ("GET /api/releases/r-aaaaaaaaaaaaaaaaaaaaaaaaaa", ok(release)),
        ("GET /me/grants", ok(json!({"items": []}))),
        (ARCHIVE, vec![(200, files())]),
        (TAKEN, vec![(200, String::new())]),
        (MADE, ok(main_workspace())),
        (UNMADE, vec![(200, String::new())]),
    ]))
    .await
}

struct Scene {
    server: Server,
    home: tempfile::TempDir,
}

impl Scene {
    async fn new() -> Self {
        let (server, home) = (server().await, tempfile::tempdir().unwrap());
        log_in(home.path(), &server.url);
        std::fs::write(home.path().join("passphrase"), "correct horse\n").unwrap();
        std::fs::write(home.path().join("wrong"), "battery staple\n").unwrap();
        Self { server, home }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// Runs a verb on a file of the home, with more words.
    async fn choir(&self, verb: &str, file: &str, more: &[&str]) -> Output {
        let file = self.path(file);
        let words = [&[verb, file.to_str().unwrap()], more].concat();
        choir(self.home.path(), &self.server.url, &words, None).await
    }

    async fn with_passphrase(&self, verb: &str, file: &str, passphrase: &str) -> Output {
        let passphrase = self.path(passphrase);
        self.choir(verb, file, &["--passphrase-file", passphrase.to_str().unwrap()])
            .await
    }

    fn asked(&self) -> Vec<String> {
        self.server.asked().into_iter().map(|(what, ..)| what).collect()
    }

    fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.home.path()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names
            .filter(|name| name.contains("choir") && !name.starts_with('.'))
            .collect()
    }
}

#[tokio::test]
async fn an_export_is_its_owners_alone_and_leaves_no_snapshot_of_its_own() {
    let scene = Scene::new().await;
    let out = scene.with_passphrase("export", "main.choir", "passphrase").await;
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    let written = std::fs::metadata(scene.path("main.choir")).unwrap();
    assert_eq!(written.mode() & 0o777, 0o600);
    assert_eq!(scene.files(), ["main.choir"]);
    let asked = scene.asked();
    assert_eq!((&asked[0][..], &asked[asked.len() - 1][..]), (SNAPSHOTS, TAKEN));

    let before = std::fs::read(scene.path("main.choir")).unwrap();
    assert!(
        before.starts_with(b"age-encryption.org/") && !before.windows(11).any(|part| part == b"exported_at"),
        "it is not encrypted"
    );
    let out = scene.with_passphrase("export", "main.choir", "passphrase").await;
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("is there already"), "{}", text(&out.stderr));
    assert_eq!(std::fs::read(scene.path("main.choir")).unwrap(), before);
    assert_eq!(scene.asked(), asked);
}

#[tokio::test]
async fn where_nobody_can_be_asked_for_a_passphrase_nothing_is_begun() {
    let scene = Scene::new().await;
    let out = scene.choir("export", "main.choir", &[]).await;
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("--passphrase-file"), "{}", text(&out.stderr));
    assert!(scene.asked().is_empty() && scene.files().is_empty());
    let recipient = "age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p";
    let out = scene.choir("export", "main.choir", &["--to", recipient]).await;
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    let out = scene.choir("import", "main.choir", &[]).await;
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("--identity"), "{}", text(&out.stderr));
}

#[tokio::test]
async fn what_does_not_open_makes_nothing_and_what_ends_early_is_deleted_again() {
    let scene = Scene::new().await;
    let out = scene.with_passphrase("export", "main.choir", "passphrase").await;
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    let asked = scene.asked();
    let out = scene.with_passphrase("import", "main.choir", "wrong").await;
    assert_eq!(out.status.code(), Some(1));
    assert!(
        text(&out.stderr).contains("not the passphrase"),
        "{}",
        text(&out.stderr)
    );
    assert_eq!(scene.asked(), asked);

    let whole = std::fs::read(scene.path("main.choir")).unwrap();
    std::fs::write(scene.path("main.choir"), &whole[..whole.len() - 1]).unwrap();
    let out = scene.with_passphrase("import", "main.choir", "passphrase").await;
    assert_eq!(out.status.code(), Some(1));
    let told = text(&out.stderr);
    assert!(
        told.contains("damaged or not whole") && told.contains("deleted again"),
        "{told}"
    );
    assert_eq!(scene.asked()[asked.len()..], [MADE, UNMADE]);
}
