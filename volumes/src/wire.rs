//! What is said over the socket: one JSON object per line each way, answered in order, any number
//! per connection, at most [`MAX_REQUEST`] bytes a line. Knows nothing of file systems.
//!
//! ```text
//! {"verb":"hello"}                                   -> {"backend":"btrfs"|"plain","version":V}
//! {"verb":"create","volume":ID}                      -> {}
//! {"verb":"create","volume":ID,
//!  "from":"tar"|"image","most":N?}                   -> {"bytes":N,"sha256":HEX}
//! {"verb":"snapshot","source":ID,"volume":ID,
//!  "readonly":BOOL?,"only":"root"?,"replace":"root"?} -> {}
//! {"verb":"delete","volume":ID}                      -> {}
//! {"verb":"limit","volume":ID,"bytes":N|null}        -> {"enforced":BOOL}
//! {"verb":"usage","volume":ID}                       -> {"bytes":N,"exclusive":N,"limit":N|null,"enforced":BOOL}
//! {"verb":"usage"}                                   -> {"total":N,"free":N,"volumes":[ID...]}
//! {"verb":"shift","volume":ID,"base":B,"size":S?}    -> {"files":N}
//! anything that failed                               -> {"error":{"code":C,"message":"One sentence."}}
//! ```
//!
//! - `create` makes `DIR/ID/root` and `DIR/ID/home`, the two stable paths a container runtime may use.
//!   With `from`, a descriptor comes by SCM_RIGHTS in the same `sendmsg` as the request line, and what
//!   it holds goes into `root`, of `most` bytes at most (64 GiB if not given). A tar, of a regular file
//!   or pipe, is read from its current offset to its end, and the SHA-256 is that of all of it. An image
//!   is an archive in a regular file; the SHA-256 is the image's own.
//! - `snapshot` copies both trees. With `only`, `home` is empty and owned by user 1000. With
//!   `replace`, an existing volume's `root` is exchanged for a copy of the source's in one step and
//!   its `home` stays; the old root is deleted. Neither combines with `readonly`. A new volume has
//!   no limit, whatever its source had.
//! - `delete` of what is absent succeeds.
//! - `usage` counts bytes as of the file system's last commit, at most 30 s ago on btrfs.
//! - `shift` is idempotent and may be repeated after a crash; `size` is 65536 if not given.
//! - Codes: `not_found`, `exists`, `invalid`, `busy` (another request is changing that volume: try
//!   again), `no_space`, `refused`, `internal`.

use serde::{Deserialize, Serialize};

/// Longest request line, bytes.
pub const MAX_REQUEST: usize = 64 * 1024;

/// A volume's name: `^[a-z0-9][a-z0-9-]{0,63}$`, so it is always one ordinary path component.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String")]
pub struct VolumeId(String);

impl VolumeId {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for VolumeId {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let bytes = text.as_bytes();
        let good = matches!(bytes.len(), 1..=64) && plain(bytes[0]) && bytes.iter().all(|&b| plain(b) || b == b'-');
        if !good {
            return Err("a volume id is 1 to 64 of a-z, 0-9 and '-', and does not begin with '-'");
        }
        Ok(Self(text))
    }
}

/// The part of a volume that `only` and `replace` can name.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// The operating system tree.
    Root,
}

/// What a descriptor holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// A file system as a tar.
    Tar,
    /// An image's layers with their manifest.
    Image,
}

impl Source {
    pub const ALL: [Self; 2] = [Self::Tar, Self::Image];

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tar => "tar",
            Self::Image => "image",
        }
    }
}

/// One request line.
#[derive(Debug, Deserialize)]
#[serde(tag = "verb", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Who answers; used by `doctor`.
    Hello {},
    /// A new volume.
    Create {
        volume: VolumeId,
        from: Option<Source>,
        #[serde(default = "most_bytes")]
        most: u64,
    },
    /// A copy of a volume, or of its root.
    Snapshot {
        source: VolumeId,
        volume: VolumeId,
        #[serde(default)]
        readonly: bool,
        only: Option<Part>,
        replace: Option<Part>,
    },
    /// The end of a volume.
    Delete { volume: VolumeId },
    /// The most bytes a volume may refer to; null for no limit.
    Limit { volume: VolumeId, bytes: Option<u64> },
    /// Bytes of one volume, or of the pool with all its volumes' ids.
    Usage { volume: Option<VolumeId> },
    /// Moves all owner ids to `base..base+size`.
    Shift {
        volume: VolumeId,
        base: u32,
        #[serde(default = "id_range")]
        size: u32,
    },
}

fn most_bytes() -> u64 {
    64 << 30
}

fn id_range() -> u32 {
    65_536
}

/// One answer line.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum Response {
    Hello {
        backend: &'static str,
        version: &'static str,
    },
    Done {},
    Unpacked {
        bytes: u64,
        sha256: String,
    },
    Limited {
        enforced: bool,
    },
    Usage {
        bytes: u64,
        exclusive: u64,
        limit: Option<u64>,
        enforced: bool,
    },
    Pool {
        total: u64,
        free: u64,
        volumes: Vec<String>,
    },
    Shifted {
        files: u64,
    },
    Error {
        error: Failure,
    },
}

/// Why a request failed.
#[derive(Debug, Serialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub code: Code,
    /// One sentence.
    pub message: String,
}

/// The kinds of failure a caller can act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    NotFound,
    Exists,
    Invalid,
    Busy,
    NoSpace,
    Refused,
    Internal,
}

impl Failure {
    /// A failure with its sentence.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// A failed system call; `doing` completes "Could not ...".
    pub fn io(doing: &str, error: impl Into<std::io::Error>) -> Self {
        use std::io::ErrorKind::{QuotaExceeded, StorageFull};
        let error = error.into();
        let code = match error.kind() {
            StorageFull | QuotaExceeded => Code::NoSpace,
            _ => Code::Internal,
        };
        Self::new(code, format!("Could not {doing}: {error}."))
    }
}
