//! What there is of the box itself: database, backups, audit trail, metrics, log, processes, and disks that nobody uses. It
//! must not know what is looked for.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use choir_api::prove::Owner;
use choir_core::UserId;
use choir_runtime::sweep::{Frame, Show};
use choir_store::AuditFilter;
use tokio::sync::mpsc;

use super::tally::{Ended, Feed, PlaceId};
use crate::app::App;
use crate::backup;

/// Bytes that are read at once.
const PIECE: usize = 64 << 10;
/// Audit rows that are read at once.
const ROWS: u32 = 500;
/// Pieces that may wait between the disk and the search.
const WAITING: usize = 8;

/// Searches everything of the box but its sandboxes and disks.
pub async fn of_the_box(app: &App, feed: &mut Feed) -> Result<(), Ended> {
    let owner = Owner::Box;
    for (what, suffix) in [("database", ""), ("write-ahead log", "-wal"), ("shared memory", "-shm")] {
        let mut path = app.config.store.path.clone().into_os_string();
        path.push(suffix);
        let place = feed.open(&owner, what).await?;
        file(feed, place, &PathBuf::from(path)).await?;
    }
    backups(app, feed).await?;
    audit(app, None, feed, &owner).await?;
    let place = feed.open(&owner, "metrics").await?;
    feed.item(place, "/metrics").await?;
    feed.bytes(app.metrics_text().into_bytes()).await?;
    feed.complete(place).await?;
    log(feed).await?;
    let place = feed.open(&owner, "own process").await?;
    for name in ["environ", "cmdline"] {
        part(feed, place, &PathBuf::from(format!("/proc/self/{name}"))).await?;
    }
    feed.complete(place).await?;
    command_lines(feed).await
}

/// The audit trail as it is exported: of everybody, or of one user.
pub async fn audit(app: &App, of: Option<&UserId>, feed: &mut Feed, owner: &Owner) -> Result<(), Ended> {
    let place = feed.open(owner, "audit trail").await?;
    feed.item(place, "audit trail").await?;
    let mut before = None;
    loop {
        let filter = AuditFilter {
            user: of.cloned(),
            before,
            limit: ROWS,
            ..AuditFilter::default()
        };
        let rows = match app.store.audit_rows(filter).await {
            Ok(rows) => rows,
            Err(error) => return feed.incomplete(place, error.to_string()).await,
        };
        let Some(last) = rows.last() else { break };
        before = Some(last.id);
        let mut text = Vec::new();
        for row in &rows {
            serde_json::to_writer(&mut text, row).expect("a row is plain JSON");
            text.push(b'\n');
        }
        feed.bytes(text).await?;
    }
    feed.complete(place).await
}

/// The backups that were written from this box, where they were written to.
async fn backups(app: &App, feed: &mut Feed) -> Result<(), Ended> {
    let place = feed.open(&Owner::Box, "backups").await?;
    let directories = match backup::directories(&app.config) {
        Ok(directories) => directories,
        Err(error) => {
            let why = format!("where they were written to cannot be read: {error}");
            return feed.incomplete(place, why).await;
        }
    };
    for directory in directories {
        let listed = backup::written(&directory);
        match listed {
            Ok(files) => {
                for path in files {
                    part(feed, place, &path).await?;
                }
            }
            // They were moved away, and are nothing that somebody sees here.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                feed.item(place, directory.display().to_string()).await?;
                feed.unread(error.to_string()).await?;
            }
        }
    }
    feed.complete(place).await
}

/// The hypervisor's log, where that is a file.
async fn log(feed: &mut Feed) -> Result<(), Ended> {
    let place = feed.open(&Owner::Box, "log").await?;
    let output = Path::new("/proc/self/fd/2");
    match fs::metadata(output) {
        Ok(kind) if kind.is_file() => file(feed, place, output).await,
        Ok(kind) if kind.file_type().is_char_device() && !is_terminal() => {
            feed.item(place, "nowhere: it is thrown away").await?;
            feed.complete(place).await
        }
        _ => {
            let why = "it goes to a journal or a terminal, which cannot be read back from here: search that by hand";
            feed.incomplete(place, why).await
        }
    }
}

