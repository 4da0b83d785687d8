//! Without the right master key nothing opens and nothing is overwritten (G11).

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use choir_broker::{KeyFile, Keyring, UnlockError, Vault, VaultError, derive};
use choir_store::Store;

use crate::rig::{Rig, event, name, open, put, random, value};

/// All that rotation or a wrong start could spoil.
fn kept(rig: &Rig) -> Vec<(String, Vec<u8>)> {
    let sql = rig.sql();
    let mut statement = sql
        .prepare(
            "SELECT 'own', sealed FROM key_check UNION ALL SELECT user_id, sealed FROM data_keys
             UNION ALL SELECT id, sealed FROM secrets ORDER BY 1",
        )
        .unwrap();
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    rows.map(Result::unwrap).collect()
}

fn write_key(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o600)).unwrap();
}

#[tokio::test]
async fn with_a_key_that_is_missing_wrong_or_damaged_it_is_sealed_and_everything_is_kept() {
    let rig = Rig::new();
    let (vault, own) = rig.unlock().await;
    let ada = rig.user("ada").await;
    put(&vault, &ada, "token", b"kept").await.unwrap();
    let (right, before) = (std::fs::read_to_string(rig.path("key")).unwrap(), kept(&rig));
    let derived: [u8; 32] = derive(&own.unwrap(), "test");
    for (what, key) in [
        ("missing", None),
        ("another's", Some("ab".repeat(32))),
        ("cut short", Some(right[..40].to_owned())),
        ("empty", Some(String::new())),
    ] {
        let _ = std::fs::remove_file(rig.path("key"));
        if let Some(key) = &key {
            write_key(&rig.path("key"), key);
        }
        let (vault, own) = rig.unlock().await;
        assert!(vault.is_sealed() && own.is_none(), "{what}");
        assert!(
            matches!(open(&vault, &ada, "token").await, Err(VaultError::Sealed)),
            "{what}"
        );
        assert!(
            matches!(put(&vault, &ada, "token", b"new").await, Err(VaultError::Sealed)),
            "{what}"
        );
        let deleted = vault.delete(&ada, &name("token"), event()).await;
        assert!(matches!(deleted, Err(VaultError::Sealed)), "{what}");
        assert_eq!(
            vault.list(&ada).await.unwrap().len(),
            1,
            "{what}: names are still listed"
        );
        assert_eq!(kept(&rig), before, "{what}");
        assert_eq!(
            std::fs::read_to_string(rig.path("key")).ok(),
            key,
            "{what}: no key was made"
        );
    }
    // The control: with the right key back, everything opens as before.
    write_key(&rig.path("key"), &right);
    let (vault, own) = rig.unlock().await;
    assert_eq!(value(&vault, &ada, "token").await.unwrap(), b"kept");
    assert_eq!(derive::<32>(&own.unwrap(), "test"), derived);
}

#[tokio::test]
async fn a_key_file_that_others_can_read_stops_the_start() {
    let rig = Rig::new();
    rig.vault().await;
    std::fs::set_permissions(rig.path("key"), PermissionsExt::from_mode(0o644)).unwrap();
    let refused = Vault::unlock(rig.store.clone(), rig.file(), random()).await;
    let Err(UnlockError::Key(error)) = refused else {
        panic!("it started")
    };
    assert!(error.to_string().contains("chmod 600"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn processes_that_start_a_new_box_together_agree_on_its_keys() {
    let rig = Rig::new();
    let ada = rig.user("ada").await;
    let starts = (0..8).map(|_| {
        // A store of its own, as each process has.
        let (store, file) = (Store::open(&rig.path("choir.db")).unwrap(), rig.file());
        tokio::spawn(async move { Vault::unlock(store, file, random()).await.unwrap() })
    });
    let starts: Vec<_> = starts.collect();
    put(&rig.vault().await, &ada, "token", b"one").await.unwrap();
    for start in starts {
        let (vault, own) = start.await.unwrap();
        assert_eq!(value(&vault, &ada, "token").await.unwrap(), b"one");
        assert_eq!(
            derive::<32>(&own.unwrap(), "x"),
            derive::<32>(&rig.unlock().await.1.unwrap(), "x")
        );
    }
}

#[tokio::test]
async fn a_key_file_put_there_before_the_first_start_is_used_as_it_is() {
    let rig = Rig::new();
    let given = Keyring::new(&random());
    rig.file().write(&given).unwrap();
    let text = std::fs::read_to_string(rig.path("key")).unwrap();
    assert!(!rig.vault().await.is_sealed());
    assert_eq!(std::fs::read_to_string(rig.path("key")).unwrap(), text);
    // A malformed one is not replaced, though nothing is sealed under any key yet.
    let other = Rig::new();
    write_key(&other.path("key"), "not a key\n");
    let file = KeyFile::new(other.path("key"));
    assert!(Vault::unlock(other.store.clone(), file, random()).await.is_err());
    assert_eq!(std::fs::read_to_string(other.path("key")).unwrap(), "not a key\n");
}
