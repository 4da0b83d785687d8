//! `choir workspaces`: list, make and delete pairs of sandboxes. It must not delete one that nobody confirmed.

use std::io::{self, IsTerminal as _, Write as _};
use std::time::Duration;

use choir_core::{Name, Slot};
use clap::Subcommand;
use serde_json::json;

use crate::context::Context;
use crate::failure::Failure;
use crate::output::table;
use crate::progress;

/// How long a deletion may take.
pub const DELETION: Duration = Duration::from_secs(120);

/// List, create and delete workspaces
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  choir workspaces create blog\n  choir workspaces delete blog --yes")]
pub struct Args {
    #[command(subcommand)]
    pub what: Option<What>,
}

#[derive(Debug, Subcommand)]
pub enum What {
    /// List your workspaces (the default)
    List,
    /// Make a workspace with two sandboxes
    Create { name: Name },
    /// Delete a workspace, both sandboxes and all their files
    Delete {
        name: Name,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

pub async fn run(ctx: &Context, args: &Args) -> Result<(), Failure> {
    match &args.what {
        None | Some(What::List) => list(ctx).await,
        Some(What::Create { name }) => {
            let client = ctx.client()?;
            let made = progress::watch("create", ctx.json, client.create_workspace(name)).await?;
            ctx.show(&made, || {
                format!("Workspace {name} is there; see `choir status -w {name}`.")
            })
        }
        Some(What::Delete { name, yes }) => {
            if !yes {
                confirm(name)?;
            }
            let client = ctx.client()?;
            progress::watch("delete", ctx.json, client.delete_workspace(name, DELETION)).await?;
            ctx.show(&json!({ "name": name }), || format!("Workspace {name} is deleted."))
        }
    }
}

async fn list(ctx: &Context) -> Result<(), Failure> {
    let all = ctx.client()?.workspaces().await?;
    ctx.show(&all, || {
        let rows: Vec<Vec<String>> = all
            .iter()
            .map(|w| {
                let state = |slot| w.slots.get(slot).state.clone();
                vec![w.name.to_string(), state(Slot::Live), state(Slot::Dev)]
            })
            .collect();
        table(&["NAME", "LIVE", "DEV"], &rows)
    })
}

fn confirm(name: &Name) -> Result<(), Failure> {
    if !io::stdin().is_terminal() {
        return Err(Failure::Usage(format!(
            "deleting {name} loses all its files; add --yes to do it without being asked"
        )));
    }
    eprint!("This deletes both sandboxes of {name} with all their files. Type its name to go on: ");
    io::stderr().flush()?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    if answer.trim() == name.as_str() {
        Ok(())
    } else {
        Err(Failure::Failed("nothing was deleted".to_owned()))
    }
}
