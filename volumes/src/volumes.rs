//! The nine verbs. A volume is `DIR/ID/{root,home}`; a name in DIR that begins with a dot is half
//! made or half deleted and is cleared at the next start. Must not know sockets.

mod limits;
mod seal;

use std::collections::HashMap;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{
    CWD, FlockOperation, Gid, Mode, RenameFlags, Uid, chmod, fchown, flock, fsync, open, renameat_with, syncfs,
};
use rustix::io::Errno;

use self::limits::inherited;
use crate::backend::Backend;
use crate::diff::diff;
use crate::kernel;
use crate::pack::pack;
use crate::shift::{self, Base};
use crate::unpack::{SPARE_ROOM, unpack};
use crate::walk::DIRECTORY;
use crate::wire::{Code, Failure, HOME, ROOT, Request, Response, Source, TREES, VolumeId};

/// The incoming root of a replacement, and right after the exchange the outgoing one.
const SPARE: &str = "root.new";
/// Marks a read-only volume where the file system cannot.
const READONLY: &str = "readonly";
/// Who owns `home`, before any shift.
const USER: u32 = 1000;

/// Everything below one directory.
pub struct Volumes {
    dir: PathBuf,
    handle: File,
    backend: Backend,
    /// Volumes in use by a request: how many only read it, or `None` while one changes it.
    held: Mutex<HashMap<String, Option<u32>>>,
}

/// A claim on one volume, given back when dropped.
struct Hold<'a> {
    volumes: &'a Volumes,
    id: &'a str,
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let mut held = self.volumes.held();
        match held.get_mut(self.id) {
            Some(Some(readers)) if *readers > 1 => *readers -= 1,
            _ => {
                held.remove(self.id);
            }
        }
    }
}

impl Volumes {
    /// Takes the directory into use and clears what a crash left. The error is for the operator.
    pub fn open(dir: &Path, plain: bool) -> Result<Self, String> {
        let cannot = |e: &dyn std::fmt::Display| format!("cannot use {}: {e}", dir.display());
        let handle = File::open(dir).map_err(|e| cannot(&e))?;
        if flock(&handle, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(cannot(&"another choir-volumes serves it"));
        }
        let backend = Backend::detect(dir, &handle, plain)?;
        chmod(dir, Mode::from_raw_mode(0o711)).map_err(|e| cannot(&e))?;
        let volumes = Self {
            dir: dir.to_owned(),
            handle,
            backend,
            held: Mutex::default(),
        };
        volumes.clear_leftovers().map_err(|e| cannot(&e))?;
        Ok(volumes)
    }

    /// Does what a request asks; with the descriptor that came with it.
    pub fn answer(&self, request: Request, descriptor: Option<OwnedFd>) -> Response {
        let outcome = match request {
            Request::Create { from, base, .. } if base.is_some() != (from == Some(Source::Volume)) => Err(
                Failure::new(Code::Invalid, "`base` comes with `from` a volume, and only then."),
            ),
            Request::Create {
                volume,
                from: Some(from),
                most,
                base,
                size,
            } => self.create_from(&volume, descriptor, from, most, base.map(|base| (base, size))),
            Request::Pack { volume } => self.pack(&volume, descriptor),
            _ if descriptor.is_some() => Err(Failure::new(
                Code::Invalid,
                "Only `create` with `from` and `pack` take a descriptor.",
            )),
            Request::Hello {} => Ok(Response::Hello {
                backend: self.backend.name(),
                version: env!("CARGO_PKG_VERSION"),
            }),
            Request::Create { volume, .. } => self.create(&volume),
            Request::Snapshot {
                source,
                volume,
                readonly,
                only,
                replace,
            } => match (only, replace) {
                (None, None) => self.snapshot(&source, &volume, readonly),
                (Some(_), None) if !readonly => self.snapshot_root(&source, &volume),
                (None, Some(_)) if !readonly => self.replace_root(&source, &volume),
                _ => Err(Failure::new(
                    Code::Invalid,
                    "`readonly`, `only` and `replace` exclude each other.",
                )),
            },
            Request::Seal { volume } => self.seal(&volume),
            Request::Delete { volume } => self.delete(&volume),
            Request::Limit { volume, bytes } => self.limit(&volume, bytes),
            Request::Usage { volume: Some(id) } => self.usage(&id),
            Request::Usage { volume: None } => self.pool(),
            Request::Shift { volume, base, size } => self.shift(&volume, base, size),
            Request::Diff { from, to, most } => self.diff(&from, &to, most),
        };
        outcome.unwrap_or_else(|error| Response::Error { error })
    }

