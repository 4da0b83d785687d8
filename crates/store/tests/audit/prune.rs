//! Old rows go, what is left verifies, and nobody else can take a row away.

use choir_store::{AuditFilter, AuditHead, Fault, Pruned};

use crate::trail::{KEY, Trail, at, event, fault};

/// A trail of two hundred rows, one a second.
async fn long() -> Trail {
    let trail = Trail::new(Some(KEY)).await;
    trail.write(2..=200).await;
    trail
}

async fn prune(trail: &Trail, before: i64, most: u32) -> Pruned {
    trail.store().prune_audit(at(before), most, at(1000)).await.unwrap()
}

async fn ids(trail: &Trail) -> (i64, i64) {
    let rows = trail.rows(AuditFilter::default()).await;
    (rows.last().unwrap().id, rows[0].id)
}

#[tokio::test]
async fn what_is_left_verifies_and_says_what_went() {
    let mut trail = long().await;
    let (whole, old) = (trail.head().await, {
        let found = trail.verified(None).await;
        assert_eq!(found.pruned, 0);
        trail
            .sql()
            .query_row("SELECT mac FROM audit_chain WHERE id = 30", [], |row| row.get(0))
            .map(|mac| AuditHead { id: 30, mac })
            .unwrap()
    });
    assert_eq!(prune(&trail, 101, 1000).await, Pruned::Rows(100));
    assert_eq!(ids(&trail).await, (101, 201));
    assert_eq!(
        trail.newest().await,
        ("audit.prune".into(), "1-100".into(), "ok".into())
    );
    for _ in 0..2 {
        let found = trail.verified(Some(whole)).await;
        assert_eq!((found.rows, found.pruned, found.bad), (101, 100, None));
        // After a restart, too, which has nothing to say.
        trail.open(Some(KEY)).await;
    }
    // A head of a row that went says nothing.
    assert_eq!(trail.verified(Some(old)).await.bad, None);
    // In steps, again and again, also the rows that tell of pruning.
    assert_eq!(prune(&trail, 151, 20).await, Pruned::Rows(20));
    assert_eq!(prune(&trail, 151, 20).await, Pruned::Rows(20));
    assert_eq!(prune(&trail, 151, 20).await, Pruned::Rows(10));
    assert_eq!(prune(&trail, 151, 20).await, Pruned::Rows(0));
    assert_eq!(prune(&trail, 5000, 5000).await, Pruned::Rows(53), "all but the newest");
    trail.write([7]).await;
    let found = trail.verified(None).await;
    assert_eq!((found.rows, found.pruned, found.bad), (3, 203, None));
}

#[tokio::test]
async fn an_open_intent_stays_with_all_after_it_and_an_outcome_may_outlive_its_intent() {
    let mut trail = Trail::new(Some(KEY)).await;
    let first = trail.store().audit_intent(event(2)).await.unwrap();
    let second = trail.store().audit_intent(event(3)).await.unwrap();
    trail.write(4..=9).await;
    assert_eq!(prune(&trail, 500, 100).await, Pruned::Rows(1));
    trail.store().audit_outcome(first, at(600), "ok").await.unwrap();
    assert_eq!(prune(&trail, 500, 100).await, Pruned::Rows(1));
    assert_eq!(ids(&trail).await.0, 3);
    let outcomes = trail.rows(AuditFilter::default()).await;
    assert!(outcomes.iter().any(|row| row.intent == Some(2)));
    // After a crash nobody is left to end it but the next start.
    trail.open(Some(KEY)).await;
    assert_eq!(trail.verified(None).await.open_intents, 1);
    assert_eq!(trail.store().end_open_intents(at(601), "interrupted").await.unwrap(), 1);
    assert_eq!(trail.store().end_open_intents(at(601), "interrupted").await.unwrap(), 0);
    assert!(trail.store().audit_outcome(second, at(602), "ok").await.is_err());
    assert!(matches!(prune(&trail, 500, 100).await, Pruned::Rows(7..)));
    let found = trail.verified(None).await;
    assert_eq!((found.open_intents, found.bad), (0, None));
}

