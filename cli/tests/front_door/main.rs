//! The program as people run it, against a small server of this test's own. It must not need a hypervisor.

mod moving;
mod new;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Output, Stdio};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::process::Command;

mod prove;

/// `METHOD /path` and the answers to give, in turn; the last one again and again.
type Answers = BTreeMap<&'static str, Vec<(u16, String)>>;

/// What was asked: method and path, `Authorization`, body.
type Asked = Arc<Mutex<Vec<(String, String, String)>>>;

struct Server {
    url: String,
    asked: Asked,
}

impl Server {
    async fn start(answers: Answers) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://localhost:{}", listener.local_addr().unwrap().port());
        let asked = Asked::default();
        let state = (Arc::new(Mutex::new(answers)), Arc::clone(&asked));
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let state = state.clone();
                tokio::spawn(async move {
                    let service = service_fn(move |request| answer(state.clone(), request));
                    hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await
                });
            }
        });
        Self { url, asked }
    }

    fn asked(&self) -> Vec<(String, String, String)> {
        self.asked.lock().unwrap().clone()
    }
}

async fn answer(
    (answers, asked): (Arc<Mutex<Answers>>, Asked),
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let what = format!("{} {}", request.method(), request.uri());
    let header = request.headers().get("authorization");
    let token = header.map(|v| v.to_str().unwrap().to_owned()).unwrap_or_default();
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let body = String::from_utf8(body.to_vec()).unwrap();
    asked.lock().unwrap().push((what.clone(), token, body));
    let mut answers = answers.lock().unwrap();
    let (status, text) = match answers.get_mut(what.as_str()) {
        Some(list) if list.len() > 1 => list.remove(0),
        Some(list) => list[0].clone(),
        None => (404, String::new()),
    };
    let kind = if text.starts_with("event:") {
        "text/event-stream"
    } else {
        "application/json"
    };
    let response = Response::builder().status(status).header("content-type", kind);
    Ok(response.body(Full::new(Bytes::from(text))).unwrap())
}

fn ok(value: Value) -> Vec<(u16, String)> {
    vec![(200, value.to_string())]
}

fn user() -> Value {
    json!({"id": "u-1", "name": "ada", "display_name": "Ada", "role": "admin", "created_at": "2026-01-01T00:00:00Z"})
}

/// Runs `choir` with a home of its own, where somebody is logged in to `url` if `token` is given.
async fn choir(home: &Path, url: &str, arguments: &[&str], stdin: Option<&str>) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_choir"));
    command
        .env_clear()
        .env("HOME", home)
        .env("CHOIR_URL", url)
        .args(arguments)
        .stdin(if stdin.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    if let Some(text) = stdin {
        use tokio::io::AsyncWriteExt as _;
        // A program that was called wrongly ends without reading.
        match child.stdin.take().unwrap().write_all(text.as_bytes()).await {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
            written => written.unwrap(),
        }
    }
    child.wait_with_output().await.unwrap()
}

fn log_in(home: &Path, url: &str) {
    use std::os::unix::fs::PermissionsExt as _;
    let file = home.join(".config/choir/config.json");
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    let config = json!({"url": url, "logins": {url: {"username": "ada", "token": "choir_canary"}}});
    std::fs::write(&file, config.to_string()).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[tokio::test]
async fn logging_in_shows_the_code_and_keeps_the_token_for_its_owner_alone() {
    let pending = (202, json!({"status": "pending"}).to_string());
    let granted = (200, json!({"token": "choir_canary", "user": user()}).to_string());
    let start = json!({
        "device_code": "secret", "user_code": "ABCD-EFGH", "verification_uri": "http://x/auth/device",
        "verification_uri_complete": "http://x/auth/device?code=ABCD-EFGH", "interval_s": 0, "expires_in_s": 600,
    });
    let server = Server::start(Answers::from([
        ("POST /auth/device/start", ok(start)),
        ("POST /auth/device/poll", vec![pending.clone(), pending, granted]),
    ]))
    .await;
    let home = tempfile::tempdir().unwrap();
    let out = choir(home.path(), &server.url, &["login"], None).await;
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    assert!(
        text(&out.stderr).contains("http://x/auth/device?code=ABCD-EFGH") && text(&out.stderr).contains("ABCD-EFGH")
    );
    assert!(text(&out.stdout).contains("as ada"));
    assert!(!format!("{out:?}").contains("canary"), "the token is shown");
    let file = home.path().join(".config/choir/config.json");
    assert_eq!(std::fs::metadata(&file).unwrap().mode() & 0o777, 0o600);
    assert!(std::fs::read_to_string(&file).unwrap().contains("choir_canary"));
    assert_eq!(server.asked().iter().filter(|a| a.0.ends_with("/poll")).count(), 3);
}

#[tokio::test]
async fn a_code_that_was_refused_is_a_failure_that_says_what_to_do() {
    let start = json!({
        "device_code": "s", "user_code": "A", "verification_uri": "http://x", "verification_uri_complete": "http://x",
        "interval_s": 0, "expires_in_s": 600,
    });
    let server = Server::start(Answers::from([
        ("POST /auth/device/start", ok(start)),
        ("POST /auth/device/poll", vec![(410, String::new())]),
    ]))
    .await;
    let home = tempfile::tempdir().unwrap();
    let out = choir(home.path(), &server.url, &["login"], None).await;
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("run `choir login` again"));
    assert!(!home.path().join(".config").exists());
}

