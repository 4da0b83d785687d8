//! Keeping the audit trail honest and bounded: its head goes to the log, where whoever cuts the trail does not reach, old
//! rows are pruned, and its rows are checked on request. It must not write rows of its own.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use choir_store::{AuditHead, AuditVerdict, Pruned, Store};
use jiff::{SignedDuration, Timestamp};
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::config::Config;
use crate::keys;
use crate::random::{OsRandom, Random};

/// How often the head is logged while rows are added: what is cut off is at most this young.
const ANCHOR_EVERY: Duration = Duration::from_secs(60);
/// How often it is looked for rows that are too old.
const PRUNE_EVERY: Duration = Duration::from_secs(3600);
/// Rows of one step of pruning: other writes wait for a step, about 50 ms.
const PRUNE_STEP: u32 = 2000;

/// Logs the head now, while rows are added, and at the end.
pub async fn anchor(store: Store, stop: CancellationToken) {
    let mut last = None;
    loop {
        match store.audit_head().await {
            Ok(head) if head != last => {
                last = head;
                if let Some(head) = head {
                    tracing::info!(audit.head = %head, "the audit trail reaches to here");
                }
            }
            Ok(_) => {}
            Err(error) => tracing::error!(?error, "the head of the audit trail cannot be read"),
        }
        if stop.is_cancelled() {
            return;
        }
        tokio::select! {
            () = stop.cancelled() => {}
            () = tokio::time::sleep(ANCHOR_EVERY) => {}
        }
    }
}

/// What has to be said in the trail at a start, before anything else is: how its end was found, and that what was under
/// way when the process before ended is over. Where it cannot be written, the start goes on, and so does signing in.
pub async fn begin(store: &Store, now: Timestamp) {
    let told = async {
        store.settle_audit(now).await?;
        store.end_open_intents(now, "interrupted").await
    };
    if let Err(error) = told.await {
        tracing::error!(%error, "the audit trail cannot be written: no secret is released");
    }
}

/// Prunes what is older than `keep_days`, now and then; never with 0.
pub async fn keep(store: Store, clock: Arc<dyn Clock>, keep_days: u32, stop: CancellationToken) {
    if keep_days == 0 {
        return;
    }
    loop {
        match prune(&store, clock.now(), keep_days).await {
            Ok(0) => {}
            Ok(rows) => tracing::info!(rows, "audit rows of more than {keep_days} days ago were pruned"),
            Err(error) => tracing::error!(error = format!("{error:#}"), "old audit rows were not pruned"),
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(PRUNE_EVERY) => {}
        }
    }
}

/// Takes away all rows that are too old; how many.
pub async fn prune(store: &Store, now: Timestamp, keep_days: u32) -> anyhow::Result<u64> {
    let before = now.saturating_sub(SignedDuration::from_hours(24 * i64::from(keep_days)))?;
    let mut rows = 0;
    loop {
        match store.prune_audit(before, PRUNE_STEP, now).await? {
            Pruned::Rows(0) => return Ok(rows),
            Pruned::Rows(more) => rows += more,
            Pruned::Bad(bad) => bail!("{bad}; it and all after it are kept. Look into it with `audit verify`"),
        }
    }
}

/// Checks the trail beside a running hypervisor or without one, and says what was found; the first bad row is an error.
pub async fn verify(config: &Config, kept: Option<AuditHead>) -> anyhow::Result<String> {
    let store = Store::open_read_only(&config.store.path)?;
    let random: Arc<dyn Random> = Arc::new(OsRandom);
    keys::load(&config.key_file(), &store, &random).await?;
    let found = store
        .verify_audit(kept)
        .await
        .with_context(|| format!("the audit trail of {}", config.store.path.display()))?;
    if let Some(bad) = found.bad {
        let before = found
            .head
            .map_or("nothing before it".into(), |head| format!("{head} before it"));
        bail!("{bad}; {before} is good. Keep this database as it is, and compare it with a backup");
    }
    if kept.is_some_and(|kept| kept.id < found.pruned) {
        bail!(
            "the row of this head was pruned (all up to {} were), so it says nothing; give a newer one from the log",
            found.pruned
        );
    }
    Ok(report(&found, kept.is_some()))
}

fn report(found: &AuditVerdict, compared: bool) -> String {
    let mut lines = vec![format!("{} audit rows are as they were written", found.rows)];
    if found.pruned > 0 {
        lines.push(format!(
            "rows up to {} were pruned, as [audit] keep_days says",
            found.pruned
        ));
    }
    for (first, last) in &found.sealed {
        lines.push(format!(
            "rows {first} to {last} were written while the master key was missing: anybody with the database could have \
             added them then"
        ));
    }
    if found.open_intents > 0 {
        lines.push(format!(
            "{} intents have no outcome: they are under way, or the hypervisor ended meanwhile",
            found.open_intents
        ));
    }
    if let Some(head) = found.head {
        lines.push(format!("head {head}"));
    }
    if !compared {
        lines.push(
            "compare with a head from the journal (--head ID:MAC) to see that this is not an older copy of the database"
                .into(),
        );
    }
    lines.join("\n")
}
