//! What sandboxes used of the model providers, by day, and the caps on it. It must not know providers, prices or clocks.

use choir_core::{Capability, Name, SandboxId, Slot, UserId};
use jiff::civil::Date;
use rusqlite::{Connection, Row, params};

use crate::audit::{self, AuditEvent, AuditId};
use crate::row::parsed;
use crate::{Error, Result, Store};

/// Whose key a call is made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KeyOwner {
    /// The box's: caps are for it.
    Platform,
    /// The user's, by a grant.
    Own,
}

impl KeyOwner {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Platform => "platform",
            Self::Own => "own",
        }
    }
}

/// Where a use is counted.
#[derive(Debug, Clone)]
pub struct UsePlace {
    /// In UTC.
    pub day: Date,
    pub user: UserId,
    pub workspace: Name,
    pub slot: Slot,
    pub sandbox: SandboxId,
    pub provider: Capability,
    pub key: KeyOwner,
}

/// What one user, and one sandbox, may use of the box's key in a day. `None` is no cap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Caps {
    pub requests: Option<u64>,
    /// Input and output together.
    pub tokens: Option<u64>,
    pub sandbox_requests: Option<u64>,
    pub sandbox_tokens: Option<u64>,
}

/// A cap that is used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spent {
    /// Whether it is the cap of one sandbox rather than of its user.
    pub sandbox: bool,
    /// Whether it counts tokens rather than requests.
    pub tokens: bool,
    pub cap: u64,
    pub used: u64,
}

/// Whether a call may be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counted {
    /// It is counted, and the intent recorded.
    Go(AuditId),
    Capped(Spent),
}

/// Tokens of one answer, or the sum of many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tokens {
    pub input: u64,
    /// The part of the input that the provider had in its cache.
    pub cached: u64,
    pub output: u64,
}

/// A day's use at one place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UseRow {
    pub day: Date,
    pub user: Name,
    pub workspace: Name,
    pub slot: Slot,
    pub provider: Capability,
    pub key: KeyOwner,
    pub requests: u64,
    pub tokens: Tokens,
}

impl Store {
    /// Counts a request that is about to be sent and records the intent, in one step with the look at the caps, so that
    /// of requests at once no more pass than a cap allows. One that does not pass is recorded as `event` with the outcome
    /// `capped`. Where the audit trail cannot be written nothing is counted, and the call must not be made.
    pub async fn begin_use(&self, place: UsePlace, caps: Caps, event: AuditEvent) -> Result<Counted> {
        let counted = self.write(move |c| {
            if place.key == KeyOwner::Platform
                && let Some(spent) = spent(c, &place, caps)?
            {
                let outcome = "capped";
                audit::append(c, &AuditEvent { outcome, ..event })?;
                return Ok(Counted::Capped(spent));
            }
            c.prepare_cached(
                "INSERT INTO provider_use (user_id, day, provider, key, workspace, slot, sandbox_id, requests)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, 1)
                 ON CONFLICT (user_id, day, provider, key, workspace, slot, sandbox_id)
                 DO UPDATE SET requests = requests + 1",
            )?
            .execute(params![
                place.user.as_str(),
                place.day.to_string(),
                place.provider.as_str(),
                place.key.as_str(),
                place.workspace.as_str(),
                place.slot.as_str(),
                place.sandbox.as_str()
            ])?;
            audit::append_intent(c, event).map(Counted::Go)
        });
        self.alarm.note(counted.await)
    }

    /// Adds the tokens of a request that was counted.
    pub async fn add_tokens(&self, place: UsePlace, tokens: Tokens) -> Result<()> {
        self.write(move |c| {
            let changed = c
                .prepare_cached(
                    "UPDATE provider_use SET input_tokens = input_tokens + ?8, cached_tokens = cached_tokens + ?9,
                                             output_tokens = output_tokens + ?10
                     WHERE user_id = ?1 AND day = ?2 AND provider = ?3 AND key = ?4 AND workspace = ?5 AND slot = ?6
                       AND sandbox_id = ?7",
                )?
                .execute(params![
                    place.user.as_str(),
                    place.day.to_string(),
                    place.provider.as_str(),
                    place.key.as_str(),
                    place.workspace.as_str(),
                    place.slot.as_str(),
                    place.sandbox.as_str(),
                    tokens.input,
                    tokens.cached,
                    tokens.output
                ])?;
            if changed == 0 { Err(Error::NotFound) } else { Ok(()) }
        })
        .await
    }

    /// A user's use, or everybody's, from the day `since` on; the newest day first.
    pub async fn provider_use(&self, of: Option<UserId>, since: Date) -> Result<Vec<UseRow>> {
        self.read(move |c| {
            let mut statement = c.prepare_cached(
                "SELECT p.day, u.name AS user, p.workspace, p.slot, p.provider, p.key, sum(p.requests) AS requests,
                        sum(p.input_tokens) AS input, sum(p.cached_tokens) AS cached, sum(p.output_tokens) AS output
                 FROM provider_use p JOIN users u ON u.id = p.user_id
                 WHERE p.day >= ?1 AND (?2 IS NULL OR p.user_id = ?2)
                 GROUP BY p.day, u.name, p.workspace, p.slot, p.provider, p.key
                 ORDER BY p.day DESC, u.name, p.workspace, p.slot, p.provider, p.key",
            )?;
            let mut rows = statement.query(params![since.to_string(), of.as_ref().map(UserId::as_str)])?;
            let mut found = Vec::new();
            while let Some(row) = rows.next()? {
                found.push(use_row(row)?);
            }
            Ok(found)
        })
        .await
    }
}

/// The first cap that is used up.
fn spent(c: &Connection, place: &UsePlace, caps: Caps) -> Result<Option<Spent>> {
    let levels = [
        (false, caps.requests, caps.tokens),
        (true, caps.sandbox_requests, caps.sandbox_tokens),
    ];
    for (sandbox, most_requests, most_tokens) in levels {
        if most_requests.is_none() && most_tokens.is_none() {
            continue;
        }
        let (requests, tokens): (u64, u64) = c
            .prepare_cached(
                "SELECT coalesce(sum(requests), 0), coalesce(sum(input_tokens + output_tokens), 0) FROM provider_use
                 WHERE user_id = ?1 AND day = ?2 AND provider = ?3 AND key = 'platform'
                   AND (?4 IS NULL OR sandbox_id = ?4)",
            )?
            .query_row(
                params![
                    place.user.as_str(),
                    place.day.to_string(),
                    place.provider.as_str(),
                    sandbox.then(|| place.sandbox.as_str())
                ],
                |row| Ok((row.get(0)?, row.get(1)?)),
            )?;
        for (of_tokens, cap, used) in [(false, most_requests, requests), (true, most_tokens, tokens)] {
            if let Some(cap) = cap.filter(|cap| used >= *cap) {
                return Ok(Some(Spent {
                    sandbox,
                    tokens: of_tokens,
                    cap,
                    used,
                }));
            }
        }
    }
    Ok(None)
}

fn use_row(row: &Row<'_>) -> Result<UseRow> {
    Ok(UseRow {
        day: parsed(row, "day")?,
        user: parsed(row, "user")?,
        workspace: parsed(row, "workspace")?,
        slot: parsed(row, "slot")?,
        provider: parsed(row, "provider")?,
        key: match row.get::<_, String>("key")?.as_str() {
            "platform" => KeyOwner::Platform,
            _ => KeyOwner::Own,
        },
        requests: row.get("requests")?,
        tokens: Tokens {
            input: row.get("input")?,
            cached: row.get("cached")?,
            output: row.get("output")?,
        },
    })
}
