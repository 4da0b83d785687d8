//! Searches for secrets, their reports, and logins that go into the vault.

use choir_api::prove::{Verdict, canonical};
use ed25519_dalek::{Signer as _, SigningKey};
use serde_json::{Value, json};

use crate::{Answers, Server, choir, log_in, ok, stored, text};

#[tokio::test]
async fn a_login_of_a_tool_is_taken_out_of_its_file_and_shown_nowhere() {
    let server = Server::start(Answers::from([("PUT /me/secrets/GH_LOGIN", ok(stored()))])).await;
    let home = tempfile::tempdir().unwrap();
    log_in(home.path(), &server.url);
    let file = home.path().join(".config/gh/hosts.yml");
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(&file, "github.com:\n    oauth_token: gho_canary\n").unwrap();
    let import = async |arguments: &[&str]| choir(home.path(), &server.url, arguments, None).await;
    let out = import(&["secrets", "import-login", "gh"]).await;
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    assert!(text(&out.stdout).contains("--template gh"), "{}", text(&out.stdout));
    assert!(!text(&out.stdout).contains("canary") && !text(&out.stderr).contains("canary"));
    let body: Value = serde_json::from_str(&server.asked()[0].2).unwrap();
    assert_eq!(body, json!({"value": "gho_canary", "reveal": false}));
    std::fs::write(&file, "github.com:\n").unwrap();
    let out = import(&["secrets", "import-login", "gh"]).await;
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("no token"), "{}", text(&out.stderr));
    let out = import(&["secrets", "import-login", "nothing"]).await;
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("claude, codex"), "{}", text(&out.stderr));
    assert_eq!(server.asked().len(), 1);
}

/// The stream of a search that found so much, signed by a box.
fn search(key: &SigningKey, verdict: Verdict) -> (u16, String) {
    let hits = u64::from(verdict == Verdict::Hits);
    let report = json!({
        "format": 1, "box_id": "b-1", "origin": "http://x", "version": "0", "scope": "own", "asked_by": "ada",
        "began_at": "2026-01-02T03:04:05Z", "ended_at": "2026-01-02T03:04:06Z", "verdict": verdict,
        "complete": verdict != Verdict::Incomplete, "summary": "as it is", "bytes": 12, "sought": [], "unsought": [],
        "places": [{
            "owner": {"of": "box"}, "what": "log", "bytes": 12, "items": 1, "hits": hits, "unread": 0,
            "why": ["nobody \u{1b}[2J answers"], "searched": verdict != Verdict::Incomplete,
        }],
        "hits_total": hits, "hits": [], "logins_total": 0, "logins": [], "beyond": [],
    });
    let value = key.sign(canonical(&report).as_bytes()).to_bytes();
    let hex = |bytes: &[u8]| data_encoding::HEXLOWER.encode(bytes);
    let key = hex(key.verifying_key().as_bytes());
    let signed = json!({"report": report, "signature": {"algorithm": "ed25519", "key": key, "value": hex(&value)}});
    let progress = json!({"place": "log of the box", "bytes": 12, "places_done": 0, "places": 1, "hits": 0});
    let stream = format!("event: progress\ndata: {progress}\n\nevent: report\ndata: {signed}\n\n");
    (200, stream)
}

#[tokio::test]
async fn a_search_ends_with_its_verdict_and_its_report_is_kept_and_checked() {
    let key = SigningKey::from_bytes(&[7; 32]);
    let public = data_encoding::HEXLOWER.encode(key.verifying_key().as_bytes());
    let [clean, incomplete, hits] = [Verdict::Clean, Verdict::Incomplete, Verdict::Hits].map(|v| search(&key, v));
    let forged = (200, clean.1.replace("as it is", "all is well"));
    let broken = (200, clean.1.split("event: report").next().unwrap().to_owned());
    let server = Server::start(Answers::from([
        (
            "GET /api/prove/key",
            ok(json!({"box_id": "b-1", "algorithm": "ed25519", "key": public})),
        ),
        (
            "POST /me/prove",
            vec![clean, incomplete.clone(), incomplete, hits, forged, broken],
        ),
    ]))
    .await;
    let home = tempfile::tempdir().unwrap();
    log_in(home.path(), &server.url);
    let run = async |arguments: &[&str]| choir(home.path(), &server.url, arguments, None).await;
    let file = home.path().join("report.json");
    let file = file.to_str().unwrap();
    for (arguments, code, shown) in [
        (&["prove", "--out", file][..], 0, "CLEAN"),
        (&["prove"], 1, "nobody \u{fffd}[2J answers"),
        (&["prove", "--allow-unsearched"], 0, "NOT SEARCHED"),
        (&["prove", "--allow-unsearched", "--allow-revealed"], 1, "HITS"),
        (&["prove"], 1, ""),
        (&["prove"], 1, ""),
        (&["prove", "--verify", file], 0, "CLEAN"),
        (&["prove", "--verify", file, "--key", &public], 0, "CLEAN"),
        (&["prove", "--verify", file, "--key", &"00".repeat(32)], 1, ""),
        (&["prove", "--verify", file, "--all"], 2, ""),
        (&["prove", "--key", "00"], 2, ""),
    ] {
        let out = run(arguments).await;
        assert_eq!(out.status.code(), Some(code), "{arguments:?}: {out:?}");
        assert!(
            text(&out.stdout).contains(shown),
            "{arguments:?}: {}",
            text(&out.stdout)
        );
        assert_eq!(shown.is_empty(), text(&out.stdout).is_empty(), "{arguments:?}");
    }
    let kept = std::fs::read_to_string(file).unwrap();
    std::fs::write(file, kept.replace("as it is", "all is well")).unwrap();
    assert_eq!(run(&["prove", "--verify", file]).await.status.code(), Some(1));
}
