//! The model providers of this box: which there are, what the box's own keys are good for, and what users used of them.
//! It must not know HTTP, nor what a key says.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};

use choir_api::usage as api;
use choir_broker::{PlatformError, PlatformSecrets, SecretValue, grant};
use choir_core::{Capability, Rule, SandboxId, UserId};
use choir_store::KeyOwner;
use jiff::civil::Date;
use jiff::tz::Offset;
use jiff::{Timestamp, ToSpan as _};
use tokio::sync::Semaphore;

use crate::app::App;
use crate::config::ConfigError;
use crate::config::providers::{ProviderKind, Providers as Configured, Upstream};
use crate::error::{ApiError, ApiResult};

use request::{MOST_HELD_KIB, Reads};

pub(crate) mod door;
mod json;
mod meter;
mod reader;
mod refusal;
mod request;
pub mod routes;

/// How far back use is shown where nobody says, in days.
const SHOWN_DAYS: i64 = 30;

/// Every provider, and the box's keys for them.
pub struct Providers {
    named: BTreeMap<Capability, Provider>,
    secrets: PlatformSecrets,
    /// What each sandbox may hold of bodies that are being read.
    held: Mutex<HashMap<SandboxId, Arc<Semaphore>>>,
}

struct Provider {
    at: Upstream,
    /// What the box's key is good for.
    doors: Vec<Way>,
}

/// One address of an API.
struct Way {
    rule: Rule,
    /// Only this path and none below it.
    exact: bool,
    reads: Reads,
    /// Its answers cost tokens.
    spends: bool,
}

/// Method, path, whether what is below it is meant too, and how it is counted.
type Line = (&'static str, &'static str, bool, Reads, bool);

/// What works with nothing of the account but its models: no stored files, answers, batches, billing or administration.
const OPENAI: &[Line] = &[
    ("POST", "/v1/chat/completions", false, Reads::ChatCompletion, true),
    ("POST", "/v1/responses", false, Reads::Response, true),
    ("POST", "/v1/embeddings", false, Reads::Nothing, true),
    ("GET", "/v1/models", true, Reads::Nothing, false),
];
const ANTHROPIC: &[Line] = &[
    ("POST", "/v1/messages", false, Reads::Nothing, true),
    ("POST", "/v1/messages/count_tokens", false, Reads::Nothing, false),
    ("GET", "/v1/models", true, Reads::Nothing, false),
];

impl Providers {
    pub fn new(configured: &Configured) -> Result<Self, ConfigError> {
        let named = configured.judged()?;
        Ok(Self {
            named: named.into_iter().map(|(name, at)| (name, Provider::new(at))).collect(),
            secrets: PlatformSecrets::new(&configured.secrets_dir),
            held: Mutex::default(),
        })
    }

    fn get(&self, name: &str) -> Option<(&Capability, &Provider)> {
        self.named.iter().find(|(known, _)| known.as_str() == name)
    }

    fn names(&self) -> Vec<&str> {
        self.named.keys().map(Capability::as_str).collect()
    }

    async fn key(&self, file: &str) -> Result<SecretValue, PlatformError> {
        let (secrets, file) = (self.secrets.clone(), file.to_owned());
        let read = tokio::task::spawn_blocking(move || secrets.read(&file)).await;
        read.unwrap_or_else(|panicked| std::panic::resume_unwind(panicked.into_panic()))
    }

    /// Whether there is a key to be read, without reading it.
    async fn check(&self, file: &str) -> Result<(), PlatformError> {
        let (secrets, file) = (self.secrets.clone(), file.to_owned());
        let checked = tokio::task::spawn_blocking(move || secrets.check(&file)).await;
        checked.unwrap_or_else(|panicked| std::panic::resume_unwind(panicked.into_panic()))
    }

    /// Providers that are meant to have a key of the box's and have none that can be used, with a sentence on what to do.
    pub async fn degraded(&self) -> Vec<(String, String)> {
        let mut found = Vec::new();
        for (name, provider) in &self.named {
            let Some(file) = &provider.at.key else { continue };
            if let Err(error) = self.key(file).await {
                found.push((
                    name.to_string(),
                    format!("no key of the box for the provider {name}: {error}"),
                ));
            }
        }
        found
    }

