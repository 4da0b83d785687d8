//! Keys: the file with the master keys, their names, and keys derived from one. It must not know what is sealed.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use choir_store::KeyIdBytes;
use hkdf::Hkdf;
use sha2::Sha256;
use zeroize::Zeroizing;

use crate::page::KeyPage;

/// Where random bytes come from; always fit for keys.
pub type Fill = Arc<dyn Fn(&mut [u8]) + Send + Sync>;

/// A 256-bit key, in locked memory. It cannot be printed, cloned or serialized.
pub struct Key {
    id: KeyIdBytes,
    page: KeyPage,
}

impl Key {
    /// A key under a name of its own.
    pub(crate) fn named(id: KeyIdBytes, fill: impl FnOnce(&mut [u8; 32])) -> Self {
        Self {
            id,
            page: KeyPage::filled(fill),
        }
    }

    /// A key whose name follows from its bytes, so that a file of bare keys names them.
    fn unnamed(fill: impl FnOnce(&mut [u8; 32])) -> Self {
        let mut key = Self::named(KeyIdBytes::default(), fill);
        key.id = derive(&key, "choir key id");
        key
    }

    /// Says which key it is and nothing else of it.
    pub fn id(&self) -> KeyIdBytes {
        self.id
    }

    pub(crate) fn is_locked(&self) -> bool {
        self.page.is_locked()
    }

    pub(crate) fn bytes(&self) -> &[u8; 32] {
        self.page.bytes()
    }
}

/// Another key for one purpose (HKDF-SHA-256, RFC 5869); nothing of `key` follows from it.
pub fn derive<const N: usize>(key: &Key, label: &str) -> [u8; N] {
    derive_from(key.bytes(), label)
}

/// The same, from a key that was derived itself.
pub(crate) fn derive_from<const N: usize>(key: &[u8; 32], label: &str) -> [u8; N] {
    let mut derived = [0; N];
    Hkdf::<Sha256>::new(None, key)
        .expand(label.as_bytes(), &mut derived)
        .expect("no derived key is longer than HKDF gives");
    derived
}

/// Why the key file gives no keys.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    #[error("the key file {} is missing; put it back", .0.display())]
    Missing(PathBuf),
    #[error("the key file {} is readable by others (mode {mode:o}); run `chmod 600` on it", path.display())]
    Open { path: PathBuf, mode: u32 },
    #[error("the key file {} must hold one key of 64 hexadecimal digits a line; put the right file back", .0.display())]
    Malformed(PathBuf),
    #[error("the key file {} cannot be used: {cause}", path.display())]
    Io { path: PathBuf, cause: io::Error },
}

/// The keys of the key file: the first is the present one, the others only open what is still sealed under them.
pub struct Keyring(Vec<Arc<Key>>);

impl Keyring {
    /// A ring with one new key.
    pub fn new(random: &Fill) -> Self {
        Self(vec![Arc::new(Key::unnamed(|bytes| random(bytes)))])
    }

    pub fn first(&self) -> &Arc<Key> {
        &self.0[0]
    }

    pub fn get(&self, id: KeyIdBytes) -> Option<&Arc<Key>> {
        self.0.iter().find(|key| key.id == id)
    }

    pub(crate) fn all(&self) -> &[Arc<Key>] {
        &self.0
    }

    /// How many keys there are; never 0.
    #[expect(clippy::len_without_is_empty, reason = "a ring is never empty")]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The same ring behind a new first key.
    pub fn with_new_first(&self, random: &Fill) -> Self {
        let mut keys = Self::new(random).0;
        keys.extend(self.0.iter().cloned());
        Self(keys)
    }

    /// Only the first key of this ring.
    pub fn only_first(&self) -> Self {
        Self(vec![self.first().clone()])
    }
}

/// The file with the master keys, 64 hexadecimal digits a line.
#[derive(Debug, Clone)]
pub struct KeyFile(PathBuf);

/// More than any key file with its line ends has.
const MOST_BYTES: u64 = 4096;

impl KeyFile {
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// # Errors
    /// Missing, readable by others, not keys, or not readable at all.
    pub fn read(&self) -> Result<Keyring, KeyFileError> {
        let mut text = Zeroizing::new(Vec::with_capacity(MOST_BYTES as usize));
        let mode = File::open(&self.0)
            .and_then(|file| {
                let mode = file.metadata()?.permissions().mode() & 0o777;
                file.take(MOST_BYTES).read_to_end(&mut text)?;
                Ok(mode)
            })
            .map_err(|cause| self.failed(cause))?;
        if mode & 0o077 != 0 {
            let path = self.0.clone();
            return Err(KeyFileError::Open { path, mode });
        }
        let lines = text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
        let keys: Option<Vec<_>> = lines.filter(|line| !line.is_empty()).map(key_of).collect();
        match keys {
            Some(keys) if !keys.is_empty() => Ok(Keyring(keys)),
            _ => Err(KeyFileError::Malformed(self.0.clone())),
        }
    }

