//! The log file of a development sandbox: its last lines, what comes, and its size. It must not know whose it is.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::mpsc;

use crate::LogLine;

/// A log that has grown beyond this starts again from nothing.
const MAX: u64 = 10 << 20;
/// Read at once, and the longest line.
const CHUNK: u64 = 1 << 20;
/// How often a followed log is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// Cuts a log that has grown too long. Whoever writes it must append.
pub(crate) fn bound(path: &Path) {
    if fs::metadata(path).is_ok_and(|m| m.len() > MAX)
        && let Err(error) = File::options().write(true).open(path).and_then(|f| f.set_len(0))
    {
        tracing::warn!(%error, "a log could not be cut");
    }
}

/// The last `tail` lines, then, if `follow`, what comes.
pub(crate) fn lines(path: PathBuf, tail: usize, follow: bool) -> io::Result<mpsc::Receiver<LogLine>> {
    let (sender, receiver) = mpsc::channel(256);
    let length = fs::metadata(&path).map_or(0, |m| m.len());
    let start = length.saturating_sub(CHUNK);
    let (mut position, text) = read(&path, start)?;
    let mut all: Vec<&str> = text.lines().collect();
    let skip = all.len().saturating_sub(tail);
    let mut due: Vec<LogLine> = all.drain(skip..).map(line).collect();
    tokio::spawn(async move {
        loop {
            for line in due.drain(..) {
                if sender.send(line).await.is_err() {
                    return;
                }
            }
            if !follow {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = sender.closed() => return,
            }
            // A shorter log was cut: it is read from its new beginning.
            if fs::metadata(&path).map_or(0, |m| m.len()) < position {
                position = 0;
            }
            let Ok((end, text)) = read(&path, position) else { return };
            position = end;
            due = text.lines().map(line).collect();
        }
    });
    Ok(receiver)
}

/// Whole lines from `start`, and where they end. A file that is not there yet is empty.
fn read(path: &Path, start: u64) -> io::Result<(u64, String)> {
    let mut file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok((0, String::new())),
        file => file?,
    };
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(CHUNK).read_to_end(&mut bytes)?;
    if let Some(end) = bytes.iter().rposition(|b| *b == b'\n') {
        bytes.truncate(end + 1);
    } else if (bytes.len() as u64) < CHUNK {
        bytes.clear();
    }
    Ok((start + bytes.len() as u64, String::from_utf8_lossy(&bytes).into_owned()))
}

fn line(text: &str) -> LogLine {
    LogLine {
        stream: "stdout".to_owned(),
        line: text.to_owned(),
    }
}
