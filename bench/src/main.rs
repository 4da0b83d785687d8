//! `cargo xtask bench`, the half that measures: drives a running ChoirOS from outside, each figure beside its peer's
//! from the same rounds. It must not build, install or start the product; that is xtask's.

mod egress;
mod exec;
mod measure;
mod memory;
mod paused;
mod peers;
mod person;
mod podman;
mod proxy;
mod report;
mod roundtrip;
mod setup;
mod snapshot;
mod stage;
mod stopped;
mod swap;
mod wire;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Parser;

use crate::measure::Outcome;
use crate::report::Report;
use crate::setup::Setup;
use crate::stage::Stage;

#[derive(Parser)]
struct Cli {
    /// What `cargo xtask bench` wrote down about the machine and the product
    setup: PathBuf,
    /// One benchmark instead of all
    name: Option<String>,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    /// Few short rounds: shows that it works, says little about speed
    #[arg(long)]
    quick: bool,
}

/// In the order in which they run: idle memory before there was any load.
const NAMES: [&str; 9] = [
    "memory",
    "proxy",
    "websocket",
    "wake-stopped",
    "wake-paused",
    "exec",
    "swap",
    "snapshot",
    "egress",
];

// A worker beside the thread that measures: idle connections are noticed closed while that waits for a program.
#[tokio::main(worker_threads = 1)]
async fn main() -> Result<()> {
    let cli = Cli::parse();
    let chosen: Vec<&str> = NAMES
        .into_iter()
        .filter(|name| cli.name.as_deref().is_none_or(|wanted| wanted == *name))
        .collect();
    ensure!(
        !chosen.is_empty(),
        "there is no such benchmark; there are {}",
        NAMES.join(", ")
    );
    let setup = Setup::read(&cli.setup)?;
    let mut stage = Stage::open(setup, cli.quick).await?;
    let mut report = Report::default();
    for name in chosen {
        if !cli.json {
            println!("==> {name}");
        }
        let outcome = run(name, &mut stage).await?;
        report.add(&stage.setup, cli.quick, outcome)?;
    }
    if cli.json {
        println!("{}", report.json()?);
    } else {
        print!("{}", report.table());
    }
    Ok(())
}

async fn run(name: &'static str, stage: &mut Stage) -> Result<Outcome> {
    match name {
        "memory" => memory::run(name, stage).await,
        "proxy" => proxy::run(name, stage).await,
        "websocket" => roundtrip::run(name, stage).await,
        "wake-stopped" => stopped::run(name, stage).await,
        "wake-paused" => paused::run(name, stage).await,
        "exec" => exec::run(name, stage).await,
        "swap" => swap::run(name, stage).await,
        "snapshot" => snapshot::run(name, stage).await,
        _ => egress::run(name, stage).await,
    }
}
