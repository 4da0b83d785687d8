//! `choir audit`: what was done, by whom, and how it ended. It must not change anything.

use std::io::{self, Write as _};
use std::str::FromStr;

use choir_api::audit::{AuditEntry, AuditQuery};
use choir_core::Name;
use jiff::{SignedDuration, Timestamp};

use crate::context::Context;
use crate::failure::Failure;
use crate::output::table;

/// Show what was done, by whom, and how it ended
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  choir audit --action secret --since 24h\n  choir audit --all --export > trail.jsonl"
)]
pub struct Args {
    /// Only actions that begin with this, such as `secret` or `session.begin`
    #[arg(long, value_name = "TEXT")]
    pub action: Option<String>,
    /// Only what ended so: `ok`, or a code such as `refused`
    #[arg(long, value_name = "CODE")]
    pub outcome: Option<String>,
    /// Only what is younger: a time, or so long ago (`90m`, `24h`)
    #[arg(long, value_name = "WHEN")]
    pub since: Option<When>,
    /// Only what is older: a time, or so long ago
    #[arg(long, value_name = "WHEN")]
    pub until: Option<When>,
    /// Everybody's events (admins only)
    #[arg(long)]
    pub all: bool,
    /// One person's events (admins only)
    #[arg(long, value_name = "NAME", conflicts_with = "all")]
    pub user: Option<Name>,
    /// How many of the newest
    #[arg(long, default_value_t = 50, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=500))]
    pub limit: u32,
    /// Write all that match, one JSON object a line
    #[arg(long, conflicts_with = "limit")]
    pub export: bool,
}

/// A point in time as people type it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    At(Timestamp),
    Ago(SignedDuration),
}

impl FromStr for When {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let at = text.parse().map(Self::At);
        at.or_else(|_| text.parse().map(Self::Ago))
            .map_err(|_| "write a time such as 2026-01-02T03:04:05Z, or how long ago, such as 90m or 24h")
    }
}

impl When {
    fn before(self, now: Timestamp) -> Timestamp {
        match self {
            Self::At(at) => at,
            Self::Ago(long) => now.saturating_sub(long.abs()).unwrap_or(Timestamp::MIN),
        }
    }
}

pub async fn run(ctx: &Context, args: Args) -> Result<(), Failure> {
    let query = AuditQuery {
        everybody: args.all,
        user: args.user,
        action: args.action,
        outcome: args.outcome,
        since: args.since.map(|when| when.before(ctx.now)),
        until: args.until.map(|when| when.before(ctx.now)),
        limit: (!args.export).then_some(args.limit),
        cursor: None,
    };
    let client = ctx.client()?;
    if args.export {
        let mut export = client.export_audit(&query).await?;
        while let Some(bytes) = export.next().await? {
            io::stdout().lock().write_all(&bytes)?;
        }
        return Ok(());
    }
    let page = client.audit(&query).await?;
    ctx.show(&page, || {
        let rows: Vec<Vec<String>> = page.items.iter().map(row).collect();
        table(&["ID", "AT", "ACTOR", "ACTION", "SUBJECT", "OUTCOME"], &rows)
    })
}

fn row(entry: &AuditEntry) -> Vec<String> {
    let outcome = match (entry.intent, entry.times) {
        (Some(intent), _) => format!("{} (of {intent})", entry.outcome),
        (None, Some(times)) => format!("{} ({times} times)", entry.outcome),
        (None, None) => entry.outcome.clone(),
    };
    vec![
        entry.id.to_string(),
        entry.at.to_string(),
        entry.actor.clone(),
        entry.action.clone(),
        entry.subject.clone(),
        outcome,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_typed_as_such_or_as_how_long_ago() {
        let now: Timestamp = "2026-01-02T03:04:05Z".parse().unwrap();
        let when = |text: &str| text.parse::<When>().map(|when| when.before(now).to_string());
        assert_eq!(when("2026-01-01T00:00:00Z").unwrap(), "2026-01-01T00:00:00Z");
        assert_eq!(when("90m").unwrap(), "2026-01-02T01:34:05Z");
        assert_eq!(when("24h").unwrap(), "2026-01-01T03:04:05Z");
        for wrong in ["", "yesterday", "24"] {
            assert!(when(wrong).is_err(), "{wrong}");
        }
    }
}
