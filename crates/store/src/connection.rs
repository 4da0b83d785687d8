//! The two database threads: one writes and commits in groups, one reads. It must not know any table but its own.

use std::fs::File;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use rusqlite::{Connection, OpenFlags, TransactionBehavior};
use tokio::sync::oneshot;

use crate::audit::{Alarm, Chain};
use crate::backup::copy;
use crate::log::Log;
use crate::{Error, Result};

/// Migrations in order; the schema version is how many were applied.
const MIGRATIONS: &[&str] = &[
    include_str!("migrations/0001_first.sql"),
    include_str!("migrations/0002_secrets.sql"),
    include_str!("migrations/0003_audit_chain.sql"),
    include_str!("migrations/0004_grants.sql"),
    include_str!("migrations/0005_audit_tail.sql"),
    include_str!("migrations/0006_providers.sql"),
    include_str!("migrations/0007_ssh_requests.sql"),
    include_str!("migrations/0008_undo.sql"),
    include_str!("migrations/0009_releases.sql"),
    include_str!("migrations/0010_scheduled_snapshots.sql"),
];

/// Jobs that one commit may carry, so that the first does not wait for an endless queue.
const GROUP: usize = 256;

type Job = Box<dyn FnOnce(&Connection) -> Box<dyn FnOnce(Option<Error>) + Send> + Send>;

/// What the writing thread is asked for.
enum Write {
    /// Part of the next commit.
    Commit(Job),
    /// Empty the log once everything before is committed; answers whether that was possible soon.
    TruncateLog(oneshot::Sender<bool>),
}

/// A handle on the database; clones share it. Dropping the last one ends its threads.
#[derive(Clone, Debug)]
pub struct Store {
    writes: mpsc::Sender<Write>,
    reads: mpsc::Sender<Job>,
    pub(crate) chain: Chain,
    pub(crate) alarm: Alarm,
}

/// Opens, checks and migrates.
pub(crate) fn open(path: &Path) -> Result<Store> {
    check_version()?;
    create_private(path)?;
    let mut writer = connect(path)?;
    check_integrity(&writer)?;
    keep_before_migrations(&writer, path)?;
    migrate(&mut writer)?;
    for suffix in ["-wal", "-shm"] {
        tighten(&with_suffix(path, suffix))?;
    }
    let reader = connect(path)?;
    run(writer, reader, Log::new(true))
}

/// Opens and checks; changes nothing.
pub(crate) fn open_read_only(path: &Path) -> Result<Store> {
    check_version()?;
    let writer = connect_read_only(path)?;
    check_integrity(&writer)?;
    if schema(&writer)? < MIGRATIONS.len() {
        let text = "the database is of an older version; start the hypervisor once, which brings it up to date";
        return Err(Error::Open(text.into()));
    }
    let reader = connect_read_only(path)?;
    run(writer, reader, Log::new(false))
}

fn run(writer: Connection, reader: Connection, log: Log) -> Result<Store> {
    let (writes, write_jobs) = mpsc::channel();
    let (reads, read_jobs) = mpsc::channel();
    let chain = Chain::default();
    let writers_chain = chain.clone();
    spawn("store-write", move || {
        write_loop(&writer, &writers_chain, log, &write_jobs)
    })?;
    spawn("store-read", move || read_loop(&reader, &read_jobs))?;
    Ok(Store {
        writes,
        reads,
        chain,
        alarm: Alarm::default(),
    })
}

impl Store {
    /// Runs `job` in the next group commit; its answer comes when the commit is on the disk. When `job` fails,
    /// what it wrote is undone and the others of the group are not touched.
    pub(crate) async fn write<T, F>(&self, job: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T> + Send + 'static,
    {
        let (answer, wait) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            let result = in_savepoint(connection, job);
            Box::new(move |commit_error| {
                // A caller that went away does not undo what it asked for.
                let _ = answer.send(match (result, commit_error) {
                    (Ok(_), Some(error)) => Err(error),
                    (result, _) => result,
                });
            })
        });
        self.writes.send(Write::Commit(job)).map_err(|_| Error::Closed)?;
        wait.await.map_err(|_| Error::Closed)?
    }

    /// Runs `job` on the reading connection, which sees every commit that was answered.
    pub(crate) async fn read<T, F>(&self, job: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T> + Send + 'static,
    {
        let (answer, wait) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            let _ = answer.send(job(connection));
            Box::new(|_| {})
        });
        self.reads.send(job).map_err(|_| Error::Closed)?;
        wait.await.map_err(|_| Error::Closed)?
    }

    /// Takes what was replaced or deleted out of the write-ahead log: its pages go to the database, where
    /// `secure_delete` has overwritten them, and the log is emptied. A reader in another process may hold the log for
    /// longer than is waited; it is emptied once that is gone, or at the next start.
    pub(crate) async fn truncate_log(&self) {
        let (answer, wait) = oneshot::channel();
        let _ = self.writes.send(Write::TruncateLog(answer));
        // Without an answer the store is being closed, which empties the log.
        if wait.await == Ok(false) {
            tracing::warn!("the database's log is in use: old ciphertext stays in it until its reader is gone");
        }
    }

    /// Whether a write commits now; for readiness.
    pub async fn check(&self) -> Result<()> {
        self.write(|c| Ok(c.execute_batch("CREATE TEMP TABLE IF NOT EXISTS ready (x); DELETE FROM ready")?))
            .await
    }
}

