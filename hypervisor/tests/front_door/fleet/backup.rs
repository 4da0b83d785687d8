//! Backups: nothing in a stolen one can be read (G06), one made under load is a commit point (G07), and what is restored
//! serves without anybody's old session.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use age::secrecy::ExposeSecret as _;
use age::x25519::Identity;
use axum::http::{Method, StatusCode};
use choir_core::UserId;
use choir_hypervisor::backup::{backup, restore};
use choir_hypervisor::config::Config;
use choir_runtime::SimVolumes;
use choir_runtime::sim::World;
use choir_store::{AuditEvent, InviteKind, NewInvite, Role, Store};
use jiff::{SignedDuration, Timestamp};
use serde_json::json;

use super::Box;
use crate::support::Browser;
use crate::support::limited::{BLOCK, survives};

const CANARY: &str = "canary-7f3a9c51e8";

/// A hypervisor with one user and one secret, whose backups an identity off the box can read.
struct Backed {
    start: Box,
    ada: Browser,
    /// Where backups go and the identity is; not the box.
    elsewhere: tempfile::TempDir,
}

impl Backed {
    async fn new() -> Self {
        let identity = Identity::generate();
        let elsewhere = tempfile::tempdir().unwrap();
        std::fs::write(
            elsewhere.path().join("identity"),
            format!("# made by a test\n{}\n", identity.to_string().expose_secret()),
        )
        .unwrap();
        let start = Box::with(|config| config.backup.recipients = vec![identity.to_public().to_string()]).await;
        let mut ada = start.ada().await;
        let put = ada.fetch(Method::PUT, "/me/secrets/token", Some(json!({ "value": CANARY })));
        assert!(put.await.status.is_success());
        Self { start, ada, elsewhere }
    }

    fn place(&self, name: &str) -> PathBuf {
        self.elsewhere.path().join(name)
    }

    async fn backup(&self) -> PathBuf {
        backup(&self.start.app.config, &self.place("backups"), now())
            .await
            .unwrap()
    }

    fn restore(&self, from: &Path) -> PathBuf {
        restore(from, &self.place("restored"), &self.place("identity"), now()).unwrap()
    }
}

fn now() -> Timestamp {
    "2026-01-02T03:04:05Z".parse().unwrap()
}

fn contains(path: &Path, text: &str) -> bool {
    let bytes = std::fs::read(path).unwrap();
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[tokio::test]
async fn the_oldest_backups_make_room_for_a_new_one() {
    let mut backed = Backed::new().await;
    let mut config = (*backed.start.app.config).clone();
    config.backup.keep = 2;
    let backups = backed.place("backups");
    std::fs::create_dir(&backups).unwrap();
    std::fs::write(backups.join("choir-mine.db.age"), "somebody's own").unwrap();
    for second in 1..5 {
        let at = now() + SignedDuration::from_secs(second);
        backup(&config, &backups, at).await.unwrap();
    }
    let mut left = names(&backups);
    left.sort();
    let newest = ["choir-20260102T030408Z.db.age", "choir-20260102T030409Z.db.age"];
    assert_eq!(left, [&newest[..], &["choir-mine.db.age"]].concat());
    // The control.
    config.backup.keep = 0;
    backup(&config, &backups, now()).await.unwrap();
    assert_eq!(names(&backups).len(), 4);
    assert!(backed.ada.is_signed_in().await);
}

#[tokio::test]
async fn a_stolen_backup_can_be_read_with_its_identity_alone_and_even_then_opens_no_secret() {
    let backed = Backed::new().await;
    let file = backed.backup().await;
    assert_eq!(file.file_name().unwrap(), "choir-20260102T030405Z.db.age");
    assert_eq!(
        names(file.parent().unwrap()).len(),
        1,
        "nothing unfinished is left there"
    );
    assert!(
        !names(backed.start.directory.path())
            .iter()
            .any(|name| name.ends_with(".part"))
    );
    let key = std::fs::read_to_string(backed.start.directory.path().join("key")).unwrap();
    // All of them long enough to be in no cipher text by chance.
    for text in [
        "SQLite format 3",
        "CREATE TABLE",
        "display_name",
        "secret.put",
        CANARY,
        key.trim(),
    ] {
        assert!(!contains(&file, text), "{text} can be read in the backup");
    }
    // Another identity, and one bit that is not as it was, give nothing.
    let other = backed.place("other");
    std::fs::write(&other, Identity::generate().to_string().expose_secret()).unwrap();
    assert!(restore(&file, &backed.place("a"), &other, now()).is_err());
    let damaged = backed.place("damaged");
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&damaged, bytes).unwrap();
    assert!(restore(&damaged, &backed.place("b"), &backed.place("identity"), now()).is_err());
    for directory in ["a", "b"] {
        assert!(
            names(&backed.place(directory)).is_empty(),
            "nothing half restored is left"
        );
    }
    // The control: with the identity the same words are found, apart from the secret and the key, which are not in it.
    let database = backed.restore(&file);
    for text in ["SQLite format 3", "CREATE TABLE", "ada", "secret."] {
        assert!(contains(&database, text), "{text}");
    }
    for text in [CANARY, key.trim()] {
        assert!(!contains(&database, text), "{text}");
    }
}

