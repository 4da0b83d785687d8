//! `choir secrets`: store, list and delete. A value comes from a prompt that shows nothing, or from the standard input:
//! never from the command line, which other users of the machine can read.

use std::io::{self, IsTerminal as _, Read as _};
use std::path::{Path, PathBuf};
use std::{env, fs};

use choir_api::secrets::{DeletedSecret, PutSecret, SecretText};
use choir_core::SecretName;
use choir_core::logins::{LOGINS, Login};
use clap::Subcommand;

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{ago, table};
use crate::prompt;

/// Keep secrets that sandboxes use without seeing them
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  choir secrets set GITHUB_TOKEN\n  choir secrets set DEPLOY_KEY < key.pem\n  choir secrets import-login claude"
)]
pub struct Args {
    #[command(subcommand)]
    pub what: Option<What>,
}

#[derive(Debug, Subcommand)]
pub enum What {
    /// List the secrets, without their values (the default)
    List,
    /// Store a value, typed at a prompt or read from the standard input, in the place of the one before
    Set {
        name: SecretName,
        /// Let sandboxes with a grant read the value itself
        #[arg(long)]
        reveal: bool,
    },
    /// Store the token of a tool's login that this machine keeps in a file, without showing it
    ImportLogin {
        /// The tool, such as `claude`, `codex` or `gh`
        tool: String,
        /// Another file than the one in your home directory
        #[arg(long, value_name = "FILE")]
        from: Option<PathBuf>,
        /// The secret's name [default: the tool's, as in CLAUDE_LOGIN]
        #[arg(long, value_name = "NAME")]
        name: Option<SecretName>,
    },
    /// Delete a secret and end its grants; what used it is refused from then on
    Rm { name: SecretName },
}

pub async fn run(ctx: &Context, args: &Args) -> Result<(), Failure> {
    match &args.what {
        None | Some(What::List) => {
            let page = ctx.client()?.secrets().await?;
            ctx.show(&page, || {
                let rows: Vec<Vec<String>> = page
                    .items
                    .iter()
                    .map(|secret| {
                        vec![
                            secret.name.to_string(),
                            secret.version.to_string(),
                            if secret.reveal { "yes" } else { "no" }.to_owned(),
                            ago(Some(secret.updated_at), ctx.now),
                            ago(secret.last_used_at, ctx.now),
                        ]
                    })
                    .collect();
                table(&["NAME", "VERSION", "REVEAL", "CHANGED", "LAST USED"], &rows)
            })
        }
        Some(What::Set { name, reveal }) => {
            let client = ctx.client()?;
            let put = PutSecret {
                value: SecretText::new(value(name)?),
                reveal: *reveal,
            };
            let stored = client.put_secret(name, &put).await?;
            ctx.show(&stored, || format!("{name} is stored, version {}.", stored.version))
        }
        Some(What::ImportLogin { tool, from, name }) => import(ctx, tool, from.as_deref(), name.clone()).await,
        Some(What::Rm { name }) => {
            let deleted = ctx.client()?.delete_secret(name).await?;
            ctx.show(&deleted, || said(&deleted))
        }
    }
}

fn said(deleted: &DeletedSecret) -> String {
    let ended = deleted.ended_grants.iter();
    let ended: Vec<String> = ended
        .map(|grant| format!("{} ({}/{})", grant.capability, grant.workspace, grant.slot))
        .collect();
    match ended.as_slice() {
        [] => format!("{} is deleted.", deleted.name),
        ended => format!(
            "{} is deleted, and its grants have ended: {}. A new secret of this name needs new ones (`choir grants add`).",
            deleted.name,
            ended.join(", ")
        ),
    }
}

/// Takes the token out of a tool's file and stores it.
async fn import(ctx: &Context, tool: &str, from: Option<&Path>, name: Option<SecretName>) -> Result<(), Failure> {
    let login = Login::of(tool)
        .filter(|login| !login.path.ends_with('*'))
        .ok_or_else(|| {
            let known = LOGINS.iter().filter(|login| !login.path.ends_with('*'));
            let mut tools: Vec<&str> = known.map(|login| login.tool).collect();
            tools.dedup();
            Failure::Usage(format!(
                "no login of `{tool}` is known; use one of {}",
                tools.join(", ")
            ))
        })?;
    let file = match from {
        Some(file) => file.to_owned(),
        None => env::home_dir()
            .ok_or_else(|| Failure::Usage("there is no home directory; say where the file is with --from".to_owned()))?
            .join(login.path),
    };
    let text = fs::read_to_string(&file).map(SecretText::new);
    let text = text.map_err(|e| Failure::Failed(format!("cannot read {}: {e}", file.display())))?;
    let token = login.tokens(text.expose()).into_iter().next().map(SecretText::new);
    let token = token.ok_or_else(|| {
        Failure::Failed(format!(
            "there is no token in {}; log in with {tool} first",
            file.display()
        ))
    })?;
    let name = match name {
        Some(name) => name,
        None => format!("{}_LOGIN", tool.to_ascii_uppercase())
            .parse()
            .map_err(|e| Failure::Failed(format!("{e}")))?,
    };
    let put = PutSecret {
        value: token,
        reveal: false,
    };
    let stored = ctx.client()?.put_secret(&name, &put).await?;
    ctx.show(&stored, || {
        let next = login.template.map(|template| {
            format!(" Let a slot use it: `choir grants add {tool} --slot dev --secret {name} --template {template}`.")
        });
        format!(
            "The token of {tool} is stored as {name}, version {}.{}",
            stored.version,
            next.unwrap_or_default()
        )
    })
}

/// What is typed or piped, without the line end that typing and `echo` add.
fn value(name: &SecretName) -> Result<String, Failure> {
    let text = if io::stdin().is_terminal() {
        prompt::hidden(&format!("Value of {name}"))?
    } else {
        let mut text = String::new();
        io::stdin()
            .lock()
            .read_to_string(&mut text)
            .map_err(|e| match e.kind() {
                io::ErrorKind::InvalidData => {
                    Failure::Failed("the value is not text; encode it first, for example with `base64`".to_owned())
                }
                _ => e.into(),
            })?;
        prompt::end_cut(&mut text);
        text
    };
    if text.is_empty() {
        return Err(Failure::Usage("the value is empty; type it, or pipe it in".to_owned()));
    }
    Ok(text)
}
