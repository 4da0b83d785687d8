//! `choir config`: which settings are in effect and where each comes from; and changing them. It must not guess what
//! a setting means.

use choir_api::workspaces::{ChoirToml, EffectiveConfig};
use choir_core::{Slot, WorkspaceSettings};
use clap::Subcommand;

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{plain, table};
use crate::settings;

/// Show or change a workspace's settings
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  choir config\n  choir config set app_port=5173 limits.memory=4GiB env.RUST_LOG=debug\n  choir config unset env.RUST_LOG\n  choir config --slot dev"
)]
pub struct Args {
    #[command(subcommand)]
    pub what: Option<What>,
    /// Whose settings to show: their releases and `choir.toml` may differ
    #[arg(long, default_value = "live")]
    pub slot: Slot,
}

#[derive(Debug, Subcommand)]
pub enum What {
    /// Show each setting in effect and where it comes from (the default)
    Show,
    /// Set one or more
    Set {
        #[arg(required = true, value_name = "KEY=VALUE")]
        assignments: Vec<String>,
    },
    /// Take environment variables or ports away
    Unset {
        #[arg(required = true, value_name = "KEY")]
        keys: Vec<String>,
    },
}

pub async fn run(ctx: &Context, args: &Args) -> Result<(), Failure> {
    let client = ctx.client()?;
    let current =
        async || -> Result<WorkspaceSettings, Failure> { Ok(client.workspace(&ctx.workspace).await?.settings) };
    let patch = match &args.what {
        None | Some(What::Show) => None,
        Some(What::Set { assignments }) => Some(settings::set(&current().await?, assignments)?),
        Some(What::Unset { keys }) => Some(settings::unset(&current().await?, keys)?),
    };
    if let Some(patch) = patch {
        client.patch_workspace(&ctx.workspace, &patch).await?;
    }
    let config = client.config(&ctx.workspace, args.slot).await?;
    ctx.show(&config, || text(&config))
}

fn text(config: &EffectiveConfig) -> String {
    let rows: Vec<Vec<String>> = config
        .settings
        .iter()
        .map(|(name, setting)| {
            let value = match &setting.value {
                serde_json::Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            vec![name.clone(), value, setting.from.clone()]
        })
        .collect();
    let mut shown = table(&["SETTING", "VALUE", "FROM"], &rows);
    if let Some(ChoirToml::Refused { reason }) = &config.choir_toml {
        shown.push_str(&format!("\nchoir.toml is not in effect: {}", plain(reason)));
    }
    shown
}
