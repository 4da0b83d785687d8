//! `choir fork`: dev becomes a copy of live or of a snapshot. It must not know how.

use choir_api::workspaces::Fork;
use choir_core::SnapshotId;

use crate::context::Context;
use crate::deploying::{self, CALL};
use crate::failure::Failure;

/// Make dev a copy of live as it is, or of a snapshot
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  choir fork\n  choir fork --from p-…\nWhat dev held is kept as a snapshot: `choir snapshots restore` brings it back."
)]
pub struct Args {
    /// A snapshot that `choir snapshots` shows
    #[arg(long, value_name = "ID")]
    pub from: Option<SnapshotId>,
}

pub async fn run(ctx: &Context, args: &Args) -> Result<(), Failure> {
    let client = ctx.client()?;
    let asked = Fork {
        from: args.from.clone(),
    };
    deploying::show(ctx, "fork", async |key| {
        client.fork(&ctx.workspace, &asked, &key, CALL).await
    })
    .await
}