    /// The box's keys that there are, each with the name of its provider.
    pub async fn keys(&self) -> Vec<(String, SecretValue)> {
        let mut found = Vec::new();
        for (name, provider) in &self.named {
            let Some(file) = &provider.at.key else { continue };
            if let Ok(key) = self.key(file).await {
                found.push((name.to_string(), key));
            }
        }
        found
    }

    fn held(&self, sandbox: &SandboxId) -> Arc<Semaphore> {
        let mut held = self.held.lock().expect("never poisoned: no panic while held");
        held.retain(|id, s| id == sandbox || s.available_permits() < MOST_HELD_KIB);
        let new = || Arc::new(Semaphore::new(MOST_HELD_KIB));
        held.entry(sandbox.clone()).or_insert_with(new).clone()
    }
}

impl Provider {
    fn new(at: Upstream) -> Self {
        let lines = match at.kind {
            ProviderKind::OpenAi => OPENAI,
            ProviderKind::Anthropic => ANTHROPIC,
        };
        let way = |(method, path, below, reads, spends): &Line| Way {
            rule: Rule {
                hosts: vec![at.host.clone()],
                methods: vec![(*method).to_owned()],
                path_prefix: (*path).to_owned(),
                inject: at.kind.inject(),
            },
            exact: !below,
            reads: *reads,
            spends: *spends,
        };
        Self {
            doors: lines.iter().map(way).collect(),
            at,
        }
    }

    /// The address that a call goes to, if it is one that the box's key is good for. `path` is the API's, as it was written.
    fn way(&self, method: &str, path: &str) -> Option<&Way> {
        self.doors.iter().find(|way| {
            let admitted = grant::admit(&way.rule, method, None, path).is_ok();
            admitted && (!way.exact || path == way.rule.path_prefix)
        })
    }

    /// For people: what [`Self::way`] finds.
    fn ways(&self) -> String {
        let ways = self
            .doors
            .iter()
            .map(|way| format!("{} {}", way.rule.methods[0], way.rule.path_prefix));
        ways.collect::<Vec<_>>().join(", ")
    }
}

/// The day in UTC, and how long it still lasts, in seconds.
fn day(now: Timestamp) -> (Date, u64) {
    const DAY: i64 = 24 * 3600;
    let left = DAY - now.as_second().rem_euclid(DAY);
    (Offset::UTC.to_datetime(now).date(), left.unsigned_abs())
}

impl App {
    /// What a user, or everybody, used since a day.
    pub async fn usage(&self, of: Option<UserId>, since: Option<Date>) -> ApiResult<api::Usage> {
        let (today, seconds_left) = day(self.clock.now());
        let since = match since {
            Some(since) => since,
            None => today.checked_sub(SHOWN_DAYS.days()).map_err(ApiError::internal)?,
        };
        let rows = self.store.provider_use(of.clone(), since).await?;
        let caps = match of {
            Some(_) => self.caps(&rows, today, seconds_left),
            None => Vec::new(),
        };
        let items = rows.into_iter().map(view).collect();
        Ok(api::Usage { items, caps })
    }

    /// What one user has used today of each of the box's keys.
    fn caps(&self, rows: &[choir_store::UseRow], today: Date, seconds_left: u64) -> Vec<api::Cap> {
        let with_key = self
            .providers
            .named
            .iter()
            .filter(|(_, provider)| provider.at.key.is_some());
        let cap = |(name, provider): (&Capability, &Provider)| {
            let counted = rows
                .iter()
                .filter(|row| row.day == today && row.provider == *name && row.key == KeyOwner::Platform);
            let (requests, tokens) = counted.fold((0, 0), |(requests, tokens), row| {
                (requests + row.requests, tokens + row.tokens.input + row.tokens.output)
            });
            api::Cap {
                provider: name.clone(),
                requests,
                daily_requests: provider.at.caps.requests,
                tokens,
                daily_tokens: provider.at.caps.tokens,
                resets_in_s: seconds_left,
            }
        };
        with_key.map(cap).collect()
    }
}

fn view(row: choir_store::UseRow) -> api::UsageRow {
    api::UsageRow {
        day: row.day,
        user: row.user,
        workspace: row.workspace,
        slot: row.slot,
        provider: row.provider,
        key: match row.key {
            KeyOwner::Platform => api::KeyOwner::Platform,
            KeyOwner::Own => api::KeyOwner::Own,
        },
        requests: row.requests,
        input_tokens: row.tokens.input,
        cached_tokens: row.tokens.cached,
        output_tokens: row.tokens.output,
    }
}
