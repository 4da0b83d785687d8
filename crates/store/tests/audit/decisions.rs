//! Each decision is one row, an intent is there before its action, and without a row nothing is given (D19, D20).

use choir_store::{AuditEvent, AuditFilter, Error, Store};
use rusqlite::Connection;

use crate::trail::{KEY, Trail, at, event, user};

#[tokio::test]
async fn an_intent_is_there_before_its_outcome_and_ends_once() {
    let trail = Trail::new(Some(KEY)).await;
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
            ("subject 1", "ok", Some(2)),
            ("subject 2", "intent", None),
            ("subject 1", "intent", None),
            ("after row 0", "ok", None)
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
    let trail = Trail::new(Some(KEY)).await;
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
    assert_eq!((found.bad, found.open_intents, found.sealed), (None, 0, vec![]));
    let connection = Connection::open(trail.path()).unwrap();
    let count = |sql: &str| connection.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap();
    let of = |rest: i64| (0..DECISIONS).filter(|n| n % 3 == rest).count() as i64;
    assert_eq!(count("SELECT count(*) FROM audit WHERE outcome = 'intent'"), of(0));
    assert_eq!(count("SELECT count(*) FROM audit WHERE intent IS NOT NULL"), of(0));
    assert_eq!(count("SELECT count(*) FROM audit"), 1 + 2 * of(0) + of(1));
    assert_eq!(count("SELECT count(DISTINCT subject) FROM audit"), 1 + of(0) + of(1));
    assert_eq!(
        count("SELECT max(id) FROM audit"),
        1 + 2 * of(0) + of(1),
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
