//! The vault: stores secrets sealed and opens them for the one call that needs them. It must not know who may have
//! them, nor what is done with them.
//!
//! A master key from the key file seals one key a user, and that seals the user's secrets. The box's own key, from which
//! others are derived, is sealed under the master key too: where it does not open, the vault is sealed and nothing is
//! written.

use std::sync::{Arc, PoisonError, RwLock};

use choir_core::{SecretName, UserId};
use choir_store::{AuditEvent, DataKey, Grant, KeyIdBytes, NewSecret, SealedKey, Secret, Store};
use jiff::Timestamp;

use crate::keys::{Fill, Key, KeyFile, KeyFileError, Keyring};
use crate::seal::{self, Damaged, Place};
use crate::value::SecretValue;

/// The vault; clones share it.
#[derive(Clone)]
pub struct Vault(Arc<Inner>);

struct Inner {
    store: Store,
    file: KeyFile,
    random: Fill,
    /// The master keys as last read; `None` while sealed.
    ring: Option<RwLock<Arc<Keyring>>>,
}

/// A secret's value, and which version it is.
pub struct Opened {
    pub value: SecretValue,
    pub version: u64,
    /// Whether its owner lets sandboxes with a grant have the value itself.
    pub reveal: bool,
}

/// Why the vault did not do it.
#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    /// The master key is missing or is not this database's.
    #[error("the vault is sealed: the right master key is missing")]
    Sealed,
    #[error("there is no such secret")]
    NotFound,
    #[error("the database failed")]
    Store(#[source] choir_store::Error),
    /// A row was changed outside of this program.
    #[error("a sealed value is damaged")]
    Damaged,
}

impl From<choir_store::Error> for VaultError {
    fn from(error: choir_store::Error) -> Self {
        match error {
            choir_store::Error::NotFound => Self::NotFound,
            other => Self::Store(other),
        }
    }
}

impl From<Damaged> for VaultError {
    fn from(Damaged: Damaged) -> Self {
        Self::Damaged
    }
}

