//! `choir rollback`: what live was comes back. It must not know how.

use std::str::FromStr;

use choir_api::client::Client;
use choir_api::workspaces::Rollback;
use choir_core::deployment::{Step, UNDOABLE};
use choir_core::{DeploymentId, Name, Slot};

use crate::context::Context;
use crate::deploying::{self, CALL};
use crate::failure::Failure;

/// Bring back what live was before its last change, without dropping a request
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  choir rollback\n  choir rollback --to 2\nRight after a swap the sandbox that was live is still there, frozen, and comes back as it was. Later, live starts anew on a copy of its snapshot, and what it held until then is kept as a snapshot, too: another rollback brings that back."
)]
pub struct Args {
    /// Undo the last N changes of live, or this deployment and all after it
    #[arg(long, value_name = "N|ID", default_value = "1")]
    pub to: To,
}

/// A number of changes, or the oldest one.
#[derive(Debug, Clone)]
pub enum To {
    Changes(usize),
    Deployment(DeploymentId),
}

impl FromStr for To {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(number) if (1..=UNDOABLE).contains(&number) => Ok(Self::Changes(number)),
            Ok(_) => Err(format!(
                "the last {UNDOABLE} changes can be undone: give 1 to {UNDOABLE}"
            )),
            Err(_) => text
                .parse()
                .map(Self::Deployment)
                .map_err(|_| format!("give 1 to {UNDOABLE}, or an id that `choir deployments` shows")),
        }
    }
}

pub async fn run(ctx: &Context, args: &Args) -> Result<(), Failure> {
    let client = ctx.client()?;
    let to = match &args.to {
        To::Changes(1) => None,
        To::Changes(number) => Some(nth(&client, &ctx.workspace, *number).await?),
        To::Deployment(id) => Some(id.clone()),
    };
    let asked = Rollback { to };
    deploying::show(ctx, "rollback", async |key| {
        client.rollback(&ctx.workspace, &asked, &key, CALL).await
    })
    .await
}

/// The n-th last change of live.
async fn nth(client: &Client, workspace: &Name, number: usize) -> Result<DeploymentId, Failure> {
    let page = client.deployments(workspace).await?;
    let of_live = page
        .items
        .into_iter()
        .filter(|d| d.slot == Slot::Live && d.step == Step::Succeeded);
    let ids: Vec<DeploymentId> = of_live.map(|d| d.id).collect();
    ids.get(number - 1).cloned().ok_or_else(|| {
        Failure::Failed(format!(
            "live has changed {} times, so {number} changes cannot be undone",
            ids.len()
        ))
    })
}
