//! How trees are made, copied, deleted and counted: btrfs subvolumes, or plain directories for
//! development. Knows directories and names of trees in them, not volumes.
//!
//! On btrfs each tree is a subvolume counted by its own quota group 0/id. With simple quotas (Linux
//! 6.7) a tree is charged for what was written into it, for as long as anything refers to it; what
//! it was copied from is counted by `volumes.rs`. Older kernels have full quotas only: a tree is
//! charged for all it refers to, and each deletion of a snapshot holds up every write for as long
//! as the kernel counts again. There are no groups of a higher level: with full quotas a snapshot
//! into another such group makes the kernel stop all counting, and with it every limit, until a
//! rescan.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{FileType, Mode, openat};
use rustix::io::Errno;

use crate::kernel::{self, Counted, Quota};
use crate::walk::{DIRECTORY, walk};

const BTRFS_MAGIC: i64 = 0x9123_683e;
/// Deepest nesting of subvolumes that is deleted.
const MAX_NESTING: u32 = 64;

/// Where trees live.
pub enum Backend {
    Btrfs {
        /// Whether a tree is charged for what it wrote only.
        simple: bool,
    },
    /// Copies by `cp` (reflinks where the file system has them), deletes by `rm`.
    Plain { cp: PathBuf, rm: PathBuf },
}

impl Backend {
    /// Finds out what `dir` offers; the error is a sentence for the operator.
    pub fn detect(dir: &Path, handle: &File, plain: bool) -> Result<Self, String> {
        let at = dir.display();
        if plain {
            return Ok(Self::Plain {
                cp: program("cp")?,
                rm: program("rm")?,
            });
        }
        let kind = rustix::fs::fstatfs(handle).map_err(|e| format!("cannot examine {at}: {e}"))?;
        if kind.f_type != BTRFS_MAGIC {
            return Err(format!(
                "{at} is not on btrfs; mount a btrfs there, or add --plain for development without snapshots and limits"
            ));
        }
        match counting(handle.as_fd()) {
            Ok(quota) => {
                if !quota.simple {
                    eprintln!(
                        "choir-volumes: full quotas on {at}: while a deleted snapshot is counted away, writes wait; on \
                         Linux 6.7 or later run `btrfs quota disable {at}` and start again for simple ones"
                    );
                }
                Ok(Self::Btrfs { simple: quota.simple })
            }
            Err(error) => Err(format!("cannot count what is on {at}: {error}; run as root")),
        }
    }

    /// The name clients see.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Btrfs { .. } => "btrfs",
            Self::Plain { .. } => "plain",
        }
    }

    /// Makes the empty tree `name` in `parent`.
    pub fn make(&self, parent: &Path, name: &str) -> io::Result<()> {
        match self {
            Self::Btrfs { .. } => {
                kernel::create_subvolume(File::open(parent)?.as_fd(), name)?;
                rustix::fs::chmod(parent.join(name), Mode::from_raw_mode(0o755))?;
                Ok(())
            }
            Self::Plain { .. } => DirBuilder::new().mode(0o755).create(parent.join(name)),
        }
    }

    /// Copies the tree `source` to `name` in `parent`, without a limit.
    pub fn copy(&self, source: &Path, parent: &Path, name: &str, readonly: bool) -> io::Result<()> {
        match self {
            Self::Btrfs { .. } => {
                let into = File::open(parent)?;
                kernel::snapshot(File::open(source)?.as_fd(), into.as_fd(), name, readonly)?;
                // The kernel copies the source's limit, too.
                let id = kernel::subvolume_id(File::open(parent.join(name))?.as_fd())?;
                Ok(kernel::set_limit(into.as_fd(), id, None)?)
            }
            Self::Plain { cp, .. } => run(Command::new(cp)
                .args(["--archive", "--reflink=auto", "--no-target-directory", "--"])
                .args([source, &parent.join(name)])),
        }
    }

    /// Deletes the tree `name` in `parent`, if it is there.
    pub fn remove(&self, parent: &Path, name: &str) -> io::Result<()> {
        match self {
            Self::Btrfs { .. } => match File::open(parent) {
                Ok(parent) => destroy(parent.as_fd(), name.as_bytes(), MAX_NESTING),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                Err(error) => Err(error),
            },
            Self::Plain { rm, .. } => run(Command::new(rm)
                .args(["--recursive", "--force", "--one-file-system", "--"])
                .arg(parent.join(name))),
        }
    }

    /// Bytes of a tree: as of the last commit on btrfs, by a walk otherwise.
    pub fn count(&self, tree: &Path) -> io::Result<Counted> {
        let top = File::open(tree)?;
        if let Self::Btrfs { .. } = self {
            let id = kernel::subvolume_id(top.as_fd())?;
            return Ok(kernel::counted(top.as_fd(), id)?);
        }
        let mut bytes = 0;
        walk(top.into(), |entry| -> io::Result<()> {
            if !entry.foreign {
                bytes += u64::try_from(entry.stat.st_blocks).unwrap_or(0) * 512;
            }
            Ok(())
        })?;
        Ok(Counted {
            referenced: bytes,
            exclusive: bytes,
            limit: None,
        })
    }
}

/// How the file system counts; it is made to, if it does not.
fn counting(pool: BorrowedFd<'_>) -> io::Result<Quota> {
    if let Some(quota) = kernel::quota(pool)? {
        return Ok(quota);
    }
    match kernel::enable_quota(pool, true) {
        // Linux before 6.7.
        Err(Errno::INVAL) => kernel::enable_quota(pool, false)?,
        other => other?,
    }
    kernel::quota(pool)?.ok_or_else(|| io::Error::other("quotas stay off"))
}

/// Deletes a subvolume, those nested in it, and their quota groups.
fn destroy(parent: BorrowedFd<'_>, name: &[u8], depth: u32) -> io::Result<()> {
    let tree = match openat(parent, name, DIRECTORY, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        other => other?,
    };
    let id = kernel::subvolume_id(tree.as_fd())?;
    match kernel::destroy_subvolume(parent, name) {
        Err(Errno::NOTEMPTY) if depth > 0 => {
            walk(tree, |entry| -> io::Result<()> {
                let kind = FileType::from_raw_mode(entry.stat.st_mode);
                if entry.foreign && kind == FileType::Directory {
                    destroy(entry.parent, entry.name.to_bytes(), depth - 1)?;
                }
                Ok(())
            })?;
            kernel::destroy_subvolume(parent, name)?;
        }
        other => other?,
    }
    Ok(kernel::remove_group(parent, id)?)
}

fn program(name: &str) -> Result<PathBuf, String> {
    let places = ["/usr/bin", "/bin", "/run/current-system/sw/bin"];
    places
        .iter()
        .map(|place| Path::new(place).join(name))
        .find(|path| path.exists())
        .ok_or_else(|| format!("`{name}` is in none of {}; install coreutils", places.join(", ")))
}

fn run(command: &mut Command) -> io::Result<()> {
    let output = command.env_clear().env("LC_ALL", "C").stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let first = said.lines().next().unwrap_or("it said nothing");
    Err(if first.ends_with("No space left on device") {
        io::ErrorKind::StorageFull.into()
    } else {
        io::Error::other(first.escape_debug().to_string())
    })
}
