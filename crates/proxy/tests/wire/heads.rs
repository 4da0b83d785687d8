//! Heads that are refused, and hosts that route nowhere (B06, B07, B11, B16, B21).

use crate::harness::*;

#[tokio::test]
async fn a_host_routes_only_when_it_is_one_exact_value() {
    let world = world(plain).await;
    for (head, expected) in [
        (format!("GET / HTTP/1.1\r\nHost: {LIVE}\r\n"), 200),
        (format!("GET http://{LIVE}/ HTTP/1.1\r\nHost: {LIVE}\r\n"), 200),
        ("GET / HTTP/1.1\r\nHost: localhost:9090\r\n".into(), 200),
        ("GET / HTTP/1.1\r\n".into(), 400),
        ("GET / HTTP/1.1\r\nHost:\r\n".into(), 400),
        ("GET / HTTP/1.1\r\nHost: evil.example\r\n".into(), 421),
        (format!("GET / HTTP/1.1\r\nHost: {LIVE}\r\nHost: {LIVE}\r\n"), 400),
        (
            format!("GET / HTTP/1.1\r\nHost: {LIVE}\r\nHost: localhost:9090\r\n"),
            400,
        ),
        (format!("GET http://evil.example/ HTTP/1.1\r\nHost: {LIVE}\r\n"), 400),
        (format!("GET http://ada@{LIVE}/ HTTP/1.1\r\nHost: {LIVE}\r\n"), 400),
        (format!("GET http://{LIVE}/ HTTP/1.1\r\n"), 400),
        (
            "GET / HTTP/1.1\r\nHost: live--main--ada.localhost.:9090\r\n".into(),
            421,
        ),
        ("GET / HTTP/1.1\r\nHost: LIVE--main--ada.localhost:9090\r\n".into(), 421),
        ("GET / HTTP/1.1\r\nHost: live--main--ada.localhost:9091\r\n".into(), 421),
        ("GET / HTTP/1.1\r\nHost: live--main--ada.localhost\r\n".into(), 421),
        (format!("GET / HTTP/1.1\r\nHost: x@{LIVE}\r\n"), 400),
        (format!("GET / HTTP/1.1\r\nHost: {LIVE},{LIVE}\r\n"), 400),
        (format!("GET / HTTP/1.1\r\nHost: {LIVE}/\r\n"), 400),
        ("GET / HTTP/1.1\r\nHost: l\u{f6}cal:9090\r\n".into(), 400),
        (
            "GET / HTTP/1.1\r\nHost: xn--lcal-5qa--main--ada.localhost:9090\r\n".into(),
            421,
        ),
        ("GET / HTTP/1.1\r\nHost: [::1]:9090\r\n".into(), 421),
        (format!("OPTIONS * HTTP/1.1\r\nHost: {LIVE}\r\n"), 400),
    ] {
        let answer = world.raw(format!("{head}{COOKIE}\r\nConnection: close\r\n\r\n")).await;
        assert_eq!(status(&answer), expected, "{head:?}: {answer}");
    }
    assert_eq!(world.sandbox.text().matches("GET /").count(), 2);
}

#[tokio::test]
async fn only_canonical_ports_that_are_not_reserved_are_reached() {
    let world = world(plain).await;
    for (port, expected) in [
        ("5173", 200),
        ("22", 200),
        ("65535", 200),
        ("0", 421),
        ("65536", 421),
        ("-1", 421),
        ("08080", 421),
        ("9091", 404),
        ("9092", 404),
        ("8080", 404),
        ("127.0.0.1", 421),
        ("::1", 421),
        ("localhost@", 400),
    ] {
        let answer = world.get(&format!("{port}--{LIVE}"), &[COOKIE]).await;
        assert_eq!(status(&answer), expected, "{port}");
    }
}

#[tokio::test]
async fn a_loopback_address_leads_people_to_the_control_host() {
    let world = world(plain).await;
    let lines = ["Sec-Fetch-Mode: navigate"];
    let answer = world.get("127.0.0.1:9090", &lines).await;
    assert_eq!(status(&answer), 307);
    assert!(answer.contains("location: http://localhost:9090/\r\n"), "{answer}");
    let programs = world.get("127.0.0.1:9090", &["Accept: application/json"]).await;
    assert_eq!(status(&programs), 421);
    assert!(programs.contains("{\"error\":{\"code\":\"unknown_host\""), "{programs}");
}

#[tokio::test]
async fn methods_that_are_not_served_are_refused() {
    let world = world(plain).await;
    for (line, expected) in [
        ("TRACE / HTTP/1.1", 405),
        ("CONNECT live--main--ada.localhost:9090 HTTP/1.1", 405),
        ("PROPFIND / HTTP/1.1", 405),
        ("get / HTTP/1.1", 405),
        ("GET / HTTP/1.1", 200),
        ("DELETE / HTTP/1.1", 200),
    ] {
        let override_ = "X-HTTP-Method-Override: GET\r\nX-Method-Override: GET";
        let answer = world
            .raw(format!(
                "{line}\r\nHost: {LIVE}\r\n{COOKIE}\r\n{override_}\r\nConnection: close\r\n\r\n"
            ))
            .await;
        assert_eq!(status(&answer), expected, "{line}: {answer}");
    }
    // Overrides change nothing: what arrived is what was asked.
    assert_eq!(world.sandbox.text().matches("DELETE / HTTP/1.1").count(), 1);
}