    /// Writes the ring, readable by the owner only, in one step: readers see the old file or the new, also after a
    /// loss of power.
    ///
    /// # Errors
    /// The directory or the disk does not let us.
    pub fn write(&self, ring: &Keyring) -> Result<(), KeyFileError> {
        let mut text = Zeroizing::new(Vec::with_capacity(ring.len() * 65));
        for key in &ring.0 {
            let mut digits = Zeroizing::new([0; 64]);
            data_encoding::HEXLOWER.encode_mut(key.bytes(), &mut *digits);
            text.extend_from_slice(&*digits);
            text.push(b'\n');
        }
        self.replace(&text).map_err(|cause| self.failed(cause))
    }

    fn replace(&self, text: &[u8]) -> io::Result<()> {
        let mut new = self.0.clone().into_os_string();
        new.push(".new");
        let new = PathBuf::from(new);
        match std::fs::remove_file(&new) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
        file.write_all(text)?;
        file.sync_all()?;
        std::fs::rename(&new, &self.0)?;
        let directory = self.0.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
    }

    fn failed(&self, cause: io::Error) -> KeyFileError {
        let path = self.0.clone();
        match cause.kind() {
            ErrorKind::NotFound => KeyFileError::Missing(path),
            _ => KeyFileError::Io { path, cause },
        }
    }
}

fn key_of(line: &[u8]) -> Option<Arc<Key>> {
    let mut ok = line.len() == 64;
    let key = Key::unnamed(|bytes| {
        ok = ok
            && data_encoding::HEXLOWER_PERMISSIVE
                .decode_mut(line, bytes)
                .is_ok_and(|length| length == bytes.len());
    });
    ok.then(|| Arc::new(key))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn counting() -> Fill {
        let next = std::sync::atomic::AtomicU8::new(1);
        Arc::new(move |bytes| bytes.fill(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)))
    }

    #[test]
    fn a_ring_comes_back_from_its_file_in_order_and_only_the_owner_can_read_it() {
        let directory = tempfile::tempdir().unwrap();
        let file = KeyFile::new(directory.path().join("key"));
        let ring = Keyring::new(&counting());
        let two = ring.with_new_first(&counting());
        file.write(&two).unwrap();
        // What a killed writer left behind is in nobody's way.
        std::fs::write(directory.path().join("key.new"), "half").unwrap();
        file.write(&two).unwrap();
        let back = file.read().unwrap();
        assert_eq!(back.len(), 2);
        assert_eq!(back.first().id(), two.first().id());
        assert_eq!(back.get(ring.first().id()).unwrap().bytes(), ring.first().bytes());
        assert_eq!(
            std::fs::metadata(file.path()).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_is_no_key_file_is_refused_with_a_reason() {
        let directory = tempfile::tempdir().unwrap();
        let file = KeyFile::new(directory.path().join("key"));
        assert!(matches!(file.read(), Err(KeyFileError::Missing(_))));
        let good = "ab".repeat(32);
        for bad in [
            "",
            "\n",
            "ab",
            &good[1..],
            &format!("{good}{good}"),
            &format!("{good}\nzz"),
            "\u{e4}",
        ] {
            std::fs::write(file.path(), bad).unwrap();
            std::fs::set_permissions(file.path(), PermissionsExt::from_mode(0o600)).unwrap();
            assert!(matches!(file.read(), Err(KeyFileError::Malformed(_))), "{bad:?}");
        }
        std::fs::write(file.path(), format!("{good}\n\n {} \r\n", "CD".repeat(32))).unwrap();
        assert_eq!(file.read().unwrap().len(), 2);
        std::fs::set_permissions(file.path(), PermissionsExt::from_mode(0o640)).unwrap();
        assert!(matches!(file.read(), Err(KeyFileError::Open { mode: 0o640, .. })));
    }

    #[test]
    fn keys_derived_for_two_purposes_differ() {
        let ring = Keyring::new(&counting());
        let one: [u8; 32] = derive(ring.first(), "one");
        assert_ne!(one, derive(ring.first(), "two"));
        assert_ne!(&one, ring.first().bytes());
    }
}
