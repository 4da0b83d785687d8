//! Waking a stopped sandbox, until its agent answers as the new generation, beside `podman start` of a container that
//! someone made ready on the same root.

use std::os::unix::fs::MetadataExt;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use choir_api::client::SlotVerb;
use choir_core::{IdRange, Slot};

use crate::measure::{Bound, Outcome, Row, Series};
use crate::podman;
use crate::stage::Stage;

const ROUNDS: usize = 15;
const PEER: &str = "bench-peer";

pub async fn run(name: &'static str, stage: &mut Stage) -> Result<Outcome> {
    stage.change(Slot::Live, SlotVerb::Start, "ready").await?;
    create_peer(stage, &stage.container(Slot::Live).await?)?;
    let mut ours = Series::new("ChoirOS, stopped until /health", "ms");
    let mut theirs = Series::new("podman start", "ms");
    for _ in 0..=stage.rounds(ROUNDS) {
        stage.quiet().await?;
        let before = stage.view(Slot::Live).await?.generation.context("live does not run")?;
        stage.change(Slot::Live, SlotVerb::Stop, "stopped").await?;
        let (took, _) = podman::run(&stage.setup.podman, &["start", PEER])?;
        theirs.round([took.as_secs_f64() * 1e3]);
        podman::run(&stage.setup.podman, &["stop", "--time", "0", PEER])?;
        let begun = Instant::now();
        let health = stage.sandbox(Slot::Live).health().await?;
        ours.round([begun.elapsed().as_secs_f64() * 1e3]);
        ensure!(health.generation > before, "generation {} answered", health.generation);
    }
    podman::run(&stage.setup.podman, &["rm", "--force", PEER])?;
    // The first round warms up.
    ours.rounds.remove(0);
    theirs.rounds.remove(0);
    let row = Row::new("wake: stopped to /health, p50", ours.percentile(50.0), "ms")
        .against("podman start", theirs.percentile(50.0), ours.ratio(&theirs))
        .asked(Bound::RatioAtMost(1.0));
    Ok(Outcome {
        name,
        series: vec![ours, theirs],
        rows: vec![row],
    })
}

/// As little as a container on that root can be: no network, and one process that waits.
fn create_peer(stage: &Stage, ours: &str) -> Result<()> {
    let root = podman::inspect(&stage.setup.podman, ours, ".Rootfs")?;
    let owner = std::fs::metadata(&root)
        .with_context(|| format!("cannot look at {root}"))?
        .uid();
    let map = format!("0:{owner}:{}", IdRange::SIZE);
    let mut arguments = vec!["create", "--name", PEER, "--network", "none"];
    arguments.extend(["--uidmap", &map, "--gidmap", &map]);
    arguments.extend([
        "--ulimit",
        "nofile=1024:4096",
        "--ulimit",
        "nproc=4096:4096",
        "--ulimit",
        "core=0:0",
    ]);
    arguments.extend(["--rootfs", &root, "/bin/sleep", "infinity"]);
    podman::run(&stage.setup.podman, &arguments).map(|_| ())
}
