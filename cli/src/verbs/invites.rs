//! `choir invites`: links with which a person can register, for admins. A link is shown once.

use choir_api::client::CreateInvite;
use clap::Subcommand;
use serde_json::json;

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{ago, table};

/// Invite people to this box (admins only)
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  choir invites create\n  choir invites")]
pub struct Args {
    #[command(subcommand)]
    pub what: Option<What>,
}

#[derive(Debug, Subcommand)]
pub enum What {
    /// List the invites (the default)
    List,
    /// Make a link with which one person can register
    Create {
        /// The new person becomes an admin too
        #[arg(long)]
        admin: bool,
    },
    /// Make an unused link useless
    Revoke { id: String },
}

pub async fn run(ctx: &Context, args: &Args) -> Result<(), Failure> {
    let client = ctx.client()?;
    match &args.what {
        None | Some(What::List) => {
            let page = client.invites().await?;
            ctx.show(&page, || {
                let rows: Vec<Vec<String>> = page
                    .items
                    .iter()
                    .map(|i| {
                        let used = if i.used_at.is_some() { "used" } else { "open" };
                        let until = i.expires_at.to_string();
                        vec![
                            i.id.clone(),
                            i.kind.clone(),
                            i.role.clone(),
                            used.to_owned(),
                            ago(Some(i.created_at), ctx.now),
                            until,
                        ]
                    })
                    .collect();
                table(&["ID", "KIND", "ROLE", "STATE", "CREATED", "UNTIL"], &rows)
            })
        }
        Some(What::Create { admin }) => {
            let role = admin.then(|| "admin".to_owned());
            let invite = client.create_invite(&CreateInvite { role }).await?;
            ctx.show(&invite, || invite.url.clone())
        }
        Some(What::Revoke { id }) => {
            client.revoke_invite(id).await?;
            ctx.show(&json!({ "id": id }), || format!("Invite {id} is revoked."))
        }
    }
}
