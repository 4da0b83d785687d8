//! Rows that are written while the master key is missing: they are linked all the same, and told of for ever.

use choir_store::{AuditEvent, Fault, admit_copy};

use crate::trail::{KEY, Trail, at, event, fault};

/// Six rows, then three more by a sealed box.
async fn sealed() -> Trail {
    let mut trail = Trail::of_six().await;
    trail.open(None).await;
    trail.write(7..=8).await;
    // A sealed box that starts anew goes on where it was.
    trail.open(None).await;
    trail.write([9]).await;
    trail
}

#[tokio::test]
async fn rows_written_without_the_key_are_whole_and_named_by_a_row_once_it_is_back() {
    let mut trail = sealed().await;
    let found = trail.verified(None).await;
    assert_eq!((found.rows, found.sealed, found.bad), (9, vec![(7, 9)], None));
    trail.open(Some(KEY)).await;
    assert_eq!(trail.newest().await, ("audit.resume".into(), "7-9".into(), "ok".into()));
    trail.write([11]).await;
    trail.open(None).await;
    trail.write([12]).await;
    trail.open(Some(KEY)).await;
    let found = trail.verified(Some(trail.head().await)).await;
    assert_eq!(
        (found.rows, found.sealed, found.bad),
        (13, vec![(7, 9), (12, 12)], None)
    );
}

#[tokio::test]
async fn a_row_that_a_sealed_box_wrote_cannot_be_changed_moved_or_taken_out_either() {
    for (sql, id) in [
        ("UPDATE audit SET subject = 'other' WHERE id = 8", 8),
        (
            "DELETE FROM audit WHERE id = 8; DELETE FROM audit_chain WHERE id = 8",
            8,
        ),
        (
            "DELETE FROM audit WHERE id = 9; DELETE FROM audit_chain WHERE id = 9;
             UPDATE sqlite_sequence SET seq = 8 WHERE name = 'audit'; UPDATE audit_tail SET id = 8",
            9,
        ),
        (
            "UPDATE audit SET subject = 'other' WHERE id = 8; DELETE FROM audit_chain WHERE id >= 8",
            8,
        ),
        (
            "UPDATE audit_chain SET mac = (SELECT mac FROM audit_chain WHERE id = 9) WHERE id = 8",
            8,
        ),
    ] {
        let mut trail = sealed().await;
        trail.tamper(sql);
        assert_eq!(trail.bad(None).await.map(|bad| bad.id), Some(id), "{sql}");
        trail.open(Some(KEY)).await;
        trail.write([20]).await;
        let after = trail.bad(None).await.expect(sql).id;
        // What the start found is told of by the first row of the stretch at the earliest.
        assert!((7..=id).contains(&after), "{sql}: {after}");
    }
    // The control: untouched, the same rows are whole.
    let mut trail = sealed().await;
    trail.open(Some(KEY)).await;
    assert_eq!(trail.bad(None).await, None);
}

/// What the tail's key is good for, to whoever has the file: more rows at the end, which are told of, and nothing else.
#[tokio::test]
async fn who_has_the_file_can_add_rows_as_a_sealed_box_does_and_these_are_told_of() {
    let mut trail = Trail::of_six().await;
    trail.open(None).await;
    trail.write([7]).await;
    trail.open(Some(KEY)).await;
    assert_eq!(trail.verified(None).await.sealed, [(7, 7)]);
    // Without the row that names them they are found.
    trail.tamper("UPDATE audit_chain SET sealed = 0 WHERE id = 7");
    assert_eq!(trail.bad(None).await, fault(7, Fault::Changed));
}

#[tokio::test]
async fn a_restore_is_recorded_in_the_chain_though_it_has_no_key() {
    let mut trail = Trail::of_six().await;
    let elsewhere = tempfile::tempdir().unwrap();
    let copy = elsewhere.path().join("choir.db");
    trail.store().copy_to(&copy).await.unwrap();
    let restored = AuditEvent {
        action: "backup.restore",
        at: at(7),
        ..event(7)
    };
    admit_copy(&copy, &restored).unwrap();
    trail.put_back(&copy).await;
    let found = trail.verified(None).await;
    assert_eq!((found.rows, found.sealed, found.bad), (7, vec![(7, 7)], None));
    trail.open(Some(KEY)).await;
    assert_eq!(trail.bad(None).await, None);
    assert_eq!(trail.newest().await.1, "7-7");
}
