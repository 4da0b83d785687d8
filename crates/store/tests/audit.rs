//! What the audit trail promises: every decision is one row, an intent is on the disk before its action, and whoever
//! changes the file offline is found (D19, D20, D21).

use std::path::PathBuf;

use choir_core::UserId;
use choir_store::{AuditEvent, AuditFilter, AuditHead, AuditRow, BadRow, Error, Fault, Store};
use jiff::Timestamp;
use rusqlite::Connection;

const KEY: [u8; 32] = [7; 32];

struct Trail {
    dir: tempfile::TempDir,
    store: Option<Store>,
}

impl Trail {
    /// An empty trail; linked unless there is no key.
    fn new(key: Option<[u8; 32]>) -> Self {
        let mut trail = Self {
            dir: tempfile::tempdir().unwrap(),
            store: None,
        };
        trail.open(key);
        trail
    }

    /// A trail of six rows.
    async fn of_six() -> Self {
        let trail = Self::new(Some(KEY));
        for n in 1..=6 {
            trail.store().audit(event(n)).await.unwrap();
        }
        trail
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("choir.db")
    }

    fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    fn open(&mut self, key: Option<[u8; 32]>) {
        let store = Store::open(&self.path()).unwrap();
        if let Some(key) = key {
            store.set_audit_key(key);
        }
        self.store = Some(store);
    }

    /// What somebody does who has the file, and knows that triggers guard it.
    fn tamper(&self, sql: &str) {
        let connection = Connection::open(self.path()).unwrap();
        connection
            .execute_batch(&format!(
                "PRAGMA foreign_keys = OFF;
                 DROP TRIGGER audit_is_never_changed; DROP TRIGGER audit_is_never_deleted;
                 DROP TRIGGER audit_chain_is_never_changed; DROP TRIGGER audit_chain_is_never_deleted;
                 {sql}"
            ))
            .unwrap();
    }

    async fn head(&self) -> AuditHead {
        self.store().audit_head().await.unwrap().unwrap()
    }

    async fn bad(&self, kept: Option<AuditHead>) -> Option<BadRow> {
        self.verified(kept).await.bad
    }

    async fn verified(&self, kept: Option<AuditHead>) -> choir_store::AuditVerdict {
        let store = Store::open_read_only(&self.path()).unwrap();
        store.set_audit_key(KEY);
        store.verify_audit(kept).await.unwrap()
    }

    async fn rows(&self, filter: AuditFilter) -> Vec<AuditRow> {
        let limit = 1000;
        self.store().audit_rows(AuditFilter { limit, ..filter }).await.unwrap()
    }
}

fn at(n: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + n).unwrap()
}

fn user(n: u8) -> UserId {
    UserId::from_random([n; 16])
}

fn event(n: i64) -> AuditEvent {
    AuditEvent {
        at: at(n),
        actor: user(1).to_string(),
        user: Some(user(1)),
        action: "secret.use",
        subject: format!("subject {n}"),
        outcome: "ok",
    }
}

fn fault(id: i64, fault: Fault) -> Option<BadRow> {
    Some(BadRow { id, fault })
}

#[tokio::test]
async fn an_untouched_trail_verifies_up_to_its_head_beside_a_running_writer() {
    let trail = Trail::of_six().await;
    let found = trail.verified(Some(trail.head().await)).await;
    assert_eq!((found.rows, found.unlinked, found.bad), (6, 0, None));
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
             INSERT INTO audit_chain VALUES (7, randomblob(32))",
            fault(7, Fault::Changed),
        ),
        ("one link taken away", "DELETE FROM audit_chain WHERE id = 3", fault(3, Fault::Unlinked)),
    ] {
        let trail = Trail::of_six().await;
        trail.tamper(sql);
        assert_eq!(trail.bad(None).await, bad, "{name}");
    }
}

