//! Secrets through the front door: values go in and never come out, sealed mode, and rotation of the master key.

mod rotation;
mod sealed;

use axum::http::{Method, StatusCode};
use choir_core::{SecretName, UserId};
use choir_hypervisor::router::tables;
use jiff::SignedDuration;
use serde_json::{Value, json};

use super::wire::{clock, start_at};
use super::{Box, workspace};
use crate::support::{Answer, Browser};

const CANARY: &str = "canary-3f9a-b71c-and-more";

async fn put(browser: &mut Browser, name: &str, body: Value) -> Answer {
    let path = format!("/me/secrets/{name}");
    browser.fetch(Method::PUT, &path, Some(body)).await
}

async fn delete(browser: &mut Browser, name: &str) -> Answer {
    browser.delete(&format!("/me/secrets/{name}")).await
}

async fn id_of(browser: &mut Browser) -> UserId {
    let me = browser.get("/auth/me").await.expect(StatusCode::OK);
    me["user"]["id"].as_str().unwrap().parse().unwrap()
}

/// What the broker would use for a call.
async fn value(start: &Box, browser: &mut Browser, name: &str) -> Result<String, String> {
    let (user, name) = (id_of(browser).await, name.parse::<SecretName>().unwrap());
    let opened = start.app.vault.open(&user, &name).await.map_err(|e| e.to_string())?;
    Ok(String::from_utf8(opened.value.expose().to_vec()).unwrap())
}

#[tokio::test]
async fn a_secret_is_stored_replaced_listed_and_deleted_and_its_value_is_never_shown() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let first = put(&mut ada, "GITHUB_TOKEN", json!({"value": CANARY})).await;
    let shown = first.expect(StatusCode::CREATED);
    assert_eq!(shown["name"], "GITHUB_TOKEN");
    assert_eq!((&shown["version"], &shown["reveal"]), (&json!(1), &json!(false)));
    assert_eq!(value(&start, &mut ada, "GITHUB_TOKEN").await.unwrap(), CANARY);
    let second = put(&mut ada, "GITHUB_TOKEN", json!({"value": "another"})).await;
    assert_eq!(second.expect(StatusCode::OK)["version"], 2);
    assert_eq!(value(&start, &mut ada, "GITHUB_TOKEN").await.unwrap(), "another");
    let list = ada.get("/me/secrets").await;
    assert_eq!(list.expect(StatusCode::OK)["items"].as_array().unwrap().len(), 1);
    for answer in [first, second, list] {
        assert!(!answer.text().contains(CANARY) && !answer.text().contains("another"));
    }
    let gone = delete(&mut ada, "GITHUB_TOKEN").await.expect(StatusCode::OK);
    assert_eq!(gone, json!({"name": "GITHUB_TOKEN", "ended_grants": []}));
    delete(&mut ada, "GITHUB_TOKEN")
        .await
        .refused(StatusCode::NOT_FOUND, "not_found");
    assert!(value(&start, &mut ada, "GITHUB_TOKEN").await.is_err());
    // One of the same name that comes later has nothing of the first.
    put(&mut ada, "GITHUB_TOKEN", json!({"value": "later"}))
        .await
        .expect(StatusCode::CREATED);
}

#[tokio::test]
async fn what_cannot_be_a_secret_is_refused_and_not_repeated() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let long = "a".repeat((64 << 10) + 1);
    for body in [
        json!({}),
        json!({"value": ""}),
        json!({"value": long}),
        json!({"value": 73735}),
        json!({"value": [73735]}),
        json!({"value": {"b": 73735}}),
        json!({"value": "x", "colour": 1}),
    ] {
        let answer = put(&mut ada, "token", body).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{}", answer.text());
        assert!(!answer.text().contains("73735"), "{}", answer.text());
    }
    for name in ["..%2fx", ".env", "-x", "a%00", "%C3%A4", &"a".repeat(65)] {
        put(&mut ada, name, json!({"value": "x"}))
            .await
            .refused(StatusCode::BAD_REQUEST, "bad_name");
        delete(&mut ada, name).await.refused(StatusCode::NOT_FOUND, "not_found");
    }
    assert_eq!(ada.get("/me/secrets").await.expect(StatusCode::OK)["items"], json!([]));
    // The control: the longest name with the longest value is taken.
    put(&mut ada, &"a".repeat(64), json!({"value": &long[1..]}))
        .await
        .expect(StatusCode::CREATED);
}

