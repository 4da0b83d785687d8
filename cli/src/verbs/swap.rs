//! `choir swap`: live becomes dev and dev live. It must not know how a deployment is waited for.

use choir_api::client::Client;
use choir_api::workspaces::Deployment;
use choir_core::Name;

use crate::context::Context;
use crate::deploying::{self, CALL};
use crate::failure::Failure;
use crate::progress::Line;

/// Make dev live and live dev, without dropping a request
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  choir swap\nWhat was live is frozen as it was: `choir rollback` brings it back in under a second."
)]
pub struct Args {}

pub async fn run(ctx: &Context, _args: &Args) -> Result<(), Failure> {
    let client = ctx.client()?;
    deploying::show(ctx, "swap", async |key: String| {
        client.swap(&ctx.workspace, &key, CALL).await
    })
    .await
}

/// Swaps and waits for the end, without a word.
pub async fn swap(client: &Client, workspace: &Name) -> Result<Deployment, Failure> {
    let mut quiet = Line::begin(true);
    deploying::carry_out(client, workspace, "swap", &mut quiet, async |key| {
        client.swap(workspace, &key, CALL).await
    })
    .await
}
