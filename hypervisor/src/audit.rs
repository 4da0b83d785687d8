//! Keeping the audit trail honest: its head goes to the log, where whoever cuts the trail does not reach, and its rows are
//! checked on request. It must not write rows.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use choir_store::{AuditHead, AuditVerdict, Store};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::keys;
use crate::random::{OsRandom, Random};

/// How often the head is logged while rows are added: what is cut off is at most this young.
const ANCHOR_EVERY: Duration = Duration::from_secs(60);

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
    Ok(report(&found, kept.is_some()))
}

fn report(found: &AuditVerdict, compared: bool) -> String {
    let mut lines = vec![format!(
        "{} audit rows are as they were written",
        found.rows - found.unlinked
    )];
    if found.unlinked > 0 {
        lines.push(format!(
            "{} more were written while the master key was missing: nothing is known about those yet",
            found.unlinked
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
        lines.push("compare with a head from the journal (--head ID:MAC) to see that nothing was cut off".into());
    }
    lines.join("\n")
}
