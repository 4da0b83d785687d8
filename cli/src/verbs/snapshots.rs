//! `choir snapshots`: what a slot held at some moments. It must not know how one is taken.

use choir_api::client::Client;
use choir_api::workspaces::{Page, Snapshot};
use choir_core::{Name, Slot, SnapshotId};
use clap::Subcommand;
use serde_json::json;

use crate::context::Context;
use crate::deploying::{self, CALL};
use crate::failure::Failure;
use crate::output::{ago, bytes, table};
use crate::progress;

/// List, take, restore and delete snapshots of the slots
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  choir snapshots\n  choir snapshots take live\n  choir snapshots restore dev p-…\nA snapshot is also taken before each swap, rollback, deploy, restore and fork, and once an hour of a slot that runs (`choir config set snapshot_every_s=0` for none). Those that a rollback may need stay; of the others one an hour for a day, and one a day for a week."
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

async fn all(client: &Client, workspace: &Name) -> Result<Page<Snapshot>, Failure> {
    let mut page = client.snapshots(workspace, Slot::Live).await?;
    page.items.extend(client.snapshots(workspace, Slot::Dev).await?.items);
    page.items.sort_by_key(|s| std::cmp::Reverse(s.created_at));
    Ok(page)
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
