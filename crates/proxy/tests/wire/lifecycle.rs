//! Connections over time: slow ones, broken ones, kept ones, and the end of it all (B19, B20, B24).

use std::sync::atomic::Ordering;
use std::time::Duration;

use choir_proxy::{Bounds, Pulse};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::*;

fn good(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: {LIVE}\r\n{COOKIE}\r\n\r\n")
}

#[tokio::test]
async fn silent_and_half_heads_are_closed_at_the_header_timeout() {
    let bounds = Bounds {
        header_timeout: Duration::from_millis(200),
        ..Default::default()
    };
    let world = world_with(Recorder::new(plain, false), bounds, &[]).await;
    for bytes in ["", "GET / HTTP/1.1\r\nHost: "] {
        world.raw(bytes).await;
    }
    // A client that trickles gets no extra time.
    let mut client = world.connect().await;
    let (mut read, mut write) = client.split();
    let trickle = async {
        let mut tick = tokio::time::interval(Duration::from_millis(20));
        while write.write_all(b"G").await.is_ok() {
            tick.tick().await;
        }
    };
    let mut answer = Vec::new();
    tokio::select! {
        () = trickle => {}
        read = read.read_to_end(&mut answer) => drop(read),
    }
    assert!(world.sandbox.text().is_empty());
    assert_eq!(status(&world.get(LIVE, &[COOKIE]).await), 200);
}

#[tokio::test]
async fn a_kept_connection_that_closed_meanwhile_fails_no_request() {
    let world = world_with(Recorder::new(plain, true), Bounds::default(), &[]).await;
    let mut client = world.connect().await;
    for n in 0..5 {
        client.write_all(good(&format!("/{n}")).as_bytes()).await.unwrap();
        let answer = response(&mut client).await;
        assert_eq!(status(&answer), 200, "{answer}");
        world.sandbox.until(|seen| seen.contains(&format!("GET /{n} "))).await;
    }
    assert_eq!(world.sandbox.dials.load(Ordering::SeqCst), 5);
    assert_eq!(world.sandbox.text().matches("GET /").count(), 5);
}