#[tokio::test]
async fn what_was_restored_serves_with_passkeys_and_secrets_and_without_old_sessions() {
    let mut backed = Backed::new().await;
    let token = backed
        .ada
        .post("/me/tokens", json!({"name": "ci", "scopes": ["read"]}))
        .await;
    token.expect(StatusCode::CREATED);
    let database = backed.restore(&backed.backup().await);
    let directory = tempfile::tempdir().unwrap();
    std::fs::copy(&database, directory.path().join("choir.db")).unwrap();
    std::fs::copy(backed.start.directory.path().join("key"), directory.path().join("key")).unwrap();
    let mut config = Config::clone(&backed.start.app.config);
    config.store.path = directory.path().join("choir.db");
    let again = Box::compose(
        Arc::new(directory),
        Arc::new(config),
        World::new(),
        SimVolumes::default(),
        choir_hypervisor::egress::Outside::system(),
    )
    .await;
    let mut ada = again.browser();
    (ada.cookies, ada.key) = (backed.ada.cookies.clone(), backed.ada.key.clone());
    assert!(!ada.is_signed_in().await);
    // The control: where it was not restored, the same cookie is good.
    assert!(backed.ada.is_signed_in().await);
    ada.cookies.clear();
    ada.login().await.expect(StatusCode::OK);
    let user = user(&mut ada).await;
    let opened = again.app.vault.open(&user, &"token".parse().unwrap()).await.unwrap();
    assert_eq!(opened.value.expose(), CANARY.as_bytes());
    let events = ada
        .get("/admin/audit?action=backup.restore")
        .await
        .expect(StatusCode::OK);
    assert_eq!(events["items"][0]["subject"], "choir-20260102T030405Z.db.age");
    let found = again.app.store.verify_audit(None).await.unwrap();
    assert_eq!(found.bad, None);
    // The restore itself was written without the key.
    assert_eq!(found.sealed.len(), 1);
}

/// Writes an invite and its event in one transaction, as fast as they are committed, until told to stop.
async fn write_on(store: Store, stop: Arc<AtomicBool>, writer: u8) -> usize {
    let mut written = 0_usize;
    while !stop.load(Ordering::Relaxed) {
        let mut hash = [writer; 32];
        hash[..8].copy_from_slice(&written.to_be_bytes());
        let invite = NewInvite {
            hash,
            id: format!("{writer}-{written}"),
            kind: InviteKind::Invite,
            role: Role::Member,
            for_user: None,
            created_by: None,
            created_at: now(),
            expires_at: now() + SignedDuration::from_hours(1),
        };
        let event = AuditEvent {
            at: now(),
            actor: "system".into(),
            user: None,
            action: "load",
            subject: invite.id.clone(),
            outcome: "ok",
        };
        store.add_invite(invite, event).await.unwrap();
        written += 1;
    }
    written
}

