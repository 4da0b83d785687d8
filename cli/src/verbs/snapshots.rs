//! `choir snapshots`: what a slot held at some moments. It must not know how one is taken.

use choir_api::client::Client;
use choir_api::workspaces::{Page, Snapshot};
use choir_core::snapshot::{Change, Diff, Differs};
use choir_core::{Name, Slot, SnapshotId};
use clap::Subcommand;
use serde_json::json;

use crate::context::Context;
use crate::deploying::{self, CALL};
use crate::failure::Failure;
use crate::output::{ago, bytes, plain, table};
use crate::progress;

/// List, take, compare, restore and delete snapshots of the slots
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  choir snapshots\n  choir snapshots take live\n  choir snapshots diff p-…\n  choir snapshots restore dev p-…\nA snapshot is also taken before each swap, rollback, deploy, restore and fork, and once an hour of a slot that runs (`choir config set snapshot_every_s=0` for none). Those that a rollback may need stay; of the others one an hour for a day, and one a day for a week.\nA difference is one of type, mode, owner, size, time of the last write or a link's target; no file is read, so a change that keeps size and time is not seen."
)]
pub struct Args {
    #[command(subcommand)]
    pub what: Option<What>,
}

#[derive(Debug, Subcommand)]
pub enum What {
    /// List those of both slots (the default)
    List,
    /// Take one of a slot now; it stays until you delete it
    Take { slot: Slot },
    /// Show which files differ: `+` added, `-` removed, `~` changed, with their sizes
    Diff {
        from: SnapshotId,
        /// Another one (default: what the slot that the first is of holds now)
        to: Option<SnapshotId>,
    },
    /// Put one into a slot; what the slot holds is kept as another
    Restore { slot: Slot, id: SnapshotId },
    /// Delete one
    Rm { id: SnapshotId },
}

pub async fn run(ctx: &Context, args: &Args) -> Result<(), Failure> {
    let client = ctx.client()?;
    match &args.what {
        None | Some(What::List) => {
            let page = all(&client, &ctx.workspace).await?;
            ctx.show(&page, || list(ctx, &page))
        }
        Some(What::Take { slot }) => {
            let taking = client.take_snapshot(&ctx.workspace, *slot);
            let taken = progress::watch("snapshot", ctx.json, taking).await?;
            ctx.show(&taken, || format!("{} is what {slot} holds now", taken.id))
        }
        Some(What::Diff { from, to }) => {
            let slot = match to {
                Some(_) => Slot::Live,
                None => slot_of(&client, &ctx.workspace, from).await?,
            };
            let comparing = client.diff_snapshots(&ctx.workspace, slot, from, to.as_ref());
            let diff = progress::watch("diff", ctx.json, comparing).await?;
            ctx.show(&diff, || differences(&diff))
        }
        Some(What::Restore { slot, id }) => {
            deploying::show(ctx, "restore", async |key| {
                client.restore(&ctx.workspace, *slot, id, &key, CALL).await
            })
            .await
        }
        Some(What::Rm { id }) => {
            client.delete_snapshot(&ctx.workspace, Slot::Live, id).await?;
            ctx.show(&json!({"deleted": id}), || format!("{id} is gone"))
        }
    }
}

/// Those of both slots, newest first.
pub async fn all(client: &Client, workspace: &Name) -> Result<Page<Snapshot>, Failure> {
    let mut page = client.snapshots(workspace, Slot::Live).await?;
    page.items.extend(client.snapshots(workspace, Slot::Dev).await?.items);
    page.items.sort_by_key(|s| std::cmp::Reverse(s.created_at));
    Ok(page)
}

/// The slot that a snapshot is of; any for one that is not there, which the server then says.
async fn slot_of(client: &Client, workspace: &Name, id: &SnapshotId) -> Result<Slot, Failure> {
    let page = all(client, workspace).await?;
    let found = page.items.iter().find(|s| s.id == *id);
    Ok(found.map_or(Slot::Live, |s| s.slot))
}

fn why(snapshot: &Snapshot) -> String {
    match snapshot.taken_for {
        Some(kind) => format!("for a {}", kind.as_str()),
        None if snapshot.scheduled => "scheduled".to_owned(),
        None => "asked for".to_owned(),
    }
}

fn list(ctx: &Context, page: &Page<Snapshot>) -> String {
    let rows: Vec<Vec<String>> = page
        .items
        .iter()
        .map(|s| {
            vec![
                s.id.to_string(),
                s.slot.to_string(),
                ago(Some(s.created_at), ctx.now),
                bytes(s.bytes),
                why(s),
            ]
        })
        .collect();
    table(&["ID", "OF", "TAKEN", "HOLDS", "WHY"], &rows)
}

fn differences(diff: &Diff) -> String {
    let mut lines: Vec<String> = diff.entries.iter().map(difference).collect();
    let rest = if diff.truncated { "; this is not all" } else { "" };
    lines.push(format!(
        "{} added ({}), {} removed ({}), {} changed{rest}",
        diff.added,
        bytes(diff.added_bytes),
        diff.removed,
        bytes(diff.removed_bytes),
        diff.changed
    ));
    lines.join("\n")
}

fn difference(entry: &Differs) -> String {
    let sign = match entry.change {
        Change::Added => '+',
        Change::Removed => '-',
        Change::Changed => '~',
    };
    let size = match (entry.before, entry.after) {
        (Some(before), Some(after)) if before != after => format!("{} → {}", bytes(before), bytes(after)),
        (before, after) => bytes(after.or(before).unwrap_or(0)),
    };
    format!("{sign} {}  {size}", plain(&entry.path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_one_line_each_and_cannot_write_escape_sequences_to_the_terminal() {
        let one = |path: &str, change, before, after| Differs {
            path: path.to_owned(),
            change,
            before,
            after,
        };
        let diff = Diff {
            added: 1,
            removed: 1,
            changed: 2,
            added_bytes: 1229,
            removed_bytes: 10,
            truncated: true,
            entries: vec![
                one("/home/choir/\u{1b}[2Jnew\n", Change::Added, None, Some(1229)),
                one("/etc/old", Change::Removed, Some(10), None),
                one("/etc/passwd", Change::Changed, Some(10), Some(20)),
                one("/usr/bin/x", Change::Changed, Some(10), Some(10)),
            ],
        };
        let expected = [
            "+ /home/choir/\u{fffd}[2Jnew\u{fffd}  1.2 KiB",
            "- /etc/old  10 B",
            "~ /etc/passwd  10 B → 20 B",
            "~ /usr/bin/x  10 B",
            "1 added (1.2 KiB), 1 removed (10 B), 2 changed; this is not all",
        ];
        assert_eq!(differences(&diff), expected.join("\n"));
    }
}