#[tokio::test]
async fn rows_cut_off_the_end_are_missed_by_what_was_kept_elsewhere() {
    const CUT: &str = "DELETE FROM audit WHERE id > 4; DELETE FROM audit_chain WHERE id > 4;";
    let trail = Trail::of_six().await;
    let head = trail.head().await;
    trail.tamper(CUT);
    assert_eq!(trail.bad(None).await, fault(5, Fault::Missing), "the next number tells");
    // Somebody who also sets the numbers back is found by the head alone. Without it the trail looks whole: the control.
    let trail = Trail::of_six().await;
    trail.tamper(&format!(
        "{CUT} UPDATE sqlite_sequence SET seq = 4 WHERE name = 'audit'"
    ));
    assert_eq!(trail.bad(None).await, None);
    assert_eq!(trail.bad(Some(head)).await, fault(5, Fault::Missing));
    // Nor do other rows in their place help, linked by the hypervisor itself or not.
    for key in [Some(KEY), None] {
        let mut trail = Trail::of_six().await;
        let head = trail.head().await;
        trail.tamper(&format!(
            "{CUT} UPDATE sqlite_sequence SET seq = 4 WHERE name = 'audit'"
        ));
        trail.open(key);
        for n in 10..=13 {
            trail.store().audit(event(n)).await.unwrap();
        }
        assert_eq!(trail.bad(None).await, None);
        assert_eq!(trail.bad(Some(head)).await, fault(6, Fault::NotTheHead));
    }
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

#[tokio::test]
async fn rows_written_without_the_key_are_told_of_and_linked_once_it_is_back() {
    let mut trail = Trail::of_six().await;
    trail.open(None);
    for n in 7..=9 {
        trail.store().audit(event(n)).await.unwrap();
    }
    let found = trail.verified(None).await;
    assert_eq!((found.rows, found.unlinked, found.bad), (9, 3, None));
    trail.open(Some(KEY));
    trail.store().audit(event(10)).await.unwrap();
    let found = trail.verified(None).await;
    assert_eq!((found.rows, found.unlinked, found.bad), (10, 0, None));
    trail.tamper("UPDATE audit SET subject = 'other' WHERE id = 8");
    assert_eq!(trail.bad(None).await, fault(8, Fault::Changed));
}

#[tokio::test]
async fn an_intent_is_there_before_its_outcome_and_ends_once() {
    let trail = Trail::new(Some(KEY));
    let one = trail.store().audit_intent(event(1)).await.unwrap();
    let two = trail.store().audit_intent(event(2)).await.unwrap();
    assert_eq!(trail.verified(None).await.open_intents, 2);
    trail.store().audit_outcome(one, at(3), "ok").await.unwrap();
    let again = trail.store().audit_outcome(one, at(4), "refused").await;
    assert!(matches!(again, Err(Error::Exists)), "{again:?}");
    let rows = trail.rows(AuditFilter::default()).await;
    let told: Vec<_> = rows
        .iter()
        .map(|r| (r.subject.as_str(), r.outcome.as_str(), r.intent))
        .collect();
    assert_eq!(
        told,
        [
            ("subject 1", "ok", Some(1)),
            ("subject 2", "intent", None),
            ("subject 1", "intent", None)
        ]
    );
    assert_eq!((rows[0].at, rows[0].user.as_deref()), (at(3), Some(user(1).as_str())));
    // What is no intent has no outcome.
    trail.store().audit(event(5)).await.unwrap();
    assert_eq!(trail.verified(None).await.open_intents, 1);
    trail.store().audit_outcome(two, at(6), "refused").await.unwrap();
    assert_eq!(trail.verified(None).await.open_intents, 0);
}

#[tokio::test]
async fn no_intent_is_given_where_the_trail_cannot_be_written_and_the_rest_of_the_group_is_kept() {
    let trail = Trail::of_six().await;
    let breaker = Connection::open(trail.path()).unwrap();
    breaker
        .execute_batch("CREATE TRIGGER broken BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'broken'); END")
        .unwrap();
    let others = async { trail.store().check().await };
    let (intent, other) = tokio::join!(trail.store().audit_intent(event(7)), others);
    assert!(intent.is_err() && other.is_ok(), "{intent:?} {other:?}");
    assert_eq!(trail.verified(None).await.rows, 6);
    // The control: mended, the same call gives one, with the next number.
    breaker.execute_batch("DROP TRIGGER broken").unwrap();
    trail.store().audit_intent(event(7)).await.unwrap();
    assert_eq!((trail.verified(None).await.rows, trail.bad(None).await), (7, None));
}

#[tokio::test]
async fn no_intent_is_given_on_a_database_that_can_only_be_read_and_reading_goes_on() {
    let trail = Trail::of_six().await;
    let store = Store::open_read_only(&trail.path()).unwrap();
    let refused = store.audit_intent(event(7)).await;
    assert!(matches!(refused, Err(Error::Full(_))), "{refused:?}");
    let filter = AuditFilter {
        limit: 10,
        ..AuditFilter::default()
    };
    assert_eq!(store.audit_rows(filter).await.unwrap().len(), 6);
    // The control: opened for writing, the same call gives one.
    trail.store().audit_intent(event(7)).await.unwrap();
}

#[tokio::test]
async fn ten_thousand_decisions_at_once_are_one_row_each_in_a_whole_chain() {
    const DECISIONS: i64 = 10_000;
    let trail = Trail::new(Some(KEY));
    let mut jobs = tokio::task::JoinSet::new();
    for n in 0..DECISIONS {
        let store = trail.store().clone();
        jobs.spawn(async move {
            // A third is an intent with its outcome, a third a plain event, a third fails and leaves nothing.
            match n % 3 {
                0 => {
                    let id = store.audit_intent(event(n)).await.unwrap();
                    store.audit_outcome(id, at(n), "ok").await.unwrap();
                }
                1 => store.audit(event(n)).await.unwrap(),
                _ => assert!(matches!(
                    store.end_session(user(9), n.to_string(), event(n)).await,
                    Err(Error::NotFound)
                )),
            }
        });
    }
    while let Some(job) = jobs.join_next().await {
        job.unwrap();
    }
    let found = trail.verified(None).await;
    assert_eq!((found.bad, found.open_intents, found.unlinked), (None, 0, 0));
    let connection = Connection::open(trail.path()).unwrap();
    let count = |sql: &str| connection.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap();
    let of = |rest: i64| (0..DECISIONS).filter(|n| n % 3 == rest).count() as i64;
    assert_eq!(count("SELECT count(*) FROM audit WHERE outcome = 'intent'"), of(0));
    assert_eq!(count("SELECT count(*) FROM audit WHERE intent IS NOT NULL"), of(0));
    assert_eq!(count("SELECT count(*) FROM audit"), 2 * of(0) + of(1));
    assert_eq!(count("SELECT count(DISTINCT subject) FROM audit"), of(0) + of(1));
    assert_eq!(
        count("SELECT max(id) FROM audit"),
        2 * of(0) + of(1),
        "numbers have no gaps"
    );
}

#[tokio::test]
async fn rows_are_found_by_whose_what_when_and_how_it_ended() {
    let trail = Trail::of_six().await;
    let refused = AuditEvent {
        user: Some(user(2)),
        action: "secret.put",
        outcome: "refused",
        ..event(7)
    };
    trail.store().audit(refused).await.unwrap();
    let ids = async |filter| trail.rows(filter).await.iter().map(|row| row.id).collect::<Vec<_>>();
    let all = AuditFilter::default;
    assert_eq!(ids(all()).await, [7, 6, 5, 4, 3, 2, 1]);
    assert_eq!(
        ids(AuditFilter {
            user: Some(user(2)),
            ..all()
        })
        .await,
        [7]
    );
    assert_eq!(
        ids(AuditFilter {
            action: Some("secret.put".into()),
            ..all()
        })
        .await,
        [7]
    );
    assert_eq!(
        ids(AuditFilter {
            outcome: Some("refused".into()),
            ..all()
        })
        .await,
        [7]
    );
    assert_eq!(
        ids(AuditFilter {
            since: Some(at(3)),
            until: Some(at(5)),
            ..all()
        })
        .await,
        [4, 3]
    );
    assert_eq!(
        ids(AuditFilter {
            before: Some(3),
            ..all()
        })
        .await,
        [2, 1]
    );
}
