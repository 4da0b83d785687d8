//! What a sandbox and a client see of each other's headers (B01 to B04, A11, A14), plain and on upgrades.

use crate::harness::*;

/// A request's head as the sandbox got it, on a plain request and on a websocket upgrade.
async fn arrived(host: &str, lines: &[&str]) -> [String; 2] {
    let plain = world(|_| None).await;
    let answer = plain.get(host, lines).await;
    assert_eq!(status(&answer), 200, "{lines:?}: {answer}");
    let ws = world(|_| Some(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")).await;
    let lines: String = lines.iter().map(|l| format!("{l}\r\n")).collect();
    let answer = ws
        .raw(format!(
            "GET / HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n{lines}\r\n"
        ))
        .await;
    assert_eq!(status(&answer), 403, "{answer}");
    assert!(ws.sandbox.text().contains("upgrade: websocket\r\n"));
    [plain.sandbox.text(), ws.sandbox.text()]
}

#[tokio::test]
async fn our_cookies_never_arrive_and_others_arrive_unchanged() {
    for (lines, expected) in [
        (vec!["Cookie: __Host-choir-sbx=good"], vec![]),
        (vec!["Cookie: __Host-choir-sbx=good; a=1"], vec!["a=1"]),
        (
            vec!["Cookie: a=1; __Host-choir-sbx=good; b=\"2 3\""],
            vec!["a=1; b=\"2 3\""],
        ),
        (vec!["Cookie: a=1;  b=2 ;__Host-choir-sbx=good"], vec!["a=1;  b=2"]),
        (vec!["Cookie:\t __Host-choir-sbx =\tgood ;a=1"], vec!["a=1"]),
        (
            vec!["Cookie: __Host-choir=one; __Host-choir=two; __Host-choir-sbx=good; z=9"],
            vec!["z=9"],
        ),
        (
            vec!["Cookie: a=1", "Cookie: __Host-choir-sbx=good", "Cookie: b=2"],
            vec!["a=1", "b=2"],
        ),
        (
            vec![
                "Cookie: __Host-choir-sbx=good",
                "Cookie: __Host-choirs=1; x__Host-choir=2; __host-choir=3",
            ],
            vec!["__Host-choirs=1; x__Host-choir=2; __host-choir=3"],
        ),
    ] {
        for seen in arrived(LIVE, &lines).await {
            let cookies: Vec<_> = seen.lines().filter_map(|l| l.strip_prefix("cookie: ")).collect();
            assert_eq!(cookies, expected, "{lines:?}");
            assert!(
                !seen.contains("good") && !seen.contains("=one") && !seen.contains("=two"),
                "{seen}"
            );
        }
    }
}

#[tokio::test]
async fn a_cookie_given_twice_or_under_another_name_lets_nobody_in() {
    let world = world(plain).await;
    for (cookie, expected) in [
        ("Cookie: __Host-choir-sbx=good", 200),
        ("Cookie: __Host-choir-sbx=good; __Host-choir-sbx=good", 400),
        ("Cookie: \u{2000}__Host-choir-sbx=good", 401),
        ("Cookie: __Host-choir=good", 401),
        ("Cookie: __host-choir-sbx=good", 401),
    ] {
        assert_eq!(status(&world.get(LIVE, &[cookie]).await), expected, "{cookie}");
    }
}

#[tokio::test]
async fn what_only_a_proxy_may_say_is_said_by_us_alone() {
    let spoofed = [
        COOKIE,
        "X-Choir-User: root",
        "X_Choir_User: root",
        "X-Choir-Anything: root",
        "X-Forwarded-For: 6.6.6.6",
        "X-Forwarded-Proto: root",
        "X-Forwarded-Host: root",
        "X-Forwarded-Port: 6666",
        "Forwarded: for=6.6.6.6",
        "X-Real-IP: 6.6.6.6",
        "CF-Connecting-IP: 6.6.6.6",
        "CF-Ray: root",
        "True-Client-IP: 6.6.6.6",
        "Proxy-Authorization: Basic root",
        "Proxy-Anything: root",
        "Proxy: http://6.6.6.6",
        "Authorization: Basic cm9vdA==",
        "X-App: kept",
    ];
    for seen in arrived(LIVE, &spoofed).await {
        for ours in [
            "x-choir-user: ada\r\n",
            "x-forwarded-for: 127.0.0.1\r\n",
            "x-forwarded-proto: http\r\n",
            "x-forwarded-host: live--main--ada.localhost:9090\r\n",
            "\r\nhost: live--main--ada.localhost:9090\r\n",
            "x-app: kept\r\n",
        ] {
            assert_eq!(seen.matches(ours).count(), 1, "{ours:?} in {seen}");
        }
        let rest = seen.replace("proxy: http://6.6.6.6", "");
        assert!(
            !rest.contains("root") && !rest.contains("6.6.6.6") && !rest.contains("cm9v"),
            "{seen}"
        );
    }
}

#[tokio::test]
async fn authorization_passes_when_opted_in_and_never_with_our_token() {
    for (line, passes) in [
        ("Authorization: Basic dTpw", true),
        ("Authorization: Bearer app-token", true),
        ("Authorization: Bearer choir_secret", false),
        ("Authorization: bEaReR   CHOIR_secret", false),
        ("Authorization: choir_secret", false),
        ("Authorization: Token\tchoir_secret", false),
    ] {
        for seen in arrived(DEV, &[COOKIE, line]).await {
            assert_eq!(seen.contains("authorization: "), passes, "{line}: {seen}");
        }
        for seen in arrived(LIVE, &[COOKIE, line]).await {
            assert!(!seen.contains("authorization: "), "{line}: {seen}");
        }
    }
}

#[tokio::test]
async fn hop_by_hop_headers_end_here_in_both_directions() {
    let world = world(|_| {
        Some(
            b"HTTP/1.1 200 OK\r\nConnection: x-secret, keep-alive\r\nX-Secret: hop\r\nKeep-Alive: hop\r\nUpgrade: h2c\r\n\
              Proxy-Authenticate: hop\r\nTrailer: hop\r\nX-End: kept\r\nContent-Length: 2\r\n\r\nok",
        )
    })
    .await;
    let answer = world
        .raw(format!(
            "GET / HTTP/1.1\r\nHost: {LIVE}\r\n{COOKIE}\r\nConnection: close, x-choir-user, X-Forwarded-For, host, cookie, x-hop\r\n\
             X-Hop: gone\r\nKeep-Alive: gone\r\nTE: trailers, gone\r\nTrailer: gone\r\nUpgrade: h2c\r\nHTTP2-Settings: gone\r\n\
             Origin: http://{LIVE}\r\nX-End: kept\r\n\r\n"
        ))
        .await;
    let seen = world.sandbox.text();
    assert!(!seen.contains("gone") && !seen.contains("h2c"), "{seen}");
    for ours in [
        "x-choir-user: ada",
        "x-forwarded-for: 127.0.0.1",
        "host: live",
        "x-end: kept",
    ] {
        assert!(seen.contains(ours), "{ours} in {seen}");
    }
    assert!(!answer.contains("hop") && !answer.contains("h2c"), "{answer}");
    assert!(answer.contains("x-end: kept") && answer.ends_with("ok"), "{answer}");
}

#[tokio::test]
async fn a_sandbox_cannot_set_what_outlives_or_leaves_it() {
    let world = world(|_| {
        Some(
            b"HTTP/1.1 200 OK\r\nSet-Cookie: __Host-choir=forged; Secure; Path=/\r\nSet-Cookie: =__host-choir-sbx=forged\r\n\
              Set-Cookie: wide=forged; Domain=localhost\r\nSet-Cookie: app=1; Path=/\r\nStrict-Transport-Security: max-age=forged\r\n\
              Alt-Svc: h3=forged\r\nClear-Site-Data: \"forged\"\r\nContent-Length: 2\r\n\r\nok",
        )
    })
    .await;
    let answer = world.get(LIVE, &[COOKIE]).await;
    assert!(!answer.contains("forged"), "{answer}");
    assert!(answer.contains("set-cookie: app=1; Path=/\r\n"), "{answer}");
}

#[tokio::test]
async fn other_sites_and_service_workers_are_refused_before_anything_is_dialled() {
    for (host, lines, expected) in [
        (LIVE, vec!["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors"], 403),
        (
            LIVE,
            vec![
                "Sec-Fetch-Site: same-site",
                "Sec-Fetch-Mode: cors",
                "Origin: http://live--main--bob.localhost:9090",
            ],
            403,
        ),
        (LIVE, vec!["Service-Worker: script"], 403),
        (DEV, vec!["Service-Worker: script"], 200),
        (
            LIVE,
            vec![
                "Sec-Fetch-Site: same-site",
                "Origin: http://dev--main--ada.localhost:9090",
            ],
            200,
        ),
    ] {
        let world = world(plain).await;
        let lines: Vec<_> = lines.into_iter().chain([COOKIE]).collect();
        assert_eq!(status(&world.get(host, &lines).await), expected, "{lines:?}");
        assert_eq!(world.sandbox.text().is_empty(), expected == 403);
    }
}

#[tokio::test]
async fn bodies_pass_both_ways_in_any_framing() {
    for (framing, body, arrives) in [
        ("Content-Length: 5", "hello", "content-length: 5"),
        (
            "Transfer-Encoding: chunked",
            "5\r\nhello\r\n0\r\n\r\n",
            "transfer-encoding: chunked",
        ),
        ("Content-Length: 0", "", "content-length: 0"),
        (
            "Transfer-Encoding: Chunked",
            "5\r\nhello\r\n0\r\n\r\n",
            "transfer-encoding: chunked",
        ),
    ] {
        for method in ["POST", "GET", "DELETE"] {
            let world =
                world(|_| Some(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")).await;
            let answer = world
                .raw(format!(
                    "{method} /p?q=1 HTTP/1.1\r\nHost: {LIVE}\r\n{COOKIE}\r\n{framing}\r\nConnection: close\r\n\r\n{body}"
                ))
                .await;
            let seen = world.sandbox.text();
            assert!(seen.starts_with(&format!("{method} /p?q=1 HTTP/1.1\r\n")), "{seen}");
            if !body.is_empty() {
                assert!(
                    seen.contains(arrives) && seen.contains("hello"),
                    "{method} {framing}: {seen}"
                );
            }
            assert!(answer.contains("abc"), "{answer}");
        }
    }
}

#[tokio::test]
async fn a_head_request_keeps_the_length_it_asked_for() {
    let world = world(|_| Some(b"HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n")).await;
    let answer = world
        .raw(format!(
            "HEAD / HTTP/1.1\r\nHost: {LIVE}\r\n{COOKIE}\r\nConnection: close\r\n\r\n"
        ))
        .await;
    assert!(answer.contains("content-length: 1234\r\n"), "{answer}");
}
