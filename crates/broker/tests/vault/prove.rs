//! A search knows every secret and every key of a real vault, and names those that it cannot look for.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use choir_broker::prove::{Builder, Kind, Search, Unsought};
use choir_broker::{Fill, Vault, derive};

use crate::rig::{Rig, put, put_with};

const LABEL: &str = "test label";

fn found(search: &Search, bytes: &[u8]) -> BTreeSet<String> {
    let mut reader = search.reader();
    reader.take(bytes);
    let hits = reader.finish();
    hits.iter()
        .map(|hit| search.sought()[hit.sought].name.clone())
        .collect()
}

#[tokio::test]
async fn every_key_that_was_ever_drawn_is_looked_for() {
    let rig = Rig::new();
    let drawn: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
    let recorded = drawn.clone();
    let random: Fill = Arc::new(move |bytes| {
        getrandom::fill(bytes).unwrap();
        recorded.lock().unwrap().push(bytes.to_vec());
    });
    let (vault, own) = Vault::unlock(rig.store.clone(), rig.file(), random).await.unwrap();
    for user in ["ada", "bob"] {
        let user = rig.user(user).await;
        put(&vault, &user, "token", b"canary-of-a-user").await.unwrap();
    }
    let mut builder = Builder::default();
    vault.seek_keys(&[LABEL], &mut builder).await.unwrap();
    let search = builder.build().unwrap();
    let drawn = drawn.lock().unwrap().clone();
    let keys: Vec<_> = drawn.iter().filter(|bytes| bytes.len() == 32).collect();
    assert_eq!(keys.len(), 4, "the master key, the box's own, and one a user");
    for key in keys {
        assert_eq!(found(&search, key).len(), 1);
    }
    let derived: [u8; 32] = derive(&own.unwrap(), LABEL);
    assert_eq!(found(&search, &derived), [LABEL.to_owned()].into());
    assert!(search.sought().iter().all(|sought| sought.kind == Kind::Key));
    // The signing key and the one of the authorities as well.
    assert_eq!(search.sought().len(), 7);
    // The control: what was drawn for something else is not found.
    let nonces = drawn.iter().filter(|bytes| bytes.len() == 24);
    for nonce in nonces {
        assert_eq!(found(&search, nonce).len(), 0);
    }
    assert_ne!(vault.signer().await.unwrap().public(), derived);
    assert_eq!(
        vault.signer().await.unwrap().public(),
        rig.vault().await.signer().await.unwrap().public()
    );
}

#[tokio::test]
async fn a_users_secrets_are_looked_for_as_they_are_now_and_a_damaged_one_is_named() {
    let rig = Rig::new();
    let vault = rig.vault().await;
    let (ada, bob) = (rig.user("ada").await, rig.user("bob").await);
    put(&vault, &ada, "token", b"canary-old-value").await.unwrap();
    put(&vault, &ada, "token", b"canary-new-value").await.unwrap();
    put_with(&vault, &ada, "open", b"canary-revealed", true).await.unwrap();
    put(&vault, &ada, "damaged", b"canary-damaged").await.unwrap();
    put(&vault, &bob, "token", b"canary-of-bob").await.unwrap();
    rig.sql()
        .execute(
            "UPDATE secrets SET sealed = zeroblob(length(sealed)) WHERE name = 'damaged'",
            [],
        )
        .unwrap();
    let mut builder = Builder::default();
    vault.seek_secrets(&ada, &mut builder).await.unwrap();
    let search = builder.build().unwrap();
    let sought: Vec<_> = search
        .sought()
        .iter()
        .map(|one| (one.name.as_str(), one.version, one.reveal))
        .collect();
    assert_eq!(sought, [("open", Some(1), true), ("token", Some(2), false)]);
    assert_eq!(found(&search, b"canary-new-value"), ["token".to_owned()].into());
    for absent in [&b"canary-old-value"[..], b"canary-of-bob", b"canary-damaged"] {
        assert_eq!(found(&search, absent).len(), 0);
    }
    let [(unsought, why)] = search.unsought() else {
        panic!("{:?}", search.unsought())
    };
    assert_eq!((unsought.name.as_str(), *why), ("damaged", Unsought::Damaged));
}
