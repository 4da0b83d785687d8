//! A database with users, its key file, and a second connection that does what a thief or a vandal would.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aho_corasick::AhoCorasick;
use choir_broker::{Fill, Key, KeyFile, NewValue, Opened, SecretValue, Vault, VaultError};
use choir_core::{SecretName, UserId};
use choir_store::{AuditEvent, InviteKind, NewInvite, NewPasskey, NewSession, Registration, Role, SessionKind, Store};
use jiff::{SignedDuration, Timestamp};

pub struct Rig {
    dir: tempfile::TempDir,
    pub store: Store,
}

pub fn now() -> Timestamp {
    "2026-01-02T03:04:05Z".parse().unwrap()
}

pub fn random() -> Fill {
    Arc::new(|bytes| getrandom::fill(bytes).unwrap())
}

pub fn name(text: &str) -> SecretName {
    text.parse().unwrap()
}

pub fn event() -> AuditEvent {
    AuditEvent {
        at: now(),
        actor: "test".into(),
        user: None,
        action: "test",
        subject: "x".into(),
        outcome: "ok",
    }
}

impl Rig {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("choir.db")).unwrap();
        Self { dir, store }
    }

    /// This box as restored from a backup of now.
    pub fn copy(&self) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("choir.db");
        self.sql().execute("VACUUM INTO ?1", [to.to_str().unwrap()]).unwrap();
        std::fs::set_permissions(&to, PermissionsExt::from_mode(0o600)).unwrap();
        std::fs::copy(self.path("key"), dir.path().join("key")).unwrap();
        let store = Store::open(&to).unwrap();
        Self { dir, store }
    }

    /// Its files as they are at this moment, and nobody who has them open.
    pub fn as_it_lies(&self) -> Lying {
        let dir = tempfile::tempdir().unwrap();
        for name in ["choir.db", "choir.db-wal", "key"] {
            std::fs::copy(self.path(name), dir.path().join(name)).unwrap();
        }
        Lying { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn file(&self) -> KeyFile {
        KeyFile::new(self.path("key"))
    }

    pub async fn unlock(&self) -> (Vault, Option<Key>) {
        Vault::unlock(self.store.clone(), self.file(), random()).await.unwrap()
    }

    pub async fn vault(&self) -> Vault {
        self.unlock().await.0
    }

    /// A user; the first claims the box.
    pub async fn user(&self, name: &str) -> UserId {
        let mut hash = [0; 32];
        hash[..name.len()].copy_from_slice(name.as_bytes());
        let mut id = [0; 16];
        getrandom::fill(&mut id).unwrap();
        let id = UserId::from_random(id);
        let claim = NewInvite {
            hash,
            id: name.into(),
            kind: InviteKind::Claim,
            role: Role::Admin,
            for_user: None,
            created_by: None,
            created_at: now(),
            expires_at: now() + SignedDuration::from_mins(30),
        };
        let first = self.store.replace_claim(claim, event()).await.unwrap();
        let session = NewSession {
            hash,
            id: name.into(),
            user: id.clone(),
            kind: SessionKind::Full,
            user_agent: String::new(),
            created_at: now(),
            expires_at: now() + SignedDuration::from_hours(1),
            verified_at: None,
        };
        let registration = Registration {
            id,
            at: now(),
            name: name.parse().unwrap(),
            display_name: name.into(),
            invite: first.then_some(hash),
            passkey: NewPasskey {
                id: name.into(),
                name: "Passkey".into(),
                credential: "{}".into(),
            },
            recovery_codes: Vec::new(),
            session,
        };
        self.store.register(registration).await.unwrap().id
    }

    /// Another connection to the same database.
    pub fn sql(&self) -> rusqlite::Connection {
        let connection = rusqlite::Connection::open(self.path("choir.db")).unwrap();
        connection.busy_timeout(std::time::Duration::from_secs(5)).unwrap();
        connection
    }

    /// The sealed value of a secret, as the database has it.
    pub fn blob(&self, of: &UserId, secret: &str) -> Vec<u8> {
        let sql = "SELECT sealed FROM secrets WHERE user_id = ?1 AND name = ?2";
        let connection = self.sql();
        connection
            .query_row(sql, [of.as_str(), secret], |row| row.get(0))
            .unwrap()
    }

    /// Whether these bytes are in any of the database's files.
    pub fn holds(&self, bytes: &[u8]) -> bool {
        !self.found(&[bytes]).is_empty()
    }

    /// Which of these are in the database's files, by their index.
    pub fn found(&self, patterns: &[&[u8]]) -> BTreeSet<usize> {
        found(self.dir.path(), patterns)
    }
}

/// The files of a process that was killed.
pub struct Lying {
    dir: tempfile::TempDir,
}

impl Lying {
    pub fn found(&self, patterns: &[&[u8]]) -> BTreeSet<usize> {
        found(self.dir.path(), patterns)
    }

    pub fn started(self) -> Rig {
        let store = Store::open(&self.dir.path().join("choir.db")).unwrap();
        Rig { dir: self.dir, store }
    }
}

fn found(directory: &Path, patterns: &[&[u8]]) -> BTreeSet<usize> {
    let search = AhoCorasick::new(patterns).unwrap();
    let files = ["choir.db", "choir.db-wal"].map(|name| std::fs::read(directory.join(name)).unwrap_or_default());
    let hits = files.iter().flat_map(|file| search.find_overlapping_iter(file));
    hits.map(|hit| hit.pattern().as_usize()).collect()
}

pub async fn put(vault: &Vault, user: &UserId, secret: &str, value: &[u8]) -> Result<u64, VaultError> {
    put_with(vault, user, secret, value, false).await
}

pub async fn put_with(
    vault: &Vault,
    user: &UserId,
    secret: &str,
    value: &[u8],
    reveal: bool,
) -> Result<u64, VaultError> {
    let new = NewValue {
        user,
        name: &name(secret),
        value: &SecretValue::new(value.to_vec()),
        reveal,
        at: now(),
    };
    vault.put(new, event()).await
}

pub async fn open(vault: &Vault, user: &UserId, secret: &str) -> Result<Opened, VaultError> {
    vault.open(user, &name(secret)).await
}

/// The value alone, or why there is none.
pub async fn value(vault: &Vault, user: &UserId, secret: &str) -> Result<Vec<u8>, String> {
    let opened = open(vault, user, secret).await;
    opened.map(|o| o.value.expose().to_vec()).map_err(|e| e.to_string())
}