fn count(database: &Path, of: &str) -> usize {
    let connection = rusqlite::Connection::open(database).unwrap();
    connection
        .query_row(&format!("SELECT count(*) FROM {of}"), [], |row| row.get(0))
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_backups_at_once_are_two_whole_backups_and_what_a_killed_one_left_is_removed() {
    let backed = Backed::new().await;
    let directory = backed.start.directory.path();
    // What a backup left that was killed while it copied, and one that was killed while it encrypted.
    std::fs::create_dir(backed.place("backups")).unwrap();
    let left = [
        directory.join("backup0123.part"),
        backed.place("backups").join("choir-0123.part"),
    ];
    for file in &left {
        std::fs::write(file, "SQLite format 3").unwrap();
    }
    // The control: what somebody holds who is at work is not touched.
    let held = directory.join("backup4567.part");
    let at_work = std::fs::File::create(&held).unwrap();
    at_work.lock().unwrap();
    let later = now() + SignedDuration::from_secs(1);
    let (config, to) = (&backed.start.app.config, backed.place("backups"));
    let (one, two, same) = tokio::join!(
        backup(config, &to, now()),
        backup(config, &to, later),
        backup(config, &to, later)
    );
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_eq!(same.unwrap(), two, "of two in the same second the later one stays");
    assert!(left.iter().all(|file| !file.exists()));
    assert!(held.exists());
    drop(at_work);
    assert_eq!(names(&backed.place("backups")).len(), 2);
    for (n, file) in [one, two].iter().enumerate() {
        let into = backed.place(&format!("restored-{n}"));
        let database = restore(file, &into, &backed.place("identity"), now()).unwrap();
        assert_eq!(count(&database, "secrets"), 1);
    }
    backed.backup().await;
    assert!(names(directory).iter().all(|name| !name.ends_with(".part")));
}

/// F08: where it is killed, it has made no backup and harmed nothing.
#[tokio::test]
async fn a_backup_killed_at_any_length_is_none_and_the_next_one_is_whole() {
    let mut backed = Backed::new().await;
    let directory = backed.start.directory.path().to_owned();
    let recipient = &backed.start.app.config.backup.recipients[0];
    let text = format!("[store]\npath = \"choir.db\"\n[backup]\nrecipients = [\"{recipient}\"]\n");
    std::fs::write(directory.join("hypervisor.toml"), text).unwrap();
    let whole = backed.place("whole.db");
    backed.start.app.store.copy_to(&whole).await.unwrap();
    let all = std::fs::metadata(&whole).unwrap().len() / BLOCK;
    let to = backed.place("backups");
    let arguments = ["backup", "--to", to.to_str().unwrap()];
    let unfinished = |directory: &Path| names(directory).iter().filter(|n| n.ends_with(".part")).count();
    // What is encrypted is longer than what is copied: the last one dies while it encrypts, the others while they copy.
    for blocks in [8, 64, all / 2, all - 1, all] {
        assert!(!survives(&directory, blocks, &arguments), "{blocks} of {all} blocks");
        let encrypts = usize::from(blocks == all);
        assert_eq!(
            (unfinished(&directory), unfinished(&to)),
            (1, encrypts),
            "{blocks} of {all}"
        );
        assert!(
            !names(&to).iter().any(|name| name.contains(".db.age")),
            "{blocks} of {all}"
        );
        assert!(backed.ada.is_signed_in().await);
    }
    assert!(survives(&directory, 2 * all, &arguments));
    for directory in [&directory, &to] {
        let left = names(directory);
        assert!(!left.iter().any(|name| name.contains(".part")), "{left:?}");
    }
    let files = names(&to);
    assert_eq!(files.len(), 1);
    assert_eq!(count(&backed.restore(&to.join(&files[0])), "secrets"), 1);
    assert_eq!(backed.start.app.store.verify_audit(None).await.unwrap().bad, None);
}

/// G13, as the runbook says it, with the age identity that is kept off the box.
#[tokio::test]
async fn a_lost_master_key_comes_back_from_its_offline_copy_and_without_that_only_the_secrets_are_gone() {
    let mut backed = Backed::new().await;
    let key = backed.start.app.config.key_file();
    let identity = std::fs::read_to_string(backed.place("identity")).unwrap();
    let identity: Identity = identity.lines().last().unwrap().parse().unwrap();
    let offline = age::encrypt(&identity.to_public(), &std::fs::read(&key).unwrap()).unwrap();
    assert!(!String::from_utf8_lossy(&offline).contains(std::fs::read_to_string(&key).unwrap().trim()));
    std::fs::remove_file(&key).unwrap();

    let lost = backed.start.restarted().await;
    backed.ada.router = lost.router.clone();
    backed.ada.login().await.expect(StatusCode::OK);
    let user = user(&mut backed.ada).await;
    let name = "token".parse().unwrap();
    assert!(lost.app.vault.open(&user, &name).await.is_err());
    let made = backed.ada.post("/api/workspaces", json!({"name": "main"})).await;
    made.expect(StatusCode::CREATED);
    assert!(!key.exists(), "no new key takes the place of the lost one");
    // A new key is not this database's.
    std::fs::write(&key, "ab".repeat(32)).unwrap();
    std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let other = lost.restarted().await;
    assert!(other.app.vault.is_sealed());

    let begun = std::time::Instant::now();
    std::fs::write(&key, age::decrypt(&identity, &offline).unwrap()).unwrap();
    let found = other.restarted().await;
    let opened = found.app.vault.open(&user, &name).await.unwrap();
    println!("recovered from the offline copy in {} ms", begun.elapsed().as_millis());
    assert_eq!(opened.value.expose(), CANARY.as_bytes());
    assert_eq!(found.app.store.verify_audit(None).await.unwrap().bad, None);
}

async fn user(ada: &mut Browser) -> UserId {
    let me = ada.get("/auth/me").await.json();
    me["user"]["id"].as_str().unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_under_load_is_a_commit_point_with_all_that_was_acknowledged_before() {
    let backed = Backed::new().await;
    let store = &backed.start.app.store;
    let live = backed.start.directory.path().join("choir.db");
    // A reader of before the load keeps what the load writes in the log, so that the control below is sure.
    let reader = rusqlite::Connection::open(&live).unwrap();
    reader.execute_batch("BEGIN; SELECT count(*) FROM audit").unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..16)
        .map(|writer| tokio::spawn(write_on(store.clone(), stop.clone(), writer)))
        .collect();
    let acknowledged = || count(&live, "invites WHERE id LIKE '%-%'");
    while acknowledged() < 200 {
        tokio::task::yield_now().await;
    }
    let before = acknowledged();
    // The control: the file alone, as a naive backup takes it, lacks what is in the log.
    let naive = backed.place("naive.db");
    std::fs::copy(&live, &naive).unwrap();
    drop(reader);
    let file = backed.backup().await;
    let during = acknowledged();
    stop.store(true, Ordering::Relaxed);
    let mut written = 0;
    for writer in writers {
        written += writer.await.unwrap();
    }
    let database = backed.restore(&file);
    let (invites, events) = (
        count(&database, "invites WHERE id LIKE '%-%'"),
        count(&database, "audit WHERE action = 'load'"),
    );
    assert_eq!(invites, events, "what is written in one transaction is there together");
    assert!(
        (before..=during).contains(&invites),
        "{before} <= {invites} <= {during}"
    );
    assert!(during <= written);
    let naive = rusqlite::Connection::open(&naive).unwrap();
    let naive = naive.query_row("SELECT count(*) FROM audit WHERE action = 'load'", [], |row| {
        row.get::<_, usize>(0)
    });
    assert_eq!(naive.unwrap_or(0), 0);
}

#[tokio::test]
async fn backups_are_not_made_in_the_clear_nor_of_a_trail_that_was_changed_and_restores_overwrite_nothing() {
    let backed = Backed::new().await;
    let mut config = Config::clone(&backed.start.app.config);
    config.backup.recipients.clear();
    let refused = backup(&config, &backed.place("backups"), now()).await.unwrap_err();
    assert!(refused.to_string().contains("[backup] recipients"), "{refused}");
    config.backup.recipients = vec!["age1no".into()];
    assert!(
        config
            .judge()
            .unwrap_err()
            .to_string()
            .contains("`age1no` is not a public key")
    );
    let file = backed.backup().await;
    std::fs::create_dir(backed.place("full")).unwrap();
    std::fs::write(backed.place("full").join("choir.db"), "mine").unwrap();
    let refused = restore(&file, &backed.place("full"), &backed.place("identity"), now()).unwrap_err();
    assert!(refused.to_string().contains("is not empty"), "{refused}");
    assert_eq!(std::fs::read(backed.place("full").join("choir.db")).unwrap(), b"mine");
    let connection = rusqlite::Connection::open(backed.start.directory.path().join("choir.db")).unwrap();
    connection
        .execute_batch("DROP TRIGGER audit_is_never_changed; UPDATE audit SET actor = actor || '!' WHERE id = 3")
        .unwrap();
    let refused = backup(&backed.start.app.config, &backed.place("backups"), now())
        .await
        .unwrap_err();
    assert!(
        refused.to_string().starts_with("audit row 3 is not as it was written"),
        "{refused}"
    );
}
