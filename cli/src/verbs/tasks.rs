//! `choir tasks`: the long runs of a slot. It must not start one: that is `choir run`.

use choir_api::sandbox::{Command, Task};
use choir_core::Slot;
use clap::Subcommand;
use serde_json::json;

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{ago, table};
use crate::verbs::run::watch;

/// List, show, follow and cancel tasks
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  choir tasks list dev\n  choir tasks follow dev ID")]
pub struct Args {
    #[command(subcommand)]
    pub what: What,
}

#[derive(Debug, Subcommand)]
pub enum What {
    /// List a slot's tasks
    List { slot: Slot },
    /// Show one task
    Show { slot: Slot, id: String },
    /// Follow a task's output from its beginning
    Follow { slot: Slot, id: String },
    /// End a task and everything it started
    Cancel { slot: Slot, id: String },
}

pub async fn run(ctx: &Context, args: &Args) -> Result<(), Failure> {
    let client = ctx.client()?;
    match &args.what {
        What::List { slot } => {
            let page = ctx.sandbox(&client, *slot).tasks().await?;
            ctx.show(&page, || {
                let rows: Vec<Vec<String>> = page.items.iter().map(|task| row(ctx, task)).collect();
                table(&["ID", "STATE", "EXIT", "CREATED", "COMMAND"], &rows)
            })
        }
        What::Show { slot, id } => {
            let task = ctx.sandbox(&client, *slot).task(id).await?;
            ctx.show(&task, || {
                table(&["ID", "STATE", "EXIT", "CREATED", "COMMAND"], &[row(ctx, &task)])
            })
        }
        What::Follow { slot, id } => watch(ctx, &client, *slot, id).await,
        What::Cancel { slot, id } => {
            ctx.sandbox(&client, *slot).cancel_task(id).await?;
            ctx.show(&json!({ "id": id }), || format!("Task {id} is cancelled."))
        }
    }
}

fn row(ctx: &Context, task: &Task) -> Vec<String> {
    let state = serde_json::to_value(task.state).ok();
    let state = state.as_ref().and_then(|s| s.as_str()).unwrap_or_default().to_owned();
    let command = match &task.command {
        Command::Line(line) => line.clone(),
        Command::Argv(words) => words.join(" "),
    };
    vec![
        task.id.clone(),
        state,
        task.exit_code.map(|c| c.to_string()).unwrap_or_default(),
        ago(Some(task.created_at), ctx.now),
        command.chars().take(60).collect(),
    ]
}
