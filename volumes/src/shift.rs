//! Moves the owner ids of one tree from one range to another, keeping what a change of owner makes
//! the kernel drop: setuid and setgid bits and file capabilities.
//!
//! A stop at any instruction is safe. The tree's top carries `trusted.choir.base`: `B` when all its
//! ids are in `B..`, `A>B` while they move. A file with something to keep carries it as
//! `trusted.choir.kept` from before its change until after. `trusted.*` is beyond a sandbox's reach,
//! and a snapshot takes it along.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Stat, Uid, XattrFlags, chownat, fchmod, fchown, fgetxattr, fremovexattr,
    fsetxattr, fstat, open, openat, syncfs,
};
use rustix::io::Errno;

use crate::walk::{DIRECTORY, walk};

const BASE: &str = "trusted.choir.base";
const KEPT: &str = "trusted.choir.kept";
const CAPABILITY: &str = "security.capability";
/// Largest file capability (version 3): magic, two pairs of words, root id.
const CAPABILITY_MAX: usize = 24;
/// The id that stands for "nobody" in a range; ids that fit nowhere become this one.
const NOBODY: u32 = 65_534;

/// Where the ids of a tree are: all from `from`, or partly already from `to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Base {
    pub from: u32,
    pub to: u32,
}

impl Base {
    /// Reads the mark of a tree; a tree without one has its ids from 0.
    pub fn of(top: &impl AsFd) -> io::Result<Self> {
        let text = match attribute::<32>(top, BASE)? {
            None => return Ok(Self { from: 0, to: 0 }),
            Some(bytes) => String::from_utf8(bytes).map_err(io::Error::other)?,
        };
        let (from, to) = text.split_once('>').unwrap_or((&text, &text));
        let number = |t: &str| t.parse().map_err(io::Error::other);
        Ok(Self {
            from: number(from)?,
            to: number(to)?,
        })
    }

    /// Reads the mark of the tree at a path.
    pub fn at(tree: &Path) -> io::Result<Self> {
        Self::of(&open(tree, DIRECTORY, Mode::empty())?)
    }

    /// Writes the mark.
    pub fn mark(self, top: &impl AsFd) -> io::Result<()> {
        let Self { from, to } = self;
        let text = if from == to {
            to.to_string()
        } else {
            format!("{from}>{to}")
        };
        Ok(fsetxattr(top, BASE, text.as_bytes(), XattrFlags::empty())?)
    }
}

/// A range of ids as it is seen from inside, where `base` is 0.
#[derive(Debug, Clone, Copy)]
pub struct Range {
    pub base: u32,
    pub size: u32,
}

impl Range {
    /// An id as it is inside.
    pub fn inner(self, id: u32) -> u32 {
        self.place(id).unwrap_or(self.nobody())
    }

    /// A file's capability as it is inside.
    pub fn capability(self, file: &impl AsFd) -> io::Result<Option<Vec<u8>>> {
        let outer = attribute::<CAPABILITY_MAX>(file, CAPABILITY)?;
        outer.map(|outer| rebased(&outer, |root| self.inner(root))).transpose()
    }

    fn place(self, id: u32) -> Option<u32> {
        id.checked_sub(self.base).filter(|n| *n < self.size)
    }

    fn nobody(self) -> u32 {
        NOBODY.min(self.size - 1)
    }
}

/// A move of ids from `from..from+size` to `to..to+size`.
#[derive(Debug, Clone, Copy)]
struct Move {
    from: u32,
    to: u32,
    size: u32,
}

impl Move {
    /// The new id, or `None` for one that is already in the target range.
    fn of(self, id: u32) -> Option<u32> {
        let Self { from, to, size } = self;
        if (Range { base: to, size }).place(id).is_some() {
            return None;
        }
        Some(to + Range { base: from, size }.inner(id))
    }

    /// The new id, or the same for one that is already in the target range.
    fn moved(self, id: u32) -> u32 {
        self.of(id).unwrap_or(id)
    }
}

/// Moves a tree's ids to `base..base+size`, finishing an interrupted move first. Returns how many
/// files changed. The ranges must not overlap (EINVAL).
pub fn shift(top: &OwnedFd, base: u32, size: u32) -> io::Result<u64> {
    let now = Base::of(top)?;
    let mut files = 0;
    if now.from != now.to {
        files += run(
            top,
            Move {
                from: now.from,
                to: now.to,
                size,
            },
        )?;
    }
    if now.to != base {
        files += run(
            top,
            Move {
                from: now.to,
                to: base,
                size,
            },
        )?;
    }
    Ok(files)
}

fn run(top: &OwnedFd, ids: Move) -> io::Result<u64> {
    let Move { from, to, size } = ids;
    if size == 0 || to.checked_add(size).is_none() || from.abs_diff(to) < size {
        return Err(Errno::INVAL.into());
    }
    Base { from, to }.mark(top)?;
    let mut files = 0;
    walk(top.try_clone()?, |entry| -> io::Result<()> {
        let kind = FileType::from_raw_mode(entry.stat.st_mode);
        if entry.foreign {
            return Ok(());
        }
        if kind == FileType::RegularFile {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let file = openat(entry.parent, entry.name, flags, Mode::empty())?;
            files += u64::from(shift_file(&file, ids)?);
        } else if let Some((user, group)) = owner(entry.stat, ids) {
            let nofollow = AtFlags::SYMLINK_NOFOLLOW;
            chownat(entry.parent, entry.name, user, group, nofollow)?;
            files += 1;
        }
        Ok(())
    })?;
    if let Some((user, group)) = owner(&fstat(top)?, ids) {
        fchown(top, user, group)?;
        files += 1;
    }
    Base { from: to, to }.mark(top)?;
    syncfs(top)?;
    Ok(files)
}

