//! Looks through directories that somebody hostile may have made, and says what is there. It must not know what is looked
//! for.

use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io::{self, ErrorKind, Read as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use super::{Frame, MOST, Part};
use crate::message::{NONCE, RUN_DIR, SOCKET};

/// Directories within each other; each holds a descriptor open.
const DEEPEST: usize = 500;

/// File systems whose files are the kernel's view of what is shown otherwise, or no files at all (statfs(2)).
const NO_FILES: [i64; 12] = [
    0x9fa0,      // proc
    0x6265_6572, // sysfs
    0x0027_e0eb, // cgroup
    0x6367_7270, // cgroup2
    0x1cd1,      // devpts
    0x1980_0202, // mqueue
    0x6462_6720, // debugfs
    0x7472_6163, // tracefs
    0x7363_6673, // securityfs
    0xcafe_4a11, // bpf
    0x6165_676c, // pstore
    0x4249_4e4d, // binfmt_misc
];

/// Says what is seen, frame by frame. What vanishes meanwhile is nothing; what cannot be read is said.
pub struct Show<'a>(&'a mut dyn FnMut(Frame) -> io::Result<()>);

impl<'a> Show<'a> {
    /// Frames go to `to`; an error of it ends the look.
    pub fn new(to: &'a mut dyn FnMut(Frame) -> io::Result<()>) -> Self {
        Self(to)
    }

    /// Every name, link and file below a directory, over file systems; no link is followed.
    pub fn tree(&mut self, start: &Path) -> io::Result<()> {
        tree(self, start)
    }

    /// What an open file holds.
    pub fn contents(&mut self, file: File) -> io::Result<()> {
        contents(self, file)
    }

    /// A new item begins.
    pub fn item(&mut self, part: Part, name: &str) -> io::Result<()> {
        (self.0)(Frame::Item {
            part,
            name: name.to_owned(),
        })
    }

    fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        (self.0)(Frame::Bytes(bytes.to_vec()))
    }

    fn hole(&mut self, zeroes: u64) -> io::Result<()> {
        if zeroes == 0 {
            return Ok(());
        }
        (self.0)(Frame::Hole(zeroes))
    }

    /// The item could not be read.
    pub fn unread(&mut self, why: &str) -> io::Result<()> {
        (self.0)(Frame::Unread(why.to_owned()))
    }

    /// What is gone is nothing to be said.
    pub fn failed(&mut self, error: io::Error) -> io::Result<()> {
        let gone = error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(Errno::SRCH.raw_os_error());
        if gone { Ok(()) } else { self.unread(&error.to_string()) }
    }

    /// A file of the kernel's, which has no size.
    pub fn small(&mut self, part: Part, name: &str, path: &Path) -> io::Result<()> {
        match File::open(path) {
            Ok(mut file) => {
                self.item(part, name)?;
                self.rest(&mut file, u64::MAX).map(drop)
            }
            Err(e) => {
                let gone = !path.parent().is_some_and(Path::exists);
                if gone || e.kind() == ErrorKind::NotFound {
                    return Ok(());
                }
                self.item(part, name)?;
                self.failed(e)
            }
        }
    }

    /// At most so many bytes from here on; whether the file could be read.
    fn rest(&mut self, file: &mut File, most: u64) -> io::Result<bool> {
        let mut left = most;
        let mut buffer = [0; MOST];
        while left > 0 {
            let room = usize::try_from(left).unwrap_or(MOST).min(MOST);
            match file.read(&mut buffer[..room]) {
                Ok(0) => return Ok(true),
                Ok(read) => {
                    left -= read as u64;
                    self.bytes(&buffer[..read])?;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => {
                    self.failed(e)?;
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }
}

/// A directory that is being looked through.
struct Level {
    entries: Dir,
    directory: OwnedFd,
    device: u64,
    path: PathBuf,
}

/// Every name, link and file below a directory, over file systems; no link is followed.
fn tree(out: &mut Show<'_>, start: &Path) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    out.item(Part::Files, &start.to_string_lossy())?;
    let mut levels = match rustix::fs::open(start, flags, Mode::empty()).map_err(io::Error::from) {
        Ok(directory) => Vec::from_iter(enter(out, directory, start.to_owned(), None)?),
        Err(e) => return out.failed(e),
    };
    loop {
        let depth = levels.len();
        let Some(level) = levels.last_mut() else { return Ok(()) };
        let entry = match level.entries.next() {
            Some(Ok(entry)) => entry,
            Some(Err(e)) => {
                out.item(Part::Files, &level.path.to_string_lossy())?;
                out.failed(e.into())?;
                levels.pop();
                continue;
            }
            None => {
                levels.pop();
                continue;
            }
        };
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let path = level.path.join(OsStr::from_bytes(name.to_bytes()));
        let Ok(stat) = rustix::fs::statat(&level.directory, name, AtFlags::SYMLINK_NOFOLLOW) else {
            continue;
        };
        out.item(Part::Files, &path.to_string_lossy())?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory if depth >= DEEPEST => out.unread("it is too deep in directories")?,
            FileType::Directory => {
                let device = Some(level.device);
                match rustix::fs::openat(&level.directory, name, flags, Mode::empty()) {
                    Ok(directory) => levels.extend(enter(out, directory, path, device)?),
                    Err(Errno::ACCESS) if path == Path::new(RUN_DIR) => unlisted(out, &path)?,
                    Err(e) => out.failed(e.into())?,
                }
            }
            FileType::Symlink => match rustix::fs::readlinkat(&level.directory, name, Vec::new()) {
                Ok(target) => out.bytes(target.as_bytes())?,
                Err(e) => out.failed(e.into())?,
            },
            FileType::RegularFile => match open_file(&level.directory, name) {
                Ok(file) => contents(out, file)?,
                Err(e) => out.failed(e)?,
            },
            // Devices, sockets and pipes hold nothing at rest; their names were said.
            _ => {}
        }
    }
}

/// The hypervisor's own directory can be entered and not be listed; what it holds is known.
fn unlisted(out: &mut Show<'_>, directory: &Path) -> io::Result<()> {
    for name in [SOCKET, NONCE] {
        let path = directory.join(name);
        out.item(Part::Files, &path.to_string_lossy())?;
        if name == NONCE {
            match File::open(&path) {
                Ok(file) => contents(out, file)?,
                Err(e) => out.failed(e)?,
            }
        }
    }
    Ok(())
}

/// A directory's level, unless its file system has no files.
fn enter(out: &mut Show<'_>, directory: OwnedFd, path: PathBuf, above: Option<u64>) -> io::Result<Option<Level>> {
    let open = || -> rustix::io::Result<Option<(Dir, u64)>> {
        let device = rustix::fs::fstat(&directory)?.st_dev;
        if Some(device) != above && NO_FILES.contains(&(rustix::fs::fstatfs(&directory)?.f_type as i64)) {
            return Ok(None);
        }
        Ok(Some((Dir::read_from(&directory)?, device)))
    };
    match open() {
        Ok(opened) => Ok(opened.map(|(entries, device)| Level {
            entries,
            directory,
            device,
            path,
        })),
        Err(e) => {
            out.failed(e.into())?;
            Ok(None)
        }
    }
}

/// Opens without a trace where that is allowed, never following a link nor waiting for a pipe's other end.
fn open_file(directory: impl AsFd, name: &CStr) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let opened = match rustix::fs::openat(&directory, name, flags | OFlags::NOATIME, Mode::empty()) {
        Err(Errno::PERM) => rustix::fs::openat(&directory, name, flags, Mode::empty()),
        opened => opened,
    };
    Ok(File::from(opened?))
}

/// What a file holds, without its holes, and its extended attributes.
fn contents(out: &mut Show<'_>, mut file: File) -> io::Result<()> {
    // Somebody may have put something else in its place.
    match rustix::fs::fstat(&file) {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => {}
        _ => return Ok(()),
    }
    let mut at = 0;
    loop {
        match rustix::fs::seek(&file, SeekFrom::Data(at)) {
            Ok(data) => out.hole(data - at)?,
            // No more data.
            Err(Errno::NXIO) => break,
            // A file system that knows no holes.
            Err(_) => {
                let _ = rustix::fs::seek(&file, SeekFrom::Start(at));
                out.rest(&mut file, u64::MAX)?;
                break;
            }
        }
        let data = rustix::fs::tell(&file).unwrap_or(at);
        let end = rustix::fs::seek(&file, SeekFrom::Hole(data)).unwrap_or(data);
        if end <= data || rustix::fs::seek(&file, SeekFrom::Start(data)).is_err() {
            break;
        }
        if !out.rest(&mut file, end - data)? {
            break;
        }
        at = end;
    }
    attributes(out, &file)
}

fn attributes(out: &mut Show<'_>, file: &File) -> io::Result<()> {
    let mut names = [0_u8; 4096];
    let Ok(length @ 1..) = rustix::fs::flistxattr(file, &mut names[..]) else {
        return Ok(());
    };
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        out.bytes(b"\n")?;
        out.bytes(name)?;
        let mut value = [0_u8; 4096];
        if let Ok(length) = rustix::fs::fgetxattr(file, name, &mut value[..]) {
            out.bytes(b"=")?;
            out.bytes(&value[..length])?;
        }
    }
    Ok(())
}
