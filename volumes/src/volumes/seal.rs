//! What is not to change any more. Must not know what a volume is of.
//!
//! A sealed volume is read-only, and `trusted.choir.sealed` of `DIR/ID` says of root and home in which
//! transaction of the file system each was last changed. The kernel counts a change of any file, also
//! one that root makes after it took the read-only flag away, and no flag that it sets again hides it.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{XattrFlags, fsetxattr, fsync, syncfs};

use super::limits::numbers;
use super::{READONLY, Volumes};
use crate::backend::Backend;
use crate::kernel;
use crate::wire::{Code, Failure, Response, TREES, VolumeId};

const SEALED: &str = "trusted.choir.sealed";

impl Volumes {
    pub(super) fn seal(&self, id: &VolumeId) -> Result<Response, Failure> {
        let _hold = self.change(id)?;
        let volume = self.existing(id)?;
        self.unchanged(id, &volume)?;
        if !numbers(&volume, SEALED)
            .map_err(|e| Failure::io("examine the volume", e))?
            .is_empty()
        {
            return Ok(Response::Done {});
        }
        let work = || -> io::Result<()> {
            // What was written before and reaches the disk later would count as a change.
            syncfs(&self.handle)?;
            self.freeze(&volume)?;
            if let Backend::Btrfs { .. } = self.backend {
                let directory = File::open(&volume)?;
                let [root, home] = changed(&volume)?;
                fsetxattr(
                    &directory,
                    SEALED,
                    format!("{root} {home}").as_bytes(),
                    XattrFlags::empty(),
                )?;
                fsync(&directory)?;
            }
            Ok(())
        };
        work().map_err(|e| Failure::io("seal the volume", e))?;
        Ok(Response::Done {})
    }

    /// Refuses a sealed volume that something changed all the same.
    pub(super) fn unchanged(&self, id: &VolumeId, volume: &Path) -> Result<(), Failure> {
        let examined = || -> io::Result<bool> {
            match (&self.backend, numbers(volume, SEALED)?.as_slice()) {
                (Backend::Plain { .. }, _) | (_, []) => Ok(true),
                (Backend::Btrfs { .. }, sealed) => Ok(changed(volume)? == sealed),
            }
        };
        if examined().map_err(|e| Failure::io("examine the volume", e))? {
            return Ok(());
        }
        let message = format!(
            "Volume {} was changed on the host after it was sealed; make it again from where it came.",
            id.as_str()
        );
        Err(Failure::new(Code::Refused, message))
    }

    /// Lets nothing change the trees any more.
    pub(super) fn freeze(&self, volume: &Path) -> io::Result<()> {
        match self.backend {
            Backend::Btrfs { .. } => {
                for tree in TREES {
                    kernel::set_readonly(File::open(volume.join(tree))?.as_fd())?;
                }
                Ok(())
            }
            Backend::Plain { .. } => File::create(volume.join(READONLY)).map(drop),
        }
    }
}

fn changed(volume: &Path) -> io::Result<[u64; 2]> {
    let of = |tree: &str| Ok::<_, io::Error>(kernel::changed(File::open(volume.join(tree))?.as_fd())?);
    Ok([of(TREES[0])?, of(TREES[1])?])
}
