//! What differs between two volumes, by what the file system says of each file; `wire.rs` says what counts. The trees are
//! a stranger's, and one may be in use: they are walked by descriptor, never through a symbolic link, never into another
//! file system or nested subvolume, and within bounds. It must not read a file, or hold up who changes a volume.

use std::ffi::CStr;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{Dir, FileType, Mode, Stat, fstat, open, openat};

use crate::level::{Level, Side, is_directory, kind, present};
use crate::walk::DIRECTORY;
use crate::wire::{Change, Code, Diff, Entry, Failure, escaped, most_entries};

const MAX_NAMES: usize = 2_000_000;
/// Of all names, which may all be in memory at once.
const MAX_NAME_BYTES: usize = 64 << 20;
const MAX_TIME: Duration = Duration::from_secs(20);
/// Each level keeps two descriptors open: on the way back up, a directory that was moved would be another one.
const MAX_DEPTH: usize = 128;
/// Of the answer.
const MAX_BYTES: usize = 2 << 20;
/// An entry's bytes beside its path, at most.
const AROUND: usize = 128;

/// Compares these trees of two volumes, and tells at most `most` entries.
pub fn diff(volumes: &[PathBuf; 2], trees: [&str; 2], most: usize) -> Result<Diff, Failure> {
    // One at a time, because of the descriptors.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut walk = Walk {
        found: Diff::default(),
        most: most.min(most_entries()),
        room: MAX_BYTES - 2 * AROUND,
        names: MAX_NAMES,
        name_bytes: MAX_NAME_BYTES,
        until: Instant::now() + MAX_TIME,
    };
    let cannot = |error: io::Error| Failure::io("compare the volumes", error);
    for tree in trees {
        let tops = || -> io::Result<[(OwnedFd, Stat); 2]> {
            let [from, to] = volumes;
            Ok([top(from.join(tree))?, top(to.join(tree))?])
        };
        let [from, to] = tops().map_err(cannot)?;
        let identity = |stat: &Stat| (stat.st_dev, stat.st_ino);
        let before = [identity(&from.1), identity(&to.1)];
        walk.tree(tree, from, to).map_err(cannot)?;
        if !tops().is_ok_and(|now| now.each_ref().map(|(_, stat)| identity(stat)) == before) {
            let message = "A volume was replaced while it was compared; try again.";
            return Err(Failure::new(Code::Busy, message));
        }
    }
    Ok(walk.found)
}

fn top(path: PathBuf) -> io::Result<(OwnedFd, Stat)> {
    let directory = open(path, DIRECTORY, Mode::empty())?;
    let stat = fstat(&directory)?;
    Ok((directory, stat))
}

/// What was found, and what of the bounds is left.
struct Walk {
    found: Diff,
    most: usize,
    room: usize,
    names: usize,
    name_bytes: usize,
    until: Instant,
}

impl Walk {
    /// Compares one tree of both volumes; each with its top's description.
    fn tree(&mut self, name: &str, from: (OwnedFd, Stat), to: (OwnedFd, Stat)) -> io::Result<()> {
        let devices = [from.1.st_dev, to.1.st_dev];
        self.compare(name, &[Some(from.1), Some(to.1)], false);
        let mut levels = vec![Level {
            path: name.to_owned(),
            sides: [self.list(from.0)?, self.list(to.0)?],
        }];
        loop {
            let depth = levels.len();
            let Some(level) = levels.last_mut() else {
                return Ok(());
            };
            if self.spent() {
                return Ok(());
            }
            let Some((name, there)) = level.next_name() else {
                levels.pop();
                continue;
            };
            let Some(stats) = level.look(&name, there)? else {
                continue;
            };
            let is_foreign = |(stat, device): (&Option<Stat>, u64)| stat.as_ref().is_some_and(|s| s.st_dev != device);
            if stats.iter().zip(devices).any(is_foreign) {
                continue;
            }
            let path = format!("{}/{}", level.path, escaped(name.to_bytes()));
            self.compare(&path, &stats, level.is_retargeted(&name, &stats)?);
            if !stats.iter().flatten().any(is_directory) {
                continue;
            }
            if depth == MAX_DEPTH {
                self.found.truncated = true;
            } else if let Some(sides) = self.enter(level, &name, &stats)? {
                levels.push(Level { path, sides });
            }
        }
    }

