//! Rotation of the master key: stopped after any step, every key opens with exactly one listed master key, and the next
//! rotation finishes it (G14); a vault that runs meanwhile goes on.

use std::collections::BTreeSet;

use choir_broker::{RotateError, Rotation, RotationStep, Vault, derive};
use choir_core::UserId;

use crate::rig::{Rig, event, put, random, value};

/// More than one batch.
const USERS: usize = 70;

fn rotation(rig: &Rig) -> Rotation {
    Rotation::new(rig.store.clone(), rig.file(), random())
}

async fn finish(rotation: &Rotation) -> usize {
    let mut steps = 1;
    while rotation.step(event()).await.unwrap() != RotationStep::Finished {
        steps += 1;
    }
    steps
}

/// The master keys that the file lists, and under which the database says its keys are.
fn keys(rig: &Rig) -> (Vec<String>, Vec<String>) {
    let ring = rig.file().read().unwrap();
    let sql = rig.sql();
    let mut statement = sql
        .prepare("SELECT lower(hex(kek_id)) FROM data_keys UNION ALL SELECT lower(hex(kek_id)) FROM key_check")
        .unwrap();
    let used: Vec<String> = statement
        .query_map([], |row| row.get(0))
        .unwrap()
        .map(Result::unwrap)
        .collect();
    let mut listed: Vec<String> = used
        .iter()
        .filter(|id| {
            let id = data_encoding::HEXLOWER.decode(id.as_bytes()).unwrap();
            ring.get(id.try_into().unwrap()).is_some()
        })
        .cloned()
        .collect();
    listed.sort();
    listed.dedup();
    (listed, used)
}

/// The nonces of all sealed keys.
fn sealed_keys(rig: &Rig) -> Vec<Vec<u8>> {
    let sql = rig.sql();
    let mut statement = sql
        .prepare("SELECT substr(sealed, 10, 24) FROM data_keys UNION ALL SELECT substr(sealed, 10, 24) FROM key_check")
        .unwrap();
    let rows = statement.query_map([], |row| row.get(0)).unwrap();
    rows.map(Result::unwrap).collect()
}

/// A box with many users' secrets, as a rotation finds it.
async fn many() -> (Rig, Vault, Vec<UserId>) {
    let rig = Rig::new();
    let vault = rig.vault().await;
    let mut users = Vec::new();
    for n in 0..USERS {
        let user = rig.user(&format!("user{n}")).await;
        put(&vault, &user, "token", format!("value {n}").as_bytes())
            .await
            .unwrap();
        users.push(user);
    }
    (rig, vault, users)
}

async fn all_open(vault: &Vault, users: &[UserId]) {
    for (n, user) in users.iter().enumerate() {
        assert_eq!(
            value(vault, user, "token").await.unwrap(),
            format!("value {n}").as_bytes()
        );
    }
}

