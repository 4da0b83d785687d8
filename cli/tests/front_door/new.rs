//! `choir new`: what it asks for, and that a second run goes on where the first one failed.

use serde_json::{Value, json};

use super::*;

const START: &str = "POST /api/workspaces/blog/slots/dev/start?wait_s=25";
const CLONE: &str = "POST /api/workspaces/blog/slots/dev/sandbox/exec";

fn blog() -> Value {
    let id = |prefix: &str| format!("{prefix}{}", "a".repeat(26));
    let limits = json!({"memory": 1, "cpus": 1.0, "pids": 1, "disk": 1});
    let slot = |slot: &str| {
        json!({
            "slot": slot, "sandbox": id("s-"), "release": id("r-"), "desired": "running", "state": "ready",
            "address": "x", "limits": limits, "app_port": 3000,
        })
    };
    json!({
        "id": id("w-"), "name": "blog", "user": "ada", "created_at": "2026-01-01T00:00:00Z", "settings": {},
        "slots": {"live": slot("live"), "dev": slot("dev")},
    })
}

fn ended(code: i32, stderr: &str) -> Value {
    json!({
        "exit_code": code, "duration_ms": 1, "truncated": false, "timed_out": false, "stdout": "", "stderr": stderr,
    })
}

#[tokio::test]
async fn new_makes_grants_starts_and_clones_and_goes_on_where_a_failure_left_it() {
    let error = |code: &str| json!({"error": {"code": code, "message": "no", "request_id": "x"}}).to_string();
    let denied = "git@h.example: Permission denied (publickey).\n";
    let server = Server::start(Answers::from([
        (
            "GET /api/workspaces/blog",
            vec![(404, error("not_found")), (200, blog().to_string())],
        ),
        ("POST /api/workspaces", ok(blog())),
        ("POST /me/grants", vec![(409, error("granted_already"))]),
        (START, ok(blog()["slots"]["dev"].clone())),
        (
            CLONE,
            vec![(200, ended(128, denied).to_string()), (200, ended(0, "").to_string())],
        ),
    ]))
    .await;
    let home = tempfile::tempdir().unwrap();
    log_in(home.path(), &server.url);
    std::fs::create_dir(home.path().join(".ssh")).unwrap();
    std::fs::write(home.path().join(".ssh/known_hosts"), "h.example ssh-ed25519 AAAA\n").unwrap();
    let url = "git@h.example:ada/blog.git";
    let out = choir(home.path(), &server.url, &["new", url], None).await;
    assert_eq!(out.status.code(), Some(1), "{}", text(&out.stdout));
    for part in [
        "Permission denied",
        "--secret DEPLOY_KEY",
        "workspace blog is there",
        "same command again",
    ] {
        assert!(text(&out.stderr).contains(part), "{}", text(&out.stderr));
    }
    let arguments = ["new", url, "--secret", "DEPLOY_KEY", "--json"];
    let out = choir(home.path(), &server.url, &arguments, None).await;
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    let shown: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(
        (&shown["directory"], &shown["created"]),
        (&json!("~/blog"), &json!(false))
    );
    let asked = server.asked();
    let bodies = |what: &str| -> Vec<Value> {
        let of = asked.iter().filter(|(asked, ..)| asked == what);
        of.map(|(.., body)| serde_json::from_str(body).unwrap()).collect()
    };
    assert_eq!(bodies("POST /api/workspaces").len(), 1, "it is made once");
    let grant = &bodies("POST /me/grants")[0];
    assert_eq!(grant["inject"]["ssh"]["host_keys"], json!(["ssh-ed25519 AAAA"]));
    assert_eq!(grant["hosts"], json!(["h.example"]));
    let words = bodies(CLONE)[0]["command"].clone();
    assert_eq!((&words[4], &words[5]), (&json!(url), &json!("blog")));
}
