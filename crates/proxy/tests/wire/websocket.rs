//! Upgrades: who may, what flows when, and how a tunnel ends (B10, B12, B13, B27).

use std::sync::atomic::Ordering;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::*;

const ACCEPT: &[u8] = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
    Sec-WebSocket-Accept: a\r\nSec-WebSocket-Protocol: chat\r\nX-Choir: hop\r\n\r\n";

fn handshake(origin: &str, cookie: &str) -> String {
    format!(
        "GET /ws HTTP/1.1\r\nHost: {LIVE}\r\n{origin}{cookie}\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n\
         Sec-WebSocket-Key: k\r\nSec-WebSocket-Protocol: chat, log\r\nSec-WebSocket-Extensions: permessage-deflate\r\n\r\n"
    )
}

fn own() -> String {
    handshake(&format!("Origin: http://{LIVE}\r\n"), COOKIE)
}

async fn open(world: &World) -> (TcpStream, tokio::io::DuplexStream) {
    let mut client = world.connect().await;
    client.write_all(own().as_bytes()).await.unwrap();
    let answer = response(&mut client).await;
    assert_eq!(status(&answer), 101, "{answer}");
    assert!(answer.contains("sec-websocket-protocol: chat\r\n"), "{answer}");
    (client, world.sandbox.take_upgraded())
}

#[tokio::test]
async fn bytes_flow_both_ways_and_count_as_activity() {
    let world = world(|_| Some(ACCEPT)).await;
    let (mut client, mut app) = open(&world).await;
    assert!(
        world
            .sandbox
            .text()
            .contains("sec-websocket-extensions: permessage-deflate\r\n")
    );
    assert_eq!(world.gate.live.activity.tunnels(), 1);
    world.clock.store(77, Ordering::SeqCst);
    client.write_all(b"\x81\x02hi").await.unwrap();
    let mut buf = [0; 4];
    app.read_exact(&mut buf).await.unwrap();
    assert_eq!(&buf, b"\x81\x02hi");
    assert_eq!(world.gate.live.activity.last_ms(), 77);
    let big = vec![b'x'; 1_000_000];
    let ((), got) = tokio::join!(
        async {
            app.write_all(&big).await.unwrap();
            drop(app);
        },
        async {
            let mut got = Vec::new();
            client.read_to_end(&mut got).await.unwrap();
            got
        }
    );
    assert!(got == big);
}

#[tokio::test]
async fn a_websocket_of_another_origin_is_refused_before_a_dial() {
    let world = world(|_| Some(ACCEPT)).await;
    for (origin, expected) in [
        ("", 403),
        ("Origin: null\r\n", 403),
        ("Origin: http://evil.example\r\n", 403),
        ("Origin: http://localhost:9090\r\n", 403),
        ("Origin: http://live--main--bob.localhost:9090\r\n", 403),
    ] {
        let mut client = world.connect().await;
        client.write_all(handshake(origin, COOKIE).as_bytes()).await.unwrap();
        assert_eq!(status(&response(&mut client).await), expected, "{origin}");
    }
    let mut client = world.connect().await;
    let stranger = handshake(&format!("Origin: http://{LIVE}\r\n"), "X: y");
    client.write_all(stranger.as_bytes()).await.unwrap();
    assert_eq!(status(&response(&mut client).await), 401);
    assert_eq!(world.sandbox.dials.load(Ordering::SeqCst), 0);
    open(&world).await;
}

#[tokio::test]
async fn nothing_behind_a_handshake_flows_before_the_101() {
    for (script, expected) in [
        (
            (|_| Some(&b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"[..])) as Script,
            200,
        ),
        (|_| Some(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"), 403),
        (
            |_| Some(b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 0\r\n\r\n"),
            426,
        ),
    ] {
        let world = world(script).await;
        let hidden = format!("GET /SMUGGLED HTTP/1.1\r\nHost: {LIVE}\r\n{COOKIE}\r\n\r\n");
        let got = world.raw(format!("{}{hidden}", own())).await;
        assert_eq!(status(&got), expected, "{got}");
        assert_eq!(got.matches("HTTP/1.1 ").count(), 1, "{got}");
        assert!(!world.sandbox.text().contains("SMUGGLED"));
    }
    // Accepted, they are the tunnel's first bytes.
    let world = world(|_| Some(ACCEPT)).await;
    let mut client = world.connect().await;
    client.write_all(format!("{}EARLY", own()).as_bytes()).await.unwrap();
    assert_eq!(status(&response(&mut client).await), 101);
    assert!(!world.sandbox.text().contains("EARLY"));
    let mut buf = [0; 5];
    world.sandbox.take_upgraded().read_exact(&mut buf).await.unwrap();
    assert_eq!(&buf, b"EARLY");
}

#[tokio::test]
async fn other_upgrades_are_dropped_and_a_101_to_them_is_an_error() {
    let world = world(|_| Some(ACCEPT)).await;
    for upgrade in ["h2c", "websocket, h2c", "tcp"] {
        let answer = world
            .raw(format!(
                "GET / HTTP/1.1\r\nHost: {LIVE}\r\nOrigin: http://{LIVE}\r\n{COOKIE}\r\nUpgrade: {upgrade}\r\n\
                 Connection: Upgrade, close\r\n\r\n"
            ))
            .await;
        assert_eq!(status(&answer), 502, "{upgrade}: {answer}");
    }
    assert!(!world.sandbox.text().contains("upgrade"), "{}", world.sandbox.text());
}

#[tokio::test]
async fn a_closed_session_closes_its_websockets_with_a_close_frame() {
    let world = world(|_| Some(ACCEPT)).await;
    let (mut client, mut app) = open(&world).await;
    app.write_all(b"\x81\x02hi").await.unwrap();
    let mut first = [0; 4];
    client.read_exact(&mut first).await.unwrap();
    world.gate.visitor.closed.cancel();
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, [0x88, 2, 0x03, 0xf0]);
}

#[tokio::test]
async fn a_swap_closes_websockets_with_1012_between_two_frames() {
    let world = world(|_| Some(ACCEPT)).await;
    let (mut client, mut app) = open(&world).await;
    // Half of a frame is under way; its other half comes after the swap, another frame behind it.
    app.write_all(b"\x81\x04ab").await.unwrap();
    let mut first = [0; 4];
    client.read_exact(&mut first).await.unwrap();
    world.forwarder.close_tunnels(&generation(1), 1012);
    app.write_all(b"cd\x81\x02no").await.unwrap();
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"cd\x88\x02\x03\xf4");
    drop(client);
    // The generation may be swapped back: new tunnels live.
    let (mut client, mut app) = open(&world).await;
    app.write_all(b"\x81\x02hi").await.unwrap();
    client.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"\x81\x02hi");
}

#[tokio::test]
async fn no_second_close_frame_follows_the_servers_own() {
    let world = world(|_| Some(ACCEPT)).await;
    let (mut client, mut app) = open(&world).await;
    app.write_all(b"\x88\x02\x03\xe8").await.unwrap();
    let mut own = [0; 4];
    client.read_exact(&mut own).await.unwrap();
    world.forwarder.close_tunnels(&generation(1), 1012);
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).await.unwrap();
    assert!(rest.is_empty(), "{rest:?}");
}
