//! Backups of the database: consistent, checked, and readable only with an identity that is not on this box. The key file
//! is not in them, so that a stolen backup opens no secret. It must not know what the tables hold.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use age::{Decryptor, Encryptor, Identity, IdentityFile, Recipient};
use anyhow::{Context as _, bail, ensure};
use choir_store::{AuditEvent, Store, admit_copy};
use data_encoding::HEXLOWER;
use jiff::Timestamp;
use jiff::civil::DateTime;

use crate::config::Config;
use crate::keys;
use crate::random::{OsRandom, Random, draw};

/// Removes a file that is not wanted any more, whatever happens.
struct Doomed(PathBuf);

impl Drop for Doomed {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A file that a backup is at work on, under a name of its own; locked for as long, so that another backup can tell it
/// from one that was left behind by a backup that was killed.
struct Part {
    file: Doomed,
    _lock: File,
}

impl Part {
    const END: &str = ".part";

    /// A new one in this directory, after those left behind were removed.
    fn new(directory: &Path, begin: &str) -> io::Result<Self> {
        Self::remove_left_behind(directory, begin)?;
        loop {
            let name = HEXLOWER.encode(&draw::<8>(&OsRandom));
            let path = directory.join(format!("{begin}{name}{}", Self::END));
            let lock = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)?;
            let file = Doomed(path);
            lock.lock()?;
            // Another backup may have taken it for one left behind before it was locked.
            if file.0.exists() {
                return Ok(Self { file, _lock: lock });
            }
        }
    }

    fn path(&self) -> &Path {
        &self.file.0
    }

    fn remove_left_behind(directory: &Path, begin: &str) -> io::Result<()> {
        for entry in fs::read_dir(directory)? {
            let (path, name) = entry.map(|entry| (entry.path(), entry.file_name()))?;
            let name = name.to_string_lossy();
            if !(name.starts_with(begin) && name.ends_with(Self::END)) {
                continue;
            }
            // Removed under the lock: who made it and waits for that finds it gone.
            if let Ok(file) = File::open(&path)
                && file.try_lock().is_ok()
            {
                let _ = fs::remove_file(&path);
                // SQLite's own, where the copying was killed.
                let mut journal = path.into_os_string();
                journal.push("-journal");
                let _ = fs::remove_file(journal);
            }
        }
        Ok(())
    }
}

/// Writes a backup into the directory `to`, beside a running hypervisor or without one; returns its file.
pub async fn backup(config: &Config, to: &Path, now: Timestamp) -> anyhow::Result<PathBuf> {
    let recipients = config.backup_recipients()?;
    ensure!(
        !recipients.is_empty(),
        "backups are encrypted: make an identity with `age-keygen`, keep it off this box, and name its public key in \
         [backup] recipients"
    );
    fs::create_dir_all(to).with_context(|| format!("cannot make {}", to.display()))?;
    // In the clear beside the database only, where it is anyway; never where backups go.
    let beside = config.beside_store(".");
    let copy = Part::new(&beside, "backup").with_context(|| format!("cannot write into {}", beside.display()))?;
    Store::open_read_only(&config.store.path)?.copy_to(copy.path()).await?;
    check_trail(config, copy.path()).await?;
    let name = format!("choir-{}.db.age", now.strftime("%Y%m%dT%H%M%SZ"));
    let file = to.join(&name);
    let part = Part::new(to, "choir-").with_context(|| format!("cannot write into {}", to.display()))?;
    encrypt(copy.path(), part.path(), &recipients).with_context(|| format!("cannot write {}", file.display()))?;
    fs::rename(part.path(), &file).with_context(|| format!("cannot put {} in place", file.display()))?;
    sync_directory(to)?;
    note_directory(config, to)?;
    if config.backup.keep > 0 {
        remove_old(to, config.backup.keep).with_context(|| format!("older backups in {} stay", to.display()))?;
    }
    Ok(file)
}

/// Leaves the newest `keep`. Their names tell when they were written.
fn remove_old(directory: &Path, keep: usize) -> io::Result<()> {
    let mut whole = written(directory)?;
    // Somebody's own are not told by their names.
    whole.retain(|path| {
        let name = path.file_name().map(|name| name.to_string_lossy());
        name.is_some_and(|name| DateTime::strptime("choir-%Y%m%dT%H%M%SZ.db.age", &*name).is_ok())
    });
    whole.sort();
    for old in whole.iter().rev().skip(keep) {
        fs::remove_file(old)?;
    }
    Ok(())
}

/// Where backups were written to, one directory a line, so that a search for secrets finds them.
const DIRECTORIES: &str = "backup-directories";

