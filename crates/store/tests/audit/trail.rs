//! A trail in a file of its own, and somebody who has that file. It must not know what is checked.

use std::path::PathBuf;

use choir_core::UserId;
use choir_store::{AuditEvent, AuditFilter, AuditHead, AuditRow, AuditVerdict, BadRow, Fault, Store};
use jiff::Timestamp;
use rusqlite::Connection;

pub const KEY: [u8; 32] = [7; 32];

pub struct Trail {
    dir: tempfile::TempDir,
    store: Option<Store>,
}

impl Trail {
    /// A trail with nothing but its beginning; without a key nothing at all.
    pub async fn new(key: Option<[u8; 32]>) -> Self {
        let mut trail = Self {
            dir: tempfile::tempdir().unwrap(),
            store: None,
        };
        trail.open(key).await;
        trail
    }

    /// A trail of six rows: its beginning and five events.
    pub async fn of_six() -> Self {
        let trail = Self::new(Some(KEY)).await;
        trail.write(2..=6).await;
        trail
    }

    pub async fn write(&self, events: impl IntoIterator<Item = i64>) {
        for n in events {
            self.store().audit(event(n)).await.unwrap();
        }
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("choir.db")
    }

    pub fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    /// Starts anew, with the master key or sealed.
    pub async fn open(&mut self, key: Option<[u8; 32]>) {
        self.store = None;
        let store = Store::open(&self.path()).unwrap();
        if let Some(key) = key {
            store.set_audit_key(key);
        }
        store.settle_audit(at(0)).await.unwrap();
        self.store = Some(store);
    }

    /// Replaces the file by another one, as it is.
    pub async fn put_back(&mut self, copy: &std::path::Path) {
        self.store = None;
        for suffix in ["", "-wal", "-shm"] {
            let _ = std::fs::remove_file(format!("{}{suffix}", self.path().display()));
        }
        std::fs::copy(copy, self.path()).unwrap();
        self.open_as_it_is();
    }

    fn open_as_it_is(&mut self) {
        self.store = Some(Store::open(&self.path()).unwrap());
    }

    /// What somebody does who has the file, and knows that triggers guard it.
    pub fn tamper(&self, sql: &str) {
        self.sql()
            .execute_batch(&format!(
                "PRAGMA foreign_keys = OFF;
                 DROP TRIGGER IF EXISTS audit_is_never_changed; DROP TRIGGER IF EXISTS audit_is_never_deleted;
                 DROP TRIGGER IF EXISTS audit_chain_is_never_changed; DROP TRIGGER IF EXISTS audit_chain_is_never_deleted;
                 DROP TRIGGER IF EXISTS audit_cut_never_goes_back; DROP TRIGGER IF EXISTS audit_cut_is_never_deleted;
                 {sql}"
            ))
            .unwrap();
    }

    pub fn sql(&self) -> Connection {
        Connection::open(self.path()).unwrap()
    }

    pub async fn head(&self) -> AuditHead {
        self.store().audit_head().await.unwrap().unwrap()
    }

    pub async fn bad(&self, kept: Option<AuditHead>) -> Option<BadRow> {
        self.verified(kept).await.bad
    }

    pub async fn verified(&self, kept: Option<AuditHead>) -> AuditVerdict {
        let store = Store::open_read_only(&self.path()).unwrap();
        store.set_audit_key(KEY);
        store.verify_audit(kept).await.unwrap()
    }

    pub async fn rows(&self, filter: AuditFilter) -> Vec<AuditRow> {
        let limit = 1000;
        self.store().audit_rows(AuditFilter { limit, ..filter }).await.unwrap()
    }

    /// The newest row: action, subject, outcome.
    pub async fn newest(&self) -> (String, String, String) {
        let row = self.rows(AuditFilter::default()).await.swap_remove(0);
        (row.action, row.subject, row.outcome)
    }
}

pub fn at(n: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + n).unwrap()
}

pub fn user(n: u8) -> UserId {
    UserId::from_random([n; 16])
}

pub fn event(n: i64) -> AuditEvent {
    AuditEvent {
        at: at(n),
        actor: user(1).to_string(),
        user: Some(user(1)),
        action: "secret.use",
        subject: format!("subject {n}"),
        outcome: "ok",
    }
}

pub fn fault(id: i64, fault: Fault) -> Option<BadRow> {
    Some(BadRow { id, fault })
}
