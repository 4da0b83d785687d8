//! What is stored is sealed, bound to its row, and never under a nonce that was there before (G15).

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use choir_broker::{Fill, Vault, VaultError};

use crate::rig::{Rig, name, now, open, put, put_with, random, value};

const CANARY: &[u8] = b"canary-3f9a-and-more-of-it";

#[tokio::test]
async fn a_value_comes_back_as_it_was_and_each_new_one_is_the_next_version() {
    let rig = Rig::new();
    let vault = rig.vault().await;
    let (ada, bob) = (rig.user("ada").await, rig.user("bob").await);
    assert_eq!(put(&vault, &ada, "token", b"\0\xff not text").await.unwrap(), 1);
    assert_eq!(put(&vault, &bob, "token", b"bob's").await.unwrap(), 1);
    assert_eq!(value(&vault, &ada, "token").await.unwrap(), b"\0\xff not text");
    assert_eq!(put_with(&vault, &ada, "token", b"two", true).await.unwrap(), 2);
    let opened = open(&vault, &ada, "token").await.unwrap();
    assert_eq!(
        (opened.value.expose(), opened.version, opened.reveal),
        (&b"two"[..], 2, true)
    );
    assert_eq!(value(&vault, &bob, "token").await.unwrap(), b"bob's");
    assert!(matches!(open(&vault, &bob, "other").await, Err(VaultError::NotFound)));
    vault.used(&ada, &name("token"), now()).await.unwrap();
    assert_eq!(
        vault.describe(&ada, &name("token")).await.unwrap().last_used_at,
        Some(now())
    );
    assert_eq!(vault.list(&bob).await.unwrap()[0].last_used_at, None);
}

#[tokio::test]
async fn many_writers_of_one_name_each_get_a_version_of_their_own() {
    let rig = Rig::new();
    let vault = rig.vault().await;
    let ada = rig.user("ada").await;
    let writers = (0..16u8).map(|n| {
        let (vault, ada) = (vault.clone(), ada.clone());
        tokio::spawn(async move { put(&vault, &ada, "token", &[n]).await.unwrap() })
    });
    let mut versions = HashSet::new();
    for writer in writers.collect::<Vec<_>>() {
        assert!(versions.insert(writer.await.unwrap()));
    }
    assert_eq!(open(&vault, &ada, "token").await.unwrap().version, 16);
}

#[tokio::test]
async fn no_form_of_a_value_is_in_the_database_or_its_log() {
    let rig = Rig::new();
    let vault = rig.vault().await;
    let ada = rig.user("ada").await;
    put(&vault, &ada, "canary-name", CANARY).await.unwrap();
    let hex = data_encoding::HEXLOWER.encode(CANARY).into_bytes();
    let base64 = data_encoding::BASE64.encode(&CANARY[..24]).into_bytes();
    for form in [CANARY, &hex, &base64] {
        assert!(!rig.holds(form));
    }
    // The control: the same search finds what is kept in clear, and the sealed value.
    assert!(rig.holds(b"canary-name"));
    assert!(rig.holds(&rig.blob(&ada, "canary-name")));
}

#[tokio::test]
async fn a_sealed_value_opens_in_its_own_row_only() {
    let rig = Rig::new();
    let vault = rig.vault().await;
    let (ada, bob) = (rig.user("ada").await, rig.user("bob").await);
    put(&vault, &ada, "one", b"old").await.unwrap();
    let earlier = rig.blob(&ada, "one");
    put(&vault, &ada, "one", b"1").await.unwrap();
    put(&vault, &ada, "two", b"2").await.unwrap();
    put(&vault, &bob, "one", b"bob's").await.unwrap();
    let sql = rig.sql();
    let own = rig.blob(&ada, "one");
    let plant = |blob: &[u8]| {
        let sql = sql.execute(
            "UPDATE secrets SET sealed = ?1 WHERE user_id = ?2 AND name = 'one'",
            rusqlite::params![blob, ada.as_str()],
        );
        assert_eq!(sql.unwrap(), 1);
    };
    let mut bent = own.clone();
    *bent.last_mut().unwrap() ^= 1;
    for (what, blob) in [
        ("another secret's", rig.blob(&ada, "two")),
        ("another user's", rig.blob(&bob, "one")),
        ("an earlier version", earlier),
        ("one bit changed", bent),
        ("cut short", own[..20].to_vec()),
        ("nothing", Vec::new()),
    ] {
        plant(&blob);
        assert!(
            matches!(open(&vault, &ada, "one").await, Err(VaultError::Damaged)),
            "{what}"
        );
    }
    plant(&own);
    sql.execute("UPDATE secrets SET reveal = 1 WHERE user_id = ?1", [ada.as_str()])
        .unwrap();
    assert!(
        matches!(open(&vault, &ada, "one").await, Err(VaultError::Damaged)),
        "revealed"
    );
    sql.execute("UPDATE secrets SET reveal = 0", []).unwrap();
    // The control: put back as it was, it opens.
    assert_eq!(value(&vault, &ada, "one").await.unwrap(), b"1");
    // Whole users' keys cannot be exchanged either.
    sql.execute_batch(
        "CREATE TEMP TABLE k AS SELECT id, sealed FROM data_keys;
         UPDATE data_keys SET sealed = (SELECT sealed FROM k WHERE k.id != data_keys.id);",
    )
    .unwrap();
    assert!(matches!(open(&vault, &ada, "one").await, Err(VaultError::Damaged)));
}

const VALUES: u64 = 150;

/// The nonces of all values that a box seals after a backup, and that the box restored from this backup seals.
async fn nonces_through_a_restore(random: impl Fn() -> Fill) -> Vec<[u8; 24]> {
    let original = Rig::new();
    let ada = original.user("ada").await;
    put(&original.vault().await, &ada, "before", b"x").await.unwrap();
    let restored = original.copy();
    let mut found = Vec::new();
    for rig in [&original, &restored] {
        let vault = Vault::unlock(rig.store.clone(), rig.file(), random()).await.unwrap().0;
        assert_eq!(value(&vault, &ada, "before").await.unwrap(), b"x");
        for n in 0..VALUES {
            let secret = format!("after-{n}");
            put(&vault, &ada, &secret, b"x").await.unwrap();
            found.push(rig.blob(&ada, &secret)[9..33].try_into().unwrap());
        }
    }
    found
}

#[tokio::test]
async fn no_nonce_comes_twice_though_a_restored_copy_goes_on() {
    let nonces = nonces_through_a_restore(random).await;
    let different: HashSet<_> = nonces.iter().collect();
    assert_eq!((nonces.len(), different.len()), (300, 300));
    // The control: nonces from a counter that a restore sets back do repeat, and the same count shows it.
    let counting = || -> Fill {
        let next = AtomicU64::new(1);
        Arc::new(move |bytes: &mut [u8]| {
            for chunk in bytes.chunks_mut(8) {
                let number = next.fetch_add(1, Ordering::Relaxed).to_be_bytes();
                chunk.copy_from_slice(&number[..chunk.len()]);
            }
        })
    };
    let nonces = nonces_through_a_restore(counting).await;
    let different: HashSet<_> = nonces.iter().collect();
    assert_eq!(different.len(), nonces.len() / 2);
}