    fn create(&self, id: &VolumeId) -> Result<Response, Failure> {
        let _hold = self.change(id)?;
        self.assemble(id, |draft| {
            self.backend
                .make(draft, ROOT)
                .map_err(|e| Failure::io("make the root", e))?;
            self.make_home(draft, 0)?;
            Ok(Response::Done {})
        })
    }

    fn create_from(
        &self,
        id: &VolumeId,
        descriptor: Option<OwnedFd>,
        from: Source,
        most: u64,
        owners: Option<(u32, u32)>,
    ) -> Result<Response, Failure> {
        let _hold = self.change(id)?;
        let missing = || {
            let message = format!("No descriptor came with the request to create from: {}.", from.name());
            Failure::new(Code::Invalid, message)
        };
        let source = descriptor.ok_or_else(missing)?;
        let room = self.room().map_err(|e| Failure::io("look for room", e))?;
        if from != Source::Tar && room == 0 {
            let message = format!("The disk of the volumes has no room to create from: {}.", from.name());
            return Err(Failure::new(Code::NoSpace, message));
        }
        let most = if from == Source::Tar { most } else { most.min(room) };
        self.assemble(id, |draft| {
            self.backend
                .make(draft, ROOT)
                .map_err(|e| Failure::io("make the root", e))?;
            self.make_home(draft, 0)?;
            let into = match from {
                Source::Tar | Source::Image => draft.join(ROOT),
                Source::Volume => draft.to_owned(),
            };
            let bound = |most| self.bound(draft, most).map_err(|e| Failure::io("bound the volume", e));
            bound(Some(most))?;
            let (bytes, sha256) = unpack(&into, source, from, most)?;
            bound(None)?;
            if let Some((base, size)) = owners {
                shift_trees(draft, base, size)?;
            }
            syncfs(&self.handle).map_err(|e| Failure::io("flush the volume", e))?;
            if from == Source::Volume {
                self.freeze(draft)
                    .map_err(|e| Failure::io("make the volume read-only", e))?;
            }
            Ok(Response::Unpacked { bytes, sha256 })
        })
    }

    fn pack(&self, id: &VolumeId, descriptor: Option<OwnedFd>) -> Result<Response, Failure> {
        let _hold = self.read(id)?;
        let volume = self.existing(id)?;
        let missing = || Failure::new(Code::Invalid, "No descriptor came with the request to pack.");
        let into = descriptor.ok_or_else(missing)?;
        let refused = |why: &str| {
            let message = format!("Volume {} {why}.", id.as_str());
            Failure::new(Code::Refused, message)
        };
        if !self.is_readonly(&volume)? {
            return Err(refused("may change meanwhile; pack a read-only snapshot of it"));
        }
        let mut bases = [0; 2];
        for (base, tree) in bases.iter_mut().zip(TREES) {
            let Base { from, to } = Base::at(&volume.join(tree)).map_err(|e| Failure::io("read the base", e))?;
            if from != to {
                return Err(refused(
                    "was taken in the middle of a shift; pack a snapshot that was taken later",
                ));
            }
            *base = to;
        }
        let bytes = pack(&volume, bases, into)?;
        Ok(Response::Packed { bytes })
    }