fn is_terminal() -> bool {
    io::IsTerminal::is_terminal(&io::stderr())
}

/// Every command line of the host, which all of its users can see.
async fn command_lines(feed: &mut Feed) -> Result<(), Ended> {
    let place = feed.open(&Owner::Box, "command lines of the host").await?;
    let Ok(entries) = fs::read_dir("/proc") else {
        return feed.incomplete(place, "/proc cannot be read").await;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().filter(|name| name.bytes().all(|b| b.is_ascii_digit())) else {
            continue;
        };
        // A process that has ended meanwhile is none.
        if let Ok(line) = fs::read(entry.path().join("cmdline")) {
            feed.item(place, format!("process {pid}")).await?;
            feed.bytes(line).await?;
        }
    }
    feed.complete(place).await
}

/// One file that is a place of its own. One that is not there holds nothing.
async fn file(feed: &mut Feed, place: PlaceId, path: &Path) -> Result<(), Ended> {
    part(feed, place, path).await?;
    feed.complete(place).await
}

/// One file of a place.
async fn part(feed: &Feed, place: PlaceId, path: &Path) -> Result<(), Ended> {
    feed.item(place, path.display().to_string()).await?;
    let (pieces, mut read) = mpsc::channel(WAITING);
    let path = path.to_owned();
    tokio::task::spawn_blocking(move || {
        let mut file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => return drop(pieces.blocking_send(Err(error))),
        };
        loop {
            let mut piece = vec![0; PIECE];
            let read = match file.read(&mut piece) {
                Ok(0) => return,
                Ok(length) => {
                    piece.truncate(length);
                    Ok(piece)
                }
                Err(error) => Err(error),
            };
            let last = read.is_err();
            if pieces.blocking_send(read).is_err() || last {
                return;
            }
        }
    });
    while let Some(piece) = read.recv().await {
        match piece {
            Ok(piece) => feed.bytes(piece).await?,
            Err(error) => feed.unread(error.to_string()).await?,
        }
    }
    Ok(())
}

/// A disk that no sandbox runs on, read where it is if this process may.
pub async fn disk(app: &App, volume: &str, why_not_inside: &str, owner: &Owner, feed: &mut Feed) -> Result<(), Ended> {
    let place = feed.open(owner, "files").await?;
    let directory = app.config.volumes_dir().join(volume);
    if let Err(error) = fs::read_dir(&directory) {
        let why = format!("{why_not_inside}: its disk cannot be read by the hypervisor ({error})");
        return feed.incomplete(place, why).await;
    }
    let (frames, mut shown) = mpsc::channel(WAITING);
    let top = directory.clone();
    let looking = tokio::task::spawn_blocking(move || {
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        Show::new(&mut |frame| frames.blocking_send(frame).map_err(gone)).tree(&top)
    });
    while let Some(frame) = shown.recv().await {
        match frame {
            Frame::Item { name, .. } => {
                let inner = name.strip_prefix(&*directory.to_string_lossy()).unwrap_or(&name);
                feed.item(place, if inner.is_empty() { "/" } else { inner }).await?;
            }
            Frame::Bytes(bytes) => feed.bytes(bytes).await?,
            Frame::Hole(zeroes) => feed.hole(zeroes).await?,
            Frame::Unread(why) => feed.unread(why).await?,
            Frame::Done => {}
        }
    }
    match looking.await {
        Ok(Ok(())) => feed.complete(place).await,
        Ok(Err(error)) => feed.incomplete(place, format!("{why_not_inside}: {error}")).await,
        Err(_) => feed.incomplete(place, why_not_inside).await,
    }
}
