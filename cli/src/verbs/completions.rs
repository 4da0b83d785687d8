//! `choir completions`: what a shell needs to complete our verbs. It must not need a hypervisor or a home.

use std::io::{self, Write as _};

use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::args::Cli;
use crate::failure::Failure;

/// Print completions for a shell
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  choir completions bash > ~/.local/share/bash-completion/completions/choir")]
pub struct Args {
    pub shell: Shell,
}

pub fn run(args: &Args) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "choir", &mut script);
    io::stdout().lock().write_all(&script)?;
    Ok(())
}
