//! What is said over the socket: one JSON object per line each way, answered in order, any number
//! per connection, at most [`MAX_REQUEST`] bytes a line. Knows nothing of file systems.
//!
//! ```text
//! {"verb":"hello"}                                   -> {"backend":"btrfs"|"plain","version":V}
//! {"verb":"create","volume":ID}                      -> {}
//! {"verb":"create","volume":ID,
//!  "from":"tar"|"image","most":N?}                   -> {"bytes":N,"sha256":HEX}
//! {"verb":"create","volume":ID,"from":"volume",
//!  "most":N?,"base":B,"size":S?}                     -> {"bytes":N,"sha256":HEX}
//! {"verb":"pack","volume":ID}                        -> {"bytes":N}
//! {"verb":"seal","volume":ID}                        -> {}
//! {"verb":"snapshot","source":ID,"volume":ID,
//!  "readonly":BOOL?,"only":"root"?,"replace":"root"?} -> {}
//! {"verb":"delete","volume":ID}                      -> {}
//! {"verb":"limit","volume":ID,"bytes":N|null}        -> {"enforced":BOOL}
//! {"verb":"usage","volume":ID}                       -> {"bytes":N,"exclusive":N,"limit":N|null,"enforced":BOOL}
//! {"verb":"usage"}                                   -> {"total":N,"free":N,"volumes":[ID...]}
//! {"verb":"shift","volume":ID,"base":B,"size":S?}    -> {"files":N}
//! {"verb":"diff","from":ID,"to":ID,"most":N?}        -> {"added":N,"removed":N,"changed":N,"added_bytes":N,
//!                                                        "removed_bytes":N,"truncated":BOOL,"entries":[
//!                                                        {"path":P,"change":"added"|"removed"|"changed",
//!                                                         "before":N|null,"after":N|null}...]}
//! anything that failed                               -> {"error":{"code":C,"message":"One sentence."}}
//! ```
//!
//! - `create` makes `DIR/ID/root` and `DIR/ID/home`, the two stable paths a container runtime may use.
//!   With `from`, a descriptor comes by SCM_RIGHTS in the same `sendmsg` as the request line, and what
//!   it holds goes into `root`, of `most` bytes at most (64 GiB if not given). A tar, of a regular file
//!   or pipe, is read from its current offset to its end, and the SHA-256 is that of all of it. An image
//!   is an archive in a regular file; the SHA-256 is the image's own. From a volume that `pack` wrote
//!   comes a read-only snapshot, its owners shifted to `base` as by `shift`; it is read like a tar, is
//!   refused where it breaks off, and `most` bounds what its files hold.
//! - `pack` writes a read-only snapshot as one tar to a descriptor that comes with the request, a regular
//!   file or pipe: `root/` and all below it, then `home/`. Owners are as inside, those outside of 65536
//!   ids nobody's; modes, capabilities and, but for directories, times of the last write are kept, files
//!   stay sparse and keep their several names. Sockets, FIFOs, device nodes, nested subvolumes and other
//!   extended attributes are left out. An error may come after bytes were written.
//! - `seal` makes both trees read-only for good. On btrfs a copy of a sealed volume is `refused` once
//!   something on the host changed it all the same, and so is sealing it again.
//! - `snapshot` copies both trees. With `only`, `home` is empty and owned by user 1000. With
//!   `replace`, an existing volume's `root` is exchanged for a copy of the source's in one step and
//!   its `home` stays; the old root is deleted. Neither combines with `readonly`. A new volume has
//!   no limit, whatever its source had.
//! - `delete` of what is absent succeeds.
//! - `usage` counts bytes as of the file system's last commit, at most 30 s ago on btrfs.
//! - `shift` is idempotent and may be repeated after a crash, also of what was sealed there; `size` is 65536 if not given.
//! - `diff` tells what `to` has, has not, or has otherwise than `from`, sorted by path, one name after the
//!   other. A path is `root` or `home` and what is below it; bytes that are not UTF-8, control characters
//!   and backslashes are `\xNN`. `before` and `after` are bytes of a file, 0 of anything else, null where
//!   it is not there. Type, mode, owner, size, time of the last write and a link's target count, of a directory
//!   the first three. No file is read: what keeps size and time is not seen, nor are extended
//!   attributes. Nested subvolumes are left out. At most `most` entries (1000 if not given, and at most)
//!   are told, and the line is below 2 MiB. `truncated` says that not all was told, or, after 20 s,
//!   2,000,000 names, 64 MiB of names or below 128 directories, not all was compared. What goes away
//!   meanwhile is left out. Nothing waits for a `diff`; `busy` says that a volume was replaced meanwhile.
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

/// The trees of a volume, as they are named in its directory and in what `pack` writes.
pub const TREES: [&str; 2] = [ROOT, HOME];
pub const ROOT: &str = "root";
pub const HOME: &str = "home";

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
    /// Both trees of a volume, as `pack` wrote them.
    Volume,
}

impl Source {
    pub const ALL: [Self; 3] = [Self::Tar, Self::Image, Self::Volume];

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tar => "tar",
            Self::Image => "image",
            Self::Volume => "volume",
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
        base: Option<u32>,
        #[serde(default = "id_range")]
        size: u32,
    },
    /// A read-only volume as a tar.
    Pack { volume: VolumeId },
    /// No more changes.
    Seal { volume: VolumeId },
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
    /// What differs between two volumes.
    Diff {
        from: VolumeId,
        to: VolumeId,
        #[serde(default = "most_entries")]
        most: usize,
    },
}

fn most_bytes() -> u64 {
    64 << 30
}

/// Ids of a range where no number is given.
pub fn id_range() -> u32 {
    65_536
}

/// Entries of a `diff` that are told where no number is given, and at most.
pub fn most_entries() -> usize {
    1000
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
    Packed {
        bytes: u64,
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
    Differs(Diff),
    Error {
        error: Failure,
    },
}

/// What differs between two volumes.
#[derive(Debug, Default, Serialize)]
pub struct Diff {
    pub added: u64,
    pub removed: u64,
    pub changed: u64,
    pub added_bytes: u64,
    pub removed_bytes: u64,
    pub truncated: bool,
    pub entries: Vec<Entry>,
}

/// One path that differs.
#[derive(Debug, Serialize)]
pub struct Entry {
    pub path: String,
    pub change: Change,
    pub before: Option<u64>,
    pub after: Option<u64>,
}

/// How a path differs.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    Added,
    Removed,
    Changed,
}

/// A file's name as text: bytes that are not UTF-8, control characters and backslashes are `\xNN`.
pub fn escaped(name: &[u8]) -> String {
    let mut text = String::new();
    for chunk in name.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() || c == '\\' {
                escape(c.encode_utf8(&mut [0; 4]).as_bytes(), &mut text);
            } else {
                text.push(c);
            }
        }
        escape(chunk.invalid(), &mut text);
    }
    text
}

fn escape(bytes: &[u8], text: &mut String) {
    for byte in bytes {
        text.push_str(&format!("\\x{byte:02x}"));
    }
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
