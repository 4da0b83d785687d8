//! `/health` and `/exec`.

use std::path::Path;

use choir_api::sandbox::Encoding;
use serde_json::{Value, json};

use crate::sandbox::{Client, Sandbox, is_alive, request, until};

fn make_fifo(path: &Path) {
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
}

async fn pid_in(path: &Path) -> i32 {
    let read = || std::fs::read_to_string(path).ok()?.trim().parse().ok();
    until(async || read().is_some()).await;
    read().unwrap()
}

#[tokio::test]
async fn health_says_which_generation_answers() {
    let (sandbox, _link) = Sandbox::ready().await;
    let health = sandbox.get("/health").await;
    assert_eq!(health["service"], "sandbox");
    assert_eq!(health["status"], "ok");
    assert_eq!(health["sandbox_id"], "s-test");
    assert_eq!(health["generation"], 3);
    assert_eq!(health["nonce"], crate::sandbox::NONCE);
    let inside = Client::connect(&sandbox.directory.path().join("agent/api.sock")).await;
    let (status, _) = { inside }.json("GET", "/health", Value::Null).await;
    assert_eq!(status, 200);
}

#[tokio::test]
async fn a_command_gives_its_output_and_its_exit_code() {
    let (sandbox, _link) = Sandbox::ready().await;
    let result = sandbox
        .exec(json!({"command": ["sh", "-c", "echo out; echo err >&2; exit 3"]}))
        .await;
    assert_eq!((result.stdout.as_str(), result.stderr.as_str()), ("out\n", "err\n"));
    assert_eq!((result.exit.exit_code, result.exit.signal), (3, None));
    assert!(!result.exit.truncated && !result.exit.timed_out);
    let result = sandbox.exec(json!({"command": "echo $((6 * 7)) | cat"})).await;
    assert_eq!(result.stdout, "42\n");
}

#[tokio::test]
async fn a_signal_is_named() {
    let (sandbox, _link) = Sandbox::ready().await;
    let result = sandbox.exec(json!({"command": ["sh", "-c", "kill -SEGV $$"]})).await;
    assert_eq!(
        (result.exit.exit_code, result.exit.signal.as_deref()),
        (139, Some("SIGSEGV"))
    );
}

#[tokio::test]
async fn a_program_that_is_not_there_ends_like_in_a_shell() {
    let (sandbox, _link) = Sandbox::ready().await;
    let result = sandbox.exec(json!({"command": ["no-such-program"]})).await;
    assert_eq!(result.exit.exit_code, 127);
    assert_eq!(result.stderr, "no-such-program: command not found\n");
    let result = sandbox.exec(json!({"command": ["/etc/passwd"]})).await;
    assert_eq!(result.exit.exit_code, 126);
}

#[tokio::test]
async fn stdin_directory_and_environment_arrive() {
    let (sandbox, link) = Sandbox::ready().await;
    std::fs::create_dir(sandbox.home().join("sub")).unwrap();
    let line = "cat; pwd; echo $FROM_CONFIG $MINE $CHOIR_BROKER_URL; echo $HOME";
    let body = json!({"command": ["sh", "-c", line], "cwd": "sub", "env": {"MINE": "too"}, "stdin": "input\n"});
    let result = sandbox.exec(body).await;
    let home = sandbox.home().display().to_string();
    let broker = link.broker.local_addr().unwrap();
    assert_eq!(
        result.stdout,
        format!("input\n{home}/sub\nyes too http://{broker}\n{home}\n")
    );
    let body = json!({"command": ["cat"], "stdin": {"data": "//4=", "encoding": "base64"}});
    let result = sandbox.exec(body).await;
    assert_eq!(
        (result.stdout.as_str(), result.stdout_encoding),
        ("//4=", Encoding::Base64)
    );
}

#[tokio::test]
async fn input_larger_than_a_pipe_and_not_read_does_not_hang() {
    let (sandbox, _link) = Sandbox::ready().await;
    let large = "x".repeat(1 << 20);
    let result = sandbox.exec(json!({"command": ["wc", "-c"], "stdin": large})).await;
    assert_eq!(result.stdout.trim(), "1048576");
    let result = sandbox.exec(json!({"command": ["true"], "stdin": large})).await;
    assert_eq!(result.exit.exit_code, 0);
}

#[tokio::test]
async fn a_timeout_kills_the_whole_group() {
    let (sandbox, _link) = Sandbox::ready().await;
    let line = "trap '' TERM; sleep 1000 & echo $!; wait";
    let result = sandbox
        .exec(json!({"command": ["sh", "-c", line], "timeout_ms": 300}))
        .await;
    assert!(result.exit.timed_out);
    assert_eq!(
        (result.exit.exit_code, result.exit.signal.as_deref()),
        (137, Some("SIGKILL"))
    );
    let background = result.stdout.trim().parse().unwrap();
    until(async || !is_alive(background)).await;
}

#[tokio::test]
async fn output_beyond_the_limit_is_left_out_and_said() {
    let (sandbox, _link) = Sandbox::ready().await;
    let body = json!({"command": ["sh", "-c", "printf 'ab\u{20ac}cd'; printf 12345678 >&2"], "max_output_bytes": 4});
    let result = sandbox.exec(body).await;
    assert_eq!((result.stdout.as_str(), result.stderr.as_str()), ("ab", "1234"));
    assert!(result.exit.truncated);
    let result = sandbox
        .exec(json!({"command": ["head", "-c", "3000000", "/dev/zero"]}))
        .await;
    assert_eq!(result.stdout.len(), 1 << 20);
    assert!(result.exit.truncated);
}

