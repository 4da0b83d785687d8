//! `choir deployments`: what was tried with this workspace, newest first. It must not change anything.

use choir_api::workspaces::Deployment;

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{ago, duration, plain, table};

/// List what changed live and dev, or show one change step by step
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  choir deployments\n  choir deployments d-…")]
pub struct Args {
    /// Show this one's steps with their times
    pub id: Option<String>,
}

pub async fn run(ctx: &Context, args: &Args) -> Result<(), Failure> {
    let client = ctx.client()?;
    if let Some(id) = &args.id {
        let deployment = client.deployment(&ctx.workspace, id).await?;
        return ctx.show(&deployment, || steps(&deployment));
    }
    let page = client.deployments(&ctx.workspace).await?;
    ctx.show(&page, || {
        let rows: Vec<Vec<String>> = page.items.iter().map(|d| row(ctx, d)).collect();
        table(&["ID", "KIND", "SLOT", "STEP", "BEGAN", "TOOK", "REASON"], &rows)
    })
}

fn row(ctx: &Context, deployment: &Deployment) -> Vec<String> {
    let total: u64 = deployment.steps.iter().map(|s| s.took_ms).sum();
    vec![
        deployment.id.to_string(),
        deployment.kind.as_str().to_owned(),
        deployment.slot.to_string(),
        deployment.step.as_str().to_owned(),
        ago(Some(deployment.created_at), ctx.now),
        duration(total),
        deployment.reason.clone().unwrap_or_default(),
    ]
}

fn steps(deployment: &Deployment) -> String {
    let rows: Vec<Vec<String>> = deployment
        .steps
        .iter()
        .map(|s| vec![s.step.as_str().to_owned(), s.at.to_string(), duration(s.took_ms)])
        .collect();
    let mut text = table(&["STEP", "AT", "AFTER"], &rows);
    if let Some(reason) = &deployment.reason {
        text.push_str(&format!("\n{}", plain(reason)));
    }
    text
}
