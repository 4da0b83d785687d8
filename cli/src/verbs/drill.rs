//! `choir drill`: rehearsals of what must work on a bad day. It must not rehearse itself.

use clap::Subcommand;

use crate::context::Context;
use crate::drill;
use crate::failure::Failure;

/// Rehearse what must work on a bad day, on a scratch workspace
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  choir drill rollback\nIt makes a workspace of its own that everybody may visit while the drill runs, loads and breaks it, rolls it back, and deletes it again; no other workspace is touched. The first step that fails ends it with exit code 1, after cleaning up."
)]
pub struct Args {
    #[command(subcommand)]
    pub what: What,
}

#[derive(Debug, Subcommand)]
pub enum What {
    /// Swap a broken version in under load and roll it back, warm and cold
    Rollback {
        /// Leave the workspace there at the end
        #[arg(long)]
        keep: bool,
    },
}

pub async fn run(ctx: &Context, args: &Args) -> Result<(), Failure> {
    let What::Rollback { keep } = args.what;
    drill::rollback(ctx, keep).await
}
