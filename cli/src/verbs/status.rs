//! `choir status`: both slots of a workspace, and why one is not well. It must not ask the sandboxes themselves: that
//! would wake them.

use choir_api::workspaces::{ChoirToml, SlotView, Workspace};
use choir_core::Slot;

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{ago, plain, table};

pub async fn run(ctx: &Context) -> Result<(), Failure> {
    let workspace = ctx.client()?.workspace(&ctx.workspace).await?;
    ctx.show(&workspace, || text(ctx, &workspace))
}

fn text(ctx: &Context, workspace: &Workspace) -> String {
    let views = Slot::ALL.map(|slot| workspace.slots.get(slot));
    let rows: Vec<Vec<String>> = views.iter().map(|view| row(ctx, view)).collect();
    let mut lines = vec![table(
        &["SLOT", "STATE", "SINCE", "GENERATION", "SANDBOX", "ADDRESS"],
        &rows,
    )];
    for view in views {
        if let Some(reason) = &view.reason {
            lines.push(format!("{}: {}", view.slot, plain(reason)));
        }
        if let Some(ChoirToml::Refused { reason }) = &view.choir_toml {
            lines.push(format!("{}: choir.toml is not in effect: {}", view.slot, plain(reason)));
        }
    }
    if let Some(deployment) = &workspace.open_deployment {
        lines.push(format!("deployment {deployment} is under way"));
    }
    if let Some(undo) = &workspace.undo {
        let how = if undo.warm {
            "at once, processes and all: what was live is frozen as it was"
        } else {
            "with a new start on its snapshot"
        };
        lines.push(format!(
            "rollback: undoes the {} of {}, {how}",
            undo.kind.as_str(),
            ago(Some(undo.at), ctx.now)
        ));
    }
    lines.join("\n")
}

fn row(ctx: &Context, view: &SlotView) -> Vec<String> {
    vec![
        view.slot.to_string(),
        view.state.clone(),
        ago(view.since, ctx.now),
        view.generation.map_or_else(|| "-".to_owned(), |g| g.to_string()),
        view.sandbox.to_string(),
        ctx.absolute(&view.address)
            .map_or_else(|_| view.address.clone(), |url| url.to_string()),
    ]
}
