//! What is deleted or replaced is gone from the database and its log, ciphertext and all (D23).

use std::collections::BTreeSet;
use std::time::Duration;

use choir_broker::VaultError;

use crate::rig::{Rig, event, name, open, put, value};

#[tokio::test]
async fn a_deleted_secret_is_refused_and_its_ciphertext_is_nowhere() {
    let rig = Rig::new();
    let vault = rig.vault().await;
    let ada = rig.user("ada").await;
    // Values of all sizes, so that some are on pages of their own, in an order that makes pages split.
    let names: Vec<String> = (0..200).map(|n| format!("secret-{:03}", n * 73 % 200)).collect();
    for (n, secret) in names.iter().enumerate() {
        put(&vault, &ada, secret, &vec![7; n * n % 9000]).await.unwrap();
    }
    let (gone, stays): (Vec<_>, Vec<_>) = names.iter().partition(|name| name.ends_with(['1', '4', '7']));
    let blobs_of = |names: &[&String]| -> Vec<Vec<u8>> { names.iter().map(|name| rig.blob(&ada, name)).collect() };
    let (blobs, kept) = (blobs_of(&gone), blobs_of(&stays));
    let traces_of = |blobs: &[Vec<u8>]| -> Vec<Vec<u8>> { blobs.iter().flat_map(|blob| traces(blob)).collect() };
    // A nonce is near the beginning of its row, so it is whole on one page; other pieces may lie across two.
    let found = |blobs: &[Vec<u8>]| {
        let nonces: Vec<_> = blobs.iter().map(|blob| &blob[9..33]).collect();
        rig.found(&nonces).len()
    };
    // The control: before, the same search finds each of them.
    assert_eq!(found(&blobs), blobs.len());
    for secret in &gone {
        vault.delete(&ada, &name(secret), event()).await.unwrap();
        assert!(matches!(open(&vault, &ada, secret).await, Err(VaultError::NotFound)));
    }
    assert_eq!(rig.found(&slices(&traces_of(&blobs))), BTreeSet::new());
    assert_eq!(found(&kept), kept.len(), "what was not deleted is there");
    for secret in stays {
        assert!(value(&vault, &ada, secret).await.is_ok());
    }
}

#[tokio::test]
async fn a_replaced_value_leaves_no_ciphertext_behind() {
    let rig = Rig::new();
    let vault = rig.vault().await;
    let ada = rig.user("ada").await;
    for length in [10, 9000, 10, 500] {
        put(&vault, &ada, "token", &vec![1; length]).await.unwrap();
        let old = rig.blob(&ada, "token");
        let traces = traces(&old);
        assert!(rig.holds(&old[9..33]));
        put(&vault, &ada, "token", &vec![2; length]).await.unwrap();
        assert_eq!(rig.found(&slices(&traces)), BTreeSet::new(), "{length}");
    }
}

/// A reader in another process, which keeps the log from being emptied.
fn reading(rig: &Rig) -> rusqlite::Connection {
    let reader = rig.sql();
    reader.execute_batch("BEGIN; SELECT count(*) FROM secrets").unwrap();
    reader
}

/// Waits until none of these is in the database's files.
async fn gone(rig: &Rig, traces: &[Vec<u8>]) {
    let gone = async {
        while !rig.found(&slices(traces)).is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), gone).await.unwrap();
}

#[tokio::test]
async fn while_somebody_reads_others_write_and_what_was_deleted_goes_once_they_are_done() {
    let rig = Rig::new();
    let vault = rig.vault().await;
    let ada = rig.user("ada").await;
    put(&vault, &ada, "token", &[1; 500]).await.unwrap();
    let traces = traces(&rig.blob(&ada, "token"));
    let reader = reading(&rig);
    let deleting = {
        let (vault, ada) = (vault.clone(), ada.clone());
        tokio::spawn(async move { vault.delete(&ada, &name("token"), event()).await })
    };
    while open(&vault, &ada, "token").await.is_ok() {
        tokio::task::yield_now().await;
    }
    // Nobody waits for the reader: thirty commits, each by itself, are done before the deletion gives up on it.
    for n in 0..30 {
        put(&vault, &ada, &format!("other-{n}"), b"x").await.unwrap();
    }
    assert!(!deleting.is_finished(), "the writer waited for the reader");
    // The control: what the reader holds is there.
    assert!(!rig.found(&slices(&traces)).is_empty());
    deleting.await.unwrap().unwrap();
    assert!(
        !rig.found(&slices(&traces)).is_empty(),
        "the deletion does not wait for ever"
    );
    drop(reader);
    gone(&rig, &traces).await;
}

#[tokio::test]
async fn what_a_killed_process_left_in_the_log_goes_at_the_next_start() {
    let rig = Rig::new();
    let vault = rig.vault().await;
    let ada = rig.user("ada").await;
    put(&vault, &ada, "token", &[1; 500]).await.unwrap();
    let traces = traces(&rig.blob(&ada, "token"));
    let reader = reading(&rig);
    vault.delete(&ada, &name("token"), event()).await.unwrap();
    // As it lies on the disk when the process is killed now.
    let killed = rig.as_it_lies();
    assert!(!killed.found(&slices(&traces)).is_empty());
    drop(reader);
    let started = killed.started();
    gone(&started, &traces).await;
}

/// The controls of both: a deletion without `secure_delete` leaves the ciphertext in the database, and one that does not
/// empty the log leaves it there.
#[tokio::test]
async fn a_plain_deletion_would_leave_the_ciphertext_behind() {
    for (secure_delete, checkpoint) in [("OFF", "TRUNCATE"), ("ON", "PASSIVE")] {
        let rig = Rig::new();
        let vault = rig.vault().await;
        let ada = rig.user("ada").await;
        put(&vault, &ada, "token", b"value").await.unwrap();
        let blob = rig.blob(&ada, "token");
        let sql = format!(
            "PRAGMA secure_delete = {secure_delete}; DELETE FROM secrets; PRAGMA wal_checkpoint({checkpoint});"
        );
        rig.sql().execute_batch(&sql).unwrap();
        assert!(rig.holds(&blob[9..33]), "{sql}");
    }
}

/// Pieces of a blob that nothing else can hold: its nonce, its end, and some of each page that a long one fills.
fn traces(blob: &[u8]) -> Vec<Vec<u8>> {
    let stretches = blob[33..].chunks(1500).filter_map(|stretch| stretch.get(..16));
    let pieces = [&blob[9..33], &blob[blob.len() - 16..]].into_iter().chain(stretches);
    let pieces: BTreeSet<_> = pieces.map(<[u8]>::to_vec).collect();
    pieces.into_iter().collect()
}

fn slices(traces: &[Vec<u8>]) -> Vec<&[u8]> {
    traces.iter().map(Vec::as_slice).collect()
}
