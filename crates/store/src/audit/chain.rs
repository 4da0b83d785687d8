//! The chain over the audit rows: each row's link is an HMAC of the link before and of all that the row says. It must not
//! know where the key comes from.

use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, OnceLock};

use hmac::{Hmac, KeyInit, Mac as _};
use rusqlite::{Connection, OptionalExtension, Row, params};
use sha2::Sha256;

use crate::{Result, Store};

/// Names this encoding; another one gets another label, so that no row means two things.
const LABEL: &[u8] = b"choir audit row 1";

/// One link, in bytes.
pub(super) type Link = [u8; 32];

/// What the first row's link is chained to.
pub(super) const START: Link = [0; 32];

/// Where the writer finds the chain's key; empty while the master key is missing.
#[derive(Clone, Default)]
pub(crate) struct Chain(Arc<OnceLock<ChainKey>>);

/// It cannot be printed.
impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Chain")
    }
}

/// A keyed HMAC, which does not give its key out again.
pub(super) struct ChainKey(Hmac<Sha256>);

impl ChainKey {
    pub(super) fn new(key: &[u8; 32]) -> Self {
        Self(Hmac::new_from_slice(key).expect("HMAC takes keys of any length"))
    }

    /// The link of the row under the cursor. Every field has its length before it, so that no two rows look alike.
    pub(super) fn link(&self, before: &Link, row: &Row<'_>) -> Result<Link, rusqlite::Error> {
        let mut mac = self.0.clone();
        mac.update(LABEL);
        mac.update(before);
        for column in ["id", "at"] {
            mac.update(&row.get::<_, i64>(column)?.to_be_bytes());
        }
        for column in ["actor", "user_id", "action", "subject", "outcome"] {
            let text: Option<String> = row.get(column)?;
            // One more than the length, so that nothing and an empty text differ.
            let size = text.as_ref().map_or(0, |text| text.len() as u64 + 1);
            mac.update(&size.to_be_bytes());
            mac.update(text.unwrap_or_default().as_bytes());
        }
        // No row has the id 0.
        let intent: Option<i64> = row.get("intent")?;
        mac.update(&intent.unwrap_or_default().to_be_bytes());
        Ok(mac.finalize().into_bytes().into())
    }
}

impl Chain {
    pub(super) fn key(&self) -> Option<&ChainKey> {
        self.0.get()
    }

    /// Links all rows that have none, in the transaction under way; does nothing without a key.
    pub(crate) fn extend(&self, c: &Connection) -> Result<(), rusqlite::Error> {
        let Some(key) = self.key() else {
            return Ok(());
        };
        let (last, mut link) = head(c)?.map_or((0, START), |head| (head.id, head.mac));
        let mut add = c.prepare_cached("INSERT INTO audit_chain (id, mac) VALUES (?1, ?2)")?;
        let mut statement = c.prepare_cached("SELECT * FROM audit WHERE id > ?1 ORDER BY id")?;
        let mut rows = statement.query([last])?;
        while let Some(row) = rows.next()? {
            link = key.link(&link, row)?;
            add.execute(params![row.get::<_, i64>("id")?, link])?;
        }
        Ok(())
    }
}

/// The newest link. Whoever keeps one elsewhere can tell later whether the trail was cut before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuditHead {
    pub id: i64,
    pub mac: [u8; 32],
}

/// `ID:MAC`, the link as 64 hexadecimal digits.
impl fmt::Display for AuditHead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.id, data_encoding::HEXLOWER.encode(&self.mac))
    }
}

/// The text is not `ID:MAC`.
#[derive(Debug, thiserror::Error)]
#[error("a head is a row's number, a colon and 64 hexadecimal digits, as the hypervisor logs it")]
pub struct NotAHead;

impl FromStr for AuditHead {
    type Err = NotAHead;

    fn from_str(text: &str) -> Result<Self, NotAHead> {
        let (id, mac) = text.split_once(':').ok_or(NotAHead)?;
        let mac = data_encoding::HEXLOWER_PERMISSIVE.decode(mac.as_bytes());
        Ok(Self {
            id: id.parse().ok().filter(|id| *id > 0).ok_or(NotAHead)?,
            mac: mac.ok().and_then(|mac| mac.try_into().ok()).ok_or(NotAHead)?,
        })
    }
}

fn head(c: &Connection) -> Result<Option<AuditHead>, rusqlite::Error> {
    c.prepare_cached("SELECT id, mac FROM audit_chain ORDER BY id DESC LIMIT 1")?
        .query_row([], |row| {
            Ok(AuditHead {
                id: row.get(0)?,
                mac: row.get(1)?,
            })
        })
        .optional()
}

impl Store {
    /// From now on every commit links the audit rows that have no link yet. The first key stays.
    pub fn set_audit_key(&self, key: [u8; 32]) {
        self.chain.0.get_or_init(|| ChainKey::new(&key));
    }

    /// The newest link; `None` before there is one.
    pub async fn audit_head(&self) -> Result<Option<AuditHead>> {
        self.read(|c| Ok(head(c)?)).await
    }
}
