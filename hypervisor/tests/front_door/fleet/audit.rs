//! The audit trail at the front door: who reads which rows of it, and what goes on while it cannot be written (D20).

use axum::body::Body;
use axum::http::{Request, StatusCode};
use choir_core::Slot;
use choir_hypervisor::audit::prune;
use choir_hypervisor::clock::Clock as _;
use choir_hypervisor::gate::Gatekeeper;
use choir_store::{AuditEvent, AuditFilter, AuditRow, Store};
use jiff::SignedDuration;
use serde_json::{Value, json};

use super::access::{HOST, knock};
use super::wire::{clock, start_at};
use super::{Box, change, workspace};
use crate::support::Browser;

fn event(start: &Box, subject: &str) -> AuditEvent {
    AuditEvent {
        at: start.app.clock.now(),
        actor: "system".into(),
        user: None,
        action: "secret.use",
        subject: subject.into(),
        outcome: "ok",
    }
}

/// Makes every new audit row fail until this is dropped.
pub(super) struct Broken(rusqlite::Connection);

impl Broken {
    pub(super) fn trail_of(start: &Box) -> Self {
        let connection = rusqlite::Connection::open(start.directory.path().join("choir.db")).unwrap();
        connection
            .execute_batch("CREATE TRIGGER broken BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'broken'); END")
            .unwrap();
        Self(connection)
    }

    pub(super) fn mend(self) {
        self.0.execute_batch("DROP TRIGGER broken").unwrap();
    }
}

async fn rows(store: &Store, action: &str) -> Vec<AuditRow> {
    let filter = AuditFilter {
        action: Some(action.into()),
        limit: 500,
        ..AuditFilter::default()
    };
    store.audit_rows(filter).await.unwrap()
}

async fn readiness(browser: &mut Browser) -> Value {
    browser.get("/readyz").await.json()["parts"]["audit"].clone()
}

#[tokio::test]
async fn while_the_trail_cannot_be_written_nothing_that_needs_it_is_done_and_people_sign_in_and_reach_their_sandboxes()
{
    let start = Box::new().await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    change(&mut ada, Slot::Live, "start").await;
    let broken = Broken::trail_of(&start);
    // Nothing that must be recorded is done: no intent is given, and what is recorded with its change is not changed.
    // That no secret is released then is tested at the broker's door.
    for n in 0..20 {
        let refused = start.app.store.audit_intent(event(&start, &n.to_string())).await;
        assert!(refused.is_err(), "{refused:?}");
    }
    assert_eq!(readiness(&mut ada).await, "not ready");
    let mut operator = start.browser();
    operator.peer = "127.0.0.1".parse().unwrap();
    assert!(operator.get("/metrics").await.text().contains(
        "
choir_audit_failing 1
"
    ));
    let before = ada.get("/me/tokens").await.text();
    let token = ada.post("/me/tokens", json!({"name": "x", "scopes": ["read"]})).await;
    assert!(token.status.is_server_error(), "{}", token.text());
    assert_eq!(ada.get("/me/tokens").await.text(), before);
    // People sign in and out, see their things and reach their sandboxes.
    let mut elsewhere = ada.clone();
    elsewhere.cookies.clear();
    elsewhere.login().await.expect(StatusCode::OK);
    ada.key = elsewhere.key.clone();
    elsewhere.get("/api/workspaces/main").await.expect(StatusCode::OK);
    let gate = Gatekeeper::new(start.app.clone());
    let (status, to) = knock(&gate, &start, HOST, Some(&elsewhere), true).await;
    assert_eq!(status, 200, "{to}");
    elsewhere
        .post("/auth/logout", json!({}))
        .await
        .expect(StatusCode::NO_CONTENT);
    assert!(!elsewhere.is_signed_in().await);
    // The control: mended, the same things are done, and the alarm ends.
    broken.mend();
    let intent = start.app.store.audit_intent(event(&start, "mended")).await.unwrap();
    start
        .app
        .store
        .audit_outcome(intent, start.app.clock.now(), "ok")
        .await
        .unwrap();
    assert_eq!(readiness(&mut ada).await, "ok");
    ada.post("/me/tokens", json!({"name": "x", "scopes": ["read"]}))
        .await
        .expect(StatusCode::CREATED);
    let subjects: Vec<_> = rows(&start.app.store, "secret.use")
        .await
        .into_iter()
        .map(|row| row.subject)
        .collect();
    assert_eq!(subjects, ["mended", "mended"]);
    assert_eq!(start.app.store.verify_audit(None).await.unwrap().bad, None);
}

#[tokio::test]
async fn an_export_of_events_needs_an_assertion_of_the_last_five_minutes_and_a_page_does_not() {
    let clock = clock();
    let start = start_at(&clock, |sim| sim).await;
    let mut ada = start.ada().await;
    clock.advance(SignedDuration::from_secs(5 * 60 + 1));
    for path in ["/me/audit", "/admin/audit"] {
        ada.get(path).await.expect(StatusCode::OK);
        for (path, accept) in [
            (format!("{path}?format=jsonl"), "*/*"),
            (path.into(), "application/x-ndjson"),
        ] {
            let request = Request::get(&path)
                .header("accept", accept)
                .body(Body::empty())
                .unwrap();
            let refused = ada.send(request).await;
            refused.refused(StatusCode::FORBIDDEN, "step_up_required");
        }
    }
    // The control: just after one, the same export is written.
    ada.step_up().await.expect(StatusCode::OK);
    for path in ["/me/audit?format=jsonl", "/admin/audit?format=jsonl"] {
        assert!(!lines(&mut ada, path, "*/*").await.is_empty());
    }
}