#[tokio::test]
async fn connections_are_kept_per_generation_and_gone_once_it_is_retired() {
    let world = world(plain).await;
    let mut client = world.connect().await;
    for _ in 0..3 {
        client.write_all(good("/").as_bytes()).await.unwrap();
        response(&mut client).await;
    }
    assert_eq!(world.sandbox.dials.load(Ordering::SeqCst), 1);
    world.forwarder.retire(&generation(1));
    client.write_all(good("/").as_bytes()).await.unwrap();
    assert_eq!(status(&response(&mut client).await), 200);
    assert_eq!(world.sandbox.dials.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn reading_a_page_counts_as_activity_and_being_refused_one_does_not() {
    let world = world(plain).await;
    let activity = &world.gate.live.activity;
    let before = activity.last_ms();
    world.clock.store(77, Ordering::SeqCst);
    assert_eq!(status(&world.get(LIVE, &[]).await), 401);
    assert_eq!(activity.last_ms(), before);
    assert_eq!(status(&world.get(LIVE, &[COOKIE]).await), 200);
    assert_eq!(activity.last_ms(), 77);
}

#[tokio::test]
async fn a_sandbox_that_breaks_off_is_a_502_that_says_so() {
    let world = world_with(Recorder::new(|_| Some(b""), true), Bounds::default(), &[]).await;
    let answer = world.get(LIVE, &[COOKIE]).await;
    assert_eq!(status(&answer), 502);
    assert!(answer.contains("\"code\":\"bad_gateway\""), "{answer}");
    let page = world.get(LIVE, &[COOKIE, "Accept: text/html"]).await;
    assert!(page.contains("<!doctype html>") && !page.contains("<script"), "{page}");
}

#[tokio::test]
async fn an_event_stream_flows_as_it_comes_and_ends_with_its_session() {
    let world = world(|_| Some(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\ndata:1\r\n")).await;
    let mut client = world.connect().await;
    client.write_all(good("/events").as_bytes()).await.unwrap();
    let mut got = Vec::new();
    while !got.ends_with(b"data:1\r\n") {
        assert!(client.read_buf(&mut got).await.unwrap() > 0);
    }
    assert_eq!(world.forwarder.in_flight(&generation(1)), 1);
    world.gate.visitor.closed.cancel();
    // Cut off, not ended as if complete.
    while client.read_buf(&mut got).await.unwrap_or(0) > 0 {}
    assert!(!got.ends_with(b"0\r\n\r\n"));
    world.forwarder.quiet(&generation(1)).await;
    assert_eq!(world.forwarder.in_flight(&generation(1)), 0);
}

#[tokio::test]
async fn a_swap_cuts_event_streams_and_lets_other_responses_finish() {
    for (script, cut) in [
        (
            (|_| Some(&b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata:1"[..])) as Script,
            true,
        ),
        (
            |_| Some(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\ndata:1"),
            false,
        ),
    ] {
        let world = world(script).await;
        let mut client = world.connect().await;
        client.write_all(good("/").as_bytes()).await.unwrap();
        let mut got = Vec::new();
        while !String::from_utf8_lossy(&got).contains("data:1") {
            assert!(client.read_buf(&mut got).await.unwrap() > 0);
        }
        world.forwarder.close_tunnels(&generation(1), 1012);
        if cut {
            while client.read_buf(&mut got).await.unwrap_or(0) > 0 {}
            world.forwarder.quiet(&generation(1)).await;
        } else {
            assert_eq!(world.forwarder.in_flight(&generation(1)), 1);
        }
    }
}

#[tokio::test]
async fn connections_are_kept_after_any_complete_response() {
    for script in [
        (|_| Some(&b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"[..])) as Script,
        |_| Some(b"HTTP/1.1 204 No Content\r\n\r\n"),
        |_| Some(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
        |_| Some(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n"),
    ] {
        let world = world(script).await;
        for _ in 0..3 {
            world.get(LIVE, &[COOKIE]).await;
        }
        assert_eq!(
            world.sandbox.dials.load(Ordering::SeqCst),
            1,
            "{}",
            script("").unwrap().escape_ascii()
        );
    }
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_request_along() {
    let world = world(|_| Some(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")).await;
    let mut client = world.connect().await;
    client.write_all(good("/").as_bytes()).await.unwrap();
    let mut got = Vec::new();
    while !got.ends_with(b"abc") {
        assert!(client.read_buf(&mut got).await.unwrap() > 0);
    }
    drop(client);
    world.forwarder.quiet(&generation(1)).await;
}

#[tokio::test]
async fn stopping_finishes_requests_closes_idle_connections_and_says_1012() {
    let world = world(|head| {
        head.contains("websocket")
            .then_some(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
    })
    .await;
    let mut idle = world.connect().await;
    idle.write_all(good("/").as_bytes()).await.unwrap();
    response(&mut idle).await;
    let mut busy = world.connect().await;
    let head = format!("POST /busy HTTP/1.1\r\nHost: {LIVE}\r\n{COOKIE}\r\nContent-Length: 4\r\n\r\nab");
    busy.write_all(head.as_bytes()).await.unwrap();
    world.sandbox.until(|seen| seen.contains("/busy")).await;
    let mut socket = world.connect().await;
    let upgrade = format!(
        "GET / HTTP/1.1\r\nHost: {LIVE}\r\nOrigin: http://{LIVE}\r\n{COOKIE}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
    );
    socket.write_all(upgrade.as_bytes()).await.unwrap();
    response(&mut socket).await;

    world.stop.cancel();
    let mut end = Vec::new();
    idle.read_to_end(&mut end).await.unwrap();
    assert!(end.is_empty());
    socket.read_to_end(&mut end).await.unwrap();
    assert_eq!(end, [0x88, 2, 0x03, 0xf4]);
    drop(socket);
    busy.write_all(b"cd").await.unwrap();
    assert_eq!(status(&response(&mut busy).await), 200);
    world.served.await.unwrap();
}

#[tokio::test]
async fn who_connected_before_the_stop_and_asks_after_it_is_answered() {
    let world = world(plain).await;
    let mut early = world.connect().await;
    // Came after it: when this one is answered, both were accepted.
    let mut idle = world.connect().await;
    idle.write_all(good("/").as_bytes()).await.unwrap();
    response(&mut idle).await;
    world.stop.cancel();
    let mut end = Vec::new();
    idle.read_to_end(&mut end).await.unwrap();
    early.write_all(good("/late").as_bytes()).await.unwrap();
    assert_eq!(status(&response(&mut early).await), 200);
    early.read_to_end(&mut end).await.unwrap();
    assert!(end.is_empty());
    world.served.await.unwrap();
}

#[tokio::test]
async fn the_time_to_drain_is_bounded() {
    let bounds = Bounds {
        drain: Duration::from_millis(50),
        ..Default::default()
    };
    let world = world_with(Recorder::new(plain, false), bounds, &[]).await;
    let mut busy = world.connect().await;
    let head = format!("POST /busy HTTP/1.1\r\nHost: {LIVE}\r\n{COOKIE}\r\nContent-Length: 4\r\n\r\nab");
    busy.write_all(head.as_bytes()).await.unwrap();
    world.sandbox.until(|seen| seen.contains("/busy")).await;
    world.stop.cancel();
    world.served.await.unwrap();
}

#[tokio::test]
async fn connections_beyond_the_cap_wait_and_are_served_in_turn() {
    let bounds = Bounds {
        connections: 2,
        ..Default::default()
    };
    let world = world_with(Recorder::new(plain, false), bounds, &[]).await;
    let mut held = world.connect().await;
    held.write_all(good("/").as_bytes()).await.unwrap();
    response(&mut held).await;
    let mut second = world.connect().await;
    second.write_all(good("/").as_bytes()).await.unwrap();
    response(&mut second).await;
    let mut waiting = world.connect().await;
    waiting.write_all(good("/waiting").as_bytes()).await.unwrap();
    // Whoever is served first is served while the other two are still open.
    assert!(!world.sandbox.text().contains("/waiting"));
    assert!(world.pulse.is_felt().await, "a full house is not a dead one");
    drop(held);
    assert_eq!(status(&response(&mut waiting).await), 200);
}

#[tokio::test]
async fn the_pulse_is_felt_while_connections_are_accepted_and_not_before_nor_after() {
    assert!(!Pulse::default().is_felt().await);
    let world = world(plain).await;
    assert_eq!(status(&world.get(LIVE, &[COOKIE]).await), 200);
    assert!(world.pulse.is_felt().await);
    world.stop.cancel();
    world.served.await.unwrap();
    assert!(!world.pulse.is_felt().await);
}
