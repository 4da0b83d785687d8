//! Emptying the write-ahead log, so that what was deleted or replaced is not left in it. Readers in other processes may
//! hold it for long: it is tried until it works, and commits go on meanwhile. It must not know what is in it.

use std::time::Duration;

use rusqlite::Connection;
use tokio::sync::oneshot;

/// How long a writer waits for the lock of another process.
pub(crate) const BUSY: Duration = Duration::from_secs(5);

/// Between two tries without a commit.
const PAUSE: Duration = Duration::from_millis(50);
/// Between two tries while there are commits.
const COMMITS: u32 = 16;
/// After so many, who waits is told that it takes longer: five seconds without commits.
const PATIENT: u32 = 100;

/// The log, and who waits for it to be emptied.
pub(crate) struct Log {
    /// Whether there is something in it that has to go.
    full: bool,
    commits: u32,
    tries: u32,
    waiting: Vec<oneshot::Sender<bool>>,
}

impl Log {
    /// Full at a start: the process before may have been killed over it.
    pub(crate) fn new(full: bool) -> Self {
        Self {
            full,
            commits: 0,
            tries: 0,
            waiting: Vec::new(),
        }
    }

    /// How long to wait for work before the next try; for ever when there is nothing to do.
    pub(crate) fn pause(&self) -> Option<Duration> {
        self.full.then_some(PAUSE)
    }

    /// Empties it once; tells whether that was done soon.
    pub(crate) fn empty(&mut self, connection: &Connection, answer: oneshot::Sender<bool>) {
        (self.full, self.tries) = (true, 0);
        self.waiting.push(answer);
        self.attempt(connection);
    }

    pub(crate) fn after_commit(&mut self, connection: &Connection) {
        self.commits += 1;
        if self.commits >= COMMITS {
            self.attempt(connection);
        }
    }

    pub(crate) fn attempt(&mut self, connection: &Connection) {
        self.commits = 0;
        if !self.full {
            return;
        }
        self.full = match truncate(connection) {
            Ok(emptied) => !emptied,
            Err(error) => {
                if self.tries == 0 {
                    tracing::error!(%error, "the database's log cannot be emptied yet");
                }
                true
            }
        };
        self.tries = self.tries.saturating_add(1);
        if !self.full || self.tries >= PATIENT {
            for answer in self.waiting.drain(..) {
                let _ = answer.send(!self.full);
            }
        }
    }
}

/// Whether the log is empty now; no reader is waited for.
fn truncate(connection: &Connection) -> rusqlite::Result<bool> {
    connection.busy_timeout(Duration::ZERO)?;
    let busy = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, bool>(0));
    connection.busy_timeout(BUSY)?;
    Ok(!busy?)
}
