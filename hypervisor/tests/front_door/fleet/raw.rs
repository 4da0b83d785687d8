//! Bytes that two parsers could read differently, sent to the control host, whose bodies its own router reads (B06, B07,
//! B11). What is hidden in them would make a workspace, if anybody took it for a request.

use super::Box;
use super::wire::{CONTROL, Served, control_cookie, status};
use crate::support::Browser;

struct World {
    start: Box,
    server: Served,
    ada: Browser,
}

async fn world() -> World {
    let start = Box::new().await;
    let ada = start.ada().await;
    let server = Served::over(&start).await;
    World { start, server, ada }
}

impl World {
    /// The lines of a request that is really Ada's own page's.
    fn own(&self) -> String {
        let cookie = control_cookie(&self.ada);
        format!("Origin: http://{CONTROL}\r\nX-Choir: 1\r\nContent-Type: application/json\r\nCookie: {cookie}\r\n")
    }

    /// A whole, honest request that makes a workspace.
    fn making(&self, name: &str) -> String {
        let body = format!("{{\"name\":\"{name}\"}}");
        format!(
            "POST /api/workspaces HTTP/1.1\r\nHost: {CONTROL}\r\n{}Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
            self.own(),
            body.len()
        )
    }

    async fn has(&self, name: &str) -> bool {
        let all = self.start.app.store.all_workspaces().await.unwrap();
        all.iter().any(|view| view.workspace.name.as_str() == name)
    }

    /// The control: on a new connection a clean request is answered, and does what it says.
    async fn serves_a_clean_request(&self) {
        let answer = self.server.raw(self.making("clean")).await;
        assert_eq!(status(&answer), 201, "{answer}");
        assert!(self.has("clean").await);
    }
}

/// How a head may frame its body so that two parsers disagree.
struct Framing {
    lines: String,
    /// What stands in the body before the hidden request.
    before: &'static str,
    /// Whether the head itself is refused; else the body's end is plain, or broken, to who reads it.
    refused: bool,
}

/// Heads that say it wrongly.
const LINES: &[&str] = &[
    "Content-Length: 0\r\nContent-Length: 6",
    "Content-Length: +0",
    "Content-Length: -0",
    "Content-Length: 0, 0",
    "Content-Length: 0x0",
    "Content-Length: 0 0",
    "Content-Length: ",
    "Content-Length: 99999999999999999999",
    "Content-Length : 0",
    "X: a\r\n b: c",
    "X: a\0b",
    "X: a\rTransfer-Encoding: chunked",
    "Transfer-Encoding : chunked",
    " Transfer-Encoding: chunked",
    "X\r\nTransfer-Encoding: chunked",
];

/// Codings that are not one plain `chunked`.
const CODINGS: &[&str] = &[
    "xchunked",
    "chunked, identity",
    "identity",
    "identity, chunked",
    "gzip, chunked",
    "chunked, chunked",
    "\u{b}chunked",
    "chunked;q=1",
    "\"chunked\"",
    "chunked\u{a0}",
    "x\r\nTransfer-Encoding: chunked",
    "chunked\r\nTransfer-Encoding: x",
    "chunked\r\nTransfer-Encoding: chunked",
    ",chunked",
    "chunked,",
    "cow",
    "",
];

/// Chunks whose size is none, or of which nobody sends so much.
const CHUNKS: &[&str] = &[
    "ffffffffffffffff1\r\n",
    "-1\r\n",
    "0x0\r\n\r\n",
    "+0\r\n\r\n",
    "1 1\r\n",
    "g\r\n",
    " 0\r\n\r\n",
];

fn framings() -> Vec<Framing> {
    const LAST: &str = "0\r\n\r\n";
    let framing = |lines: String, before, refused| Framing { lines, before, refused };
    let mut all: Vec<_> = LINES.iter().map(|lines| framing((*lines).into(), "", true)).collect();
    for coding in CODINGS {
        all.push(framing(format!("Transfer-Encoding: {coding}"), LAST, true));
        all.push(framing(
            format!("Content-Length: 5\r\nTransfer-Encoding: {coding}"),
            LAST,
            true,
        ));
    }
    // The length is ignored then, and the connection closed after the one answer.
    for length in ["0", "5"] {
        let (length, chunked) = (format!("Content-Length: {length}"), "Transfer-Encoding: chunked");
        all.push(framing(format!("{length}\r\n{chunked}"), LAST, false));
        all.push(framing(format!("{chunked}\r\n{length}"), LAST, false));
    }
    all.extend(
        CHUNKS
            .iter()
            .map(|size| framing("Transfer-Encoding: chunked".into(), size, false)),
    );
    all
}

#[tokio::test]
async fn a_request_hidden_in_another_ones_body_is_never_carried_out() {
    let world = world().await;
    let hidden = world.making("smuggled");
    // One route does not read its body, the other does.
    for path in ["/auth/login/start", "/auth/device/start"] {
        for Framing { lines, before, refused } in framings() {
            let head = format!(
                "POST {path} HTTP/1.1\r\nHost: {CONTROL}\r\n{}{lines}\r\n\r\n",
                world.own()
            );
            let answer = world.server.raw(format!("{head}{before}{hidden}")).await;
            let case = format!("{path} {lines:?} {before:?}");
            let expected: &[u16] = if refused { &[400] } else { &[200, 400] };
            assert!(expected.contains(&status(&answer)), "{case}: {answer}");
            assert_eq!(
                answer.matches("HTTP/1.1 ").count(),
                1,
                "{case} was answered twice: {answer}"
            );
            assert!(!world.has("smuggled").await, "{case}");
        }
    }
    world.serves_a_clean_request().await;
}

