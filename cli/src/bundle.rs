//! The file that `choir export` writes and `choir import` reads: an age file, in it a compressed tar, whose first member
//! says what the rest is of. It must not know a hypervisor, nor hold a secret's value.

use std::io::{self, BufRead, BufReader, Read, Write};

use age::stream::{StreamReader, StreamWriter};
use age::{DecryptError, Decryptor, Encryptor, Identity, Recipient};
use choir_api::grants::Grant;
use choir_core::{Name, ReleaseConfig, SecretName, Slot, SnapshotId, WorkspaceSettings};
use flate2::Compression;
use flate2::bufread::GzDecoder;
use flate2::write::GzEncoder;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tar::{EntryType, Header};

/// How [`Manifest`] is to be read.
pub const FORMAT: u32 = 1;
/// The first member.
const MANIFEST: &[u8] = b"choir.json";
/// Bytes.
const MOST_MANIFEST: u64 = 1 << 20;
/// Of a tar, in bytes.
const BLOCK: u64 = 512;

/// What an export is of, and what else is needed to have it run elsewhere.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub format: u32,
    pub exported_at: Timestamp,
    /// The control origin of the box.
    pub origin: String,
    pub workspace: Name,
    pub slot: Slot,
    pub snapshot: SnapshotId,
    pub settings: WorkspaceSettings,
    pub release: ExportedRelease,
    /// Those that the grants use.
    pub secrets: Vec<SecretName>,
    /// Of both slots.
    pub grants: Vec<Grant>,
}

/// What the slot's system was made from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExportedRelease {
    pub name: String,
    pub image_digest: String,
    pub config: ReleaseConfig,
}

/// An export that is being written. Without [`Self::finish`] it cannot be read.
pub struct Writer<W: Write>(GzEncoder<StreamWriter<W>>);

impl<W: Write> Writer<W> {
    /// What is written then is the rest of the tar.
    pub fn begin(out: W, recipients: &[Box<dyn Recipient>], manifest: &Manifest) -> io::Result<Self> {
        let recipients = recipients.iter().map(|one| &**one as &dyn Recipient);
        let encryptor = Encryptor::with_recipients(recipients).map_err(|e| io::Error::other(e.to_string()))?;
        let mut inside = GzEncoder::new(encryptor.wrap_output(out)?, Compression::fast());
        let mut text = serde_json::to_vec_pretty(manifest)?;
        let mut header = Header::new_ustar();
        header.as_mut_bytes()[..MANIFEST.len()].copy_from_slice(MANIFEST);
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0o600);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(text.len() as u64);
        header.set_mtime(u64::try_from(manifest.exported_at.as_second()).unwrap_or(0));
        header.set_cksum();
        text.resize(text.len().next_multiple_of(BLOCK as usize), 0);
        inside.write_all(header.as_bytes())?;
        inside.write_all(&text)?;
        Ok(Self(inside))
    }

    pub fn finish(self) -> io::Result<W> {
        self.0.finish()?.finish()
    }
}

impl<W: Write> Write for Writer<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// An age file whose header was read.
pub struct Sealed<R>(Decryptor<R>);

impl<R: BufRead> Sealed<R> {
    /// # Errors
    /// Why it is no export, in one sentence.
    pub fn new(file: R) -> Result<Self, String> {
        match Decryptor::new_buffered(file) {
            Ok(sealed) => Ok(Self(sealed)),
            Err(DecryptError::Io(error)) if error.kind() != io::ErrorKind::UnexpectedEof => {
                Err(format!("it cannot be read: {error}"))
            }
            Err(DecryptError::UnknownFormat) => Err("it is of a newer age format; use a newer choir".to_owned()),
            Err(_) => Err("it is no file that `choir export` wrote, or its beginning is damaged".to_owned()),
        }
    }

    /// Whether a passphrase opens it; else an identity does.
    pub fn has_passphrase(&self) -> bool {
        self.0.is_scrypt()
    }

    /// What it is of, and the rest of the tar.
    ///
    /// # Errors
    /// Why it does not open, in one sentence.
    pub fn open(self, identities: &[Box<dyn Identity>]) -> Result<(Manifest, Archive<R>), String> {
        let by_passphrase = self.has_passphrase();
        let identities = identities.iter().map(|one| &**one as &dyn Identity);
        let clear = self.0.decrypt(identities).map_err(|error| match error {
            DecryptError::DecryptionFailed | DecryptError::KeyDecryptionFailed if by_passphrase => {
                "this is not the passphrase that it was exported with".to_owned()
            }
            DecryptError::NoMatchingKeys => "none of these identities opens it".to_owned(),
            DecryptError::ExcessiveWork { .. } => {
                "trying a passphrase takes more memory than is given to it; export it again on the box it is from"
                    .to_owned()
            }
            _ => "its header is damaged; export it again".to_owned(),
        })?;
        let mut archive = Archive(GzDecoder::new(BufReader::new(clear)));
        let manifest = archive.manifest()?;
        Ok((manifest, archive))
    }
}

/// What follows the manifest. Its end is only told once all of the file was read and is as it was written.
pub struct Archive<R>(GzDecoder<BufReader<StreamReader<R>>>);

impl<R: Read> Archive<R> {
    fn manifest(&mut self) -> Result<Manifest, String> {
        let other = || "it is encrypted by age, and is no file that `choir export` wrote".to_owned();
        let damaged = |error: io::Error| format!("it is damaged ({error}); export it again");
        let mut header = Header::new_old();
        match self.read_exact(header.as_mut_bytes()) {
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Err(other()),
            read => read.map_err(damaged)?,
        }
        let size = header.entry_size().map_err(|_| other())?;
        if *header.path_bytes() != *MANIFEST || size > MOST_MANIFEST {
            return Err(other());
        }
        let mut text = Vec::new();
        let padded = size.next_multiple_of(BLOCK);
        let read = Read::take(&mut *self, padded).read_to_end(&mut text).map_err(damaged)?;
        if read as u64 != padded {
            return Err(damaged(io::ErrorKind::UnexpectedEof.into()));
        }
        text.truncate(usize::try_from(size).map_err(|_| other())?);
        let value: Value = serde_json::from_slice(&text).map_err(|_| other())?;
        match value["format"].as_u64() {
            Some(format) if format == u64::from(FORMAT) => {}
            Some(_) => return Err("it was written by a newer choir; import it with one of that version".to_owned()),
            None => return Err(other()),
        }
        let wrong = |error| format!("what it says of itself is not understood ({error}); is this choir the older one?");
        serde_json::from_value(value).map_err(wrong)
    }
}

impl<R: Read> Read for Archive<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.0.read(into)?;
        if read > 0 || into.is_empty() {
            return Ok(read);
        }
        // Only here does age see whether its last part is there.
        if self.0.get_mut().fill_buf()?.is_empty() {
            Ok(0)
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidData, "something follows its end"))
        }
    }
}

#[cfg(test)]
mod tests;