/// Why there is not even a sealed vault.
#[derive(Debug, thiserror::Error)]
pub enum UnlockError {
    #[error(transparent)]
    Key(#[from] KeyFileError),
    #[error("the database failed: {0}")]
    Store(#[from] choir_store::Error),
}

impl Vault {
    /// The vault of this database, and the box's own key unless it is sealed. The first time both the key file, unless
    /// there is one, and the box's own key are made; a key file is never made anew.
    ///
    /// # Errors
    /// The key file is readable by others; or it is unusable and nothing was sealed yet, so that it can be mended.
    pub async fn unlock(store: Store, file: KeyFile, random: Fill) -> Result<(Self, Option<Key>), UnlockError> {
        let (first_file, first_random) = (file.clone(), random.clone());
        let check = store.key_check_or(move || begin(&first_file, &first_random)).await??;
        let unlocked = match file.read() {
            Err(error @ KeyFileError::Open { .. }) => return Err(error.into()),
            Err(error) => Err(error.to_string()),
            Ok(ring) => match open_own_key(&ring, &check) {
                Some(own) => Ok((ring, own)),
                None => Err(format!(
                    "the key file {} holds another key than this database's; put the right one back",
                    file.path().display()
                )),
            },
        };
        let (ring, own) = match unlocked {
            Ok((ring, own)) => {
                if !(ring.first().is_locked() && own.is_locked()) {
                    tracing::warn!("keys may be written to swap: raise the limit of locked memory (LimitMEMLOCK)");
                }
                (Some(RwLock::new(Arc::new(ring))), Some(own))
            }
            Err(reason) => {
                tracing::error!("sealed: {reason} and restart; until then secrets and recovery codes do not work");
                (None, None)
            }
        };
        let vault = Self(Arc::new(Inner {
            store,
            file,
            random,
            ring,
        }));
        Ok((vault, own))
    }

    /// Whether the master key is missing or wrong. Lasts until the hypervisor is started anew.
    pub fn is_sealed(&self) -> bool {
        self.0.ring.is_none()
    }

    /// A user's secret in clear.
    ///
    /// # Errors
    /// Sealed, not found, damaged, or the database failed.
    pub async fn open(&self, user: &UserId, name: &SecretName) -> Result<Opened, VaultError> {
        self.unsealed()?;
        let found = self.0.store.sealed_secret(user.clone(), name.clone()).await?;
        let key = self.data_key(&found.data_key)?;
        let place = place_of(user, &found.id, found.secret.version, found.secret.reveal);
        Ok(Opened {
            value: seal::open(&key, place, &found.sealed)?,
            version: found.secret.version,
            reveal: found.secret.reveal,
        })
    }

    /// Stores a value in the place of the one before; returns its version. Nothing of the old one is kept.
    ///
    /// # Errors
    /// Sealed, damaged, or the database failed or refused it.
    pub async fn put(&self, new: NewValue<'_>, event: AuditEvent) -> Result<u64, VaultError> {
        self.unsealed()?;
        loop {
            let place = self.0.store.secret_place(new.user.clone(), new.name.clone()).await?;
            let key = match &place.data_key {
                Some(row) => self.data_key(row)?,
                None => match self.add_data_key(new.user, place.kek).await? {
                    Some(key) => key,
                    None => continue,
                },
            };
            let (id, version) = match place.present {
                Some((id, version)) => (id, version + 1),
                None => (self.new_row_id(), 1),
            };
            let sealed = seal::seal(
                &key,
                place_of(new.user, &id, version, new.reveal),
                new.value.expose(),
                &self.0.random,
            );
            let row = NewSecret {
                id,
                user: new.user.clone(),
                name: new.name.clone(),
                version,
                reveal: new.reveal,
                sealed,
                at: new.at,
            };
            if self.0.store.put_secret(row, event.clone()).await? {
                return Ok(version);
            }
        }
    }

    /// Deletes a secret, its ciphertext and its grants; the grants that ended so.
    ///
    /// # Errors
    /// Sealed, not found, or the database failed.
    pub async fn delete(&self, user: &UserId, name: &SecretName, event: AuditEvent) -> Result<Vec<Grant>, VaultError> {
        self.unsealed()?;
        Ok(self.0.store.delete_secret(user.clone(), name.clone(), event).await?)
    }

    /// A user's secrets without their values; also while sealed.
    ///
    /// # Errors
    /// The database failed.
    pub async fn list(&self, user: &UserId) -> Result<Vec<Secret>, VaultError> {
        Ok(self.0.store.secrets(user.clone()).await?)
    }

    /// One secret without its value; also while sealed.
    ///
    /// # Errors
    /// Not found, or the database failed.
    pub async fn describe(&self, user: &UserId, name: &SecretName) -> Result<Secret, VaultError> {
        Ok(self.0.store.secret(user.clone(), name.clone()).await?)
    }

    /// Notes that a secret was used; to the minute.
    ///
    /// # Errors
    /// The database failed.
    pub async fn used(&self, user: &UserId, name: &SecretName, at: Timestamp) -> Result<(), VaultError> {
        Ok(self.0.store.touch_secret(user.clone(), name.clone(), at).await?)
    }

    pub(crate) fn store(&self) -> &Store {
        &self.0.store
    }

    /// The master keys as last read.
    pub(crate) fn ring(&self) -> Result<Arc<Keyring>, VaultError> {
        let ring = self.unsealed()?;
        Ok(ring.read().unwrap_or_else(PoisonError::into_inner).clone())
    }

    /// The box's own key, for whoever derives another one from it.
    pub(crate) async fn own_key(&self) -> Result<Key, VaultError> {
        let check = self.0.store.key_check().await?.ok_or(VaultError::Sealed)?;
        self.master(check.kek)?;
        open_own_key(&*self.ring()?, &check).ok_or(VaultError::Damaged)
    }

    fn unsealed(&self) -> Result<&RwLock<Arc<Keyring>>, VaultError> {
        self.0.ring.as_ref().ok_or(VaultError::Sealed)
    }

    pub(crate) fn data_key(&self, row: &DataKey) -> Result<Key, VaultError> {
        Ok(open_data_key(&*self.master(row.key.kek)?, row)?)
    }

    /// Makes a user's key under the master key that new ones belong under; `None` when somebody else came first.
    async fn add_data_key(&self, user: &UserId, kek: Option<KeyIdBytes>) -> Result<Option<Key>, VaultError> {
        let master = self.master(kek.ok_or(VaultError::Sealed)?)?;
        let mut id = KeyIdBytes::default();
        (self.0.random)(&mut id);
        let key = Key::named(id, |bytes| (self.0.random)(bytes));
        let row = seal_data_key(&master, user, &key, &self.0.random);
        Ok(self.0.store.add_data_key(row).await?.then_some(key))
    }

    /// A master key by its name. One that is not known yet came with a rotation: the file is read again.
    fn master(&self, id: KeyIdBytes) -> Result<Arc<Key>, VaultError> {
        let ring = self.unsealed()?;
        // A ring is replaced as a whole, so one that a panic left behind is whole too.
        if let Some(key) = ring.read().unwrap_or_else(PoisonError::into_inner).get(id) {
            return Ok(key.clone());
        }
        let again = self.0.file.read().map_err(|error| {
            tracing::error!(%error, "a secret is sealed under a master key that is not there");
            VaultError::Sealed
        })?;
        let key = again.get(id).cloned();
        *ring.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(again);
        key.ok_or(VaultError::Sealed)
    }

    fn new_row_id(&self) -> String {
        let mut id = [0; 16];
        (self.0.random)(&mut id);
        data_encoding::HEXLOWER.encode(&id)
    }
}

/// A value to be stored.
pub struct NewValue<'a> {
    pub user: &'a UserId,
    pub name: &'a SecretName,
    pub value: &'a SecretValue,
    /// Whether sandboxes with a grant may have the value itself.
    pub reveal: bool,
    pub at: Timestamp,
}

/// Makes what a database has from its first start on: the box's own key, and a master key unless one was put there.
fn begin(file: &KeyFile, random: &Fill) -> Result<SealedKey, KeyFileError> {
    let ring = match file.read() {
        Err(KeyFileError::Missing(_)) => {
            let ring = Keyring::new(random);
            file.write(&ring)?;
            ring
        }
        read => read?,
    };
    let own = Key::named(OWN_KEY, |bytes| random(bytes));
    Ok(seal_own_key(ring.first(), &own, random))
}

/// The name of the box's own key, which seals nothing.
const OWN_KEY: KeyIdBytes = *b"box  key";

const OWN_PLACE: Place<'_> = Place {
    table: "key_check",
    user: "",
    row: "",
    version: 1,
    flag: false,
};