const EXEC: &str = "POST /api/workspaces/main/slots/dev/sandbox/exec";

#[tokio::test]
async fn exec_passes_bytes_through_and_returns_the_commands_own_exit_code() {
    let stream = concat!(
        "event: stdout\ndata: {\"data\":\"out\\n\"}\n\n",
        "event: stderr\ndata: {\"data\":\"err\\n\",\"encoding\":\"utf8\"}\n\n",
        "event: stdout\ndata: {\"data\":\"/wA=\",\"encoding\":\"base64\"}\n\n",
        "event: exit\ndata: {\"exit_code\":42,\"duration_ms\":3,\"truncated\":false,\"timed_out\":false}\n\n",
    );
    let server = Server::start(Answers::from([(EXEC, vec![(200, stream.to_owned())])])).await;
    let home = tempfile::tempdir().unwrap();
    log_in(home.path(), &server.url);
    let arguments = ["exec", "dev", "-e", "A=1", "--", "sh", "-c", "exit 42"];
    let out = choir(home.path(), &server.url, &arguments, Some("typed")).await;
    assert_eq!(out.status.code(), Some(42));
    assert_eq!(out.stdout, b"out\n\xff\0");
    assert_eq!(out.stderr, b"err\n");
    let (_, token, body) = server.asked().remove(0);
    assert_eq!(token, "Bearer choir_canary");
    let body: Value = serde_json::from_str(&body).unwrap();
    let expected = json!({"command": ["sh", "-c", "exit 42"], "env": {"A": "1"}, "stdin": "typed"});
    assert_eq!(body, expected);
}

#[tokio::test]
async fn an_exec_that_is_cut_off_is_not_a_success() {
    let stream = "event: stdout\ndata: {\"data\":\"out\"}\n\n".to_owned();
    let server = Server::start(Answers::from([(EXEC, vec![(200, stream)])])).await;
    let home = tempfile::tempdir().unwrap();
    log_in(home.path(), &server.url);
    let out = choir(home.path(), &server.url, &["exec", "dev", "--", "true"], None).await;
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("connection ended"));
}

#[tokio::test]
async fn a_task_is_followed_over_a_broken_connection_without_loss_or_repetition() {
    let base = "/api/workspaces/main/slots/dev/sandbox/tasks";
    let task =
        json!({"id": "t1", "command": "x", "state": "queued", "created_at": "2026-01-01T00:00:00Z", "last_seq": 0});
    let first =
        "event: output\nid: 1\ndata: {\"seq\":1,\"type\":\"output\",\"stream\":\"stdout\",\"data\":\"one \"}\n\n";
    let rest = concat!(
        "event: output\nid: 2\ndata: {\"seq\":2,\"type\":\"output\",\"stream\":\"stdout\",\"data\":\"two\"}\n\n",
        "event: state\nid: 3\ndata: {\"seq\":3,\"type\":\"state\",\"state\":\"failed\",\"exit_code\":7}\n\n",
    );
    let answers = [
        (format!("POST {base}"), task.to_string()),
        (format!("GET {base}/t1/events?since=0"), first.to_owned()),
        (format!("GET {base}/t1/events?since=1"), rest.to_owned()),
    ];
    let answers = answers.map(|(what, text)| (&*what.leak(), vec![(200, text)]));
    let server = Server::start(Answers::from(answers)).await;
    let home = tempfile::tempdir().unwrap();
    log_in(home.path(), &server.url);
    let out = choir(home.path(), &server.url, &["run", "dev", "--", "x"], None).await;
    assert_eq!((out.status.code(), text(&out.stdout)), (Some(7), "one two".to_owned()));
}

