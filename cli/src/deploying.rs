//! Asking for a deployment and seeing it to its end. It must not begin a second one when an answer was lost: the key is
//! the same for the whole run.

use std::time::{Duration, Instant};

use choir_api::client::{Client, ClientError};
use choir_api::workspaces::Deployment;
use choir_core::Name;
use choir_core::deployment::Step;
use data_encoding::BASE32_NOPAD;

use crate::context::Context;
use crate::failure::Failure;
use crate::output::duration;
use crate::progress::Line;

/// How long one call lets the server wait.
pub const CALL: Duration = Duration::from_secs(25);

/// Carries one out for a person, and says how long it took.
pub async fn show<F>(ctx: &Context, what: &str, begin: impl Fn(String) -> F) -> Result<(), Failure>
where
    F: Future<Output = Result<Deployment, ClientError>>,
{
    let mut line = Line::begin(ctx.json);
    let deployment = carry_out(&ctx.client()?, &ctx.workspace, what, &mut line, begin).await?;
    drop(line);
    ctx.show(&deployment, || told(what, &deployment))
}

/// How long it took, in all and step by step.
fn told(what: &str, deployment: &Deployment) -> String {
    let steps = &deployment.steps;
    let total: u64 = steps.iter().map(|s| s.took_ms).sum();
    let each: Vec<String> = steps
        .iter()
        .map(|s| format!("{} {}", s.step.as_str(), duration(s.took_ms)))
        .collect();
    format!("{what}: done in {} ({})", duration(total), each.join(", "))
}

/// Begins one and waits for its end, telling how far it is.
pub async fn carry_out<F>(
    client: &Client,
    workspace: &Name,
    what: &str,
    line: &mut Line,
    begin: impl Fn(String) -> F,
) -> Result<Deployment, Failure>
where
    F: Future<Output = Result<Deployment, ClientError>>,
{
    let begun = Instant::now();
    let mut deployment = once(begin).await?;
    while !deployment.step.is_final() {
        let step = deployment.step.as_str();
        line.tell(&format!("{what} … {step} … {} s", begun.elapsed().as_secs()));
        tokio::time::sleep(Duration::from_millis(100)).await;
        deployment = client.deployment(workspace, deployment.id.as_str()).await?;
    }
    settled(what, deployment)
}

/// Begins it. Where the connection broke nobody knows whether it was begun; with the same key asking again is safe.
async fn once<F>(begin: impl Fn(String) -> F) -> Result<Deployment, Failure>
where
    F: Future<Output = Result<Deployment, ClientError>>,
{
    let key = idempotency_key()?;
    match begin(key.clone()).await {
        Err(ClientError::Unreachable { .. } | ClientError::Silent { .. }) => Ok(begin(key).await?),
        other => Ok(other?),
    }
}

/// The deployment, if it did what it should.
fn settled(what: &str, deployment: Deployment) -> Result<Deployment, Failure> {
    let came_to = match deployment.step {
        Step::Succeeded => return Ok(deployment),
        Step::RolledBack => "did not succeed, and what was there before is back",
        _ => "did not succeed, and nothing has changed",
    };
    let reason = deployment.reason.unwrap_or_else(|| "no reason was given".to_owned());
    Err(Failure::Failed(format!("{what} {came_to}: {reason}")))
}

fn idempotency_key() -> Result<String, Failure> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|e| Failure::Failed(format!("the system gives no randomness: {e}")))?;
    Ok(BASE32_NOPAD.encode(&bytes).to_ascii_lowercase())
}