#[tokio::test]
async fn what_is_left_in_the_background_does_not_hold_the_answer() {
    let (sandbox, _link) = Sandbox::ready().await;
    let result = sandbox
        .exec(json!({"command": ["sh", "-c", "sleep 1000 & echo $!"]}))
        .await;
    assert_eq!(result.exit.exit_code, 0);
    assert!(is_alive(result.stdout.trim().parse().unwrap()));
}

#[tokio::test]
async fn a_stream_sends_output_as_it_comes_and_then_the_exit() {
    let (sandbox, _link) = Sandbox::ready().await;
    let fifo = sandbox.home().join("fifo");
    make_fifo(&fifo);
    let body = json!({"command": ["sh", "-c", "echo one; read x < fifo; echo $x >&2; printf '\\377'; exit 5"]});
    let mut events = sandbox.client().await.events("POST", "/exec", &[], body).await;
    let first = events.next().await.unwrap();
    assert_eq!((first.name.as_str(), &first.data["data"]), ("stdout", &json!("one\n")));
    std::fs::write(&fifo, "two\n").unwrap();
    let mut rest = Vec::new();
    while let Some(event) = events.next().await {
        rest.push(event);
    }
    let last = rest.pop().unwrap();
    assert_eq!((last.name.as_str(), &last.data["exit_code"]), ("exit", &json!(5)));
    rest.sort_by_key(|e| e.name.clone());
    assert_eq!(
        (rest[0].name.as_str(), &rest[0].data["data"]),
        ("stderr", &json!("two\n"))
    );
    assert_eq!(rest[1].data, json!({"data": "/w==", "encoding": "base64"}));
}

#[tokio::test]
async fn hanging_up_kills_the_command() {
    let (sandbox, _link) = Sandbox::ready().await;
    for headers in [&[][..], &[("accept", "text/event-stream")]] {
        let file = sandbox.home().join("pid");
        let body = json!({"command": ["sh", "-c", "echo $$ > pid; exec sleep 1000"]});
        let mut client = sandbox.client().await;
        let asked = tokio::spawn(async move { client.send(request("POST", "/exec", headers, body)).await });
        let pid = pid_in(&file).await;
        assert!(is_alive(pid));
        asked.abort();
        drop(asked.await);
        until(async || !is_alive(pid)).await;
        std::fs::remove_file(file).unwrap();
    }
}

#[tokio::test]
async fn bad_requests_are_refused_with_a_sentence() {
    let (sandbox, _link) = Sandbox::ready().await;
    let cases = [
        (json!({"command": []}), 400, "bad_command"),
        (json!({"command": ["a\0b"]}), 400, "bad_command"),
        (json!({"command": "echo \0"}), 400, "bad_command"),
        (json!({"command": ["echo", "x".repeat(200 << 10)]}), 400, "bad_command"),
        (json!({"command": vec!["x".repeat(100 << 10); 30]}), 400, "bad_command"),
        (json!({"command": ["env"], "env": {"A=B": "1"}}), 400, "bad_command"),
        (json!({"command": ["env"], "env": {"A": "\0"}}), 400, "bad_command"),
        (json!({"command": ["ls"], "cwd": "no/such"}), 400, "no_such_directory"),
        (json!({"command": ["ls"], "cwd": "a\0b"}), 400, "no_such_directory"),
        (json!({"command": ["ls"], "colour": 1}), 400, "bad_body"),
        (
            json!({"command": ["ls"], "stdin": {"data": "?", "encoding": "base64"}}),
            400,
            "bad_stdin",
        ),
        (
            json!({"command": ["cat"], "stdin": "x".repeat(11 << 20)}),
            413,
            "body_refused",
        ),
    ];
    for (body, status, code) in cases {
        let (got, answer) = sandbox.request("POST", "/exec", body).await;
        assert_eq!(
            (got.as_u16(), &answer["error"]["code"]),
            (status, &json!(code)),
            "{answer}"
        );
        assert!(answer["error"]["message"].as_str().unwrap().ends_with('.'));
        assert_ne!(answer["error"]["request_id"], "");
    }
    let (status, answer) = sandbox.request("GET", "/exec", Value::Null).await;
    assert_eq!(
        (status.as_u16(), &answer["error"]["code"]),
        (405, &json!("method_not_allowed"))
    );
    let (status, answer) = sandbox.request("GET", "/nothing", Value::Null).await;
    assert_eq!(
        (status.as_u16(), &answer["error"]["code"]),
        (404, &json!("no_such_route"))
    );
    let plain = request("POST", "/exec", &[("content-type", "text/plain")], Value::Null);
    assert_eq!(sandbox.client().await.send(plain).await.status(), 415);
}

#[tokio::test]
async fn many_commands_at_once_each_get_their_own_output() {
    let (sandbox, _link) = Sandbox::ready().await;
    let runs = (0..40).map(|n| {
        let sandbox = &sandbox;
        async move {
            let result = sandbox
                .exec(json!({"command": ["sh", "-c", format!("echo {n}; exit {n}")]}))
                .await;
            assert_eq!((result.stdout, result.exit.exit_code), (format!("{n}\n"), n));
        }
    });
    futures_util::future::join_all(runs).await;
}