#[tokio::test]
async fn a_task_is_followed_to_the_slot_to_which_a_swap_brings_it() {
    let [live, dev] = ["live", "dev"].map(|slot| format!("/api/workspaces/main/slots/{slot}/sandbox/tasks"));
    let task =
        json!({"id": "t1", "command": "x", "state": "running", "created_at": "2026-01-01T00:00:00Z", "last_seq": 1});
    let first =
        "event: output\nid: 1\ndata: {\"seq\":1,\"type\":\"output\",\"stream\":\"stdout\",\"data\":\"one \"}\n\n";
    let rest = concat!(
        "event: output\nid: 2\ndata: {\"seq\":2,\"type\":\"output\",\"stream\":\"stdout\",\"data\":\"two\"}\n\n",
        "event: state\nid: 3\ndata: {\"seq\":3,\"type\":\"state\",\"state\":\"succeeded\",\"exit_code\":0}\n\n",
    );
    let absent = json!({"error": {"code": "not_found", "message": "There is no such task.", "request_id": ""}});
    let answers = [
        (format!("POST {live}"), 200, task.to_string()),
        (format!("GET {live}/t1/events?since=0"), 200, first.to_owned()),
        (format!("GET {live}/t1/events?since=1"), 404, absent.to_string()),
        (format!("GET {dev}/t1"), 200, task.to_string()),
        (format!("GET {dev}/t1/events?since=1"), 200, rest.to_owned()),
    ];
    let answers = answers.map(|(what, status, text)| (&*what.leak(), vec![(status, text)]));
    let server = Server::start(Answers::from(answers)).await;
    let home = tempfile::tempdir().unwrap();
    log_in(home.path(), &server.url);
    let out = choir(home.path(), &server.url, &["run", "live", "--", "x"], None).await;
    assert_eq!((out.status.code(), text(&out.stdout)), (Some(0), "one two".to_owned()));
    assert!(text(&out.stderr).contains("a swap has brought the task to dev"));
}

#[tokio::test]
async fn an_error_is_one_sentence_on_the_standard_error() {
    let error =
        json!({"error": {"code": "deployment_open", "message": "d-1 is under way; wait for it.", "request_id": ""}});
    let server = Server::start(Answers::from([(
        "POST /api/workspaces/main/swap?wait_s=25",
        vec![(409, error.to_string())],
    )]))
    .await;
    let home = tempfile::tempdir().unwrap();
    log_in(home.path(), &server.url);
    let out = choir(home.path(), &server.url, &["swap"], None).await;
    assert_eq!(out.status.code(), Some(1));
    assert_eq!(text(&out.stderr), "choir: d-1 is under way; wait for it.\n");
    assert!(out.stdout.is_empty());
}

#[tokio::test]
async fn who_is_not_logged_in_or_where_nobody_answers_is_told_what_to_do() {
    let home = tempfile::tempdir().unwrap();
    let out = choir(home.path(), "http://localhost:1", &["status"], None).await;
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("run `choir login --url http://localhost:1`"));
    log_in(home.path(), "http://localhost:1");
    let out = choir(home.path(), "http://localhost:1", &["status"], None).await;
    assert!(
        text(&out.stderr).contains("cannot reach http://localhost:1"),
        "{}",
        text(&out.stderr)
    );
    let out = choir(home.path(), "not a url", &["status"], None).await;
    assert_eq!(out.status.code(), Some(2));
}

#[tokio::test]
async fn a_token_file_wins_over_the_login_and_json_is_json() {
    let me = json!({"authenticated": true, "user": user(), "by": "token",
        "session": {"id": "k", "expires_at": "2030-01-01T00:00:00Z"}});
    let server = Server::start(Answers::from([("GET /auth/me", ok(me))])).await;
    let home = tempfile::tempdir().unwrap();
    log_in(home.path(), &server.url);
    let file = home.path().join("token");
    std::fs::write(&file, "choir_other\n").unwrap();
    let out = Command::new(env!("CARGO_BIN_EXE_choir"))
        .env_clear()
        .env("HOME", home.path())
        .env("CHOIR_TOKEN_FILE", &file)
        .args(["whoami", "--json", "--url", &server.url])
        .output()
        .await
        .unwrap();
    let answer: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(answer["name"], "ada");
    assert_eq!(server.asked()[0].1, "Bearer choir_other");
}