fn in_savepoint<T>(connection: &Connection, job: impl FnOnce(&Connection) -> Result<T>) -> Result<T> {
    connection.execute_batch("SAVEPOINT job")?;
    let result = job(connection);
    let end = if result.is_ok() {
        "RELEASE job"
    } else {
        "ROLLBACK TO job; RELEASE job"
    };
    // After a full disk SQLite may have rolled the whole transaction back, and the savepoint with it.
    let ended = connection.execute_batch(end);
    let value = result?;
    ended?;
    Ok(value)
}

fn write_loop(connection: &Connection, chain: &Chain, mut log: Log, writes: &mpsc::Receiver<Write>) {
    log.attempt(connection);
    loop {
        let next = match log.pause() {
            None => writes.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected),
            Some(pause) => writes.recv_timeout(pause),
        };
        let mut next = match next {
            Ok(write) => Some(write),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                log.attempt(connection);
                continue;
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => return,
        };
        if let Some(Write::Commit(first)) = next {
            next = commit_group(connection, chain, first, writes);
            log.after_commit(connection);
        }
        if let Some(Write::TruncateLog(answer)) = next {
            log.empty(connection, answer);
        }
    }
}

/// Commits `first` and what waits behind it; returns the first that is no part of a commit.
fn commit_group(connection: &Connection, chain: &Chain, first: Job, writes: &mpsc::Receiver<Write>) -> Option<Write> {
    let begun = connection.execute_batch("BEGIN IMMEDIATE");
    if begun.is_err() {
        // Without a transaction each job would commit by itself, though its caller is told that it failed.
        only_reads(connection, true);
    }
    let mut answers = vec![first(connection)];
    let mut other = None;
    while answers.len() < GROUP && other.is_none() {
        match writes.try_recv() {
            Ok(Write::Commit(job)) => answers.push(job(connection)),
            Ok(truncate) => other = Some(truncate),
            Err(_) => break,
        }
    }
    if begun.is_err() {
        only_reads(connection, false);
    }
    let committed = begun
        .and_then(|()| chain.extend(connection))
        .and_then(|()| connection.execute_batch("COMMIT"));
    if let Err(error) = &committed {
        tracing::error!(%error, "a commit failed");
        // Fails when SQLite rolled back by itself; either way no transaction is left open.
        let _ = connection.execute_batch("ROLLBACK");
    }
    for answer in answers {
        let error = committed.as_ref().err().map(copy_of);
        answer(error);
    }
    other
}

fn only_reads(connection: &Connection, on: bool) {
    connection
        .pragma_update(None, "query_only", on)
        .expect("a switch of the connection's own needs neither lock nor disk");
}

fn read_loop(connection: &Connection, jobs: &mpsc::Receiver<Job>) {
    while let Ok(job) = jobs.recv() {
        job(connection)(None);
    }
}

/// One failed commit is everybody's error in the group.
fn copy_of(error: &rusqlite::Error) -> Error {
    match error {
        rusqlite::Error::SqliteFailure(code, text) => rusqlite::Error::SqliteFailure(*code, text.clone()).into(),
        other => Error::Corrupt(other.to_string()),
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
        .map(drop)
        .map_err(|e| Error::Open(format!("the database thread could not be started: {e}")))
}

fn connect(path: &Path) -> Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.execute_batch(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;
         PRAGMA secure_delete = ON; PRAGMA trusted_schema = OFF; PRAGMA busy_timeout = 5000;
         PRAGMA cache_size = -2048; PRAGMA journal_size_limit = 67108864;",
    )?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

fn connect_read_only(path: &Path) -> Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)
        .map_err(|e| Error::Open(format!("the database {} cannot be read: {e}", path.display())))?;
    connection.execute_batch("PRAGMA trusted_schema = OFF; PRAGMA busy_timeout = 5000;")?;
    Ok(connection)
}

fn check_integrity(connection: &Connection) -> Result<()> {
    let verdict: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    if verdict == "ok" {
        return Ok(());
    }
    Err(Error::Open(format!(
        "the database is damaged ({verdict}); restore the last backup, nothing was changed"
    )))
}

