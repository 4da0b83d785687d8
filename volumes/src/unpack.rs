//! A tar stream or an image archive becomes a root tree. The parsing happens in a child of few
//! privileges, chrooted into the fresh tree, which is given nothing but the bytes. Those of a stream
//! are counted and hashed by the parent; those of an image are checked by the child against the
//! digests that the image is made of. Must not know volumes.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, XattrFlags, fstat, lsetxattr, openat2};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, setrlimit};
use sha2::{Digest, Sha256};
use tar::{Archive, Entry, EntryType};

use crate::image::Image;
use crate::privileges;
use crate::wire::{Code, Failure, Source};

/// How the name of a layer's entry begins that takes another one away.
const WHITEOUT: &[u8] = b".wh.";
/// What follows then, where it takes away all there is in its directory.
const OPAQUE: &[u8] = b".wh..opq";
const MAX_ENTRIES: usize = 2_000_000;
/// Memory of the child, bytes: a long name or header cannot take more.
const CHILD_MEMORY: u64 = 512 << 20;
/// Seconds of the child's work: less than its caller waits.
const CHILD_CPU: u64 = 1500;
/// Longest message that the child sends, characters.
const MAX_TOLD: usize = 900;
/// Longest message taken from the child, bytes.
const MAX_MESSAGE: u64 = 4096;
const EXIT_REFUSED: u8 = 2;
const EXIT_NO_SPACE: u8 = 3;

/// Unpacks what `source` holds into `root`, at most `most` bytes. Returns how many were read, and a
/// hex SHA-256: of all of a tar stream (a regular file or pipe), or the digest of an image (a file).
pub fn unpack(root: &Path, source: OwnedFd, from: Source, most: u64) -> Result<(u64, String), Failure> {
    let kind = fstat(&source).map(|s| FileType::from_raw_mode(s.st_mode));
    match (kind, from) {
        (Ok(FileType::RegularFile), _) | (Ok(FileType::Fifo), Source::Tar) => {}
        (_, Source::Tar) => return Err(refused("The tar descriptor is neither a file nor a pipe.")),
        (_, Source::Image) => return Err(refused("The image descriptor is not a file.")),
    }
    let source = File::from(source);
    let given = |file: &File| file.try_clone().map_err(|e| Failure::io("hand on the image", e));
    let stdin = match from {
        Source::Tar => Stdio::piped(),
        Source::Image => Stdio::from(given(&source)?),
    };
    let mut child = Command::new("/proc/self/exe")
        .args(["unpack", from.name(), &most.to_string()])
        .env_clear()
        .current_dir(root)
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| Failure::io("start the unpacker", e))?;
    let fed = match from {
        Source::Tar => feed(&mut child, &source, most).map(Some),
        Source::Image => Ok(None),
    };
    if fed.is_err() {
        // Nothing it could still say matters.
        child.kill().map_err(|e| Failure::io("stop the unpacker", e))?;
    }
    // By value: a child that says more than is listened to must not wait for ever.
    let message = child.stderr.take().map(said).transpose();
    let answer = child.stdout.take().map(said).transpose();
    let status = child.wait().map_err(|e| Failure::io("await the unpacker", e))?;
    let (fed, message) = (fed?, message?.unwrap_or_default());
    let answer = answer?.unwrap_or_default();
    match (status.code().map(u8::try_from), fed) {
        (Some(Ok(0)), Some(fed)) => Ok(fed),
        (Some(Ok(0)), None) => image_of(&answer).ok_or_else(|| refused("The unpacker told no digest.")),
        (Some(Ok(EXIT_REFUSED)), _) => Err(refused(message)),
        (Some(Ok(EXIT_NO_SPACE)), _) => Err(Failure::new(Code::NoSpace, message)),
        _ if message.is_empty() => Err(refused(format!("The unpacker died: {status}."))),
        _ => Err(Failure::new(Code::Internal, message)),
    }
}

