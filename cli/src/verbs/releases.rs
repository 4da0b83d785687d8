//! `choir releases`: what a sandbox can start from. It must not change anything.

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{ago, table};

/// List what sandboxes can start from
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  choir releases")]
pub struct Args {}

pub async fn run(ctx: &Context, _args: &Args) -> Result<(), Failure> {
    let page = ctx.client()?.releases().await?;
    ctx.show(&page, || {
        let rows: Vec<Vec<String>> = page
            .items
            .iter()
            .map(|r| {
                vec![
                    r.id.to_string(),
                    r.name.clone(),
                    r.state.clone(),
                    ago(Some(r.created_at), ctx.now),
                    r.image_digest.chars().take(12).collect(),
                ]
            })
            .collect();
        table(&["ID", "NAME", "STATE", "CREATED", "IMAGE"], &rows)
    })
}