#[tokio::test]
async fn a_sealed_box_prunes_nothing_and_no_stretch_of_its_rows_is_cut_in_two() {
    let mut trail = Trail::of_six().await;
    trail.open(None).await;
    assert_eq!(prune(&trail, 500, 100).await, Pruned::Rows(0));
    trail.write(7..=9).await;
    trail.open(Some(KEY)).await;
    trail.write(11..=12).await;
    assert_eq!(
        prune(&trail, 9, 100).await,
        Pruned::Rows(6),
        "rows 7 to 9 stay until 10 may go"
    );
    let found = trail.verified(None).await;
    assert_eq!((found.sealed, found.bad), (vec![(7, 9)], None));
    assert_eq!(prune(&trail, 500, 100).await, Pruned::Rows(6));
    assert_eq!(trail.bad(None).await, None);
}

#[tokio::test]
async fn only_pruning_takes_rows_away_and_a_made_up_record_of_it_is_found() {
    let trail = long().await;
    assert_eq!(prune(&trail, 101, 1000).await, Pruned::Rows(100));
    let sql = trail.sql();
    for guarded in [
        "DELETE FROM audit WHERE id = 150",
        "DELETE FROM audit_chain WHERE id = 150",
        "UPDATE audit SET actor = 'root' WHERE id = 150",
        "UPDATE audit_cut SET through = 50",
        "DELETE FROM audit_cut",
    ] {
        assert!(sql.execute(guarded, []).is_err(), "{guarded}");
    }
    // Who gets around that is found.
    for (forged, bad) in [
        (
            "UPDATE audit_cut SET through = 149, link = (SELECT mac FROM audit_chain WHERE id = 149);
             DELETE FROM audit WHERE id < 150; DELETE FROM audit_chain WHERE id < 150",
            fault(150, Fault::NotPruned),
        ),
        ("UPDATE audit_cut SET begun = 0", fault(101, Fault::NotPruned)),
        ("DELETE FROM audit_cut", fault(1, Fault::Missing)),
        (
            "DELETE FROM audit WHERE id = 101; DELETE FROM audit_chain WHERE id = 101",
            fault(101, Fault::Missing),
        ),
    ] {
        let trail = long().await;
        prune(&trail, 101, 1000).await;
        trail.tamper(forged);
        assert_eq!(trail.bad(None).await, bad, "{forged}");
    }
    // A row that is not as it was written is evidence: it is not pruned away.
    let trail = long().await;
    trail.tamper("UPDATE audit SET actor = 'root' WHERE id = 50");
    assert_eq!(prune(&trail, 101, 20).await, Pruned::Rows(20));
    assert_eq!(prune(&trail, 101, 20).await, Pruned::Rows(20));
    let Pruned::Bad(bad) = prune(&trail, 101, 20).await else {
        panic!("the changed row went")
    };
    assert_eq!((bad.id, bad.fault), (50, Fault::Changed));
    assert_eq!(ids(&trail).await.0, 41);
}

#[tokio::test]
async fn pruning_that_cannot_be_recorded_takes_nothing_away() {
    let trail = long().await;
    let sql = trail.sql();
    sql.execute_batch("CREATE TRIGGER broken BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'broken'); END")
        .unwrap();
    assert!(trail.store().prune_audit(at(101), 1000, at(1000)).await.is_err());
    assert_eq!(ids(&trail).await, (1, 200));
    // Killed between two of its steps: nothing of a transaction that did not commit is there.
    sql.execute_batch(
        "DROP TRIGGER broken; CREATE TRIGGER broken BEFORE DELETE ON audit WHEN OLD.id = 60 BEGIN SELECT RAISE(ABORT, 'broken'); END",
    )
    .unwrap();
    assert!(trail.store().prune_audit(at(101), 1000, at(1000)).await.is_err());
    assert_eq!((ids(&trail).await, trail.bad(None).await), ((1, 200), None));
    sql.execute_batch("DROP TRIGGER broken").unwrap();
    assert_eq!(prune(&trail, 101, 1000).await, Pruned::Rows(100));
}