#[tokio::test]
async fn two_users_with_one_name_each_have_their_own_secret() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let mut eve = start.member(&mut ada, "eve").await;
    put(&mut ada, "token", json!({"value": "ada's"}))
        .await
        .expect(StatusCode::CREATED);
    put(&mut eve, "token", json!({"value": "eve's"}))
        .await
        .expect(StatusCode::CREATED);
    delete(&mut eve, "token").await.expect(StatusCode::OK);
    assert_eq!(value(&start, &mut ada, "token").await.unwrap(), "ada's");
    assert!(value(&start, &mut eve, "token").await.is_err());
}

#[tokio::test]
async fn a_value_that_may_be_revealed_needs_a_fresh_assertion() {
    let clock = clock();
    let start = start_at(&clock, |sim| sim).await;
    let mut ada = start.ada().await;
    clock.advance(SignedDuration::from_secs(5 * 60 + 1));
    let revealed = json!({"value": CANARY, "reveal": true});
    put(&mut ada, "token", revealed.clone())
        .await
        .refused(StatusCode::FORBIDDEN, "step_up_required");
    assert_eq!(ada.get("/me/secrets").await.expect(StatusCode::OK)["items"], json!([]));
    // The controls: one that stays hidden needs none, and with a fresh assertion the first call works.
    put(&mut ada, "token", json!({"value": CANARY}))
        .await
        .expect(StatusCode::CREATED);
    ada.step_up().await.expect(StatusCode::OK);
    let shown = put(&mut ada, "token", revealed).await.expect(StatusCode::OK);
    assert_eq!(shown["reveal"], true);
    // A new value is hidden again unless it says otherwise.
    let shown = put(&mut ada, "token", json!({"value": "new"}))
        .await
        .expect(StatusCode::OK);
    assert_eq!(shown["reveal"], false);
}

#[tokio::test]
async fn every_change_is_in_the_trail_and_no_value_is_in_any_answer_or_file() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    put(&mut ada, "canary-name", json!({"value": CANARY}))
        .await
        .expect(StatusCode::CREATED);
    put(&mut ada, "gone", json!({"value": CANARY, "reveal": true}))
        .await
        .expect(StatusCode::CREATED);
    delete(&mut ada, "gone").await.expect(StatusCode::OK);
    let events = ada.get("/me/audit?action=secret.").await.expect(StatusCode::OK);
    let actions: Vec<_> = events["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| &e["action"])
        .collect();
    assert_eq!(actions, ["secret.delete", "secret.put_reveal", "secret.put"]);
    let mut said = String::new();
    for route in tables().into_iter().flatten().filter(|route| route.method == "GET") {
        let path = route.path.replace("{ws}", "main").replace("{slot}", "live");
        said.push_str(&ada.get(&path).await.text());
    }
    let mut kept = said.into_bytes();
    let mut directories = vec![start.directory.path().to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.is_file() {
                kept.extend(std::fs::read(path).unwrap());
            }
        }
    }
    let holds = |bytes: &str| kept.windows(bytes.len()).any(|window| window == bytes.as_bytes());
    let hex = data_encoding::HEXLOWER.encode(CANARY.as_bytes());
    for form in [CANARY, &hex, &data_encoding::BASE64.encode(&CANARY.as_bytes()[..24])] {
        assert!(!holds(form), "{form}");
    }
    // The control: the same search finds the secret's name in answers and files.
    assert!(holds("canary-name"));
}