#[tokio::test]
async fn a_smoke_stops_at_the_first_failure_and_names_no_step_it_did_not_run() {
    let server = Server::start(Answers::from([
        ("GET /healthz", ok(json!({"status": "ok"}))),
        ("GET /readyz", ok(json!({"ready": true, "parts": {}}))),
        (
            "POST /auth/register/start",
            vec![(
                403,
                json!({"error": {"code": "invite_required", "message": "Invite?"}}).to_string(),
            )],
        ),
    ]))
    .await;
    let home = tempfile::tempdir().unwrap();
    let out = choir(home.path(), &server.url, &["smoke", "--json"], None).await;
    assert_eq!(out.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(
        (report["ok"].as_bool(), report["steps"].as_array().unwrap().len()),
        (Some(false), 2)
    );
    assert_eq!(report["steps"][1]["reason"], "Invite?");
}

const SECRET: &str = "PUT /me/secrets/GITHUB_TOKEN";

fn stored() -> Value {
    let at = "2026-01-01T00:00:00Z";
    json!({"name": "GITHUB_TOKEN", "version": 2, "reveal": false, "created_at": at, "updated_at": at})
}

#[tokio::test]
async fn a_secret_is_piped_in_sent_as_it_is_and_shown_nowhere() {
    let server = Server::start(Answers::from([
        (SECRET, ok(stored())),
        ("GET /me/secrets", ok(json!({"items": [stored()]}))),
        (
            "DELETE /me/secrets/GITHUB_TOKEN",
            ok(json!({"name": "GITHUB_TOKEN", "ended_grants": []})),
        ),
    ]))
    .await;
    let home = tempfile::tempdir().unwrap();
    log_in(home.path(), &server.url);
    let run = async |arguments: &[&str], stdin| choir(home.path(), &server.url, arguments, stdin).await;
    let set = run(&["secrets", "set", "GITHUB_TOKEN"], Some("a-canary\n")).await;
    assert_eq!(
        (set.status.code(), text(&set.stdout).as_str()),
        (Some(0), "GITHUB_TOKEN is stored, version 2.\n")
    );
    let several = run(&["secrets", "set", "GITHUB_TOKEN", "--reveal"], Some("two\nlines\r\n")).await;
    let list = run(&["secrets"], None).await;
    assert!(text(&list.stdout).contains("GITHUB_TOKEN"));
    let gone = run(&["secrets", "rm", "GITHUB_TOKEN"], None).await;
    assert_eq!(gone.status.code(), Some(0), "{}", text(&gone.stderr));
    assert!(!format!("{set:?}{several:?}{list:?}{gone:?}").contains("canary"));
    let bodies: Vec<Value> = server
        .asked()
        .iter()
        .take(2)
        .map(|a| serde_json::from_str(&a.2).unwrap())
        .collect();
    assert_eq!(bodies[0], json!({"value": "a-canary", "reveal": false}));
    assert_eq!(bodies[1], json!({"value": "two\nlines", "reveal": true}));
}

#[tokio::test]
async fn a_secret_without_a_value_or_on_the_command_line_is_wrong_usage() {
    let server = Server::start(Answers::from([(SECRET, ok(stored()))])).await;
    let home = tempfile::tempdir().unwrap();
    log_in(home.path(), &server.url);
    for (arguments, stdin) in [
        (&["secrets", "set", "GITHUB_TOKEN"][..], ""),
        (&["secrets", "set", "GITHUB_TOKEN"], "\n"),
        (&["secrets", "set", "GITHUB_TOKEN", "value"], "value"),
        (&["secrets", "set", "../x"], "value"),
    ] {
        let out = choir(home.path(), &server.url, arguments, Some(stdin)).await;
        assert_eq!(out.status.code(), Some(2), "{arguments:?}");
    }
    assert_eq!(server.asked(), []);
}

#[tokio::test]
async fn a_secret_typed_at_the_prompt_is_not_shown() {
    use std::io::{Read as _, Write as _};
    use std::process::Command;

    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

    let server = Server::start(Answers::from([(SECRET, ok(stored()))])).await;
    let home = tempfile::tempdir().unwrap();
    log_in(home.path(), &server.url);
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
    let terminal = std::fs::OpenOptions::new().read(true).write(true).open(name).unwrap();
    let mut keyboard = std::fs::File::from(master);
    // The control: before, the terminal shows what is typed.
    keyboard.write_all(b"seen\n").unwrap();
    let mut shown = [0; 6];
    keyboard.read_exact(&mut shown).unwrap();
    assert_eq!(&shown, b"seen\r\n");

    let mut child = Command::new(env!("CARGO_BIN_EXE_choir"))
        .env_clear()
        .env("HOME", home.path())
        .env("CHOIR_URL", &server.url)
        .args(["secrets", "set", "GITHUB_TOKEN"])
        .stdin(terminal.try_clone().unwrap())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let typed = tokio::task::spawn_blocking(move || {
        let mut said = child.stderr.take().unwrap();
        let mut prompt = Vec::new();
        while !prompt.ends_with(b"(not shown): ") {
            let mut byte = [0];
            said.read_exact(&mut byte).unwrap();
            prompt.extend(byte);
        }
        keyboard.write_all(b"a-canary\n").unwrap();
        assert!(child.wait().unwrap().success());
        // Whatever the terminal showed meanwhile comes before this.
        (&terminal).write_all(b"end").unwrap();
        let mut shown = Vec::new();
        while !shown.ends_with(b"end") {
            let mut byte = [0];
            keyboard.read_exact(&mut byte).unwrap();
            shown.extend(byte);
        }
        shown
    });
    assert!(!text(&typed.await.unwrap()).contains("canary"));
    assert!(server.asked()[0].2.contains("a-canary"), "it was sent");
}

#[tokio::test]
async fn a_grant_is_asked_for_as_it_is_typed_and_a_request_decided_by_its_id() {
    let (grant, request) = ("g-aaaaaaaaaaaaaaaaaaaaaaaaaa", "q-aaaaaaaaaaaaaaaaaaaaaaaaaa");
    let at = "2026-01-01T00:00:00Z";
    let made = json!({
        "id": grant, "workspace": "main", "slot": "dev", "capability": "mail", "secret": "MAIL_KEY", "hosts": ["api.mail.example"],
        "methods": ["POST"], "path_prefix": "/v1", "inject": {"header": "authorization", "format": "Bearer {secret}"}, "created_at": at,
    });
    let asked_for = json!({
        "id": request, "workspace": "main", "slot": "dev", "host": "b.example", "count": 3, "first_at": at, "last_at": at, "expires_at": at,
    });
    let server = Server::start(Answers::from([
        ("POST /me/grants", ok(made.clone())),
        ("GET /me/grants", ok(json!({"items": [made]}))),
        (
            "DELETE /me/grants/g-aaaaaaaaaaaaaaaaaaaaaaaaaa",
            vec![(204, String::new())],
        ),
        ("GET /me/grants/requests", ok(json!({"items": [asked_for]}))),
        (
            "POST /me/grants/requests/q-aaaaaaaaaaaaaaaaaaaaaaaaaa",
            vec![(204, String::new())],
        ),
    ]))
    .await;
    let home = tempfile::tempdir().unwrap();
    log_in(home.path(), &server.url);
    let run = async |arguments: &[&str]| {
        let out = choir(home.path(), &server.url, arguments, None).await;
        assert_eq!(out.status.code(), Some(0), "{arguments:?}: {}", text(&out.stderr));
        text(&out.stdout)
    };
    let rest = "--template bearer --host api.mail.example --method post --path /v1";
    let mut add = vec!["grants", "add", "mail", "--slot", "dev", "--secret", "MAIL_KEY"];
    add.extend(rest.split(' '));
    assert!(run(&add).await.contains("$CHOIR_BROKER_URL/v1/egress/mail/"));
    let list = run(&["grants"]).await;
    assert!(
        list.contains("api.mail.example/v1") && list.contains("main/dev"),
        "{list}"
    );
    assert!(run(&["grants", "requests"]).await.contains("to reach b.example"));
    run(&["grants", "approve", request]).await;
    run(&["grants", "dismiss", request]).await;
    run(&["grants", "rm", grant]).await;
    let asked = server.asked();
    let body = |at: usize| serde_json::from_str::<Value>(&asked[at].2).unwrap();
    let expected = json!({
        "workspace": "main", "slot": "dev", "capability": "mail", "secret": "MAIL_KEY", "template": "bearer",
        "hosts": ["api.mail.example"], "methods": ["POST"], "path_prefix": "/v1",
    });
    assert_eq!(body(0), expected);
    assert_eq!(
        (body(3), body(4)),
        (json!({"decision": "approve"}), json!({"decision": "dismiss"}))
    );
    for wrong in [
        &["grants", "add", "mail"][..],
        &["grants", "add", "M ail", "--slot", "dev", "--secret", "x"],
    ] {
        assert_eq!(
            choir(home.path(), &server.url, wrong, None).await.status.code(),
            Some(2),
            "{wrong:?}"
        );
    }
}

#[tokio::test]
async fn the_audit_trail_is_asked_for_as_typed_shown_as_a_table_and_exported_as_it_comes() {
    let home = tempfile::tempdir().unwrap();
    let row = json!({
        "id": 7, "at": "2026-01-02T03:04:05Z", "actor": "u-1", "user": "u-1", "action": "secret.use",
        "subject": "main/dev \u{1b}[2Jgithub", "outcome": "ok", "intent": 6,
    });
    let server = Server::start(BTreeMap::from([
        (
            "GET /me/audit?action=secret&outcome=ok&since=2026-01-01T00%3A00%3A00Z&limit=20",
            ok(json!({"items": [row]})),
        ),
        ("GET /admin/audit?user=eve", vec![(200, format!("{row}\n{row}\n"))]),
    ]))
    .await;
    log_in(home.path(), &server.url);
    let asked = "audit --action secret --outcome ok --since 2026-01-01T00:00:00Z --limit 20";
    let arguments: Vec<&str> = asked.split(' ').collect();
    let output = choir(home.path(), &server.url, &arguments, None).await;
    assert_eq!(
        text(&output.stdout),
        "ID  AT                    ACTOR  ACTION      SUBJECT              OUTCOME\n\
         7   2026-01-02T03:04:05Z  u-1    secret.use  main/dev \u{fffd}[2Jgithub  ok (of 6)\n",
        "{output:?}"
    );
    let output = choir(home.path(), &server.url, &["audit", "--user", "eve", "--export"], None).await;
    assert_eq!(text(&output.stdout), format!("{row}\n{row}\n"), "{output:?}");
    for wrong in [
        &["audit", "--since", "yesterday"][..],
        &["audit", "--all", "--user", "eve"],
    ] {
        let output = choir(home.path(), &server.url, wrong, None).await;
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
    }
}

#[tokio::test]
async fn what_was_used_of_providers_is_shown_by_day_with_what_is_left_of_the_caps() {
    let home = tempfile::tempdir().unwrap();
    let row = json!({
        "day": "2026-01-02", "user": "ada", "workspace": "main", "slot": "dev", "provider": "openai", "key": "platform",
        "requests": 3, "input_tokens": 40, "cached_tokens": 8, "output_tokens": 2,
    });
    let cap = json!({
        "provider": "openai", "requests": 3, "daily_requests": 10, "tokens": 42, "daily_tokens": null, "resets_in_s": 90,
    });
    let server = Server::start(BTreeMap::from([
        (
            "GET /me/usage?since=2026-01-01",
            ok(json!({"items": [row], "caps": [cap]})),
        ),
        ("GET /admin/usage?user=eve", ok(json!({"items": [], "caps": []}))),
    ]))
    .await;
    log_in(home.path(), &server.url);
    let output = choir(home.path(), &server.url, &["usage", "--since", "2026-01-01"], None).await;
    assert_eq!(
        text(&output.stdout),
        "DAY         USER  SLOT      PROVIDER  KEY        REQUESTS  INPUT  CACHED  OUTPUT\n\
         2026-01-02  ada   main/dev  openai    the box's  3         40     8       2\n\
         Today with the box's key for openai: 3 of 10 requests, 42 tokens; resets in 2 min.\n",
        "{output:?}"
    );
    let output = choir(home.path(), &server.url, &["usage", "--user", "eve", "--json"], None).await;
    let shown: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(shown, json!({"items": [], "caps": []}));
    let output = choir(home.path(), &server.url, &["usage", "--all", "--user", "eve"], None).await;
    assert_eq!(output.status.code(), Some(2));
}
