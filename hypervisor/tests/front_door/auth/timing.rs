//! Known and unknown names, by the clock and by the size of the answers (C04): a thousand starts of each kind.

use std::time::{Duration, Instant};

use axum::http::StatusCode;
use choir_hypervisor::auth::RegistrationMode;
use jiff::SignedDuration;
use serde_json::json;

use crate::support::{Answer, Browser, TestApp};

const KNOWN: &str = "ada";
/// As long as the known one, so that nothing differs but that it is unknown.
const UNKNOWN: &str = "bob";
const ROUNDS: u32 = 1000;
/// What must not be told apart over a network, in milliseconds.
const NOTICEABLE: f64 = 2.0;

/// All of an answer's shape: status, headers with their sizes, the size of the body.
fn shape(answer: &Answer) -> (StatusCode, Vec<(String, usize)>, usize) {
    let headers = answer
        .headers
        .iter()
        .map(|(name, value)| (name.to_string(), value.len()));
    (answer.status, headers.collect(), answer.body.len())
}

/// Does the same for either name in turn, now one first and now the other, so that whatever else the machine does weighs
/// on both; the difference of the medians in milliseconds.
async fn difference(app: &TestApp, rounds: u32, mut ask: impl AsyncFnMut(&mut Browser, &str) -> Answer) -> f64 {
    let mut times = [Vec::new(), Vec::new()];
    for round in 0..rounds {
        // Few enough tries an hour that each recovery is evaluated, and a peer of its own for each round.
        app.clock.advance(SignedDuration::from_mins(10));
        let names = [KNOWN, UNKNOWN];
        let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
        let mut shapes = [None, None];
        for index in order {
            let mut eve = app.browser();
            eve.peer = std::net::Ipv4Addr::from_bits(0xc612_0000 + round).into();
            let begun = Instant::now();
            let answer = ask(&mut eve, names[index]).await;
            times[index].push(begun.elapsed());
            assert_ne!(answer.status, StatusCode::TOO_MANY_REQUESTS);
            shapes[index] = Some(shape(&answer));
        }
        assert_eq!(shapes[0], shapes[1]);
    }
    let [known, unknown] = times.map(|mut all| {
        all.sort();
        all[all.len() / 2].as_secs_f64() * 1000.0
    });
    (known - unknown).abs()
}

async fn recover(browser: &mut Browser, name: &str) -> Answer {
    let guess = json!({"username": name, "code": "AAAA-BBBB"});
    browser.post("/auth/recovery", guess).await
}

async fn login(browser: &mut Browser, name: &str) -> Answer {
    browser.post("/auth/login/start", json!({"username": name})).await
}

/// Without an invite, where registering is open: only the end tells whether the name is free.
async fn register(browser: &mut Browser, name: &str) -> Answer {
    browser.post("/auth/register/start", json!({"username": name})).await
}

#[tokio::test]
async fn a_thousand_starts_of_signing_in_take_as_long_for_known_names_as_for_unknown_ones() {
    let app = TestApp::new();
    app.ada().await;
    let apart = difference(&app, ROUNDS, login).await;
    assert!(apart < NOTICEABLE, "{apart} ms");
}

#[tokio::test]
async fn a_thousand_starts_of_registering_take_as_long_for_known_names_as_for_unknown_ones() {
    let app = TestApp::with(RegistrationMode::Open);
    app.ada().await;
    register(&mut app.browser(), KNOWN).await.expect(StatusCode::OK);
    let apart = difference(&app, ROUNDS, register).await;
    assert!(apart < NOTICEABLE, "{apart} ms");
}

#[tokio::test]
async fn a_thousand_wrong_recovery_codes_take_as_long_for_known_names_as_for_unknown_ones() {
    let app = TestApp::new();
    app.ada().await;
    let apart = difference(&app, ROUNDS, recover).await;
    assert!(apart < NOTICEABLE, "{apart} ms");
}

/// The control: a server that needs little longer for a known name is noticed by the same comparison.
#[tokio::test]
async fn a_server_that_needs_three_milliseconds_longer_for_a_known_name_is_noticed() {
    let app = TestApp::new();
    app.ada().await;
    let slower = async |browser: &mut Browser, name: &str| {
        if name == KNOWN {
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
        login(browser, name).await
    };
    let apart = difference(&app, 200, slower).await;
    assert!(apart >= NOTICEABLE, "{apart} ms");
}
