//! Whoever changes the file offline is found, and the first bad row is named (D21).

use choir_store::{AuditHead, Error, Fault, Store};

use crate::trail::{KEY, Trail, event, fault};

#[tokio::test]
async fn an_untouched_trail_verifies_up_to_its_head_beside_a_running_writer() {
    let trail = Trail::of_six().await;
    let found = trail.verified(Some(trail.head().await)).await;
    assert_eq!((found.rows, &found.sealed, found.bad), (6, &vec![], None));
    assert_eq!(found.head, Some(trail.head().await));
    let text = trail.head().await.to_string();
    assert_eq!(text.parse::<AuditHead>().unwrap(), trail.head().await);
    // An older head is kept, too, as the trail grows.
    let old = trail.head().await;
    trail.store().audit(event(7)).await.unwrap();
    assert_ne!(trail.head().await, old);
    assert_eq!(trail.bad(Some(old)).await, None);
}

#[tokio::test]
async fn whatever_is_changed_in_a_row_that_row_is_named() {
    for change in [
        "at = at + 1",
        "actor = 'root'",
        "user_id = NULL",
        "user_id = ''",
        "action = 'secret.us', subject = 'e' || subject",
        "subject = ''",
        "outcome = 'refused'",
        "intent = 1",
        "times = 1",
        "times = 0 + 5",
    ] {
        let trail = Trail::of_six().await;
        trail.tamper(&format!("UPDATE audit SET {change} WHERE id = 4"));
        assert_eq!(trail.bad(None).await, fault(4, Fault::Changed), "{change}");
    }
}

#[tokio::test]
async fn a_row_taken_out_moved_or_put_in_is_named() {
    const RENUMBER: &str = "UPDATE audit SET id = -id WHERE id > 3; UPDATE audit SET id = -id - 1 WHERE id < 0";
    for (name, sql, bad) in [
        ("taken out", "DELETE FROM audit WHERE id = 3", fault(3, Fault::Missing)),
        (
            "taken out with its link",
            "DELETE FROM audit WHERE id = 3; DELETE FROM audit_chain WHERE id = 3",
            fault(3, Fault::Missing),
        ),
        (
            "taken out, and those after it moved up",
            &format!("DELETE FROM audit WHERE id = 3; {RENUMBER}"),
            fault(3, Fault::Changed),
        ),
        (
            "the first taken out",
            "DELETE FROM audit WHERE id = 1; DELETE FROM audit_chain WHERE id = 1",
            fault(1, Fault::Missing),
        ),
        (
            "two exchanged",
            "UPDATE audit SET id = -2 WHERE id = 2; UPDATE audit SET id = 2 WHERE id = 5; UPDATE audit SET id = 5 WHERE id = -2",
            fault(2, Fault::Changed),
        ),
        (
            "two exchanged with their links",
            "UPDATE audit SET id = -2 WHERE id = 2; UPDATE audit SET id = 2 WHERE id = 5; UPDATE audit SET id = 5 WHERE id = -2;
             UPDATE audit_chain SET id = -2 WHERE id = 2; UPDATE audit_chain SET id = 2 WHERE id = 5;
             UPDATE audit_chain SET id = 5 WHERE id = -2",
            fault(2, Fault::Changed),
        ),
        (
            "put in with a link that was made up",
            "INSERT INTO audit (at, actor, action, subject, outcome) VALUES (1, 'system', 'x', 'y', 'ok');
             INSERT INTO audit_chain (id, mac) VALUES (7, randomblob(32))",
            fault(7, Fault::Changed),
        ),
        ("one link taken away", "DELETE FROM audit_chain WHERE id = 3", fault(3, Fault::Unlinked)),
    ] {
        let trail = Trail::of_six().await;
        trail.tamper(sql);
        assert_eq!(trail.bad(None).await, bad, "{name}");
    }
}

/// What somebody does who cuts the end off and sets the next number back.
const CUT: &str = "DELETE FROM audit WHERE id > 4; DELETE FROM audit_chain WHERE id > 4;
                   UPDATE sqlite_sequence SET seq = 4 WHERE name = 'audit';";

