//! Volumes in memory: names, limits, and one text for each part. It must not be used outside tests.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use choir_core::snapshot::{Change, Diff, Differs};
use choir_core::{IdRange, SandboxId};
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;

use crate::template::HOME;
use crate::{Error, Result, Space, Usage, Volumes};

/// Clones are the same disk.
#[derive(Debug, Clone, Default)]
pub struct SimVolumes(Arc<Mutex<Disk>>);

#[derive(Debug, Default)]
struct Disk {
    volumes: BTreeMap<String, Volume>,
    /// Copies from now on that fail.
    failing: u32,
    /// Of 100 bytes, how many are taken.
    full_percent: u64,
}

#[derive(Debug, Clone, Default)]
struct Volume {
    root: String,
    home: String,
    readonly: bool,
    limit: Option<u64>,
}

/// What is packed of a volume; a newline behind it is its end.
#[derive(Serialize, Deserialize)]
struct Packed {
    root: String,
    home: String,
}

impl SimVolumes {
    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, volume: &str, f: impl FnOnce(&mut Volume) -> T) -> Result<T> {
        self.disk().volumes.get_mut(volume).map(f).ok_or(Error::NotFound)
    }

    /// As if a program had written it.
    pub fn write_home(&self, volume: &str, text: &str) -> Result<()> {
        self.with(volume, |v| text.clone_into(&mut v.home))
    }

    /// What both parts of a volume hold: the system of a release is its name.
    pub fn read(&self, volume: &str) -> Result<(String, String)> {
        self.with(volume, |v| (v.root.clone(), v.home.clone()))
    }

    /// Lets so many copies fail, as on a disk that is full, and archives break off.
    pub fn fail_copies(&self, failing: u32) {
        self.disk().failing = failing;
    }

    /// Lets the disk be this full from now on.
    pub fn fill(&self, percent: u64) {
        self.disk().full_percent = percent;
    }

    fn copy(&self, source: &str, target: &str, change: impl FnOnce(&mut Volume)) -> Result<()> {
        let mut disk = self.disk();
        let mut copy = disk.volumes.get(source).cloned().ok_or(Error::NotFound)?;
        if disk.volumes.contains_key(target) {
            return Ok(());
        }
        if disk.failing > 0 {
            disk.failing -= 1;
            return Err(Error::Refused("no space left".to_owned()));
        }
        copy.limit = None;
        change(&mut copy);
        disk.volumes.insert(target.to_owned(), copy);
        Ok(())
    }
}

/// Reads and writes wait, as those of the helper do, whatever the descriptor was told.
fn waiting(descriptor: OwnedFd) -> io::Result<File> {
    rustix::io::ioctl_fionbio(&descriptor, false)?;
    Ok(File::from(descriptor))
}

fn refused(why: &str) -> Error {
    Error::Refused(why.to_owned())
}

#[async_trait]
impl Volumes for SimVolumes {
    async fn backend(&self) -> Result<String> {
        Ok("sim".to_owned())
    }

    async fn list(&self) -> Result<Vec<String>> {
        Ok(self.disk().volumes.keys().cloned().collect())
    }

    async fn space(&self) -> Result<Space> {
        let free = 100 - self.disk().full_percent;
        Ok(Space { total: 100, free })
    }

