//! `choir prove`: has every place searched for secrets, shows the signed report, keeps it, and checks one that was kept. It
//! must not know any secret.

use std::fs;
use std::path::PathBuf;

use choir_api::client::Step;
use choir_api::prove::{Hit, Owner, Place, Progress, Report, Scope, Signed, Sought, Verdict};

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{plain, table};
use crate::progress::Line;

/// Search everything that a sandbox or an operator can see for secrets, and show the signed report
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  choir prove --out report.json\n  choir prove --verify report.json\n\nExit codes: 0 no secret was \
                  found and everything was searched, 1 otherwise, 2 wrong usage."
)]
pub struct Args {
    /// All secrets and keys, in the whole box (admins only)
    #[arg(long)]
    pub all: bool,
    /// Write the report with its signature to a file
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Succeed although something was not searched
    #[arg(long)]
    pub allow_unsearched: bool,
    /// Succeed although secrets that may be revealed were found in their owner's sandboxes
    #[arg(long)]
    pub allow_revealed: bool,
    /// Check the signature of a report that was kept, instead of searching
    #[arg(long, value_name = "FILE", conflicts_with_all = ["all", "out", "allow_unsearched", "allow_revealed"])]
    pub verify: Option<PathBuf>,
    /// The key it must be signed with, in hexadecimal [default: asks the box]
    #[arg(long, value_name = "KEY", requires = "verify")]
    pub key: Option<String>,
}

pub async fn run(ctx: &Context, args: &Args) -> Result<(), Failure> {
    match &args.verify {
        Some(file) => verify(ctx, file, args.key.as_deref()).await,
        None => search(ctx, args).await,
    }
}

async fn search(ctx: &Context, args: &Args) -> Result<(), Failure> {
    let client = ctx.client()?;
    let scope = if args.all { Scope::Box } else { Scope::Own };
    let key = client.prove_key().await?.key;
    let mut search = client.prove(scope).await?;
    let mut line = Line::begin(ctx.json);
    let signed = loop {
        match search.next().await? {
            Some(Step::Progress(progress)) => line.tell(&told(&progress)),
            Some(Step::Report(signed)) => break signed,
            None => {
                return Err(Failure::Failed(
                    "the search ended without a report; try again".to_owned(),
                ));
            }
        }
    };
    drop(line);
    let report = signed.verify(&key).map_err(|e| Failure::Failed(e.to_string()))?;
    if let Some(file) = &args.out {
        let text = serde_json::to_string_pretty(&signed).map_err(|e| Failure::Failed(e.to_string()))?;
        fs::write(file, text + "\n").map_err(|e| Failure::Failed(format!("cannot write {}: {e}", file.display())))?;
    }
    ctx.show(&signed, || text(&report, &key))?;
    let fine = match report.verdict {
        Verdict::Clean => true,
        Verdict::Incomplete => args.allow_unsearched,
        Verdict::Revealed => args.allow_revealed && (report.complete || args.allow_unsearched),
        Verdict::Hits => false,
    };
    if fine { Ok(()) } else { Err(Failure::Exit(1)) }
}

async fn verify(ctx: &Context, file: &PathBuf, key: Option<&str>) -> Result<(), Failure> {
    let wrong = |e: &dyn std::fmt::Display| Failure::Failed(format!("{} is not good: {e}", file.display()));
    let signed: Signed =
        serde_json::from_str(&fs::read_to_string(file).map_err(|e| wrong(&e))?).map_err(|e| wrong(&e))?;
    let key = match key {
        Some(key) => key.to_owned(),
        None => ctx.client()?.prove_key().await?.key,
    };
    let report = signed.verify(&key).map_err(|e| wrong(&e))?;
    ctx.show(&signed, || text(&report, &key))
}

fn told(progress: &Progress) -> String {
    let hits = if progress.hits > 0 {
        format!(", {} hits", progress.hits)
    } else {
        String::new()
    };
    format!(
        "{} of {}, {}{hits}: {}",
        progress.places_done,
        progress.places,
        size(progress.bytes),
        plain(&progress.place)
    )
}