/// Each entry is a head's framing lines and what follows; `SMUGGLED` must never arrive as a request.
fn smuggling() -> Vec<(String, String)> {
    let hidden = format!("GET /SMUGGLED HTTP/1.1\r\nHost: {LIVE}\r\n{COOKIE}\r\n\r\n");
    let chunked = format!("0\r\n\r\n{hidden}");
    let mut cases: Vec<(String, String)> = [
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: +5",
        "Content-Length: -0",
        "Content-Length: 5, 5",
        "Content-Length: 0x5",
        "Content-Length: 5 5",
        "Content-Length: ",
        "Content-Length: 99999999999999999999",
        "Content-Length: \u{660}",
        "Content-Length : 5",
        "X: a\r\n b: c",
        "X: a\r\n\tb: c",
        "X: a\0b",
        "X\0: a",
        "X: a\rb: c",
        "Transfer-Encoding : chunked",
        " Transfer-Encoding: chunked",
        "Transfer\u{a0}Encoding: chunked\r\nTransfer-Encoding: x",
    ]
    .into_iter()
    .map(|lines| (lines.to_owned(), hidden.clone()))
    .collect();
    for coding in [
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
    ] {
        cases.push((format!("Transfer-Encoding: {coding}"), chunked.clone()));
        cases.push((
            format!("Content-Length: 6\r\nTransfer-Encoding: {coding}"),
            chunked.clone(),
        ));
    }
    for size in ["ffffffffffffffff1", "-1", "0x0", "+0", "1 1", "g", ";", " 0"] {
        let body = format!("{size}\r\n\r\n{hidden}");
        cases.push(("Transfer-Encoding: chunked".into(), body));
    }
    cases
}

#[tokio::test]
async fn smuggled_requests_are_refused_or_never_arrive() {
    for (lines, rest) in smuggling() {
        let world = world(plain).await;
        let head = format!("POST / HTTP/1.1\r\nHost: {LIVE}\r\n{COOKIE}\r\n{lines}\r\n\r\n");
        let answer = world.raw(format!("{head}{rest}")).await;
        let seen = world.sandbox.text();
        let first = status(&answer);
        assert!(
            first == 400 || seen.matches("HTTP/1.1\r\n").count() == 1,
            "{lines:?}: {first} {seen}"
        );
        assert!(!seen.contains("SMUGGLED"), "{lines:?}: {seen}");
        assert_eq!(
            answer.matches("HTTP/1.1 ").count(),
            1,
            "{lines:?} was answered twice: {answer}"
        );
    }
}

#[tokio::test]
async fn conflicting_framing_reaches_the_sandbox_as_one_request_at_most() {
    let hidden = "G";
    for lines in [
        "Content-Length: 6\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 6",
    ] {
        let world = world(plain).await;
        let answer = world
            .raw(format!(
                "POST / HTTP/1.1\r\nHost: {LIVE}\r\n{COOKIE}\r\n{lines}\r\n\r\n0\r\n\r\n{hidden}"
            ))
            .await;
        let seen = world.sandbox.text();
        assert!(
            status(&answer) == 400 || seen.matches("HTTP/1.1\r\n").count() == 1,
            "{answer}"
        );
        assert!(!seen.to_lowercase().contains("content-length: 6"), "{seen}");
    }
    // Equal lengths are one length, and one line upstream.
    let world = world(plain).await;
    let answer = world
        .raw(format!(
            "POST / HTTP/1.1\r\nHost: {LIVE}\r\n{COOKIE}\r\nContent-Length: 2\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi"
        ))
        .await;
    assert!(status(&answer) == 400 || world.sandbox.text().to_lowercase().matches("content-length: 2").count() == 1);
}

#[tokio::test]
async fn bare_line_feeds_reach_the_sandbox_as_one_clean_request() {
    let world = world(plain).await;
    let answer = world
        .raw(format!(
            "GET /a HTTP/1.1\nHost: {LIVE}\n{COOKIE}\nX-A: 1\nConnection: close\n\n"
        ))
        .await;
    let seen = world.sandbox.text();
    assert!(
        status(&answer) == 400 || seen.matches("HTTP/1.1\r\n").count() == 1,
        "{answer}"
    );
    assert!(!seen.replace("\r\n", "").contains('\n'), "{seen}");
}