    async fn import(&self, release: &str, archive: &Path) -> Result<String> {
        let text = archive.display().to_string();
        // Distinct for distinct names, which is all that tests ask of it.
        let sum = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
        });
        let volume = Volume {
            root: release.to_owned(),
            ..Volume::default()
        };
        self.disk().volumes.insert(release.to_owned(), volume);
        Ok(format!("{sum:064x}"))
    }

    async fn import_image(&self, release: &str, archive: &Path, most: u64) -> Result<String> {
        let text = std::fs::read_to_string(archive)?;
        if !text.starts_with("image") || text.len() as u64 > most {
            return Err(Error::Refused("it is no image archive".to_owned()));
        }
        self.import(release, Path::new(&text)).await
    }

    async fn shift(&self, volume: &str, _ids: IdRange) -> Result<()> {
        self.with(volume, |_| ())
    }

    async fn seal(&self, volume: &str) -> Result<()> {
        self.with(volume, |v| v.readonly = true)
    }

    async fn derive(&self, source: &str, target: &str) -> Result<()> {
        self.copy(source, target, |v| {
            v.home.clear();
            v.readonly = false;
        })
    }

    async fn replace_root(&self, release: &str, sandbox: &SandboxId) -> Result<()> {
        let root = self.with(release, |v| v.root.clone())?;
        self.with(sandbox.as_str(), |v| v.root = root)
    }

    async fn snapshot(&self, source: &str, target: &str, readonly: bool) -> Result<()> {
        self.copy(source, target, |v| v.readonly = readonly)
    }

    async fn delete(&self, volume: &str) -> Result<()> {
        self.disk().volumes.remove(volume);
        Ok(())
    }

    async fn limit(&self, volume: &str, bytes: u64) -> Result<()> {
        self.with(volume, |v| v.limit = Some(bytes))
    }

    async fn usage(&self, volume: &str) -> Result<Usage> {
        let limit = self.with(volume, |v| v.limit)?;
        Ok(Usage {
            bytes: 4096,
            limit,
            enforced: limit.is_some(),
        })
    }

    async fn diff(&self, from: &str, to: &str, most: usize) -> Result<Diff> {
        let (from, to) = (self.read(from)?, self.read(to)?);
        let parts = [(HOME, from.1, to.1), ("/root", from.0, to.0)];
        let mut entries: Vec<Differs> = parts
            .into_iter()
            .filter(|(_, before, after)| before != after)
            .map(|(path, before, after)| Differs {
                path: path.to_owned(),
                change: Change::Changed,
                before: Some(before.len() as u64),
                after: Some(after.len() as u64),
            })
            .collect();
        let changed = entries.len();
        entries.truncate(most);
        Ok(Diff {
            changed: changed as u64,
            truncated: changed > most,
            entries,
            ..Diff::default()
        })
    }

    async fn pack(&self, snapshot: &str, into: OwnedFd) -> Result<()> {
        let Volume {
            root, home, readonly, ..
        } = self.with(snapshot, |v| v.clone())?;
        if !readonly {
            return Err(refused("it may change meanwhile"));
        }
        let breaks = {
            let mut disk = self.disk();
            let breaks = disk.failing > 0;
            disk.failing = disk.failing.saturating_sub(1);
            breaks
        };
        let mut text = serde_json::to_vec(&Packed { root, home }).map_err(io::Error::other)?;
        if !breaks {
            text.push(b'\n');
        }
        let written = spawn_blocking(move || waiting(into)?.write_all(&text));
        written.await.map_err(io::Error::other)??;
        if breaks {
            return Err(refused("a file cannot be read"));
        }
        Ok(())
    }

    async fn unpack(&self, snapshot: &str, from: OwnedFd, _ids: IdRange, most: u64) -> Result<()> {
        let read = spawn_blocking(move || {
            let mut text = String::new();
            waiting(from)?.read_to_string(&mut text).map(|_| text)
        });
        let text = read.await.map_err(io::Error::other)??;
        let whole = text.strip_suffix('\n').ok_or_else(|| refused("it breaks off"))?;
        let Packed { root, home } = serde_json::from_str(whole).map_err(|_| refused("it is no volume"))?;
        if (root.len() + home.len()) as u64 > most {
            return Err(refused("it is larger than a volume may be"));
        }
        let mut disk = self.disk();
        if disk.volumes.contains_key(snapshot) {
            return Err(refused("it exists already"));
        }
        let volume = Volume {
            root,
            home,
            readonly: true,
            limit: None,
        };
        disk.volumes.insert(snapshot.to_owned(), volume);
        Ok(())
    }
}
