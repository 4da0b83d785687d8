//! `choir login`: a code in the terminal, approved in the browser, becomes a token in the config file. It must not
//! take a token as an argument: arguments are visible to everyone on the machine.

use std::io::{self, Read as _};
use std::time::{Duration, Instant};

use choir_api::client::{Client, Credential, DevicePoll, DeviceStart};
use serde_json::json;

use crate::config::Login;
use crate::context::Context;
use crate::failure::Failure;
use crate::progress;

/// Log in by approving a code in the browser
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  choir login --url https://choir.example.com\n  choir login --with-token < token.txt"
)]
pub struct Args {
    /// Read a token from the standard input instead
    #[arg(long)]
    pub with_token: bool,
}

pub async fn run(ctx: &mut Context, args: &Args) -> Result<(), Failure> {
    let login = if args.with_token {
        from_stdin(ctx).await?
    } else {
        let host = rustix::system::uname();
        approve(ctx, &format!("choir on {}", host.nodename().to_string_lossy())).await?
    };
    let username = login.username.clone();
    ctx.config.url = Some(ctx.url.clone());
    ctx.config.logins.insert(ctx.url.clone(), login);
    ctx.config.save(&ctx.config_path)?;
    let answer = json!({ "url": ctx.url, "username": username });
    ctx.show(&answer, || format!("Logged in to {} as {username}.", ctx.url))
}

async fn from_stdin(ctx: &Context) -> Result<Login, Failure> {
    let mut token = String::new();
    io::stdin().read_to_string(&mut token)?;
    let token = token.trim().to_owned();
    if token.is_empty() {
        let text = "the standard input is empty; write the token to it, as in `choir login --with-token < token.txt`";
        return Err(Failure::Usage(text.to_owned()));
    }
    let me = Client::new(&ctx.url, Credential::Token(token.clone()))?.me().await?;
    match me.user {
        Some(user) => Ok(Login {
            username: user.name,
            token,
        }),
        None => Err(Failure::Failed(format!(
            "{} does not know this token; create one with `choir tokens create NAME`",
            ctx.url
        ))),
    }
}

/// Shows a code and waits until a person has approved it in the browser; `name` is what they are shown.
pub async fn approve(ctx: &Context, name: &str) -> Result<Login, Failure> {
    let client = ctx.anonymous()?;
    let start = client.device_start(name).await?;
    // On the standard error, so that `--json` has the answer alone on the other.
    eprintln!(
        "Open {}\nand check that it shows the code {}.",
        crate::output::plain(&start.verification_uri_complete),
        crate::output::plain(&start.user_code)
    );
    progress::watch("waiting for approval", ctx.json, poll(&client, &start)).await
}

async fn poll(client: &Client, start: &DeviceStart) -> Result<Login, Failure> {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(start.expires_in_s) {
        match client.device_poll(&start.device_code).await? {
            DevicePoll::Granted { token, user } => {
                return Ok(Login {
                    username: user.name,
                    token,
                });
            }
            DevicePoll::Expired => break,
            DevicePoll::Pending => tokio::time::sleep(Duration::from_secs(start.interval_s)).await,
        }
    }
    Err(Failure::Failed(
        "the code was refused or has expired; run `choir login` again".to_owned(),
    ))
}
