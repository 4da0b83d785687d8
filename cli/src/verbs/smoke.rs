//! `choir smoke`: the whole of it against a running hypervisor, with a throw-away user. It must not report a step
//! that it did not run.

use std::path::PathBuf;

use crate::context::Context;
use crate::failure::Failure;
use crate::smoke;

/// Try everything against a running hypervisor, with a throw-away user
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  choir smoke --url http://localhost:9090 --invite-file data/claim-link\nThe first step that fails ends it with exit code 1, after cleaning up."
)]
pub struct Args {
    /// An invite's or claim link's token, or the whole link
    #[arg(long, value_name = "TOKEN", conflicts_with = "invite_file")]
    pub invite: Option<String>,
    /// Read the invite or link from a file
    #[arg(long, value_name = "FILE")]
    pub invite_file: Option<PathBuf>,
    /// Check the metrics too, with the token in this file
    #[arg(long, value_name = "FILE")]
    pub metrics_token_file: Option<PathBuf>,
    /// Leave the workspace there at the end
    #[arg(long)]
    pub keep: bool,
    /// Leave a token of the kept user in this file, for its owner only
    #[arg(long, value_name = "FILE", requires = "keep")]
    pub token_file: Option<PathBuf>,
}

pub async fn run(ctx: &Context, args: Args) -> Result<(), Failure> {
    let invite = match (&args.invite, &args.invite_file) {
        (Some(text), _) => Some(text.clone()),
        (None, Some(path)) => Some(read(path)?),
        (None, None) => None,
    };
    let options = smoke::Options {
        invite: invite.map(|text| invite_token(&text)),
        metrics_token: args.metrics_token_file.as_ref().map(read).transpose()?,
        keep: args.keep,
        token_file: args.token_file,
    };
    smoke::run(ctx, options).await
}

fn read(path: &PathBuf) -> Result<String, Failure> {
    let text = std::fs::read_to_string(path).map_err(|e| {
        Failure::Usage(format!(
            "cannot read {}: {e}; correct the path or its mode",
            path.display()
        ))
    })?;
    Ok(text.trim().to_owned())
}

/// People paste the whole link.
fn invite_token(text: &str) -> String {
    let token = text.split_once("invite=").map_or(text, |(_, token)| token);
    token.split(['&', '#']).next().unwrap_or(token).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invite_may_be_given_as_its_whole_link() {
        assert_eq!(invite_token("http://localhost:9090/register?invite=abc\n"), "abc");
        assert_eq!(invite_token("abc"), "abc");
    }
}
