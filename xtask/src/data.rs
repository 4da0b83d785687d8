//! What lies where in a data directory. Knows nothing of how the files come to be.

use std::fs::{self, File, TryLockError};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use data_encoding::HEXLOWER;
use sha2::{Digest, Sha256};

/// sockaddr_un holds 108 bytes with the final NUL; the longest socket of ours is `run/volumes.sock`.
const LONGEST_ROOT: usize = 107 - "/run/volumes.sock".len();

/// One data directory, by its absolute path without symlinks.
#[derive(Debug)]
pub struct DataDir {
    root: PathBuf,
}

impl DataDir {
    /// Creates what is missing. Other users may pass through (a sandbox's mapped root must reach its
    /// disk) but not look around; what is private has a mode of its own.
    pub fn create(path: &Path) -> Result<Self> {
        let make = |path: &Path, mode| {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(mode)
                .create(path)
                .with_context(|| format!("cannot create {}", path.display()))
        };
        make(path, 0o711)?;
        let data = Self::open(path)?;
        if data.root.as_os_str().len() > LONGEST_ROOT {
            bail!(
                "{} is too long for the sockets in it: give a path of at most {LONGEST_ROOT} \
                 characters with --data",
                data.root.display()
            );
        }
        make(&data.run(), 0o711)?;
        make(&data.logs(), 0o700)?;
        make(&data.volumes(), 0o711)?;
        Ok(data)
    }

    /// A data directory that `up` made before.
    pub fn open(path: &Path) -> Result<Self> {
        let root = fs::canonicalize(path).with_context(|| format!("there is no data directory {}", path.display()))?;
        Ok(Self { root })
    }

    /// Held by the one `up` that runs on this directory; none when another holds it.
    pub fn lock(&self) -> Result<Option<File>> {
        let path = self.run().join("lock");
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.with_context(|| format!("cannot open {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
        }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The programs that run from here.
    pub fn bin(&self) -> PathBuf {
        self.root.join("bin")
    }

    /// Sockets and pid files.
    pub fn run(&self) -> PathBuf {
        self.root.join("run")
    }

    /// Logs of the helpers; the hypervisor's goes to the terminal, or with `--detach` to `up_log`.
    pub fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    /// Where the volumes are; a mount point where btrfs is used.
    pub fn volumes(&self) -> PathBuf {
        self.root.join("volumes")
    }

    /// The sparse file with the btrfs file system that is mounted there.
    pub fn volumes_image(&self) -> PathBuf {
        self.root.join("volumes.btrfs")
    }

    pub fn volumes_socket(&self) -> PathBuf {
        self.run().join("volumes.sock")
    }

    pub fn podman_socket(&self) -> PathBuf {
        self.run().join("podman.sock")
    }

    pub fn podman(&self) -> PathBuf {
        self.root.join("podman")
    }

    /// Podman's run-time state, which a reboot must empty and whose path may have 50 characters:
    /// a directory of this data directory's own in memory.
    pub fn podman_run(&self) -> PathBuf {
        self.in_memory("")
    }

    /// Where the whole data directory is mounted again, when sandboxes cannot walk to it.
    pub fn open_place(&self) -> PathBuf {
        self.in_memory(".open")
    }

    fn in_memory(&self, suffix: &str) -> PathBuf {
        let digest = Sha256::digest(self.root.as_os_str().as_encoded_bytes());
        let memory = match std::env::var_os("XDG_RUNTIME_DIR") {
            Some(directory) if !rustix::process::geteuid().is_root() => PathBuf::from(directory),
            _ => PathBuf::from("/run"),
        };
        memory.join(format!("choir-{}{suffix}", HEXLOWER.encode(&digest[..6])))
    }

    pub fn config(&self) -> PathBuf {
        self.root.join("hypervisor.toml")
    }

    pub fn store(&self) -> PathBuf {
        self.root.join("choir.db")
    }

    /// Written by the hypervisor while it has no user, mode 0600.
    pub fn claim_link(&self) -> PathBuf {
        self.root.join("claim-link")
    }

    pub fn up_log(&self) -> PathBuf {
        self.root.join("up.log")
    }

    pub fn up_pid(&self) -> PathBuf {
        self.pid_file("up")
    }

    /// The address of the running `up`.
    pub fn address(&self) -> PathBuf {
        self.run().join("address")
    }

    pub fn pid_file(&self, service: &str) -> PathBuf {
        self.run().join(format!("{service}.pid"))
    }
}

#[cfg(test)]
mod tests {
    use super::DataDir;

    #[test]
    fn a_data_directory_has_one_owner_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let data = DataDir::create(directory.path()).unwrap();
        let lock = data.lock().unwrap();
        assert!(lock.is_some());
        assert!(data.lock().unwrap().is_none());
        drop(lock);
        assert!(data.lock().unwrap().is_some());
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_refused_with_the_limit() {
        let directory = tempfile::tempdir().unwrap();
        let error = DataDir::create(&directory.path().join("x".repeat(100))).unwrap_err();
        assert!(error.to_string().contains("--data"), "{error}");
    }

    #[test]
    fn podmans_run_directory_fits_its_limit() {
        let directory = tempfile::tempdir().unwrap();
        let data = DataDir::create(directory.path()).unwrap();
        assert!(data.podman_run().as_os_str().len() <= 50);
    }
}
