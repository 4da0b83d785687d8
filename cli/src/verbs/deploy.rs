//! `choir deploy`: a release into a slot. It must not know how.

use choir_api::workspaces::Deploy;
use choir_core::{ReleaseId, Slot};

use crate::context::Context;
use crate::deploying::{self, CALL};
use crate::failure::Failure;

/// Put a release into a slot; its home stays
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  choir deploy dev r-…\nIf the release does not become healthy, what was there comes back by itself; `choir rollback` brings it back later, for live."
)]
pub struct Args {
    /// `live` or `dev`
    pub slot: Slot,
    /// A release that `choir releases` shows
    pub release: ReleaseId,
}

pub async fn run(ctx: &Context, args: &Args) -> Result<(), Failure> {
    let client = ctx.client()?;
    let asked = Deploy {
        release: args.release.clone(),
    };
    deploying::show(ctx, "deploy", async |key| {
        client.deploy(&ctx.workspace, args.slot, &asked, &key, CALL).await
    })
    .await
}
