//! A tar stream or an image archive becomes a root tree, and what `pack.rs` wrote both trees of a volume. The parsing
//! happens in a child of few privileges, chrooted into the fresh tree, which is given nothing but the bytes. Those of a
//! stream are counted and hashed by the parent; those of an image are checked by the child against the digests that the
//! image is made of. Must not know volumes.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::process::{Child, ExitCode, Stdio};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT, XattrFlags, fstat, lsetxattr,
    openat2, utimensat,
};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use tar::{Archive, Entry, EntryType};

use crate::confined;
use crate::image::Image;
use crate::pack::{CAPABILITY, CAPABILITY_HEX, MAX_ENTRIES};
use crate::privileges;
use crate::wire::{Code, Failure, Source, TREES, id_range};

/// How the name of a layer's entry begins that takes another one away.
const WHITEOUT: &[u8] = b".wh.";
/// What follows then, where it takes away all there is in its directory.
const OPAQUE: &[u8] = b".wh..opq";
/// Bytes that unpacking an image or a volume leaves free.
pub const SPARE_ROOM: u64 = 1 << 30;
/// How often, in bytes, it is looked whether they are.
const LOOK_EVERY: usize = 16 << 20;
/// Bytes of a packed volume beside what its files hold: 4 KiB for each of the most entries.
const AROUND: u64 = (MAX_ENTRIES as u64) << 12;

/// Unpacks what `source` holds into `root`, at most `most` bytes. Returns how many were read, and a
/// hex SHA-256: of all of a tar stream (a regular file or pipe), or the digest of an image (a file).
/// Of a packed volume `most` bounds what its files hold, and `root` is where both trees are.
pub fn unpack(root: &Path, source: OwnedFd, from: Source, most: u64) -> Result<(u64, String), Failure> {
    let kind = fstat(&source).map(|s| FileType::from_raw_mode(s.st_mode));
    match (kind, from) {
        (Ok(FileType::RegularFile), _) | (Ok(FileType::Fifo), Source::Tar | Source::Volume) => {}
        (_, Source::Tar | Source::Volume) => return Err(refused("The tar descriptor is neither a file nor a pipe.")),
        (_, Source::Image) => return Err(refused("The image descriptor is not a file.")),
    }
    let source = File::from(source);
    let given = |file: &File| file.try_clone().map_err(|e| Failure::io("hand on the image", e));
    let stdin = match from {
        Source::Tar | Source::Volume => Stdio::piped(),
        Source::Image => Stdio::from(given(&source)?),
    };
    let mut child = confined::command(root, &["unpack", from.name(), &most.to_string()])
        .stdin(stdin)
        .stdout(Stdio::null())
        .spawn()
        .map_err(|e| Failure::io("start the unpacker", e))?;
    let fed = match from {
        Source::Tar => feed(&mut child, &source, most).map(Some),
        Source::Volume => feed(&mut child, &source, most.saturating_add(AROUND)).map(Some),
        Source::Image => Ok(None),
    };
    if fed.is_err() {
        // Nothing it could still say matters.
        child.kill().map_err(|e| Failure::io("stop the unpacker", e))?;
    }
    let answer = confined::outcome(child);
    match fed? {
        Some(fed) => answer.map(|_| fed),
        None => image_of(&answer?).ok_or_else(|| refused("The unpacker told no digest.")),
    }
}

/// What the child told of an image: bytes unpacked, and its digest.
fn image_of(answer: &str) -> Option<(u64, String)> {
    let (bytes, digest) = answer.trim_end().split_once(' ')?;
    let whole = digest.len() == 64 && digest.bytes().all(|b| b.is_ascii_hexdigit());
    whole.then(|| Some((bytes.parse().ok()?, digest.to_owned())))?
}

fn refused(message: impl Into<String>) -> Failure {
    Failure::new(Code::Refused, message)
}

fn feed(child: &mut Child, mut tar: &File, most: u64) -> Result<(u64, String), Failure> {
    let mut digest = Sha256::new();
    let mut total = 0;
    let mut chunk = vec![0; 256 * 1024];
    let mut sink = child.stdin.take();
    loop {
        let read = match tar.read(&mut chunk) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let mut wait = [PollFd::new(&tar, PollFlags::IN)];
                poll(&mut wait, None).map_err(|e| Failure::io("await the tar stream", e))?;
                continue;
            }
            Err(error) => return Err(Failure::io("read the tar stream", error)),
        };
        total += read as u64;
        if total > most {
            return Err(refused(format!("The tar stream is longer than {most} bytes.")));
        }
        digest.update(&chunk[..read]);
        match sink.as_mut().map(|s| s.write_all(&chunk[..read])) {
            // The child gave up; its exit says why.
            Some(Err(error)) if error.kind() == io::ErrorKind::BrokenPipe => break,
            Some(Err(error)) => return Err(Failure::io("feed the unpacker", error)),
            _ => {}
        }
    }
    let mut hex = String::new();
    for byte in digest.finalize() {
        write!(hex, "{byte:02x}").map_err(|_| refused("The digest could not be written."))?;
    }
    Ok((total, hex))
}

