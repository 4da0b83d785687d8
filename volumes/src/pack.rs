//! A volume becomes one tar: `root/` and all below it, then `home/`. A child of few privileges, chrooted into the volume,
//! walks the trees by descriptor and writes to where it was told. Owners are as inside; sockets, FIFOs, device nodes and
//! nested subvolumes are no data and left out. Must not know where volumes are, or who reads.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufWriter, IntoInnerError, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{ExitCode, Stdio};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FileType, Mode, OFlags, Stat, fstat, open, openat, readlinkat};
use tar::{Builder, EntryType, Header};

use crate::confined;
use crate::level::{is_directory, kind};
use crate::privileges;
use crate::shift::Range;
use crate::walk::{DIRECTORY, Entry, walk};
use crate::wire::{Code, Failure, TREES, id_range};

/// Of one archive.
pub const MAX_ENTRIES: usize = 2_000_000;
/// How a file capability is written.
pub const CAPABILITY: &str = "SCHILY.xattr.security.capability";
/// How it is written in hexadecimal where a byte of it is a newline, at which readers would take it to end.
pub const CAPABILITY_HEX: &str = "CHOIR.security.capability";
/// Longest path, bytes: with the slash before it and the zero behind it the kernel takes no longer one.
const MAX_PATH: usize = 4094;
/// On btrfs, what stands for a subvolume in a snapshot of what it was nested in; no file has this inode.
const EMPTY_SUBVOLUME: u64 = 2;
/// Bytes that are written at once.
const CHUNK: usize = 256 * 1024;

/// Writes a volume to a regular file or pipe; root's and home's ids begin at these bases. Returns how many bytes.
pub fn pack(volume: &Path, bases: [u32; 2], into: OwnedFd) -> Result<u64, Failure> {
    let refused = |message: &str| Failure::new(Code::Refused, message);
    match fstat(&into).map(|stat| kind(&stat)) {
        Ok(FileType::RegularFile | FileType::Fifo) => {}
        _ => return Err(refused("The descriptor to pack into is neither a file nor a pipe.")),
    }
    let [root, home] = bases.map(|base| base.to_string());
    let child = confined::command(volume, &["pack", &root, &home])
        .stdin(Stdio::null())
        .stdout(Stdio::from(into))
        .spawn()
        .map_err(|e| Failure::io("start the packer", e))?;
    let answer = confined::outcome(child)?;
    answer
        .parse()
        .map_err(|_| refused("The packer told no number of bytes."))
}

/// The child: packs the current directory to standard output.
pub fn child(bases: [u32; 2]) -> ExitCode {
    let packed = confined::confine(privileges::PACK).and_then(|()| write(bases));
    confined::end("pack the volume", packed.map(|bytes| bytes.to_string()))
}

fn write(bases: [u32; 2]) -> io::Result<u64> {
    let into = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let mut packer = Packer {
        tar: Builder::new(BufWriter::with_capacity(CHUNK, Sink { into, bytes: 0 })),
        entries: MAX_ENTRIES,
    };
    let mut trees = TREES.into_iter().zip(bases);
    if let Err(error) = trees.try_for_each(|(name, base)| packer.tree(name, base)) {
        // Its drop would write the end of a tar that is whole.
        std::mem::forget(packer.tar);
        return Err(error);
    }
    let sink = packer.tar.into_inner()?.into_inner();
    Ok(sink.map_err(IntoInnerError::into_error)?.bytes)
}

struct Packer<W: Write> {
    tar: Builder<W>,
    /// How many may still come.
    entries: usize,
}

/// The tree that is being packed.
struct Tree {
    name: &'static str,
    ids: Range,
    /// The first path of each file that has several, by inode.
    linked: HashMap<u64, Vec<u8>>,
}

impl Tree {
    fn header(&self, stat: &Stat, kind: EntryType) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(stat.st_mode & 0o7777);
        header.set_uid(self.ids.inner(stat.st_uid).into());
        header.set_gid(self.ids.inner(stat.st_gid).into());
        header.set_mtime(stat.st_mtime as u64);
        header.set_size(0);
        header
    }
}

impl<W: Write> Packer<W> {
    fn tree(&mut self, name: &'static str, base: u32) -> io::Result<()> {
        let size = id_range();
        let mut tree = Tree {
            name,
            ids: Range { base, size },
            linked: HashMap::new(),
        };
        let top = open(name, DIRECTORY, Mode::empty())?;
        self.directory(&tree, name.as_bytes(), &fstat(&top)?)?;
        walk(top, |entry| self.entry(&mut tree, entry))
    }