#[tokio::test]
async fn old_rows_are_pruned_as_configured_and_an_intent_that_a_crash_left_is_ended_at_the_next_start() {
    let clock = clock();
    let start = start_at(&clock, |sim| sim).await;
    let mut ada = start.ada().await;
    let store = &start.app.store;
    store.audit_intent(event(&start, "cut short")).await.unwrap();
    clock.advance(SignedDuration::from_hours(24 * 399));
    assert_eq!(prune(store, clock.now(), 400).await.unwrap(), 0);
    clock.advance(SignedDuration::from_hours(24 * 2));
    // What is open keeps all after it.
    assert!(prune(store, clock.now(), 400).await.unwrap() > 0);
    assert_eq!(rows(store, "secret.use").await.len(), 1);
    let again = start.restarted().await;
    let store = &again.app.store;
    let told = rows(store, "secret.use").await;
    assert_eq!(
        told.iter().map(|row| row.outcome.as_str()).collect::<Vec<_>>(),
        ["interrupted", "intent"]
    );
    assert_eq!(prune(store, clock.now(), 400).await.unwrap(), 1);
    let found = store.verify_audit(None).await.unwrap();
    assert_eq!((found.bad, found.open_intents), (None, 0));
    assert!(found.pruned > 0);
    ada.router = again.router.clone();
    ada.login().await.expect(StatusCode::OK);
    let events = ada.get("/admin/audit?action=audit.prune").await.expect(StatusCode::OK);
    assert_eq!(events["items"].as_array().unwrap().len(), 2, "{events}");
}

/// The ids of one page.
async fn ids(browser: &mut Browser, path: &str) -> Vec<i64> {
    let page = browser.get(path).await.expect(StatusCode::OK);
    page["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["id"].as_i64().unwrap())
        .collect()
}

async fn lines(browser: &mut Browser, path: &str, accept: &str) -> Vec<Value> {
    let request = Request::get(path).header("accept", accept).body(Body::empty()).unwrap();
    let answer = browser.send(request).await;
    assert_eq!(
        (answer.status, answer.headers["content-type"].to_str().unwrap()),
        (StatusCode::OK, "application/x-ndjson")
    );
    answer
        .text()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Writes more events than an export reads at a time, all about this user.
async fn fill(start: &Box, user: &mut Browser) {
    let me = user.get("/auth/me").await.json()["user"]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let mut writes = tokio::task::JoinSet::new();
    for n in 0..1100 {
        let outcome = if n % 100 == 0 { "refused" } else { "ok" };
        let user = Some(me.parse().unwrap());
        let event = AuditEvent {
            user,
            outcome,
            ..event(start, &n.to_string())
        };
        let store = start.app.store.clone();
        writes.spawn(async move { store.audit(event).await.unwrap() });
    }
    writes.join_all().await;
}

#[tokio::test]
async fn events_are_read_in_pages_or_all_at_once_by_those_whose_they_are() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let mut eve = start.member(&mut ada, "eve").await;
    fill(&start, &mut eve).await;
    let hers = ids(&mut eve, "/me/audit?action=secret.use&limit=500").await;
    assert_eq!(hers.len(), 500);
    assert!(hers.is_sorted_by(|a, b| a > b), "newest first");
    let page = eve.get("/me/audit?action=secret.use&limit=500").await.json();
    let next = format!(
        "/me/audit?action=secret.use&limit=500&cursor={}",
        page["next_cursor"].as_str().unwrap()
    );
    assert!(ids(&mut eve, &next).await[0] < *hers.last().unwrap());
    assert_eq!(ids(&mut eve, "/me/audit?outcome=refused").await.len(), 11);
    assert_eq!(
        ids(&mut eve, "/me/audit?action=secret.use&until=2020-01-01T00:00:00Z")
            .await
            .len(),
        0
    );
    assert_eq!(
        ids(
            &mut eve,
            "/me/audit?action=secret.use&since=2020-01-01T00:00:00Z&limit=5"
        )
        .await
        .len(),
        5
    );
    for (path, accept) in [
        ("/me/audit?action=secret.use", "application/x-ndjson"),
        ("/me/audit?action=secret.use&format=jsonl", "*/*"),
    ] {
        let all = lines(&mut eve, path, accept).await;
        assert_eq!(all.len(), 1100);
        let number = |row: &Value| row["id"].as_i64().unwrap();
        assert!(
            all.is_sorted_by(|a, b| number(a) > number(b)),
            "each once, newest first"
        );
    }
}

#[tokio::test]
async fn an_admin_reads_everybodys_events_and_others_their_own() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let mut eve = start.member(&mut ada, "eve").await;
    fill(&start, &mut eve).await;
    // An admin reads one person's rows, everybody's, and through her own door her own alone.
    assert_eq!(
        lines(&mut ada, "/admin/audit?user=eve&action=secret.use&format=jsonl", "*/*")
            .await
            .len(),
        1100
    );
    assert_eq!(ids(&mut ada, "/admin/audit?action=secret.use").await.len(), 100);
    assert_eq!(ids(&mut ada, "/me/audit?action=secret.use").await.len(), 0);
    eve.get("/admin/audit")
        .await
        .refused(StatusCode::FORBIDDEN, "admin_only");
    ada.get("/admin/audit?user=nobody")
        .await
        .refused(StatusCode::NOT_FOUND, "not_found");
    // A question that is not understood is not answered with everything.
    for wrong in [
        "/me/audit?user=ada",
        "/me/audit?acton=x",
        "/me/audit?since=yesterday",
        "/me/audit?format=xml",
    ] {
        eve.get(wrong).await.refused(StatusCode::BAD_REQUEST, "bad_query");
    }
}
