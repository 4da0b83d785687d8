//! `choir tokens`: tokens for scripts. A new one needs a passkey, so it is approved in the browser as a login is; it is
//! shown once and kept nowhere by this verb.

use clap::Subcommand;
use serde_json::json;

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{ago, table};
use crate::verbs::login;

/// Manage tokens for scripts
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  choir tokens create ci > token.txt\n  CHOIR_TOKEN_FILE=token.txt choir status")]
pub struct Args {
    #[command(subcommand)]
    pub what: Option<What>,
}

#[derive(Debug, Subcommand)]
pub enum What {
    /// List the tokens, without their values (the default)
    List,
    /// Make a token that you approve in the browser, and print it, once
    Create {
        /// What it is for
        name: String,
    },
    /// End a token
    Revoke { id: String },
}

pub async fn run(ctx: &Context, args: &Args) -> Result<(), Failure> {
    match &args.what {
        None | Some(What::List) => {
            let page = ctx.client()?.tokens().await?;
            ctx.show(&page, || {
                let rows: Vec<Vec<String>> = page
                    .items
                    .iter()
                    .map(|t| {
                        let until = t.expires_at.to_string();
                        let used = ago(t.last_used_at, ctx.now);
                        vec![t.id.clone(), t.name.clone(), t.scopes.join(","), used, until]
                    })
                    .collect();
                table(&["ID", "NAME", "SCOPES", "LAST USED", "UNTIL"], &rows)
            })
        }
        Some(What::Create { name }) => {
            let made = login::approve(ctx, name).await?;
            ctx.show(&json!({ "name": name, "token": made.token }), || made.token.clone())
        }
        Some(What::Revoke { id }) => {
            ctx.client()?.revoke_token(id).await?;
            ctx.show(&json!({ "id": id }), || format!("Token {id} is revoked."))
        }
    }
}