/// The control of the test above: the same bytes behind a body whose end is plain are a second request, and seen as one.
#[tokio::test]
async fn behind_a_body_with_a_plain_end_the_same_bytes_are_a_request() {
    let world = world().await;
    for (framing, name) in [
        ("Content-Length: 2\r\n\r\n{}", "second"),
        ("Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", "third"),
    ] {
        let head = format!("POST /auth/login/start HTTP/1.1\r\nHost: {CONTROL}\r\n{}", world.own());
        let answer = world.server.raw(format!("{head}{framing}{}", world.making(name))).await;
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 2, "{answer}");
        assert!(world.has(name).await);
    }
}

#[tokio::test]
async fn a_head_with_bare_line_feeds_or_an_old_version_is_one_request_at_most() {
    let world = world().await;
    let hidden = world.making("smuggled");
    let own = world.own();
    let bare = format!(
        "POST /auth/login/start HTTP/1.1\nHost: {CONTROL}\n{}Content-Length: 0\n\n",
        own.replace("\r\n", "\n")
    );
    let old = format!(
        "POST /auth/login/start HTTP/1.0\r\nHost: {CONTROL}\r\n{own}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    );
    let answer = world.server.raw(format!("{old}{hidden}")).await;
    assert_eq!(status(&answer), 400, "{answer}");
    assert!(!world.has("smuggled").await);
    // A bare line feed ends a line for hyper, so what follows the head is honestly the next request.
    let answer = world.server.raw(format!("{bare}{}", world.making("next"))).await;
    assert_eq!(
        answer.matches("HTTP/1.1 ").count(),
        if world.has("next").await { 2 } else { 1 },
        "{answer}"
    );
}

#[tokio::test]
async fn methods_that_are_not_served_are_refused_and_an_override_changes_nothing() {
    let world = world().await;
    world.serves_a_clean_request().await;
    let own = world.own();
    for line in [
        "TRACE / HTTP/1.1",
        "CONNECT localhost:9090 HTTP/1.1",
        "CONNECT evil.example:443 HTTP/1.1",
        "PROPFIND / HTTP/1.1",
        "get / HTTP/1.1",
        "DELETE\u{9}/ HTTP/1.1",
        "DELETEX /api/workspaces/clean HTTP/1.1",
    ] {
        let host = line
            .split(' ')
            .nth(1)
            .filter(|at| line.starts_with("CONNECT") && at.contains(':'));
        let head = format!(
            "{line}\r\nHost: {}\r\n{own}Connection: close\r\n\r\n",
            host.unwrap_or(CONTROL)
        );
        let answer = world.server.raw(head).await;
        assert!([400, 405].contains(&status(&answer)), "{line}: {answer}");
        assert!(!answer.contains("__Host-choir="), "nothing is reflected: {answer}");
    }
    for line in [
        "GET /api/workspaces/clean",
        "POST /api/workspaces/clean",
        "GET /api/workspaces/clean?_method=DELETE",
    ] {
        let overrides = "X-HTTP-Method-Override: DELETE\r\nX-HTTP-Method: DELETE\r\nX-Method-Override: DELETE\r\n";
        let head = format!("{line} HTTP/1.1\r\nHost: {CONTROL}\r\n{own}{overrides}Connection: close\r\n\r\n");
        let answer = world.server.raw(head).await;
        let expected = if line.starts_with("GET") { 200 } else { 405 };
        assert_eq!(status(&answer), expected, "{line}: {answer}");
    }
    assert!(world.has("clean").await);
    // The control: the method itself does delete.
    let head = format!("DELETE /api/workspaces/clean HTTP/1.1\r\nHost: {CONTROL}\r\n{own}Connection: close\r\n\r\n");
    assert_eq!(status(&world.server.raw(head).await), 202);
}

#[tokio::test]
async fn the_control_host_answers_to_its_one_exact_name() {
    let world = world().await;
    let own = world.own();
    for (line, hosts, expected) in [
        ("GET /me/sessions", &[CONTROL][..], 200),
        ("GET http://localhost:9090/me/sessions", &[CONTROL], 200),
        ("GET /me/sessions", &[], 400),
        ("GET /me/sessions", &[CONTROL, CONTROL], 400),
        ("GET /me/sessions", &[CONTROL, "evil.example"], 400),
        ("GET http://evil.example/me/sessions", &[CONTROL], 400),
        ("GET http://localhost:9090/me/sessions", &["evil.example"], 400),
        ("GET http://ada@localhost:9090/me/sessions", &[CONTROL], 400),
        ("GET /me/sessions", &["evil.example"], 421),
        ("GET /me/sessions", &["localhost.:9090"], 421),
        ("GET /me/sessions", &["LOCALHOST:9090"], 421),
        ("GET /me/sessions", &["localhost"], 421),
        ("GET /me/sessions", &["localhost:9091"], 421),
        ("GET /me/sessions", &["localhost:09090"], 421),
        ("GET /me/sessions", &["cp.localhost:9090"], 421),
        ("GET /me/sessions", &["ada@localhost:9090"], 400),
        ("GET /me/sessions", &["localhost:9090,evil.example"], 400),
        ("GET /me/sessions", &["127.0.0.1:9090"], 421),
        ("GET /me/sessions", &["[::1]:9090"], 421),
        ("GET /me/sessions", &["0x7f.1:9090"], 421),
    ] {
        let hosts: String = hosts.iter().map(|host| format!("Host: {host}\r\n")).collect();
        let answer = world
            .server
            .raw(format!("{line} HTTP/1.1\r\n{hosts}{own}Connection: close\r\n\r\n"))
            .await;
        assert_eq!(status(&answer), expected, "{line} {hosts:?}: {answer}");
        assert_eq!(
            answer.contains("user_agent"),
            expected == 200,
            "{line} {hosts:?}: {answer}"
        );
    }
    world.serves_a_clean_request().await;
}