#[tokio::test]
async fn stopped_after_any_step_every_key_opens_and_the_next_rotation_finishes_it() {
    let (rig, running, users) = many().await;
    let own = derive::<32>(&rig.unlock().await.1.unwrap(), "test");
    let old = sealed_keys(&rig);
    assert!(old.iter().all(|nonce| rig.holds(nonce)));
    let first = rig.file().read().unwrap().first().id();
    let mut whole = None;
    for stop in 0.. {
        let before = rig.file().read().unwrap().first().id();
        assert!(rotation(&rig).begin().await.unwrap());
        // A process that dies here leaves this and nothing in memory.
        let stopped = rotation(&rig);
        let mut over = false;
        for _ in 0..stop {
            over = stopped.step(event()).await.unwrap() == RotationStep::Finished;
        }
        let (listed, used) = keys(&rig);
        assert_eq!(used.len(), USERS + 1);
        assert!(used.iter().all(|id| listed.contains(id)), "after {stop} steps");
        all_open(&running, &users).await;
        let (restarted, key) = rig.unlock().await;
        all_open(&restarted, &users).await;
        assert_eq!(
            derive::<32>(&key.unwrap(), "test"),
            own,
            "what is derived stays the same"
        );
        if over {
            whole = Some(stop);
            break;
        }
        let again = rotation(&rig);
        assert!(
            !again.begin().await.unwrap(),
            "the unfinished one is taken up, no third key is made"
        );
        finish(&again).await;
        let ring = rig.file().read().unwrap();
        assert_eq!(ring.len(), 1);
        assert_ne!(ring.first().id(), before);
    }
    assert_eq!(whole, Some(4), "own key, two batches, end");
    // The control: the first key opens nothing any more.
    let (listed, used) = keys(&rig);
    assert_eq!(listed.len(), 1);
    assert!(!used.contains(&data_encoding::HEXLOWER.encode(&first)));
    // Nor is anything left for it to open: what was sealed under it is gone from the database and its log.
    let old: Vec<_> = old.iter().map(Vec::as_slice).collect();
    assert_eq!(rig.found(&old), BTreeSet::new());
}

#[tokio::test]
async fn a_vault_that_runs_through_a_rotation_opens_and_stores_at_every_step() {
    let rig = Rig::new();
    let vault = rig.vault().await;
    let (mut users, rotation) = (Vec::new(), rotation(&rig));
    let mut over = None;
    let mut begun = false;
    while over != Some(RotationStep::Finished) {
        // Each new user gets a key now, under whichever master key is right at this step.
        let n = users.len();
        let user = rig.user(&format!("user{n}")).await;
        put(&vault, &user, "token", format!("value {n}").as_bytes())
            .await
            .unwrap();
        users.push(user);
        all_open(&vault, &users).await;
        if begun {
            over = Some(rotation.step(event()).await.unwrap());
        } else {
            begun = rotation.begin().await.unwrap();
        }
        assert!(users.len() < 20, "a rotation ends while users come");
    }
    all_open(&vault, &users).await;
    all_open(&rig.vault().await, &users).await;
    let (listed, used) = keys(&rig);
    assert_eq!((listed.len(), used.len()), (1, users.len() + 1));
}

#[tokio::test]
async fn a_key_made_under_the_old_master_key_is_refused_once_the_new_one_is_in_use() {
    let rig = Rig::new();
    let vault = rig.vault().await;
    let (ada, bob) = (rig.user("ada").await, rig.user("bob").await);
    put(&vault, &ada, "token", b"x").await.unwrap();
    // What somebody holds who was about to write it when the rotation came by.
    let mut late = rig
        .store
        .secret_place(ada, "token".parse().unwrap())
        .await
        .unwrap()
        .data_key
        .unwrap();
    late.user = bob.clone();
    late.id = *b"late key";
    let rotation = rotation(&rig);
    rotation.begin().await.unwrap();
    rotation.step(event()).await.unwrap();
    assert!(!rig.store.add_data_key(late.clone()).await.unwrap());
    // The control: the same row under the master key in use is taken.
    late.key.kek = rig.file().read().unwrap().first().id();
    assert!(rig.store.add_data_key(late).await.unwrap());
}

#[tokio::test]
async fn a_rotation_with_another_boxs_key_file_changes_nothing() {
    let rig = Rig::new();
    let unstarted = rotation(&rig).begin().await;
    assert!(matches!(unstarted, Err(RotateError::Key(_))));
    rig.vault().await;
    let other = Rig::new();
    other.vault().await;
    std::fs::copy(other.path("key"), rig.path("key")).unwrap();
    let before = std::fs::read(rig.path("key")).unwrap();
    assert!(matches!(rotation(&rig).begin().await, Err(RotateError::WrongKey)));
    assert!(matches!(rotation(&rig).step(event()).await, Err(RotateError::WrongKey)));
    assert_eq!(std::fs::read(rig.path("key")).unwrap(), before);
}