fn note_directory(config: &Config, to: &Path) -> anyhow::Result<()> {
    let to = to
        .canonicalize()
        .with_context(|| format!("cannot find {}", to.display()))?;
    let noted = config.beside_store(DIRECTORIES);
    let cause = || format!("cannot write {}", noted.display());
    if directories(config).with_context(cause)?.contains(&to) {
        return Ok(());
    }
    let mut notes = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&noted)
        .with_context(cause)?;
    writeln!(notes, "{}", to.display()).with_context(cause)
}

/// The directories that backups of this box were written to.
pub fn directories(config: &Config) -> io::Result<Vec<PathBuf>> {
    match fs::read_to_string(config.beside_store(DIRECTORIES)) {
        Ok(lines) => Ok(lines.lines().map(PathBuf::from).collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// The backups in a directory, and what is left of one that was not finished.
pub fn written(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name();
        if name.to_string_lossy().starts_with("choir-") && name.to_string_lossy().contains(".db.age") {
            found.push(directory.join(name));
        }
    }
    Ok(found)
}

/// The copy's audit rows are those that were written; without the master key nothing is known about them.
async fn check_trail(config: &Config, copy: &Path) -> anyhow::Result<()> {
    let store = Store::open_read_only(copy)?;
    let random: Arc<dyn Random> = Arc::new(OsRandom);
    if keys::load(&config.key_file(), &store, &random).await?.vault.is_sealed() {
        return Ok(());
    }
    match store.verify_audit(None).await?.bad {
        Some(bad) => bail!("{bad}; nothing was backed up. Look into it with `choir-hypervisor audit verify`"),
        None => Ok(()),
    }
}

/// Puts a backup into the directory `into`, which must hold no database. All sessions and tokens of before have ended
/// then; passkeys, recovery codes and secrets are as they were.
pub fn restore(from: &Path, into: &Path, identity: &Path, now: Timestamp) -> anyhow::Result<PathBuf> {
    let database = into.join("choir.db");
    fs::create_dir_all(into).with_context(|| format!("cannot make {}", into.display()))?;
    ensure!(
        fs::read_dir(into)?.next().is_none(),
        "{} is not empty; restore into a new directory, so that nothing is overwritten",
        into.display()
    );
    let part = Doomed(into.join("choir.db.part"));
    decrypt(from, &part.0, &identities(identity)?).with_context(|| format!("cannot restore {}", from.display()))?;
    let event = AuditEvent {
        at: now,
        actor: "root".into(),
        user: None,
        action: "backup.restore",
        subject: from.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        outcome: "ok",
    };
    admit_copy(&part.0, &event)?;
    File::open(&part.0)?.sync_all()?;
    fs::rename(&part.0, &database)?;
    sync_directory(into)?;
    Ok(database)
}

fn identities(path: &Path) -> anyhow::Result<Vec<Box<dyn Identity + Send + Sync>>> {
    let cause = || {
        format!(
            "{} must hold an age identity, as `age-keygen` writes it",
            path.display()
        )
    };
    let file = File::open(path).with_context(cause)?;
    let identities = IdentityFile::from_buffer(BufReader::new(file)).with_context(cause)?;
    identities.into_identities().with_context(cause)
}

fn encrypt(from: &Path, to: &Path, recipients: &[age::x25519::Recipient]) -> anyhow::Result<()> {
    let encryptor = Encryptor::with_recipients(recipients.iter().map(|one| one as &dyn Recipient))?;
    let mut sealed = encryptor.wrap_output(BufWriter::new(OpenOptions::new().write(true).open(to)?))?;
    io::copy(&mut File::open(from)?, &mut sealed)?;
    Ok(finish(sealed.finish()?)?)
}

fn decrypt(from: &Path, to: &Path, identities: &[Box<dyn Identity + Send + Sync>]) -> anyhow::Result<()> {
    let sealed = Decryptor::new_buffered(BufReader::new(File::open(from)?))?;
    let mut clear = sealed.decrypt(identities.iter().map(|one| &**one as &dyn Identity))?;
    let mut file = BufWriter::new(new_private(to)?);
    io::copy(&mut clear, &mut file)?;
    Ok(finish(file)?)
}

fn new_private(path: &Path) -> io::Result<File> {
    let _ = fs::remove_file(path);
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

fn finish(mut file: BufWriter<File>) -> io::Result<()> {
    file.flush()?;
    file.get_ref().sync_all()
}

fn sync_directory(path: &Path) -> anyhow::Result<()> {
    let synced = File::open(path).and_then(|directory| directory.sync_all());
    synced.with_context(|| format!("cannot write {}", path.display()))
}
