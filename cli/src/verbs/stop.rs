//! `choir stop`: stops a slot; its files stay. It must not know how a slot does it.

use choir_api::client::SlotVerb;
use choir_core::Slot;

use crate::context::Context;
use crate::failure::Failure;
use crate::waiting;

/// Stop a slot; its files stay
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  choir stop dev")]
pub struct Args {
    /// `live` or `dev`
    pub slot: Slot,
}

pub async fn run(ctx: &Context, args: &Args) -> Result<(), Failure> {
    waiting::verb(ctx, args.slot, SlotVerb::Stop).await
}