/// The child: unpacks standard input into the current directory.
pub fn child(from: Source, most: u64) -> ExitCode {
    let stream = |pass| extract(&mut io::stdin().lock(), pass, &mut Left::of(most)).map(|()| String::new());
    let answer = confined::confine(privileges::UNPACK).and_then(|()| match from {
        Source::Tar => stream(Pass::Whole),
        Source::Volume => stream(Pass::Volume),
        Source::Image => stack(most),
    });
    confined::end(&format!("unpack the {}", from.name()), answer)
}

/// Unpacks the image on standard input, each layer over those below it, and tells its size and digest.
fn stack(most: u64) -> io::Result<String> {
    let image = Image::open(File::from(io::stdin().as_fd().try_clone_to_owned()?))?;
    // A blob that many layers name is read for each.
    if image.stored_bytes() > most {
        return Err(io::Error::other("its layers are larger than a volume may be"));
    }
    let (mut left, mut additions) = (most, Left::of(most));
    for nth in 0..image.layers() {
        // What a layer takes away is of the layers below, wherever in it that is said.
        image.layer(nth, &mut left, |tar| extract(tar, Pass::Removals, &mut Left::of(most)))?;
        image.layer(nth, &mut { u64::MAX }, |tar| {
            extract(tar, Pass::Additions, &mut additions)
        })?;
    }
    Ok(format!("{} {}", most - left, image.digest))
}

/// What is taken of a tar's entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pass {
    /// All; it is no layer.
    Whole,
    /// All, and each belongs into one of a volume's trees.
    Volume,
    /// What a layer takes away of those below it.
    Removals,
    /// What it adds.
    Additions,
}

/// What is left of what archives may hold.
struct Left {
    entries: usize,
    /// Of files.
    bytes: u64,
}

impl Left {
    fn of(bytes: u64) -> Self {
        let entries = MAX_ENTRIES;
        Self { entries, bytes }
    }

    fn take(&mut self, entry: &Entry<'_, impl Read>) -> io::Result<()> {
        let large = || io::Error::other("it is larger than a volume may be, or than there is room for");
        let stored = match entry.header().entry_type() {
            EntryType::GNUSparse => entry.header().entry_size()?,
            _ => entry.size(),
        };
        self.bytes = self.bytes.checked_sub(stored).ok_or_else(large)?;
        self.count(1)
    }

    fn count(&mut self, entries: usize) -> io::Result<()> {
        let many = || io::Error::other("it has more than 2,000,000 entries");
        self.entries = self.entries.checked_sub(entries).ok_or_else(many)?;
        Ok(())
    }
}

fn extract(stream: &mut dyn Read, pass: Pass, left: &mut Left) -> io::Result<()> {
    let mut roomy = Roomy { stream, until_look: 0 };
    let stream: &mut dyn Read = if pass == Pass::Whole { roomy.stream } else { &mut roomy };
    let mut archive = Archive::new(&mut *stream);
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(true);
    archive.set_overwrite(true);
    for entry in archive.entries()? {
        let mut entry = entry?;
        left.take(&entry)?;
        extract_one(&mut entry, pass, left)?;
    }
    if pass == Pass::Volume {
        expect_end(stream)?;
    }
    // What follows the end marker belongs to the digest all the same.
    io::copy(stream, &mut io::sink())?;
    Ok(())
}

/// Reads the second of the two blocks that end a tar: without the first, its entries ended where the stream broke off.
fn expect_end(stream: &mut dyn Read) -> io::Result<()> {
    let mut block = [1; 512];
    match stream.read_exact(&mut block) {
        Ok(()) if block == [0; 512] => Ok(()),
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => Err(error),
        _ => Err(io::Error::other("it breaks off before its end")),
    }
}

/// A stream that ends with an error once the disk has no room to spare: others write there meanwhile.
struct Roomy<'a> {
    stream: &'a mut dyn Read,
    /// Bytes.
    until_look: usize,
}

impl Read for Roomy<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.until_look == 0 {
            let space = rustix::fs::statvfs("/")?;
            if space.f_bavail * space.f_frsize < SPARE_ROOM {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.until_look = LOOK_EVERY;
        }
        let read = self.stream.read(into)?;
        self.until_look = self.until_look.saturating_sub(read);
        Ok(read)
    }
}

