//! `choir pause`: freezes a slot's processes where they are. It must not know how a slot does it.

use choir_api::client::SlotVerb;
use choir_core::Slot;

use crate::context::Context;
use crate::failure::Failure;
use crate::waiting;

/// Freeze a slot's processes where they are
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  choir pause dev")]
pub struct Args {
    /// `live` or `dev`
    pub slot: Slot,
}

pub async fn run(ctx: &Context, args: &Args) -> Result<(), Failure> {
    waiting::verb(ctx, args.slot, SlotVerb::Pause).await
}