/// The owner and group to set; `None` for a file that needs no change.
fn owner(stat: &Stat, ids: Move) -> Option<(Option<Uid>, Option<Gid>)> {
    let user = ids.of(stat.st_uid).map(Uid::from_raw);
    let group = ids.of(stat.st_gid).map(Gid::from_raw);
    (user.is_some() || group.is_some()).then_some((user, group))
}

fn shift_file(file: &OwnedFd, ids: Move) -> io::Result<bool> {
    let stat = fstat(file)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(io::Error::other("a file was replaced meanwhile"));
    }
    let Some((user, group)) = owner(&stat, ids) else {
        restore(file)?;
        return Ok(false);
    };
    let capability = attribute::<CAPABILITY_MAX>(file, CAPABILITY)?;
    let keep = stat.st_mode & 0o6000 != 0 || capability.is_some();
    if keep {
        let mut kept = (stat.st_mode & 0o7777).to_le_bytes().to_vec();
        kept.extend(capability.map_or(Ok(Vec::new()), |c| rebased(&c, |root| ids.moved(root)))?);
        fsetxattr(file, KEPT, &kept, XattrFlags::empty())?;
    }
    fchown(file, user, group)?;
    if keep {
        restore(file)?;
    }
    Ok(true)
}

/// Puts back what `trusted.choir.kept` says, if there is one.
fn restore(file: &OwnedFd) -> io::Result<()> {
    const MODE: usize = size_of::<u32>();
    let Some(kept) = attribute::<{ MODE + CAPABILITY_MAX }>(file, KEPT)? else {
        return Ok(());
    };
    let (mode, capability) = kept
        .split_first_chunk::<MODE>()
        .ok_or_else(|| io::Error::other("a kept mode is damaged"))?;
    fchmod(file, Mode::from_raw_mode(u32::from_le_bytes(*mode)))?;
    if !capability.is_empty() {
        fsetxattr(file, CAPABILITY, capability, XattrFlags::empty())?;
    }
    Ok(fremovexattr(file, KEPT)?)
}

/// The same file capability for where its root user is `moved` (`struct vfs_ns_cap_data`).
fn rebased(capability: &[u8], moved: impl Fn(u32) -> u32) -> io::Result<Vec<u8>> {
    const VERSION_2: u32 = 0x0200_0000;
    const VERSION_3: u32 = 0x0300_0000;
    let damaged = || io::Error::other("a file capability is damaged");
    let word = |at: usize| {
        let bytes = capability.get(at..at + 4).and_then(|b| b.try_into().ok());
        bytes.map(u32::from_le_bytes).ok_or_else(damaged)
    };
    let magic = word(0)?;
    let root = match magic & 0xff00_0000 {
        VERSION_2 => 0,
        VERSION_3 => word(20)?,
        _ => return Err(io::Error::other("a file capability is of an unknown version")),
    };
    let root = moved(root);
    let version = if root == 0 { VERSION_2 } else { VERSION_3 };
    let mut out = (version | (magic & 0x00ff_ffff)).to_le_bytes().to_vec();
    out.extend(capability.get(4..20).ok_or_else(damaged)?);
    if root != 0 {
        out.extend(root.to_le_bytes());
    }
    Ok(out)
}

/// An extended attribute of at most `N` bytes, or `None`.
fn attribute<const N: usize>(file: &impl AsFd, name: &str) -> io::Result<Option<Vec<u8>>> {
    let mut value = [0; N];
    match fgetxattr(file, name, &mut value) {
        Ok(length) => Ok(Some(value[..length].to_vec())),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDS: Move = Move {
        from: 0,
        to: 200_000,
        size: 65_536,
    };

    #[test]
    fn ids_move_by_the_base_and_strangers_become_nobody() {
        assert_eq!(IDS.of(0), Some(200_000));
        assert_eq!(IDS.of(1000), Some(201_000));
        assert_eq!(IDS.of(200_005), None);
        assert_eq!(IDS.of(4_000_000), Some(200_000 + NOBODY));
    }

    #[test]
    fn a_capability_moves_to_the_target_ranges_root_and_back() {
        let plain: Vec<u8> = [0x0200_0001_u32, 0x2000, 0, 0, 0]
            .iter()
            .flat_map(|w| w.to_le_bytes())
            .collect();
        let moved = rebased(&plain, |root| IDS.moved(root)).expect("a sound capability");
        assert_eq!(moved.len(), 24);
        assert_eq!(moved[20..], 200_000_u32.to_le_bytes());
        let inside = Range {
            base: 200_000,
            size: 65_536,
        };
        let back = rebased(&moved, |root| inside.inner(root));
        assert_eq!(back.expect("a sound capability"), plain);
        assert!(rebased(&plain[..7], |root| root).is_err());
    }
}
