//! `choir tokens`: tokens for scripts. A token is shown once, on the standard output, and kept nowhere by this verb.

use choir_api::client::CreateToken;
use clap::Subcommand;
use serde_json::json;

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{ago, table};

/// Manage tokens for scripts
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  choir tokens create ci --days 30 > token.txt\n  CHOIR_TOKEN_FILE=token.txt choir status"
)]
pub struct Args {
    #[command(subcommand)]
    pub what: Option<What>,
}

#[derive(Debug, Subcommand)]
pub enum What {
    /// List the tokens, without their values (the default)
    List,
    /// Make a token and print it, once
    Create {
        /// What it is for
        name: String,
        /// Days until it expires
        #[arg(long)]
        days: Option<u16>,
        /// What it may be used for: `read`, `write` or `admin`; may be repeated
        #[arg(long = "scope", value_name = "SCOPE", default_values_t = ["read".to_owned(), "write".to_owned()])]
        scopes: Vec<String>,
    },
    /// End a token
    Revoke { id: String },
}

pub async fn run(ctx: &Context, args: &Args) -> Result<(), Failure> {
    let client = ctx.client()?;
    match &args.what {
        None | Some(What::List) => {
            let page = client.tokens().await?;
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
        Some(What::Create { name, days, scopes }) => {
            let request = CreateToken {
                name: name.clone(),
                scopes: scopes.clone(),
                expires_in_s: days.map(|days| i64::from(days) * 24 * 60 * 60),
            };
            let token = client.create_token(&request).await?;
            ctx.show(&token, || token.token.clone())
        }
        Some(What::Revoke { id }) => {
            client.revoke_token(id).await?;
            ctx.show(&json!({ "id": id }), || format!("Token {id} is revoked."))
        }
    }
}