#[tokio::test]
async fn http_1_0_with_a_transfer_coding_is_refused() {
    let world = world(plain).await;
    let answer = world
        .raw(format!(
            "POST / HTTP/1.0\r\nHost: {LIVE}\r\n{COOKIE}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        ))
        .await;
    assert_eq!(status(&answer), 400);
    let plain = world
        .raw(format!("GET / HTTP/1.0\r\nHost: {LIVE}\r\n{COOKIE}\r\n\r\n"))
        .await;
    assert_eq!(status(&plain), 200);
}

#[tokio::test]
async fn two_requests_in_one_write_are_two_requests() {
    // The control: what arrives as two honest requests is seen as two.
    let world = world(plain).await;
    let one = format!("GET /one HTTP/1.1\r\nHost: {LIVE}\r\n{COOKIE}\r\n\r\n");
    let two = format!("GET /two HTTP/1.1\r\nHost: {LIVE}\r\n{COOKIE}\r\nConnection: close\r\n\r\n");
    let answer = world.raw(format!("{one}{two}")).await;
    assert_eq!(answer.matches("HTTP/1.1 200").count(), 2);
    assert!(world.sandbox.text().contains("GET /two"));
    // One kept connection served both.
    assert_eq!(world.sandbox.dials.load(std::sync::atomic::Ordering::SeqCst), 1);
}

#[tokio::test]
async fn oversize_heads_are_refused() {
    let world = world(plain).await;
    let long = |n: usize| "a".repeat(n);
    for (head, expected) in [
        (format!("GET /{} HTTP/1.1\r\nHost: {LIVE}\r\n", long(32 * 1024)), 414),
        (
            format!("GET / HTTP/1.1\r\nHost: {LIVE}\r\nX: {}\r\n", long(64 * 1024)),
            431,
        ),
        (
            format!("GET / HTTP/1.1\r\nHost: {LIVE}\r\nX: {}\r\n", long(34 * 1024)),
            431,
        ),
        (
            format!("GET / HTTP/1.1\r\nHost: {LIVE}\r\n{}", "X: y\r\n".repeat(300)),
            431,
        ),
        (
            format!(
                "GET /{} HTTP/1.1\r\nHost: {LIVE}\r\nX: {}\r\n",
                long(8000),
                long(16_000)
            ),
            200,
        ),
    ] {
        let answer = world.raw(format!("{head}{COOKIE}\r\nConnection: close\r\n\r\n")).await;
        assert_eq!(status(&answer), expected, "{}", &answer[..answer.len().min(80)]);
    }
}

#[tokio::test]
async fn http_2_is_not_spoken() {
    let world = world(plain).await;
    let answer = world.raw("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
    assert!(!answer.contains(" 200 "), "{answer:?}");
}

#[tokio::test]
async fn only_a_trusted_proxy_is_believed_about_the_client() {
    let lines = [
        "X-Forwarded-For: 6.6.6.6, 203.0.113.9, 10.0.0.2",
        "X-Forwarded-Proto: https",
    ];
    let direct = world(plain).await.get("localhost:9090", &lines).await;
    assert!(direct.ends_with("control / 127.0.0.1 false"), "{direct}");
    let trusting = world_with(
        Recorder::new(plain, false),
        Default::default(),
        &["127.0.0.0/8", "10.0.0.0/8"],
    )
    .await;
    let behind = trusting.get("localhost:9090", &lines).await;
    assert!(behind.ends_with("control / 203.0.113.9 true"), "{behind}");
    for (said, is_https) in [
        ("wss", "true"),
        ("http, https", "true"),
        ("https, ws", "false"),
        ("httpss", "false"),
    ] {
        let line = format!("X-Forwarded-Proto: {said}");
        let behind = trusting.get("localhost:9090", &[line.as_str()]).await;
        assert!(
            behind.ends_with(&format!("control / 127.0.0.1 {is_https}")),
            "{said}: {behind}"
        );
    }
}

#[tokio::test]
async fn a_flood_of_trailers_never_reaches_the_sandbox() {
    let world = world(plain).await;
    let trailers = "X-Trailer: SMUGGLED\r\n".repeat(10_000);
    let head =
        format!("POST / HTTP/1.1\r\nHost: {LIVE}\r\n{COOKIE}\r\nTransfer-Encoding: chunked\r\nConnection: close");
    world.raw(format!("{head}\r\n\r\n1\r\na\r\n0\r\n{trailers}\r\n")).await;
    assert!(!world.sandbox.text().contains("SMUGGLED"));
}

#[tokio::test]
async fn an_offer_of_http_2_is_dropped() {
    let world = world(plain).await;
    let answer = world
        .raw(format!(
            "GET / HTTP/1.1\r\nHost: {LIVE}\r\n{COOKIE}\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\
             Connection: Upgrade, HTTP2-Settings, close\r\n\r\n"
        ))
        .await;
    assert_eq!(status(&answer), 200, "{answer}");
    assert!(!world.sandbox.text().contains("h2c") && !world.sandbox.text().contains("http2"));
}
