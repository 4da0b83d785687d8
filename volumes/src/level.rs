//! One directory of two trees at once: the next name in it, and what that is on either side. A name may go away at any
//! moment. It must not know which differences count.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, FileType, Stat, readlinkat, statat};
use rustix::io::Errno;

/// One directory of one tree.
pub struct Side {
    pub directory: OwnedFd,
    /// Its names that are not compared yet, the next one last.
    pub names: Vec<CString>,
}

/// One directory of both trees, or of the one that has it.
pub struct Level {
    pub path: String,
    pub sides: [Option<Side>; 2],
}

impl Level {
    /// The next name, and which sides have it.
    pub fn next_name(&mut self) -> Option<(CString, [bool; 2])> {
        let last = |side: &Option<Side>| side.as_ref()?.names.last().cloned();
        let next = self.sides.iter().filter_map(last).min()?;
        let there = self.sides.each_mut().map(|side| {
            side.as_mut()
                .is_some_and(|s| s.names.pop_if(|name| *name == next).is_some())
        });
        Some((next, there))
    }

    /// What a name is on the sides that have it; `None` where it went away.
    pub fn look(&self, name: &CStr, there: [bool; 2]) -> io::Result<Option<[Option<Stat>; 2]>> {
        let mut stats = [None, None];
        for ((stat, side), there) in stats.iter_mut().zip(&self.sides).zip(there) {
            let Some(side) = side.as_ref().filter(|_| there) else {
                continue;
            };
            *stat = present(statat(&side.directory, name, AtFlags::SYMLINK_NOFOLLOW))?;
            if stat.is_none() {
                return Ok(None);
            }
        }
        Ok(Some(stats))
    }

    /// Whether a name is a symbolic link on both sides, to different places.
    pub fn is_retargeted(&self, name: &CStr, stats: &[Option<Stat>; 2]) -> io::Result<bool> {
        let is_link = |stat: &Option<Stat>| stat.as_ref().is_some_and(|s| kind(s) == FileType::Symlink);
        let [Some(from), Some(to)] = &self.sides else {
            return Ok(false);
        };
        if !stats.iter().all(is_link) {
            return Ok(false);
        }
        let target = |side: &Side| present(readlinkat(&side.directory, name, Vec::<u8>::new()));
        let targets = target(from)?.zip(target(to)?);
        Ok(targets.is_some_and(|(from, to)| from != to))
    }
}

/// `None` for what went away, or became something else, since it was listed.
pub fn present<T>(outcome: rustix::io::Result<T>) -> io::Result<Option<T>> {
    match outcome {
        Ok(found) => Ok(Some(found)),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::INVAL) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

pub fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

pub fn is_directory(stat: &Stat) -> bool {
    kind(stat) == FileType::Directory
}