fn said(pipe: impl Read) -> Result<String, Failure> {
    let mut bytes = Vec::new();
    let read = pipe.take(MAX_MESSAGE).read_to_end(&mut bytes);
    read.map_err(|e| Failure::io("hear the unpacker", e))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
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
    let unpacked = confine().and_then(|()| match from {
        Source::Tar => extract(&mut io::stdin().lock(), Pass::Whole, &mut 0),
        Source::Image => stack(most),
    });
    let Err(error) = unpacked else {
        return ExitCode::SUCCESS;
    };
    // Shorter than what the parent reads, whatever name is in it.
    let told: String = error.to_string().chars().take(MAX_TOLD).collect();
    eprint!(
        "Could not unpack the {}: {}.",
        from.name(),
        told.replace(char::is_control, " ")
    );
    ExitCode::from(match cause(&error) {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => EXIT_NO_SPACE,
        _ => EXIT_REFUSED,
    })
}

/// Unpacks the image on standard input, each layer over those below it, and tells its size and digest.
fn stack(most: u64) -> io::Result<()> {
    let image = Image::open(File::from(io::stdin().as_fd().try_clone_to_owned()?))?;
    // A blob that many layers name is read for each.
    if image.stored_bytes() > most {
        return Err(io::Error::other("its layers are larger than a volume may be"));
    }
    let (mut left, mut entries) = (most, 0);
    for nth in 0..image.layers() {
        // What a layer takes away is of the layers below, wherever in it that is said.
        image.layer(nth, &mut left, |tar| extract(tar, Pass::Removals, &mut 0))?;
        image.layer(nth, &mut { u64::MAX }, |tar| {
            extract(tar, Pass::Additions, &mut entries)
        })?;
    }
    println!("{} {}", most - left, image.digest);
    Ok(())
}

/// The kind of the innermost error: the tar crate wraps what the kernel said.
fn cause(error: &io::Error) -> io::ErrorKind {
    let mut kind = error.kind();
    let mut inner: Option<&(dyn std::error::Error + 'static)> = error.get_ref().map(|e| e as _);
    while let Some(error) = inner {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            kind = io.kind();
        }
        inner = error.source();
    }
    kind
}

fn confine() -> io::Result<()> {
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")?;
    privileges::keep_only(privileges::UNPACK)?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    for (resource, most) in [(Resource::As, CHILD_MEMORY), (Resource::Cpu, CHILD_CPU)] {
        let limit = Rlimit {
            current: Some(most),
            maximum: Some(most),
        };
        setrlimit(resource, limit)?;
    }
    Ok(())
}

/// What is taken of a tar's entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pass {
    /// All; it is no layer.
    Whole,
    /// What a layer takes away of those below it.
    Removals,
    /// What it adds.
    Additions,
}

fn extract(stream: &mut dyn Read, pass: Pass, entries: &mut usize) -> io::Result<()> {
    let mut archive = Archive::new(&mut *stream);
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(true);
    archive.set_overwrite(true);
    for entry in archive.entries()? {
        *entries += 1;
        if *entries > MAX_ENTRIES {
            return Err(io::Error::other("it has more than 2,000,000 entries"));
        }
        extract_one(&mut entry?, pass)?;
    }
    // What follows the end marker belongs to the digest all the same.
    io::copy(stream, &mut io::sink())?;
    Ok(())
}

fn extract_one(entry: &mut Entry<'_, impl Read>, pass: Pass) -> io::Result<()> {
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
    let removes = match (pass, target.file_name().map(|name| name.as_bytes())) {
        (Pass::Whole, _) | (_, None) => None,
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
        Err(Errno::NOENT) => std::fs::create_dir_all(parent)?,
        other => drop(other?),
    }
    if let Some(removed) = removes {
        return remove(parent, removed);
    }
    if pass == Pass::Additions {
        make_way(&target, entry.header().entry_type() == EntryType::Directory)?;
    }
    let capability = capability(entry)?;
    entry.unpack(&target)?;
    if let Some(value) = capability
        && entry.header().entry_type() != EntryType::Symlink
    {
        lsetxattr(&target, "security.capability", &value, XattrFlags::empty())?;
    }
    Ok(())
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

fn capability(entry: &mut Entry<'_, impl Read>) -> io::Result<Option<Vec<u8>>> {
    let Some(extensions) = entry.pax_extensions()? else {
        return Ok(None);
    };
    for extension in extensions {
        let extension = extension?;
        if extension.key_bytes() == b"SCHILY.xattr.security.capability" {
            return Ok(Some(extension.value_bytes().to_vec()));
        }
    }
    Ok(None)
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
}