    fn entry(&mut self, tree: &mut Tree, entry: &Entry<'_>) -> io::Result<()> {
        let stat = entry.stat;
        if entry.foreign || (is_directory(stat) && stat.st_ino == EMPTY_SUBVOLUME) {
            return Ok(());
        }
        let path = [tree.name.as_bytes(), b"/", entry.directory, entry.name.to_bytes()].concat();
        match kind(stat) {
            FileType::Directory => self.directory(tree, &path, stat),
            FileType::RegularFile | FileType::Symlink => self.file(tree, &path, entry),
            _ => Ok(()),
        }
    }

    fn directory(&mut self, tree: &Tree, path: &[u8], stat: &Stat) -> io::Result<()> {
        self.count(path)?;
        let mut header = tree.header(stat, EntryType::Directory);
        let path = [path, b"/"].concat();
        self.tar.append_data(&mut header, as_path(&path), io::empty())
    }

    /// A regular file or a symbolic link, or a further name of one.
    fn file(&mut self, tree: &mut Tree, path: &[u8], entry: &Entry<'_>) -> io::Result<()> {
        self.count(path)?;
        let stat = entry.stat;
        if stat.st_nlink > 1 {
            if let Some(first) = tree.linked.get(&stat.st_ino) {
                return self.link(tree.header(stat, EntryType::Link), path, first);
            }
            tree.linked.insert(stat.st_ino, path.to_owned());
        }
        if kind(stat) == FileType::Symlink {
            let to = readlinkat(entry.parent, entry.name, Vec::<u8>::new())?;
            self.extend(modified(stat).as_slice())?;
            return self.link(tree.header(stat, EntryType::Symlink), path, to.to_bytes());
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let mut file = File::from(openat(entry.parent, entry.name, flags, Mode::empty())?);
        if kind(&fstat(&file)?) != FileType::RegularFile {
            return Err(io::Error::other("a file was replaced meanwhile"));
        }
        // The crate makes the header of the file, with the ids outside; these have precedence.
        let owner = |id: u32| tree.ids.inner(id).to_string().into_bytes();
        let mut told = vec![("uid", owner(stat.st_uid)), ("gid", owner(stat.st_gid))];
        told.extend(modified(stat));
        if let Some(value) = tree.ids.capability(&file)? {
            told.push(if value.contains(&b'\n') {
                (CAPABILITY_HEX, hex(&value).into_bytes())
            } else {
                (CAPABILITY, value)
            });
        }
        self.extend(&told)?;
        self.tar.append_file(as_path(path), &mut file)
    }

    /// A link to what is written as it is: the crate's own way leaves out what it takes for superfluous.
    fn link(&mut self, mut header: Header, path: &[u8], to: &[u8]) -> io::Result<()> {
        if header.set_link_name_literal(to).is_err() {
            let to = [to, b"\0"].concat();
            let mut long = Header::new_gnu();
            long.set_path("@LongLink")?;
            long.set_entry_type(EntryType::GNULongLink);
            long.set_size(to.len() as u64);
            long.set_cksum();
            self.tar.append(&long, to.as_slice())?;
        }
        self.tar.append_data(&mut header, as_path(path), io::empty())
    }

    /// Says something of the entry that follows.
    fn extend(&mut self, told: &[(&str, Vec<u8>)]) -> io::Result<()> {
        let told = told.iter().map(|(key, value)| (*key, value.as_slice()));
        self.tar.append_pax_extensions(told)
    }

    fn count(&mut self, path: &[u8]) -> io::Result<()> {
        if path.len() > MAX_PATH {
            let path = String::from_utf8_lossy(path);
            let message =
                format!("a path is longer than {MAX_PATH} bytes; move what is there closer to the top: {path}");
            return Err(io::Error::other(message));
        }
        let many = || io::Error::other("it holds more than 2,000,000 files; delete some");
        self.entries = self.entries.checked_sub(1).ok_or_else(many)?;
        Ok(())
    }
}

/// The time of the last write, where a header has no room for it; 0 would be read as unknown.
fn modified(stat: &Stat) -> Option<(&'static str, Vec<u8>)> {
    let (seconds, nanoseconds) = (stat.st_mtime, stat.st_mtime_nsec);
    let told = seconds >= 0 && (seconds == 0 || nanoseconds != 0);
    told.then(|| ("mtime", format!("{seconds}.{nanoseconds:09}").into_bytes()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn as_path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

/// Where the tar goes, which need not wait for room by itself, and how much went there.
struct Sink {
    into: File,
    bytes: u64,
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.into.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    poll(&mut [PollFd::new(&self.into, PollFlags::OUT)], None)?;
                }
                written => {
                    self.bytes += *written.as_ref().unwrap_or(&0) as u64;
                    return written;
                }
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
