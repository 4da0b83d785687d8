//! A tar stream becomes a root tree. The parsing happens in a child of few privileges, chrooted
//! into the fresh tree, which is given nothing but the bytes; the parent counts and hashes them.
//! Must not know volumes.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};
use std::process::{Child, Command, ExitCode, Stdio};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, XattrFlags, fstat, lsetxattr, openat2};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, setrlimit};
use sha2::{Digest, Sha256};
use tar::{Archive, Entry, EntryType};

use crate::privileges;
use crate::wire::{Code, Failure};

const MAX_BYTES: u64 = 64 << 30;
const MAX_ENTRIES: usize = 2_000_000;
/// Memory of the child, bytes: a long name or header cannot take more.
const CHILD_MEMORY: u64 = 512 << 20;
/// Longest message taken from the child, bytes.
const MAX_MESSAGE: u64 = 4096;
const EXIT_REFUSED: u8 = 2;
const EXIT_NO_SPACE: u8 = 3;

/// Feeds `tar` (a regular file or pipe) to a child that unpacks into `root`. Returns the stream's
/// length and the hex SHA-256 of all of it.
pub fn unpack(root: &Path, tar: OwnedFd) -> Result<(u64, String), Failure> {
    let kind = fstat(&tar).map(|s| FileType::from_raw_mode(s.st_mode));
    if !matches!(kind, Ok(FileType::RegularFile | FileType::Fifo)) {
        return Err(refused("The tar descriptor is neither a file nor a pipe."));
    }
    let mut child = Command::new("/proc/self/exe")
        .arg("unpack")
        .env_clear()
        .current_dir(root)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| Failure::io("start the unpacker", e))?;
    let fed = feed(&mut child, &File::from(tar));
    if fed.is_err() {
        // Nothing it could still say matters.
        child.kill().map_err(|e| Failure::io("stop the unpacker", e))?;
    }
    let mut message = String::new();
    if let Some(said) = child.stderr.take() {
        let mut bytes = Vec::new();
        let read = said.take(MAX_MESSAGE).read_to_end(&mut bytes);
        read.map_err(|e| Failure::io("hear the unpacker", e))?;
        message = String::from_utf8_lossy(&bytes).into_owned();
    }
    let status = child.wait().map_err(|e| Failure::io("await the unpacker", e))?;
    let fed = fed?;
    match status.code().map(u8::try_from) {
        Some(Ok(0)) => Ok(fed),
        Some(Ok(EXIT_REFUSED)) => Err(refused(message)),
        Some(Ok(EXIT_NO_SPACE)) => Err(Failure::new(Code::NoSpace, message)),
        _ if message.is_empty() => Err(refused(format!("The unpacker died: {status}."))),
        _ => Err(Failure::new(Code::Internal, message)),
    }
}

fn refused(message: impl Into<String>) -> Failure {
    Failure::new(Code::Refused, message)
}

fn feed(child: &mut Child, mut tar: &File) -> Result<(u64, String), Failure> {
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
        if total > MAX_BYTES {
            return Err(refused("The tar stream is longer than 64 GiB."));
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
pub fn child() -> ExitCode {
    let Err(error) = confine().and_then(|()| extract(&mut io::stdin().lock())) else {
        return ExitCode::SUCCESS;
    };
    eprint!("Could not unpack the tar: {}.", error.to_string().escape_debug());
    ExitCode::from(match cause(&error) {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => EXIT_NO_SPACE,
        _ => EXIT_REFUSED,
    })
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
    let memory = Some(CHILD_MEMORY);
    let limit = Rlimit {
        current: memory,
        maximum: memory,
    };
    Ok(setrlimit(Resource::As, limit)?)
}

fn extract(stream: &mut dyn Read) -> io::Result<()> {
    let mut archive = Archive::new(&mut *stream);
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(true);
    archive.set_overwrite(true);
    for (number, entry) in archive.entries()?.enumerate() {
        if number >= MAX_ENTRIES {
            return Err(io::Error::other("it has more than 2,000,000 entries"));
        }
        extract_one(&mut entry?)?;
    }
    // What follows the end marker belongs to the digest all the same.
    io::copy(stream, &mut io::sink())?;
    Ok(())
}

fn extract_one(entry: &mut Entry<'_, impl Read>) -> io::Result<()> {
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
    let target = Path::new("/").join(name.strip_prefix(".").unwrap_or(&name));
    let Some(parent) = target.parent() else {
        return set_root(entry);
    };
    let (flags, mode) = (OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    match openat2(CWD, parent, flags, mode, ResolveFlags::NO_SYMLINKS) {
        Err(Errno::LOOP) => return wrong("a name goes through a symbolic link"),
        Err(Errno::NOENT) => std::fs::create_dir_all(parent)?,
        other => drop(other?),
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
