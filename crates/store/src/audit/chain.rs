//! The chain over the audit rows: each row's link is an HMAC of the link before and of all that the row says. Rows written
//! while the master key is missing are linked under the tail's key instead. It must not know where the key comes from.

use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, OnceLock};

use hmac::{Hmac, KeyInit, Mac as _};
use rusqlite::{Connection, OptionalExtension, Row, params};
use sha2::Sha256;

use super::settle;
use crate::{Result, Store};

/// These name the encoding; another one gets another label, so that no row means two things.
const LABEL: &[u8] = b"choir audit row 1";
const LABEL_TIMES: &[u8] = b"choir audit row 2, times";
const LABEL_TAIL: &[u8] = b"choir audit tail 1";
const LABEL_NEXT: &[u8] = b"choir audit tail 1, next";
const LABEL_CUT: &[u8] = b"choir audit cut 1";

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

    fn mac(&self, parts: &[&[u8]]) -> [u8; 32] {
        let mut mac = self.0.clone();
        for part in parts {
            mac.update(part);
        }
        mac.finalize().into_bytes().into()
    }

    /// The link of the row under the cursor. Every field has its length before it, so that no two rows look alike.
    pub(super) fn link(&self, before: &Link, row: &Row<'_>) -> Result<Link, rusqlite::Error> {
        let mut mac = self.0.clone();
        let times: Option<i64> = row.get("times")?;
        if let Some(times) = times {
            mac.update(LABEL_TIMES);
            mac.update(&times.to_be_bytes());
        } else {
            mac.update(LABEL);
        }
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

    /// The tail's key right after a link of this key.
    pub(super) fn tail(&self, link: &Link) -> TailKey {
        TailKey(self.mac(&[LABEL_TAIL, link]))
    }

    /// Vouches for a cut.
    pub(super) fn cut(&self, through: i64, link: &Link, begun: bool) -> [u8; 32] {
        self.mac(&[LABEL_CUT, &through.to_be_bytes(), link, &[u8::from(begun)]])
    }
}

/// What links one row while the master key is missing. It goes forward with each row and never back.
#[derive(PartialEq, Eq)]
pub(super) struct TailKey(pub(super) [u8; 32]);

impl TailKey {
    pub(super) fn link(&self, before: &Link, row: &Row<'_>) -> Result<Link, rusqlite::Error> {
        ChainKey::new(&self.0).link(before, row)
    }

    pub(super) fn next(&self) -> Self {
        Self(ChainKey::new(&self.0).mac(&[LABEL_NEXT]))
    }
}

/// The tail as it is stored: the newest row that has a link, and the key for the next one.
pub(super) struct Tail {
    pub(super) id: i64,
    pub(super) key: TailKey,
}

pub(super) fn tail(c: &Connection) -> Result<Option<Tail>, rusqlite::Error> {
    c.prepare_cached("SELECT id, key FROM audit_tail")?
        .query_row([], |row| {
            Ok(Tail {
                id: row.get(0)?,
                key: TailKey(row.get(1)?),
            })
        })
        .optional()
}

fn set_tail(c: &Connection, tail: &Tail) -> Result<(), rusqlite::Error> {
    c.prepare_cached(
        "INSERT INTO audit_tail (one, id, key) VALUES (1, ?1, ?2)
         ON CONFLICT DO UPDATE SET id = excluded.id, key = excluded.key",
    )?
    .execute(params![tail.id, tail.key.0])?;
    Ok(())
}

impl Chain {
    pub(super) fn key(&self) -> Option<&ChainKey> {
        self.0.get()
    }

    /// Links all rows that have none, in the transaction under way.
    pub(crate) fn extend(&self, c: &Connection) -> Result<(), rusqlite::Error> {
        let last = newest(c)?;
        let head = head(c)?;
        if head.is_some_and(|head| head.id >= last) || last == 0 {
            return Ok(());
        }
        match self.key() {
            Some(key) => {
                settle::settle(c, key, None)?;
                link_all(c, key)
            }
            None => link_sealed(c, head),
        }
    }
}

/// Links what has no link under the master key's chain.
pub(super) fn link_all(c: &Connection, key: &ChainKey) -> Result<(), rusqlite::Error> {
    let (last, mut link) = match head(c)? {
        Some(head) => (head.id, head.mac),
        None => (0, START),
    };
    let mut newest = last;
    let mut add = c.prepare_cached("INSERT INTO audit_chain (id, mac) VALUES (?1, ?2)")?;
    let mut statement = c.prepare_cached("SELECT * FROM audit WHERE id > ?1 ORDER BY id")?;
    let mut rows = statement.query([last])?;
    while let Some(row) = rows.next()? {
        link = key.link(&link, row)?;
        newest = row.get("id")?;
        add.execute(params![newest, link])?;
    }
    let key = key.tail(&link);
    set_tail(c, &Tail { id: newest, key })
}

/// Links under the tail's key. Where that does not belong to the newest link, rows stay without one: they would prove
/// nothing.
fn link_sealed(c: &Connection, head: Option<AuditHead>) -> Result<(), rusqlite::Error> {
    let (Some(mut tail), Some(head)) = (tail(c)?, head) else {
        return Ok(());
    };
    if tail.id != head.id {
        return Ok(());
    }
    let mut link = head.mac;
    let mut add = c.prepare_cached("INSERT INTO audit_chain (id, mac, sealed) VALUES (?1, ?2, 1)")?;
    let mut statement = c.prepare_cached("SELECT * FROM audit WHERE id > ?1 ORDER BY id")?;
    let mut rows = statement.query([head.id])?;
    while let Some(row) = rows.next()? {
        link = tail.key.link(&link, row)?;
        tail = Tail {
            id: row.get("id")?,
            key: tail.key.next(),
        };
        add.execute(params![tail.id, link])?;
    }
    set_tail(c, &tail)
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

pub(super) fn head(c: &Connection) -> Result<Option<AuditHead>, rusqlite::Error> {
    c.prepare_cached("SELECT id, mac FROM audit_chain ORDER BY id DESC LIMIT 1")?
        .query_row([], |row| {
            Ok(AuditHead {
                id: row.get(0)?,
                mac: row.get(1)?,
            })
        })
        .optional()
}

/// The number of the newest row; 0 where there is none.
pub(super) fn newest(c: &Connection) -> Result<i64, rusqlite::Error> {
    c.prepare_cached("SELECT coalesce(max(id), 0) FROM audit")?
        .query_row([], |row| row.get(0))
}

impl Store {
    /// From now on every commit links its audit rows under this key. The first key stays.
    pub fn set_audit_key(&self, key: [u8; 32]) {
        self.chain.0.get_or_init(|| ChainKey::new(&key));
    }

    /// The newest link; `None` before there is one.
    pub async fn audit_head(&self) -> Result<Option<AuditHead>> {
        self.read(|c| Ok(head(c)?)).await
    }
}
