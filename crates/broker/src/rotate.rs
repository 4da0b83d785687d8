//! Rotation of the master key, step by step: each step is one durable change, what comes next follows from the key file
//! and the database alone, so a rotation that was killed is finished by the next one. It must not touch any secret.
//!
//! 1. The key file gets a new first key before the old one, which goes on opening.
//! 2. The box's own key is sealed under the new one; from then on the database takes new data keys under no other.
//! 3. Data keys are sealed under the new one, some at a time.
//! 4. Once none is left, the old key leaves the file.

use choir_store::{AuditEvent, KeyIdBytes, Store};

use crate::keys::{Fill, Key, KeyFile, KeyFileError, Keyring};
use crate::seal::Damaged;
use crate::vault::{open_data_key, open_own_key, seal_data_key, seal_own_key};

/// How many data keys one commit seals anew.
const BATCH: u32 = 64;

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RotationStep {
    OwnKey,
    DataKeys(usize),
    /// The old key is gone from the file: the rotation is over.
    Finished,
}

/// Why a rotation stopped. What it did so far stays good, and running it again goes on from there.
#[derive(Debug, thiserror::Error)]
pub enum RotateError {
    #[error(transparent)]
    Key(#[from] KeyFileError),
    #[error("the database failed: {0}; run this again")]
    Store(#[from] choir_store::Error),
    #[error("the database was never started; start the hypervisor once")]
    NeverStarted,
    #[error("the key file lacks a key that the database is sealed under; put the right file back")]
    WrongKey,
    #[error("{0}; restore the last backup")]
    Damaged(#[from] Damaged),
}

/// A rotation of one database's master key.
pub struct Rotation {
    store: Store,
    file: KeyFile,
    random: Fill,
}

impl Rotation {
    pub fn new(store: Store, file: KeyFile, random: Fill) -> Self {
        Self { store, file, random }
    }

    /// Puts a new key first, unless an earlier rotation was not finished; false then.
    ///
    /// # Errors
    /// The key file is not this database's or cannot be written.
    pub async fn begin(&self) -> Result<bool, RotateError> {
        let ring = self.file.read()?;
        let check = self.store.key_check().await?.ok_or(RotateError::NeverStarted)?;
        open_own_key(&ring, &check).ok_or(RotateError::WrongKey)?;
        if ring.len() > 1 {
            return Ok(false);
        }
        self.file.write(&ring.with_new_first(&self.random))?;
        Ok(true)
    }

    /// Does the next step. `event` goes with the step that changes under which key new things are sealed.
    ///
    /// # Errors
    /// Any; nothing is lost by one.
    pub async fn step(&self, event: AuditEvent) -> Result<RotationStep, RotateError> {
        let ring = self.file.read()?;
        let (store, first) = (&self.store, ring.first());
        let check = store.key_check().await?.ok_or(RotateError::NeverStarted)?;
        if check.kek != first.id() {
            let own = open_own_key(&ring, &check).ok_or(RotateError::WrongKey)?;
            let anew = seal_own_key(first, &own, &self.random);
            store.reseal_key_check(check.kek, anew, event).await?;
            return Ok(RotationStep::OwnKey);
        }
        let old = store.data_keys_not_under(first.id(), BATCH).await?;
        if old.is_empty() {
            self.file.write(&ring.only_first())?;
            return Ok(RotationStep::Finished);
        }
        let mut anew = Vec::with_capacity(old.len());
        for row in &old {
            let key = open_data_key(master(&ring, row.key.kek)?, row)?;
            anew.push(seal_data_key(first, &row.user, &key, &self.random));
        }
        store.reseal_data_keys(anew).await?;
        Ok(RotationStep::DataKeys(old.len()))
    }
}

fn master(ring: &Keyring, id: KeyIdBytes) -> Result<&Key, RotateError> {
    ring.get(id).map(AsRef::as_ref).ok_or(RotateError::WrongKey)
}
