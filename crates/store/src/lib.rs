//! SQLite: the only crate with SQL, one method per use case, one writer.
//! It must not know HTTP, containers or clocks: times, ids and hashes come in as arguments.

use std::path::Path;

mod audit;
mod auth;
mod backup;
mod check;
mod connection;
mod deployments;
mod grants;
mod log;
mod releases;
mod row;
mod sandboxes;
mod secrets;
mod snapshots;
mod usage;
mod workspaces;

pub use audit::{AuditEvent, AuditFilter, AuditHead, AuditId, AuditRow, AuditVerdict, BadRow, Fault, NotAHead, Pruned};
pub use auth::*;
pub use backup::admit_copy;
pub use check::Claims;
pub use connection::Store;
pub use deployments::{Begun, Deployment, Ended, NewDeployment, StepTime};
pub use grants::{Grant, GrantRequest, NewGrant, NewRequest, Standing, Wanted};
pub use releases::{NewRelease, Release, ReleaseCopy, ReleaseState, ReleaseUse};
pub use sandboxes::{Sandbox, SandboxChange};
pub use secrets::{DataKey, KeyIdBytes, NewSecret, SealedKey, SealedSecret, Secret, SecretPlace};
pub use snapshots::{Snapshot, SnapshotState, TakenFor};
pub use usage::{Caps, Counted, KeyOwner, Spent, Tokens, UsePlace, UseRow};
pub use workspaces::{NewWorkspace, Workspace, WorkspaceView};

/// Why the store could not do it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("there is no such row")]
    NotFound,
    /// Something with this name or key is there already.
    #[error("it exists already")]
    Exists,
    /// A rule of the use case forbids it; the text says which.
    #[error("{0}")]
    Conflict(&'static str),
    /// The disk is full or not writable: nothing was changed.
    #[error("the disk of the database is full or not writable")]
    Full(#[source] rusqlite::Error),
    #[error("the database failed")]
    Sqlite(#[source] rusqlite::Error),
    /// A row holds what this version cannot read.
    #[error("a stored value cannot be read: {0}")]
    Corrupt(String),
    #[error("{0}")]
    Open(String),
    /// The database thread has ended.
    #[error("the database is closed")]
    Closed,
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Self {
        use rusqlite::ErrorCode as C;
        match error.sqlite_error_code() {
            _ if matches!(error, rusqlite::Error::QueryReturnedNoRows) => Self::NotFound,
            Some(C::ConstraintViolation) if is_unique(&error) => Self::Exists,
            Some(C::DiskFull | C::ReadOnly | C::SystemIoFailure | C::CannotOpen) => Self::Full(error),
            _ => Self::Sqlite(error),
        }
    }
}

fn is_unique(error: &rusqlite::Error) -> bool {
    use rusqlite::ffi::{SQLITE_CONSTRAINT_PRIMARYKEY, SQLITE_CONSTRAINT_UNIQUE};
    matches!(error, rusqlite::Error::SqliteFailure(e, _)
        if [SQLITE_CONSTRAINT_PRIMARYKEY, SQLITE_CONSTRAINT_UNIQUE].contains(&e.extended_code))
}

/// The version of SQLite that is linked in.
pub fn sqlite_version() -> &'static str {
    rusqlite::version()
}

impl Store {
    /// Opens, checks and migrates the database at `path`, made if absent (mode 0600).
    pub fn open(path: &Path) -> Result<Self> {
        connection::open(path)
    }

    /// Opens the database at `path` to look at it only, beside a running hypervisor or as a copy: nothing is made,
    /// migrated or written, and every write fails.
    pub fn open_read_only(path: &Path) -> Result<Self> {
        connection::open_read_only(path)
    }
}
