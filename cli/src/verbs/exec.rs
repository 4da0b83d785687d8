//! `choir exec`: one command in a slot, its bytes as they come, its exit code as ours. It must not interpret what it
//! passes on.

use std::io::{self, IsTerminal as _, Read as _, Write as _};

use choir_api::client::ExecEvent;
use choir_api::sandbox::{Chunk, Command, Encoding, ExecRequest, OutputStream, Stdin};
use choir_core::Slot;

use crate::context::Context;
use crate::failure::Failure;
use crate::output;

/// Run a command in a slot and return its exit code
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  choir exec dev -- cargo test\n  git diff | choir exec dev -- git apply\nA single word with spaces is a shell line: choir exec dev -- 'ls *.rs | wc -l'"
)]
pub struct Args {
    /// `live` or `dev`
    pub slot: Slot,
    /// Pass the standard input on even if it is a terminal
    #[arg(long, short)]
    pub interactive: bool,
    /// Where to run it [default: the home directory]
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<String>,
    /// Set a variable; may be repeated
    #[arg(long, short, value_name = "NAME=VALUE", value_parser = variable)]
    pub env: Vec<(String, String)>,
    /// End it after so many seconds
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<String>,
}

pub async fn run(ctx: &Context, args: Args) -> Result<(), Failure> {
    let client = ctx.client()?;
    let request = ExecRequest {
        stdin: stdin(args.interactive)?,
        command: command(args.command),
        cwd: args.cwd,
        env: args.env.into_iter().collect(),
        timeout_ms: args.timeout.map(|s| s.saturating_mul(1000)),
        max_output_bytes: None,
    };
    let sandbox = ctx.sandbox(&client, args.slot);
    if ctx.json {
        let result = sandbox.exec(&request).await?;
        output::json(&result)?;
        return finish(result.exit.exit_code);
    }
    let mut stream = sandbox.exec_stream(&request).await?;
    while let Some(event) = stream.next().await? {
        match event {
            ExecEvent::Output(stream, bytes) => write(stream, &bytes)?,
            ExecEvent::Exit(exit) => {
                if exit.timed_out {
                    eprintln!("choir: the command was ended after its timeout; give it more with --timeout");
                }
                return finish(exit.exit_code);
            }
        }
    }
    Err(Failure::Failed(
        "the connection ended before the command did; use `choir run`, which survives that".to_owned(),
    ))
}

/// One word with spaces is a line for a shell, anything else a program and its arguments.
pub fn command(mut words: Vec<String>) -> Command {
    if words.len() == 1 && words[0].contains(char::is_whitespace) {
        Command::Line(words.remove(0))
    } else {
        Command::Argv(words)
    }
}

/// `NAME=VALUE`.
pub fn variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write it as NAME=VALUE".to_owned()),
    }
}

pub fn write(stream: OutputStream, bytes: &[u8]) -> Result<(), Failure> {
    match stream {
        OutputStream::Stdout => {
            let mut out = io::stdout().lock();
            out.write_all(bytes)?;
            out.flush()?;
        }
        OutputStream::Stderr => io::stderr().lock().write_all(bytes)?,
    }
    Ok(())
}

/// The command's own exit code becomes ours.
pub fn finish(code: i32) -> Result<(), Failure> {
    if code == 0 { Ok(()) } else { Err(Failure::Exit(code)) }
}

fn stdin(even_terminal: bool) -> Result<Option<Stdin>, Failure> {
    if io::stdin().is_terminal() && !even_terminal {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    io::stdin().lock().read_to_end(&mut bytes)?;
    let chunk = Chunk::new(&bytes);
    Ok(match chunk.encoding {
        _ if bytes.is_empty() => None,
        Encoding::Utf8 => Some(Stdin::Text(chunk.data)),
        Encoding::Base64 => Some(Stdin::Chunk(chunk)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_word_with_spaces_is_a_shell_line() {
        assert_eq!(command(vec!["ls | wc".into()]), Command::Line("ls | wc".into()));
        assert_eq!(command(vec!["ls".into()]), Command::Argv(vec!["ls".into()]));
        let two = vec!["echo".to_owned(), "a b".to_owned()];
        assert_eq!(command(two.clone()), Command::Argv(two));
    }

    #[test]
    fn a_variable_needs_a_name() {
        assert_eq!(variable("A=b=c"), Ok(("A".into(), "b=c".into())));
        assert!(variable("=x").is_err() && variable("A").is_err());
    }
}
