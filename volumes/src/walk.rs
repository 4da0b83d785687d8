//! Visits every file of a tree that hostile code wrote: by descriptor, never through a symbolic
//! link, never into another file system or nested subvolume, with two descriptors however deep.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, fstat, openat, statat};

/// How directories are opened: never through a link.
pub const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// One entry below the top: its directory, its name there, and what it is.
pub struct Entry<'a> {
    pub parent: BorrowedFd<'a>,
    /// The path of its directory below the top, with a slash behind each name.
    pub directory: &'a [u8],
    pub name: &'a CStr,
    pub stat: &'a Stat,
    /// On another device than the top: a mount or a nested subvolume, not entered.
    pub foreign: bool,
}

/// Calls `visit` for every entry below `top`; a directory comes before what is in it.
pub fn walk<E: From<io::Error>>(top: OwnedFd, mut visit: impl FnMut(&Entry<'_>) -> Result<(), E>) -> Result<(), E> {
    let root = fstat(&top).map_err(io::Error::from)?;
    let mut path: Vec<u8> = Vec::new();
    // Each level's inode, the length of its path, and the directories in it still to enter; `here` is the last level.
    let mut levels = vec![(root.st_ino, 0, list(&top, root.st_dev, &path, &mut visit)?)];
    let mut here = top;
    while let Some((_, length, pending)) = levels.last_mut() {
        path.truncate(*length);
        if let Some(name) = pending.pop() {
            here = open_directory(&here, &name)?;
            let inode = fstat(&here).map_err(io::Error::from)?.st_ino;
            path.extend_from_slice(name.to_bytes());
            path.push(b'/');
            levels.push((inode, path.len(), list(&here, root.st_dev, &path, &mut visit)?));
            continue;
        }
        levels.pop();
        if let Some((expected, _, _)) = levels.last() {
            here = open_directory(&here, c"..")?;
            let found = fstat(&here).map_err(io::Error::from)?;
            if found.st_ino != *expected || found.st_dev != root.st_dev {
                return Err(io::Error::other("a directory was moved meanwhile").into());
            }
        }
    }
    Ok(())
}

fn open_directory(at: &OwnedFd, name: &CStr) -> io::Result<OwnedFd> {
    Ok(openat(at, name, DIRECTORY, Mode::empty())?)
}

/// Visits the entries of one directory and returns the directories among them.
fn list<E: From<io::Error>>(
    directory: &OwnedFd,
    device: u64,
    path: &[u8],
    visit: &mut impl FnMut(&Entry<'_>) -> Result<(), E>,
) -> Result<Vec<CString>, E> {
    let mut pending = Vec::new();
    for entry in Dir::read_from(directory).map_err(io::Error::from)? {
        let entry = entry.map_err(io::Error::from)?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).map_err(io::Error::from)?;
        let foreign = stat.st_dev != device;
        visit(&Entry {
            parent: directory.as_fd(),
            directory: path,
            name,
            stat: &stat,
            foreign,
        })?;
        if !foreign && FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            pending.push(name.to_owned());
        }
    }
    Ok(pending)
}