fn extract_one(entry: &mut Entry<'_, impl Read>, pass: Pass, left: &mut Left) -> io::Result<()> {
    let name = entry.path()?.into_owned();
    let wrong = |what: &str| Err(io::Error::other(format!("{what}: {}", name.display())));
    if !is_relative(&name) {
        return wrong("a name is absolute or has `..`");
    }
    match entry.header().entry_type() {
        EntryType::XGlobalHeader => return Ok(()),
        EntryType::Link if !entry.link_name()?.is_some_and(|to| is_relative(&to)) => {
            return wrong("a hard link's target is absolute or has `..`");
        }
        EntryType::Regular
        | EntryType::Continuous
        | EntryType::GNUSparse
        | EntryType::Link
        | EntryType::Symlink
        | EntryType::Directory => {}
        EntryType::Block | EntryType::Char => return wrong("an entry is a device node"),
        _ => return wrong("an entry is neither file, directory nor link"),
    }
    // Without a slash at its end, which would have the kernel look into what is to be replaced.
    let parts = name.components().filter(|part| matches!(part, Component::Normal(_)));
    let target: PathBuf = std::iter::once(Component::RootDir).chain(parts).collect();
    if pass == Pass::Volume
        && let Some(what) = misplaced(entry, &target)?
    {
        return wrong(what);
    }
    let removes = match (pass, target.file_name().map(|name| name.as_bytes())) {
        (Pass::Whole | Pass::Volume, _) | (_, None) => None,
        (_, Some(name)) => name.strip_prefix(WHITEOUT),
    };
    match (pass, removes) {
        (Pass::Removals, None) | (Pass::Additions, Some(_)) => return Ok(()),
        _ => {}
    }
    let Some(parent) = target.parent() else {
        return set_root(entry);
    };
    let (mut flags, mode) = (OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    if removes.is_some() {
        // Where a directory replaces a file or a link, the mark of the new one is there: nothing below it goes away.
        flags |= OFlags::DIRECTORY | OFlags::NOFOLLOW;
    }
    match openat2(CWD, parent, flags, mode, ResolveFlags::NO_SYMLINKS) {
        Err(Errno::LOOP) => return wrong("a name goes through a symbolic link"),
        Err(Errno::NOENT | Errno::NOTDIR) if removes.is_some() => return Ok(()),
        Err(Errno::NOENT) if pass == Pass::Volume => return wrong("the directory of an entry is missing"),
        Err(Errno::NOENT) => {
            left.count(parent.components().count())?;
            std::fs::create_dir_all(parent)?;
        }
        other => drop(other?),
    }
    if let Some(removed) = removes {
        return remove(parent, removed);
    }
    if pass == Pass::Additions {
        make_way(&target, entry.header().entry_type() == EntryType::Directory)?;
    }
    let extensions = extensions(entry)?;
    if extensions.has_size && entry.header().entry_type() == EntryType::GNUSparse {
        return wrong("the size of a sparse file is told twice");
    }
    entry.unpack(&target)?;
    if let Some(value) = extensions.capability
        && entry.header().entry_type() != EntryType::Symlink
        && owned_inside(entry)?
    {
        lsetxattr(&target, "security.capability", &value, XattrFlags::empty())?;
    }
    if let Some(modified) = extensions.modified {
        set_modified(&target, modified)?;
    }
    Ok(())
}

/// Whether its owner is one of those that a sandbox has. Others could be those of a range that the volume is shifted to, so
/// that its capability would be taken for shifted, too, and stay one of the host.
fn owned_inside(entry: &Entry<'_, impl Read>) -> io::Result<bool> {
    let (user, group) = (entry.header().uid()?, entry.header().gid()?);
    Ok(user.max(group) < u64::from(id_range()))
}

/// What is wrong with where an entry of a packed volume is, or with where it leads.
fn misplaced(entry: &Entry<'_, impl Read>, target: &Path) -> io::Result<Option<&'static str>> {
    if !owned_inside(entry)? {
        return Ok(Some("an owner is not one that a sandbox has"));
    }
    let Some(tree) = first(target).filter(|first| TREES.iter().any(|tree| **first == **tree)) else {
        return Ok(Some("an entry is neither in root nor in home"));
    };
    let kind = entry.header().entry_type();
    if target == Path::new("/").join(tree) && kind != EntryType::Directory {
        return Ok(Some("a tree is not a directory"));
    }
    let to = match entry.link_name()? {
        Some(to) if kind == EntryType::Link => to,
        _ => return Ok(None),
    };
    if first(&to) != Some(tree) {
        return Ok(Some("a hard link leads into another tree"));
    }
    let (flags, above) = (OFlags::PATH | OFlags::CLOEXEC, to.parent().unwrap_or(&to));
    match openat2(CWD, above, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS) {
        Err(Errno::LOOP) => Ok(Some("a hard link goes through a symbolic link")),
        _ => Ok(None),
    }
}

fn first(path: &Path) -> Option<&OsStr> {
    path.components().find_map(|part| match part {
        Component::Normal(name) => Some(name),
        _ => None,
    })
}

/// Takes away what a whiteout names: one entry of its directory, or all that layers below put there.
fn remove(directory: &Path, name: &[u8]) -> io::Result<()> {
    match name {
        OPAQUE => {
            for entry in std::fs::read_dir(directory)? {
                remove_all(&entry?.path())?;
            }
            Ok(())
        }
        // Other marks of that kind are a storage driver's own.
        _ if name.starts_with(WHITEOUT) => Ok(()),
        b"" | b"." | b".." => Err(io::Error::other("a whiteout names nothing")),
        _ => remove_all(&directory.join(OsStr::from_bytes(name))),
    }
}

/// A layer's entry replaces what is there, but a directory keeps what is in it.
fn make_way(target: &Path, directory: bool) -> io::Result<()> {
    match std::fs::symlink_metadata(target) {
        Ok(there) if there.is_dir() && directory => Ok(()),
        _ => remove_all(target),
    }
}

fn remove_all(path: &Path) -> io::Result<()> {
    let removed = match std::fs::symlink_metadata(path) {
        Ok(there) if there.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn is_relative(name: &Path) -> bool {
    !name.as_os_str().as_bytes().contains(&0)
        && name
            .components()
            .all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
}

/// The archive's own entry for the top directory.
fn set_root(entry: &Entry<'_, impl Read>) -> io::Result<()> {
    use std::os::unix::fs::{PermissionsExt, chown};
    let header = entry.header();
    let id = |number: u64| u32::try_from(number).map_err(io::Error::other);
    chown("/", Some(id(header.uid()?)?), Some(id(header.gid()?)?))?;
    std::fs::set_permissions("/", PermissionsExt::from_mode(header.mode()?))
}

/// What is told of an entry beyond its header.
#[derive(Default)]
struct Extensions {
    capability: Option<Vec<u8>>,
    modified: Option<Timespec>,
    has_size: bool,
}

fn extensions(entry: &mut Entry<'_, impl Read>) -> io::Result<Extensions> {
    let mut found = Extensions::default();
    let Some(extensions) = entry.pax_extensions()? else {
        return Ok(found);
    };
    for extension in extensions {
        let extension = extension?;
        let value = extension.value_bytes();
        match extension.key() {
            Ok(CAPABILITY) => found.capability = Some(value.to_vec()),
            Ok(CAPABILITY_HEX) => found.capability = from_hex(value),
            Ok("mtime") => found.modified = moment(value),
            Ok("size") => found.has_size = true,
            _ => {}
        }
    }
    Ok(found)
}

fn from_hex(text: &[u8]) -> Option<Vec<u8>> {
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    text.chunks(2).map(byte).collect()
}

/// Seconds and parts of them since 1970; before that, the header's whole seconds do.
fn moment(text: &[u8]) -> Option<Timespec> {
    let text = std::str::from_utf8(text).ok()?;
    let (seconds, parts) = text.split_once('.').unwrap_or((text, ""));
    let nanoseconds: u32 = format!("{parts:0<9}").get(..9)?.parse().ok()?;
    let seconds: u64 = seconds.parse().ok()?;
    Some(Timespec {
        tv_sec: seconds.try_into().ok()?,
        tv_nsec: nanoseconds.into(),
    })
}

fn set_modified(path: &Path, modified: Timespec) -> io::Result<()> {
    let times = Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: modified,
    };
    Ok(utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_below_the_top_are_relative() {
        for good in ["a", "./a/b", "a/./b", "./", "..a/b.."] {
            assert!(is_relative(Path::new(good)), "{good}");
        }
        for bad in ["/a", "../a", "a/../b", "a/..", "a\0b"] {
            assert!(!is_relative(Path::new(bad)), "{bad}");
        }
    }

    #[test]
    fn a_moment_has_nanoseconds_and_is_after_1970() {
        let told = |text: &str| moment(text.as_bytes()).map(|time| (time.tv_sec, time.tv_nsec));
        assert_eq!(told("12"), Some((12, 0)));
        assert_eq!(told("0.5"), Some((0, 500_000_000)));
        assert_eq!(told("12.0000000019"), Some((12, 1)));
        for bad in ["", "-1.5", "1.-5", "1.5e3", "x", "1.\u{e9}"] {
            assert_eq!(told(bad), None, "{bad}");
        }
    }
}