/// Bytes as people read them.
fn size(bytes: u64) -> String {
    match bytes {
        0..1000 => format!("{bytes} B"),
        1000..1_000_000 => format!("{} kB", bytes / 1000),
        1_000_000..1_000_000_000 => format!("{} MB", bytes / 1_000_000),
        _ => format!("{}.{} GB", bytes / 1_000_000_000, bytes / 100_000_000 % 10),
    }
}

fn text(report: &Report, key: &str) -> String {
    let places: Vec<Vec<String>> = report.places.iter().map(place).collect();
    let mut parts = vec![table(&["PLACE", "OF", "SEARCHED", "ITEMS", "HITS", "STATE"], &places)];
    let reasons = report.places.iter().flat_map(|place| {
        let of = owner(&place.owner);
        place
            .why
            .iter()
            .map(move |why| format!("{} of {of}: {why}", place.what))
    });
    parts.extend(section("Not searched, and why:", reasons));
    let unsought = report.unsought.iter();
    parts.extend(section(
        "Secrets that cannot be looked for:",
        unsought.map(|unsought| format!("{}: {}", secret(&unsought.secret), unsought.why)),
    ));
    let more = |listed: usize, total: u64| {
        let rest = total.saturating_sub(listed as u64);
        (rest > 0).then(|| format!("and {rest} more"))
    };
    let hits = report.hits.iter().map(hit);
    parts.extend(section(
        "Found:",
        hits.chain(more(report.hits.len(), report.hits_total)),
    ));
    let logins = report.logins.iter().map(|login| {
        let of = owner(&login.owner);
        format!("{} in {of}, {}: {}", login.tool, login.file, login.advice)
    });
    parts.extend(section(
        "Logins inside:",
        logins.chain(more(report.logins.len(), report.logins_total)),
    ));
    parts.push(format!(
        "{}\n{}.\n{} secrets and keys looked for; asked by {} of {} (box {}), {} to {}.\nSigned with {key}.",
        report.verdict.as_str().to_uppercase(),
        plain(&report.summary),
        report.sought.len(),
        report.asked_by,
        plain(&report.origin),
        plain(&report.box_id),
        report.began_at,
        report.ended_at
    ));
    parts.join("\n\n")
}

fn section(title: &str, lines: impl Iterator<Item = String>) -> Option<String> {
    let lines: Vec<String> = lines.map(|line| format!("  {}", plain(&line))).collect();
    (!lines.is_empty()).then(|| format!("{title}\n{}", lines.join("\n")))
}

fn place(place: &Place) -> Vec<String> {
    let state = match (place.searched, place.unread) {
        (true, _) => "searched".to_owned(),
        (false, 0) => "NOT SEARCHED".to_owned(),
        (false, unread) => format!("{unread} NOT READ"),
    };
    vec![
        place.what.clone(),
        owner(&place.owner),
        size(place.bytes),
        place.items.to_string(),
        place.hits.to_string(),
        state,
    ]
}

fn owner(owner: &Owner) -> String {
    match owner {
        Owner::Box => "box".to_owned(),
        Owner::Sandbox {
            user, workspace, slot, ..
        } => format!("{slot} of {user}/{workspace}"),
        Owner::Volume { id } => id.clone(),
    }
}

fn secret(secret: &Sought) -> String {
    match (&secret.owner, secret.version) {
        (Some(owner), Some(version)) => format!("{} of {owner} (version {version})", secret.name),
        (Some(owner), None) => format!("{} of {owner}", secret.name),
        _ => secret.name.clone(),
    }
}

fn hit(hit: &Hit) -> String {
    let at = hit
        .offset
        .map_or("in its name".to_owned(), |offset| format!("at byte {offset}"));
    let allowed = hit
        .allowed
        .as_ref()
        .map(|why| format!(" (allowed: {why})"))
        .unwrap_or_default();
    format!(
        "{} as {} in {} of {}, {} {at}{allowed}",
        secret(&hit.secret),
        hit.form,
        hit.what,
        owner(&hit.owner),
        hit.item
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        let read = [0, 999, 1000, 1_500_000, 12_345_678_901].map(size);
        assert_eq!(read, ["0 B", "999 B", "1 kB", "1 MB", "12.3 GB"]);
    }
}