#[tokio::test]
async fn rows_cut_off_the_end_are_missed_also_by_the_next_start_and_whatever_comes_after() {
    for tail in [
        "",
        "UPDATE audit_tail SET id = 4",
        "UPDATE audit_tail SET id = 4, key = randomblob(32)",
        "UPDATE audit_tail SET id = 4, key = (SELECT mac FROM audit_chain WHERE id = 4)",
        "DELETE FROM audit_tail",
    ] {
        let mut trail = Trail::of_six().await;
        trail.tamper(&format!("{CUT} {tail}"));
        assert_eq!(trail.bad(None).await, fault(5, Fault::Missing), "{tail}");
        // Nor do other rows in their place help, written by the hypervisor itself, sealed or not.
        trail.open(None).await;
        trail.write([10]).await;
        trail.open(Some(KEY)).await;
        trail.write(11..=13).await;
        let bad = trail.bad(None).await.expect("it does not heal");
        assert_eq!(bad.id, 5 + i64::from(bad.fault == Fault::BegunAgain), "{tail}: {bad}");
    }
}

#[tokio::test]
async fn a_file_that_is_an_older_copy_is_found_by_the_head_alone() {
    let mut trail = Trail::of_six().await;
    let older = tempfile::tempdir().unwrap();
    let copy = older.path().join("choir.db");
    trail.store().copy_to(&copy).await.unwrap();
    trail.write(7..=9).await;
    let head = trail.head().await;
    trail.put_back(&copy).await;
    // The control: without the head it looks whole, which is why there is one.
    assert_eq!(trail.bad(None).await, None);
    assert_eq!(trail.bad(Some(head)).await, fault(7, Fault::Missing));
    trail.open(Some(KEY)).await;
    trail.write(10..=13).await;
    assert_eq!(trail.bad(None).await, None);
    assert_eq!(trail.bad(Some(head)).await, fault(9, Fault::NotTheHead));
}

#[tokio::test]
async fn rows_whose_links_were_taken_away_are_not_linked_unseen_by_the_next_start() {
    for forge in [
        "UPDATE audit SET subject = 'forged' WHERE id = 4; DELETE FROM audit_chain WHERE id >= 4",
        "UPDATE audit SET subject = 'forged' WHERE id = 4; DELETE FROM audit_chain WHERE id >= 4;
         UPDATE audit_tail SET id = 3",
        "UPDATE audit SET subject = 'forged' WHERE id = 4;
         UPDATE audit_chain SET sealed = 1, mac = randomblob(32) WHERE id >= 4",
    ] {
        let mut trail = Trail::of_six().await;
        trail.tamper(forge);
        let found = trail.bad(None).await.expect("found before a start");
        assert_eq!(found.id, 4, "{forge}");
        trail.open(Some(KEY)).await;
        assert_eq!(
            trail.newest().await,
            ("audit.resume".into(), "4-6".into(), "unproven".into())
        );
        trail.write(8..=9).await;
        let found = trail.bad(None).await.expect("found after it, too");
        assert_eq!(found.id, 4, "{forge}");
    }
    // Rows put in at the end without a link.
    let mut trail = Trail::of_six().await;
    trail.tamper("INSERT INTO audit (at, actor, action, subject, outcome) VALUES (1, 'root', 'x', 'y', 'ok')");
    assert_eq!(trail.bad(None).await, fault(7, Fault::Unlinked));
    trail.open(Some(KEY)).await;
    assert_eq!(trail.bad(None).await, fault(7, Fault::Unproven));
    // The control: a start that finds everything in its place adds nothing.
    let mut trail = Trail::of_six().await;
    trail.open(Some(KEY)).await;
    assert_eq!((trail.verified(None).await.rows, trail.bad(None).await), (6, None));
}

#[tokio::test]
async fn under_another_key_not_even_the_first_row_is_good() {
    let trail = Trail::of_six().await;
    let store = Store::open_read_only(&trail.path()).unwrap();
    assert!(
        matches!(store.verify_audit(None).await, Err(Error::Conflict(_))),
        "without a key nothing is said"
    );
    store.set_audit_key([8; 32]);
    assert_eq!(store.verify_audit(None).await.unwrap().bad, fault(1, Fault::Changed));
}
