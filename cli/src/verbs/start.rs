//! `choir start`: wakes a slot and waits until it is ready. It must not know how a slot does it.

use choir_api::client::SlotVerb;
use choir_core::Slot;

use crate::context::Context;
use crate::failure::Failure;
use crate::waiting;

/// Start a slot and wait until it is ready
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  choir start dev")]
pub struct Args {
    /// `live` or `dev`
    pub slot: Slot,
}

pub async fn run(ctx: &Context, args: &Args) -> Result<(), Failure> {
    waiting::verb(ctx, args.slot, SlotVerb::Start).await
}
