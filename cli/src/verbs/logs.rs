//! `choir logs`: what a slot's container writes. It must not change the lines, only where they go.

use std::io::{self, Write as _};

use choir_api::workspaces::LogLine;
use choir_core::Slot;

use crate::context::Context;
use crate::failure::Failure;

/// Show what a slot's container writes
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  choir logs live -f --tail 20")]
pub struct Args {
    /// `live` or `dev`
    pub slot: Slot,
    /// Go on as lines are written
    #[arg(long, short)]
    pub follow: bool,
    /// How many of the last lines
    #[arg(long, default_value_t = 200, value_name = "N")]
    pub tail: u32,
}

pub async fn run(ctx: &Context, args: &Args) -> Result<(), Failure> {
    let client = ctx.client()?;
    if !args.follow {
        let page = client.logs(&ctx.workspace, args.slot, args.tail).await?;
        return page.items.iter().try_for_each(|line| write(ctx, line));
    }
    let mut events = client.follow_logs(&ctx.workspace, args.slot, args.tail).await?;
    while let Some(event) = events.next().await? {
        if event.name == "line" {
            let line: LogLine = serde_json::from_str(&event.data)
                .map_err(|_| Failure::Failed("the log has a line this version does not understand".to_owned()))?;
            write(ctx, &line)?;
        }
    }
    Ok(())
}

fn write(ctx: &Context, line: &LogLine) -> Result<(), Failure> {
    if ctx.json {
        let text = serde_json::to_string(line).map_err(|e| Failure::Failed(e.to_string()))?;
        return crate::output::line(&text);
    }
    if line.stream == "stderr" {
        writeln!(io::stderr().lock(), "{}", line.line)?;
    } else {
        writeln!(io::stdout().lock(), "{}", line.line)?;
    }
    Ok(())
}