/// How many migrations the database has had.
pub(crate) fn schema(connection: &Connection) -> Result<usize> {
    let version: usize = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if version > MIGRATIONS.len() {
        return Err(Error::Open(format!(
            "the database has schema {version}, this binary knows up to {}; start the newer binary or restore the \
             backup made before the upgrade",
            MIGRATIONS.len()
        )));
    }
    Ok(version)
}

/// What to go back to with the binary of before: ahead of the first migration a copy of the database is made beside it,
/// named after its schema. An older copy of the same schema is replaced.
fn keep_before_migrations(connection: &Connection, path: &Path) -> Result<()> {
    let version = schema(connection)?;
    if version == 0 || version == MIGRATIONS.len() {
        return Ok(());
    }
    let kept = with_suffix(path, &format!(".schema-{version}"));
    let part = with_suffix(&kept, ".part");
    for left in [&part, &with_suffix(&part, "-journal")] {
        // By a start that was killed over it; mostly there is none.
        let _ = std::fs::remove_file(left);
    }
    copy(connection, &part)?;
    put_in_place(&part, &kept).map_err(|e| {
        let kept = kept.display();
        Error::Open(format!("{kept} cannot be written: {e}; it is made before an upgrade"))
    })?;
    let (to, kept) = (MIGRATIONS.len(), kept.display());
    tracing::info!(from = version, to, %kept, "the database is brought up to date; a copy of before is kept");
    Ok(())
}

/// Both on the disk: what the file holds, and its name.
fn put_in_place(part: &Path, whole: &Path) -> std::io::Result<()> {
    File::open(part)?.sync_all()?;
    std::fs::rename(part, whole)?;
    let directory = whole.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
}

pub(crate) fn migrate(connection: &mut Connection) -> Result<()> {
    loop {
        // Of two programs that come at once, the second finds it done.
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let version = schema(&transaction)?;
        let Some(sql) = MIGRATIONS.get(version) else {
            return Ok(());
        };
        transaction.execute_batch(sql)?;
        transaction.pragma_update(None, "user_version", version + 1)?;
        transaction.commit()?;
    }
}

/// The WAL corruption bug is fixed in 3.51.3; 3.52.0 was withdrawn.
fn check_version() -> Result<()> {
    match rusqlite::version_number() {
        3_052_000 => Err(Error::Open(
            "SQLite 3.52.0 was withdrawn; build with another version".into(),
        )),
        n if n < 3_051_003 => Err(Error::Open(format!(
            "SQLite {} is too old; 3.51.3 is the first safe one",
            rusqlite::version()
        ))),
        _ => Ok(()),
    }
}

pub(crate) fn create_private(path: &Path) -> Result<()> {
    let fail = |e: std::io::Error| Error::Open(format!("the database {} cannot be opened: {e}", path.display()));
    std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
        .map_err(fail)?;
    let mode = std::fs::metadata(path).map_err(fail)?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(Error::Open(format!(
            "the database {} is readable by others (mode {mode:o}); run `chmod 600` on it",
            path.display()
        )));
    }
    Ok(())
}

fn tighten(path: &Path) -> Result<()> {
    match std::fs::set_permissions(path, PermissionsExt::from_mode(0o600)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::Open(format!("{}: {e}", path.display()))),
        _ => Ok(()),
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_that_cannot_begin_changes_nothing_though_the_lock_is_free_again_when_its_jobs_run() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("choir.db");
        create_private(&path).unwrap();
        let (mut connection, other) = (connect(&path).unwrap(), connect(&path).unwrap());
        migrate(&mut connection).unwrap();
        connection
            .execute_batch("CREATE TABLE t (x); PRAGMA busy_timeout = 0")
            .unwrap();
        let rows = |c: &Connection| {
            c.query_row("SELECT count(*) FROM t", [], |row| row.get::<_, i64>(0))
                .unwrap()
        };
        let (_, writes) = mpsc::channel();
        let commit = |before: Box<dyn FnOnce() + Send>| {
            let (told, heard) = mpsc::channel();
            let job: Job = Box::new(move |c| {
                before();
                let done = c.execute_batch("INSERT INTO t VALUES (1)");
                Box::new(move |failed| told.send(failed.is_none() && done.is_ok()).unwrap())
            });
            commit_group(&connection, &Chain::default(), job, &writes);
            heard.recv().unwrap()
        };

        other.execute_batch("BEGIN IMMEDIATE").unwrap();
        assert!(!commit(Box::new(move || other.execute_batch("ROLLBACK").unwrap())));
        assert_eq!(rows(&connection), 0);
        assert!(commit(Box::new(|| {})), "the next group commits");
        assert_eq!(rows(&connection), 1);
    }
}
