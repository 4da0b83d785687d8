//! `choir`: the command line of ChoirOS. It is one more client of the HTTP API and must not know anything that a
//! script with a token could not know.

mod args;
mod build;
mod bundle;
mod config;
mod context;
mod deploying;
mod drill;
mod failure;
mod known_hosts;
mod output;
mod progress;
mod prompt;
mod registry;
mod report;
mod repository;
mod settings;
mod smoke;
mod throwaway;
mod verbs;
mod waiting;

use std::process::exit;

use clap::Parser as _;

use crate::args::Cli;
use crate::failure::Failure;

fn main() {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => exit(Failure::Failed(format!("cannot start: {error}; free some memory and try again")).report()),
    };
    let outcome = runtime.block_on(verbs::run(cli));
    // Not a return: a thread may still be reading the standard input, and would keep the process until a key is
    // pressed.
    exit(match outcome {
        Ok(()) => 0,
        Err(failure) => failure.report(),
    });
}