    fn snapshot(&self, from: &VolumeId, id: &VolumeId, readonly: bool) -> Result<Response, Failure> {
        let (_read, _write) = (self.read(from)?, self.change(id)?);
        let source = self.existing(from)?;
        self.unchanged(from, &source)?;
        self.assemble(id, |draft| {
            for tree in TREES {
                self.backend
                    .copy(&source.join(tree), draft, tree, readonly)
                    .map_err(|e| Failure::io("copy the volume", e))?;
            }
            self.inherit(&source, draft, [true, true])?;
            if readonly && matches!(self.backend, Backend::Plain { .. }) {
                self.freeze(draft).map_err(|e| Failure::io("mark the copy", e))?;
            }
            Ok(Response::Done {})
        })
    }

    fn snapshot_root(&self, from: &VolumeId, id: &VolumeId) -> Result<Response, Failure> {
        let (_read, _write) = (self.read(from)?, self.change(id)?);
        let volume = self.existing(from)?;
        self.unchanged(from, &volume)?;
        let source = volume.join(ROOT);
        self.assemble(id, |draft| {
            let copied = self.backend.copy(&source, draft, ROOT, false);
            copied.map_err(|e| Failure::io("copy the root", e))?;
            self.inherit(&volume, draft, [true, false])?;
            let base = Base::at(&draft.join(ROOT)).map_err(|e| Failure::io("read the base", e))?;
            self.make_home(draft, base.to)?;
            Ok(Response::Done {})
        })
    }

    fn replace_root(&self, from: &VolumeId, id: &VolumeId) -> Result<Response, Failure> {
        let (_read, _write) = (self.read(from)?, self.change(id)?);
        let (name, from) = (from, self.existing(from)?);
        self.unchanged(name, &from)?;
        let source = from.join(ROOT);
        let volume = self.writable(id)?;
        let work = || -> io::Result<()> {
            self.backend.remove(&volume, SPARE)?;
            if Base::at(&source)?.from == 0 {
                chmod(&volume, Mode::from_raw_mode(0o700))?;
            }
            self.backend.copy(&source, &volume, SPARE, false)?;
            let home = inherited(&volume)?[1];
            self.set_inherited(&volume, [self.charged(&from)?[0], home])?;
            if matches!(self.backend, Backend::Plain { .. }) {
                syncfs(&self.handle)?;
            }
            let directory = File::open(&volume)?;
            renameat_with(&directory, SPARE, &directory, ROOT, RenameFlags::EXCHANGE)?;
            fsync(&directory)?;
            self.backend.remove(&volume, SPARE)?;
            self.balance(&volume)?;
            open_to_owner(&volume)
        };
        work().map_err(|e| Failure::io("replace the root", e))?;
        Ok(Response::Done {})
    }

    fn delete(&self, id: &VolumeId) -> Result<Response, Failure> {
        let _hold = self.change(id)?;
        let gone = self.dir.join(format!(".gone-{}", id.as_str()));
        let work = || -> io::Result<()> {
            self.discard(&gone)?;
            match std::fs::rename(self.dir.join(id.as_str()), &gone) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                other => other?,
            }
            fsync(&self.handle)?;
            self.discard(&gone)
        };
        work().map_err(|e| Failure::io("delete the volume", e))?;
        Ok(Response::Done {})
    }

    /// Bytes that may be taken without taking what is running its room.
    fn room(&self) -> io::Result<u64> {
        let space = rustix::fs::fstatvfs(&self.handle)?;
        Ok((space.f_bavail * space.f_frsize).saturating_sub(SPARE_ROOM))
    }

    fn pool(&self) -> Result<Response, Failure> {
        let work = || -> io::Result<Response> {
            let space = rustix::fs::fstatvfs(&self.handle)?;
            Ok(Response::Pool {
                total: space.f_blocks * space.f_frsize,
                free: space.f_bavail * space.f_frsize,
                volumes: self.ids()?,
            })
        };
        work().map_err(|e| Failure::io("list the volumes", e))
    }

    fn shift(&self, id: &VolumeId, base: u32, size: u32) -> Result<Response, Failure> {
        let _hold = self.change(id)?;
        let volume = self.existing(id)?;
        if self.is_readonly(&volume)? && is_at(&volume, base).map_err(|e| Failure::io("read the base", e))? {
            return Ok(Response::Shifted { files: 0 });
        }
        let volume = self.writable(id)?;
        let files = shift_trees(&volume, base, size)?;
        open_to_owner(&volume).map_err(|e| Failure::io("shift the owners", e))?;
        Ok(Response::Shifted { files })
    }

    fn diff(&self, from: &VolumeId, to: &VolumeId, most: usize) -> Result<Response, Failure> {
        let volumes = [self.existing(from)?, self.existing(to)?];
        diff(&volumes, [HOME, ROOT], most).map(Response::Differs)
    }
}