/// The box's own key, if the ring is this database's.
pub(crate) fn open_own_key(ring: &Keyring, check: &SealedKey) -> Option<Key> {
    let opened = seal::open(ring.get(check.kek)?, OWN_PLACE, &check.sealed).ok()?;
    key_from(OWN_KEY, &opened).ok()
}

pub(crate) fn seal_own_key(master: &Key, own: &Key, random: &Fill) -> SealedKey {
    SealedKey {
        kek: master.id(),
        sealed: seal::seal(master, OWN_PLACE, own.bytes(), random),
    }
}

pub(crate) fn open_data_key(master: &Key, row: &DataKey) -> Result<Key, Damaged> {
    let name = data_encoding::HEXLOWER.encode(&row.id);
    let opened = seal::open(master, place_of_data_key(&row.user, &name), &row.key.sealed)?;
    key_from(row.id, &opened)
}

pub(crate) fn seal_data_key(master: &Key, user: &UserId, key: &Key, random: &Fill) -> DataKey {
    let name = data_encoding::HEXLOWER.encode(&key.id());
    DataKey {
        id: key.id(),
        user: user.clone(),
        key: SealedKey {
            kek: master.id(),
            sealed: seal::seal(master, place_of_data_key(user, &name), key.bytes(), random),
        },
    }
}

fn key_from(id: KeyIdBytes, opened: &SecretValue) -> Result<Key, Damaged> {
    let bytes: &[u8; 32] = opened.expose().try_into().map_err(|_| Damaged)?;
    Ok(Key::named(id, |page| page.copy_from_slice(bytes)))
}

fn place_of_data_key<'a>(user: &'a UserId, name: &'a str) -> Place<'a> {
    Place {
        table: "data_keys",
        user: user.as_str(),
        row: name,
        version: 1,
        flag: false,
    }
}

fn place_of<'a>(user: &'a UserId, row: &'a str, version: u64, reveal: bool) -> Place<'a> {
    Place {
        table: "secrets",
        user: user.as_str(),
        row,
        version,
        flag: reveal,
    }
}
