//! Secrets of the box itself: files in one directory, read anew at each use, so that replacing a file is all there is to
//! rotating it. It must not know who uses them, nor write any.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use crate::SecretValue;
use crate::scan::SHORTEST;

/// More than any key has.
const MOST_BYTES: usize = 16 << 10;
/// Others may not read it, nor its group write it. The group may read: that is how systemd hands credentials to a service
/// that is not root.
const TOO_OPEN: u32 = 0o027;

/// The directory of the box's own secrets.
#[derive(Debug, Clone)]
pub struct PlatformSecrets {
    directory: PathBuf,
}

/// Why a secret of the box cannot be used. It names the file and never what is in it.
#[derive(Debug, thiserror::Error)]
pub enum PlatformError {
    #[error("{0:?} is no file name; use one without slashes, such as `openai`")]
    Name(String),
    #[error("the file {} is missing; put the key there", .0.display())]
    Missing(PathBuf),
    #[error("the file {} is readable by others (mode {mode:o}); run `chmod 600` on it", path.display())]
    Open { path: PathBuf, mode: u32 },
    #[error("the file {} does not hold one key of {SHORTEST} to {MOST_BYTES} bytes; put the right one there", .0.display())]
    Malformed(PathBuf),
    #[error("the file {} cannot be read: {cause}", path.display())]
    Io { path: PathBuf, cause: io::Error },
}

impl PlatformSecrets {
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
        }
    }

    /// The key in this file, without the line's end. Blocks for as long as reading a small file takes.
    ///
    /// # Errors
    /// Missing, readable by others, or not a key.
    pub fn read(&self, name: &str) -> Result<SecretValue, PlatformError> {
        let (path, file) = self.open(name)?;
        // Large enough from the start: growing would leave copies behind that are not wiped.
        let mut bytes = Zeroizing::new(Vec::with_capacity(MOST_BYTES + 1));
        let read = file.take(MOST_BYTES as u64 + 1).read_to_end(&mut bytes);
        if let Err(cause) = read {
            return Err(PlatformError::Io { path, cause });
        }
        let key = bytes.trim_ascii();
        if !(SHORTEST..=MOST_BYTES).contains(&key.len()) || !key.iter().all(u8::is_ascii_graphic) {
            return Err(PlatformError::Malformed(path));
        }
        Ok(SecretValue::new(key.to_vec()))
    }

    /// Whether there is a file that may be read; reads nothing of it.
    ///
    /// # Errors
    /// Missing, or readable by others.
    pub fn check(&self, name: &str) -> Result<(), PlatformError> {
        self.open(name).map(drop)
    }

    fn open(&self, name: &str) -> Result<(PathBuf, File), PlatformError> {
        if !is_file_name(name) {
            return Err(PlatformError::Name(name.to_owned()));
        }
        let path = self.directory.join(name);
        let opened = File::open(&path).and_then(|file| Ok((file.metadata()?, file)));
        let (about, file) = match opened {
            Ok(opened) => opened,
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Err(PlatformError::Missing(path)),
            Err(cause) => return Err(PlatformError::Io { path, cause }),
        };
        if !about.is_file() {
            return Err(PlatformError::Malformed(path));
        }
        let mode = about.permissions().mode() & 0o777;
        if mode & TOO_OPEN != 0 {
            return Err(PlatformError::Open { path, mode });
        }
        Ok((path, file))
    }
}

/// Whether this names a file in a directory and leads nowhere else.
pub fn is_file_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    let plain = matches!(parts.next(), Some(std::path::Component::Normal(part)) if part == name);
    plain && parts.next().is_none() && !name.contains('\0')
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};

    use super::*;

    fn written(directory: &Path, text: &str, mode: u32) {
        fs::write(directory.join("openai"), text).unwrap();
        fs::set_permissions(directory.join("openai"), Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_key_is_read_anew_each_time_without_its_line_end() {
        let directory = tempfile::tempdir().unwrap();
        let secrets = PlatformSecrets::new(directory.path());
        for (text, mode) in [
            ("sk-first-key\n", 0o600),
            ("sk-second-key", 0o400),
            ("sk-third-key\r\n", 0o440),
        ] {
            written(directory.path(), text, mode);
            assert_eq!(secrets.read("openai").unwrap().expose(), text.trim().as_bytes());
            fs::remove_file(directory.path().join("openai")).unwrap();
        }
        assert!(matches!(secrets.read("openai"), Err(PlatformError::Missing(_))));
    }

    #[test]
    fn a_file_that_others_can_read_or_that_holds_no_key_is_refused_and_its_text_is_not_told() {
        let directory = tempfile::tempdir().unwrap();
        let secrets = PlatformSecrets::new(directory.path());
        for (text, mode) in [
            ("sk-canary-key", 0o644),
            ("sk-canary-key", 0o620),
            ("short", 0o600),
            ("", 0o600),
            ("sk-canary-key\nsecond: line", 0o600),
        ] {
            written(directory.path(), text, mode);
            let error = secrets.read("openai").err().unwrap();
            assert!(!format!("{error} {error:?}").contains("canary"), "{error}");
        }
        fs::create_dir(directory.path().join("directory")).unwrap();
        assert!(matches!(secrets.read("directory"), Err(PlatformError::Malformed(_))));
        written(directory.path(), "sk-canary-key", 0o600);
        assert!(secrets.read("openai").is_ok());
    }

    #[test]
    fn no_name_leads_out_of_the_directory() {
        let directory = tempfile::tempdir().unwrap();
        written(directory.path(), "sk-canary-key", 0o600);
        fs::create_dir(directory.path().join("inner")).unwrap();
        let secrets = PlatformSecrets::new(directory.path().join("inner"));
        for name in [
            "",
            ".",
            "..",
            "../openai",
            "/etc/passwd",
            "a/b",
            "openai/",
            "./openai",
            "a\0",
        ] {
            assert!(matches!(secrets.read(name), Err(PlatformError::Name(_))), "{name:?}");
        }
        // The control: the file is there for who names it from its own directory.
        assert!(PlatformSecrets::new(directory.path()).read("openai").is_ok());
    }
}