impl Volumes {
    /// Makes a volume aside and gives it its name once it is whole.
    fn assemble(
        &self,
        id: &VolumeId,
        fill: impl FnOnce(&Path) -> Result<Response, Failure>,
    ) -> Result<Response, Failure> {
        let path = self.dir.join(id.as_str());
        if path.exists() {
            let message = format!("Volume {} exists already.", id.as_str());
            return Err(Failure::new(Code::Exists, message));
        }
        let draft = self.dir.join(format!(".new-{}", id.as_str()));
        let begin = || {
            self.discard(&draft)?;
            DirBuilder::new().mode(0o700).create(&draft)
        };
        let finish = || -> io::Result<()> {
            open_to_owner(&draft)?;
            if matches!(self.backend, Backend::Plain { .. }) {
                syncfs(&self.handle)?;
            }
            renameat_with(CWD, &draft, CWD, &path, RenameFlags::NOREPLACE)?;
            Ok(fsync(&self.handle)?)
        };
        begin().map_err(|e| Failure::io("begin the volume", e))?;
        let filled = fill(&draft).and_then(|answer| {
            finish().map_err(|e| Failure::io("finish the volume", e))?;
            Ok(answer)
        });
        if filled.is_err()
            && let Err(error) = self.discard(&draft)
        {
            eprintln!("choir-volumes: {} is left behind: {error}", draft.display());
        }
        filled
    }

    fn make_home(&self, draft: &Path, base: u32) -> Result<(), Failure> {
        let work = || -> io::Result<()> {
            self.backend.make(draft, HOME)?;
            let home = open(draft.join(HOME), DIRECTORY, Mode::empty())?;
            let id = base + USER;
            match fchown(&home, Some(Uid::from_raw(id)), Some(Gid::from_raw(id))) {
                // Without root there is only one user to develop as.
                Err(Errno::PERM) if matches!(self.backend, Backend::Plain { .. }) => {}
                other => other?,
            }
            if base != 0 {
                Base { from: base, to: base }.mark(&home)?;
            }
            Ok(())
        };
        work().map_err(|e| Failure::io("make the home", e))
    }

