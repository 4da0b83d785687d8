//! `choir swap`: live becomes dev and dev live. It must not start a second swap when an answer was lost: the key is
//! the same for the whole run.

use std::time::Duration;

use choir_api::client::{Client, ClientError};
use choir_api::workspaces::Deployment;
use choir_core::Name;
use choir_core::deployment::Step;
use data_encoding::BASE32_NOPAD;

use crate::context::Context;
use crate::failure::Failure;
use crate::output::duration;
use crate::progress;

/// How long one call lets the server wait.
const CALL: Duration = Duration::from_secs(25);

/// Make dev live and live dev, without dropping a request
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  choir swap\nRun it again to swap back.")]
pub struct Args {}

pub async fn run(ctx: &Context, _args: &Args) -> Result<(), Failure> {
    let client = ctx.client()?;
    let deployment = progress::watch("swap", ctx.json, swap(&client, &ctx.workspace)).await?;
    let total: u64 = deployment.steps.iter().map(|s| s.took_ms).sum();
    ctx.show(&deployment, || {
        format!("Swapped in {}: what was dev is now live.", duration(total))
    })
}

/// Swaps and waits for the end.
pub async fn swap(client: &Client, workspace: &Name) -> Result<Deployment, Failure> {
    let key = idempotency_key()?;
    let mut deployment = match client.swap(workspace, &key, CALL).await {
        // The connection broke, so nobody knows whether it was begun; with the same key asking again is safe.
        Err(ClientError::Unreachable { .. } | ClientError::Silent { .. }) => client.swap(workspace, &key, CALL).await?,
        other => other?,
    };
    while !deployment.step.is_final() {
        tokio::time::sleep(Duration::from_millis(100)).await;
        deployment = client.deployment(workspace, deployment.id.as_str()).await?;
    }
    if deployment.step == Step::Succeeded {
        return Ok(deployment);
    }
    let reason = deployment.reason.unwrap_or_else(|| "no reason was given".to_owned());
    Err(Failure::Failed(format!(
        "the swap did not succeed and nothing has changed: {reason}"
    )))
}

fn idempotency_key() -> Result<String, Failure> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|e| Failure::Failed(format!("the system gives no randomness: {e}")))?;
    Ok(BASE32_NOPAD.encode(&bytes).to_ascii_lowercase())
}