    /// Opens and lists a directory on the sides where it is one; `None` where it went away or a bound is reached.
    fn enter(
        &mut self,
        level: &Level,
        name: &CStr,
        stats: &[Option<Stat>; 2],
    ) -> io::Result<Option<[Option<Side>; 2]>> {
        let mut sides = [None, None];
        for ((into, side), stat) in sides.iter_mut().zip(&level.sides).zip(stats) {
            let (Some(side), Some(stat)) = (side, stat.as_ref().filter(|s| is_directory(s))) else {
                continue;
            };
            let Some(directory) = present(openat(&side.directory, name, DIRECTORY, Mode::empty()))? else {
                return Ok(None);
            };
            if fstat(&directory)?.st_dev != stat.st_dev {
                return Ok(None);
            }
            *into = self.list(directory)?;
            if into.is_none() {
                return Ok(None);
            }
        }
        Ok(Some(sides))
    }

    /// Takes in the names of a directory; `None` where a bound is reached.
    fn list(&mut self, directory: OwnedFd) -> io::Result<Option<Side>> {
        let mut names = Vec::new();
        for entry in Dir::read_from(&directory)? {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            self.names = self.names.saturating_sub(1);
            self.name_bytes = self.name_bytes.saturating_sub(name.to_bytes().len());
            if self.spent() {
                return Ok(None);
            }
            names.push(name.to_owned());
        }
        names.sort_unstable_by(|a, b| b.cmp(a));
        Ok(Some(Side { directory, names }))
    }

    /// Whether a bound is reached, so that the rest is left out.
    fn spent(&mut self) -> bool {
        let spent = self.names == 0 || self.name_bytes == 0 || Instant::now() >= self.until;
        self.found.truncated |= spent;
        spent
    }

    fn compare(&mut self, path: &str, stats: &[Option<Stat>; 2], retargeted: bool) {
        let found = &mut self.found;
        let [before, after] = stats.each_ref().map(|stat| stat.as_ref().map(bytes));
        let change = match stats {
            [Some(from), Some(to)] if is_alike(from, to) && !retargeted => return,
            [Some(_), Some(_)] => Change::Changed,
            [Some(_), None] => Change::Removed,
            [None, _] => Change::Added,
        };
        match change {
            Change::Changed => found.changed += 1,
            Change::Removed => {
                found.removed += 1;
                found.removed_bytes = found.removed_bytes.saturating_add(before.unwrap_or(0));
            }
            Change::Added => {
                found.added += 1;
                found.added_bytes = found.added_bytes.saturating_add(after.unwrap_or(0));
            }
        }
        // As JSON, quotes and backslashes of an escaped name take two bytes each.
        let needed = 2 * path.len() + AROUND;
        if found.entries.len() == self.most || needed > self.room {
            // What is told is all up to there.
            self.room = 0;
            found.truncated = true;
            return;
        }
        self.room -= needed;
        found.entries.push(Entry {
            path: path.to_owned(),
            change,
            before,
            after,
        });
    }
}

fn bytes(stat: &Stat) -> u64 {
    match kind(stat) {
        FileType::RegularFile => u64::try_from(stat.st_size).unwrap_or(0),
        _ => 0,
    }
}

fn is_alike(from: &Stat, to: &Stat) -> bool {
    let is = |s: &Stat| (s.st_mode, s.st_uid, s.st_gid);
    let holds = |s: &Stat| (s.st_size, s.st_mtime, s.st_mtime_nsec);
    is(from) == is(to) && (is_directory(from) || holds(from) == holds(to))
}