    /// Deletes a volume's directory, if it is there.
    fn discard(&self, volume: &Path) -> io::Result<()> {
        for tree in [ROOT, HOME, SPARE] {
            self.backend.remove(volume, tree)?;
        }
        let marker = std::fs::remove_file(volume.join(READONLY));
        for outcome in [marker, std::fs::remove_dir(volume)] {
            match outcome {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    fn clear_leftovers(&self) -> io::Result<()> {
        for entry in std::fs::read_dir(&self.dir)? {
            let (entry, name) = entry.map(|e| (e.path(), e.file_name()))?;
            let name = name.to_string_lossy();
            if name.starts_with(".new-") || name.starts_with(".gone-") {
                self.discard(&entry)?;
            }
        }
        for id in self.ids()? {
            self.backend.remove(&self.dir.join(id), SPARE)?;
        }
        Ok(())
    }

    /// The ids of all volumes, sorted.
    fn ids(&self) -> io::Result<Vec<String>> {
        let mut ids = Vec::new();
        for entry in std::fs::read_dir(&self.dir)? {
            let name = entry?.file_name().into_string();
            if let Ok(id) = VolumeId::try_from(name.unwrap_or_default()) {
                ids.push(id.as_str().to_owned());
            }
        }
        ids.sort();
        Ok(ids)
    }

    fn existing(&self, id: &VolumeId) -> Result<PathBuf, Failure> {
        let path = self.dir.join(id.as_str());
        if path.is_dir() {
            return Ok(path);
        }
        Err(absent(id))
    }

    fn writable(&self, id: &VolumeId) -> Result<PathBuf, Failure> {
        let path = self.existing(id)?;
        if self.is_readonly(&path)? {
            let message = format!("Volume {} is a read-only snapshot.", id.as_str());
            return Err(Failure::new(Code::Refused, message));
        }
        Ok(path)
    }

    fn is_readonly(&self, volume: &Path) -> Result<bool, Failure> {
        let readonly = match &self.backend {
            Backend::Plain { .. } => Ok(volume.join(READONLY).exists()),
            Backend::Btrfs { .. } => {
                File::open(volume.join(ROOT)).and_then(|root| Ok(kernel::is_readonly(root.as_fd())?))
            }
        };
        readonly.map_err(|e| Failure::io("examine the volume", e))
    }

    fn held(&self) -> MutexGuard<'_, HashMap<String, Option<u32>>> {
        // The map is whole after every statement, so a panic elsewhere does not spoil it.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<'a>(&'a self, id: &'a VolumeId) -> Result<Hold<'a>, Failure> {
        let mut held = self.held();
        if held.contains_key(id.as_str()) {
            return Err(busy(id));
        }
        held.insert(id.as_str().to_owned(), None);
        Ok(Hold {
            volumes: self,
            id: id.as_str(),
        })
    }

    fn read<'a>(&'a self, id: &'a VolumeId) -> Result<Hold<'a>, Failure> {
        match self.held().entry(id.as_str().to_owned()).or_insert(Some(0)) {
            Some(readers) => *readers += 1,
            None => return Err(busy(id)),
        }
        Ok(Hold {
            volumes: self,
            id: id.as_str(),
        })
    }
}

fn absent(id: &VolumeId) -> Failure {
    let message = format!("There is no volume {}.", id.as_str());
    Failure::new(Code::NotFound, message)
}

fn busy(id: &VolumeId) -> Failure {
    let message = format!("Volume {} is in use by another request; try again.", id.as_str());
    Failure::new(Code::Busy, message)
}

/// Moves the owners of both trees to a range of `size` ids. Returns how many files changed.
fn shift_trees(volume: &Path, base: u32, size: u32) -> Result<u64, Failure> {
    let shift_tree = |tree: &str| shift::shift(&open(volume.join(tree), DIRECTORY, Mode::empty())?, base, size);
    match TREES.into_iter().map(shift_tree).sum::<io::Result<u64>>() {
        Ok(files) => Ok(files),
        Err(error) if Errno::from_io_error(&error) == Some(Errno::INVAL) => Err(Failure::new(
            Code::Invalid,
            "The old and the new range of ids overlap, or the new one is empty or too high.",
        )),
        Err(error) => Err(Failure::io("shift the owners", error)),
    }
}

/// Whether both trees are shifted to this base, whole.
fn is_at(volume: &Path, base: u32) -> io::Result<bool> {
    let at = |tree: &str| Ok::<_, io::Error>(Base::at(&volume.join(tree))? == Base { from: base, to: base });
    Ok(at(ROOT)? && at(HOME)?)
}

/// Until its ids are shifted, a volume may hold setuid programs of the host's root: nobody else may
/// reach them.
fn open_to_owner(volume: &Path) -> io::Result<()> {
    let bases = [Base::at(&volume.join(ROOT))?, Base::at(&volume.join(HOME))?];
    let shifted = bases.iter().all(|base| base.from != 0 && base.to != 0);
    let mode = if shifted { 0o711 } else { 0o700 };
    Ok(chmod(volume, Mode::from_raw_mode(mode))?)
}
