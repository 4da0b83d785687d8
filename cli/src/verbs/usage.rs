//! `choir usage`: what sandboxes used of the model providers. It must not know prices.

use choir_api::usage::{Cap, KeyOwner, Usage, UsageRow};
use choir_core::Name;
use jiff::civil::Date;

use crate::context::Context;
use crate::failure::Failure;
use crate::output::table;

/// Show requests and tokens used of the model providers, by day, workspace and slot
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  choir usage\n  choir usage --since 2026-01-01 --json\n  choir usage --all")]
pub struct Args {
    /// The first day to show, in UTC [default: 30 days ago]
    #[arg(long, value_name = "DAY")]
    pub since: Option<Date>,
    /// Everybody's use (admins only)
    #[arg(long)]
    pub all: bool,
    /// One person's use (admins only)
    #[arg(long, value_name = "NAME", conflicts_with = "all")]
    pub user: Option<Name>,
}

pub async fn run(ctx: &Context, args: &Args) -> Result<(), Failure> {
    let client = ctx.client()?;
    let usage = if args.all || args.user.is_some() {
        client.everybodys_usage(args.user.as_ref(), args.since).await?
    } else {
        client.usage(args.since).await?
    };
    ctx.show(&usage, || text(&usage))
}

fn text(usage: &Usage) -> String {
    let rows: Vec<Vec<String>> = usage.items.iter().map(row).collect();
    let mut text = if rows.is_empty() {
        "Nothing was used.".to_owned()
    } else {
        let headings = [
            "DAY", "USER", "SLOT", "PROVIDER", "KEY", "REQUESTS", "INPUT", "CACHED", "OUTPUT",
        ];
        table(&headings, &rows)
    };
    for cap in &usage.caps {
        text.push_str(&format!("\n{}", left(cap)));
    }
    text
}

fn row(row: &UsageRow) -> Vec<String> {
    vec![
        row.day.to_string(),
        row.user.to_string(),
        format!("{}/{}", row.workspace, row.slot),
        row.provider.to_string(),
        match row.key {
            KeyOwner::Platform => "the box's".to_owned(),
            KeyOwner::Own => "own".to_owned(),
        },
        row.requests.to_string(),
        row.input_tokens.to_string(),
        row.cached_tokens.to_string(),
        row.output_tokens.to_string(),
    ]
}

fn left(cap: &Cap) -> String {
    let of = |used: u64, most: Option<u64>| match most {
        Some(most) => format!("{used} of {most}"),
        None => used.to_string(),
    };
    format!(
        "Today with the box's key for {}: {} requests, {} tokens; resets in {} min.",
        cap.provider,
        of(cap.requests, cap.daily_requests),
        of(cap.tokens, cap.daily_tokens),
        cap.resets_in_s.div_ceil(60)
    )
}
