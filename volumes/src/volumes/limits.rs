//! How much a volume holds and may hold. Must not know what else is done to volumes.
//!
//! The size limit of a volume is kept as `trusted.choir.limit` of `DIR/ID`. It is enforced on each
//! tree by the kernel: whenever counts change, each may hold what it has plus what the volume has
//! left. Both growing at once can overshoot by what is written between two commits.
//!
//! Where the kernel charges a tree only for what it wrote, a copy begins at nothing. So that a limit
//! is not evaded by copying, what its source was charged for is kept as `trusted.choir.inherited`
//! of the copy, for root and home, and counts, too. It is an upper bound: what the copy deletes of
//! it still counts.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{Mode, XattrFlags, fgetxattr, fremovexattr, fsetxattr, fsync, open};
use rustix::io::Errno;

use super::{Volumes, absent};
use crate::backend::Backend;
use crate::kernel::{self, Counted};
use crate::walk::DIRECTORY;
use crate::wire::{Failure, HOME, ROOT, Response, TREES, VolumeId};

const LIMIT: &str = "trusted.choir.limit";
/// Bytes that even an empty volume may take while it is made.
const AROUND: u64 = 64 << 20;
const INHERITED: &str = "trusted.choir.inherited";

impl Volumes {
    /// Brings all limits up to date with what was written. Called every few seconds; failures are
    /// tried again then.
    pub fn rebalance(&self) -> io::Result<()> {
        if matches!(self.backend, Backend::Plain { .. }) {
            return Ok(());
        }
        let pool = self.handle.as_fd();
        if kernel::quota(pool)?.is_some_and(|quota| !quota.consistent) {
            kernel::rescan_quota(pool)?;
        }
        for id in self.ids()? {
            match self.balance(&self.dir.join(id)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    pub(super) fn limit(&self, id: &VolumeId, bytes: Option<u64>) -> Result<Response, Failure> {
        let _hold = self.change(id)?;
        let volume = self.existing(id)?;
        let work = || -> io::Result<()> {
            let directory = File::open(&volume)?;
            match bytes {
                Some(bytes) => {
                    let text = bytes.to_string();
                    fsetxattr(&directory, LIMIT, text.as_bytes(), XattrFlags::empty())?;
                }
                None => match fremovexattr(&directory, LIMIT) {
                    Ok(()) | Err(Errno::NODATA) => {}
                    Err(error) => return Err(error.into()),
                },
            }
            fsync(&directory)?;
            self.balance(&volume)?;
            Ok(())
        };
        let enforced = matches!(self.backend, Backend::Btrfs { .. });
        if enforced {
            work().map_err(|e| Failure::io("set the limit", e))?;
        }
        Ok(Response::Limited { enforced })
    }

    pub(super) fn usage(&self, id: &VolumeId) -> Result<Response, Failure> {
        let volume = self.existing(id)?;
        let (root, home, limit) = self.balance(&volume).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => absent(id),
            _ => Failure::io("count the volume", error),
        })?;
        let before = inherited(&volume).map_err(|e| Failure::io("count the volume", e))?;
        Ok(Response::Usage {
            bytes: root.referenced + home.referenced + before[0] + before[1],
            exclusive: root.exclusive + home.exclusive,
            limit,
            enforced: limit.is_some(),
        })
    }

    /// Counts both trees and divides what the volume has left between them.
    pub(super) fn balance(&self, volume: &Path) -> io::Result<(Counted, Counted, Option<u64>)> {
        let trees = [volume.join(ROOT), volume.join(HOME)];
        let [root, home] = [self.backend.count(&trees[0])?, self.backend.count(&trees[1])?];
        if matches!(self.backend, Backend::Plain { .. }) {
            return Ok((root, home, None));
        }
        let limit = read_limit(volume)?;
        let before = inherited(volume)?;
        let used = root.referenced + home.referenced + before[0] + before[1];
        for (path, counted) in trees.iter().zip([root, home]) {
            let wanted = limit.map(|l| counted.referenced + l.saturating_sub(used));
            if counted.limit != wanted {
                let id = kernel::subvolume_id(File::open(path)?.as_fd())?;
                kernel::set_limit(self.handle.as_fd(), id, wanted)?;
            }
        }
        Ok((root, home, limit))
    }

    /// Has the kernel stop what fills a draft at so many bytes a tree, and what is kept of the files themselves.
    pub(super) fn bound(&self, draft: &Path, most: Option<u64>) -> io::Result<()> {
        if matches!(self.backend, Backend::Plain { .. }) {
            return Ok(());
        }
        let most = most.map(|most| most.saturating_add(most / 8).saturating_add(AROUND));
        for tree in TREES {
            let id = kernel::subvolume_id(File::open(draft.join(tree))?.as_fd())?;
            kernel::set_limit(self.handle.as_fd(), id, most)?;
        }
        Ok(())
    }

    /// Has these trees of a copy, root and home, begin with what their source is charged for.
    pub(super) fn inherit(&self, source: &Path, draft: &Path, trees: [bool; 2]) -> Result<(), Failure> {
        let work = || {
            let charged = self.charged(source)?;
            let of = |nth: usize| if trees[nth] { charged[nth] } else { 0 };
            self.set_inherited(draft, [of(0), of(1)])
        };
        work().map_err(|e| Failure::io("count the source", e))
    }

    /// What root and home of a volume are charged for, what they began with included.
    pub(super) fn charged(&self, volume: &Path) -> io::Result<[u64; 2]> {
        let before = inherited(volume)?;
        let own = |tree: &str| Ok::<_, io::Error>(self.backend.count(&volume.join(tree))?.referenced);
        match self.backend {
            Backend::Btrfs { simple: true } => Ok([before[0] + own(ROOT)?, before[1] + own(HOME)?]),
            _ => Ok([0, 0]),
        }
    }

    pub(super) fn set_inherited(&self, volume: &Path, [root, home]: [u64; 2]) -> io::Result<()> {
        if let Backend::Btrfs { simple: true } = self.backend {
            let text = format!("{root} {home}");
            fsetxattr(File::open(volume)?, INHERITED, text.as_bytes(), XattrFlags::empty())?;
        }
        Ok(())
    }
}

/// What root and home of a volume began with.
pub(super) fn inherited(volume: &Path) -> io::Result<[u64; 2]> {
    Ok(<[u64; 2]>::try_from(numbers(volume, INHERITED)?).unwrap_or_default())
}

fn read_limit(volume: &Path) -> io::Result<Option<u64>> {
    Ok(numbers(volume, LIMIT)?.first().copied())
}

/// The numbers in an attribute of a volume; none where it has none.
pub(super) fn numbers(volume: &Path, attribute: &str) -> io::Result<Vec<u64>> {
    let directory = open(volume, DIRECTORY, Mode::empty())?;
    let mut text = [0; 64];
    match fgetxattr(&directory, attribute, &mut text) {
        Err(Errno::NODATA | Errno::NOTSUP) => Ok(Vec::new()),
        Err(error) => Err(error.into()),
        Ok(length) => std::str::from_utf8(&text[..length])
            .map_err(io::Error::other)?
            .split(' ')
            .map(|number| number.parse().map_err(io::Error::other))
            .collect(),
    }
}
