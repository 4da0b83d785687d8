//! Running `true` in a sandbox to its end, beside `podman exec` in the same container.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Result, ensure};
use choir_api::client::SlotVerb;
use choir_api::sandbox::{Command, ExecRequest};
use choir_core::Slot;

use crate::measure::{Bound, Outcome, Row, Series};
use crate::podman;
use crate::stage::Stage;

const ROUNDS: usize = 15;
const CALLS: usize = 20;

pub async fn run(name: &'static str, stage: &mut Stage) -> Result<Outcome> {
    stage.change(Slot::Live, SlotVerb::Start, "ready").await?;
    let container = stage.container(Slot::Live).await?;
    let request = ExecRequest {
        command: Command::Argv(vec!["true".into()]),
        cwd: None,
        env: BTreeMap::new(),
        stdin: None,
        timeout_ms: None,
        max_output_bytes: None,
    };
    let mut ours = Series::new("ChoirOS, /exec", "ms");
    let mut theirs = Series::new("podman exec", "ms");
    for _ in 0..=stage.rounds(ROUNDS) {
        stage.quiet().await?;
        let mut calls = Vec::new();
        for _ in 0..CALLS {
            let begun = Instant::now();
            let done = stage.sandbox(Slot::Live).exec(&request).await?;
            calls.push(begun.elapsed().as_secs_f64() * 1e3);
            ensure!(done.exit.exit_code == 0, "`true` ended with {}", done.exit.exit_code);
        }
        ours.round(calls);
        let (took, _) = podman::run(&stage.setup.podman, &["exec", &container, "true"])?;
        theirs.round([took.as_secs_f64() * 1e3]);
    }
    // The first round warms up.
    ours.rounds.remove(0);
    theirs.rounds.remove(0);
    let row = Row::new("exec of `true`, p50", ours.percentile(50.0), "ms")
        .against("podman exec", theirs.percentile(50.0), ours.ratio(&theirs))
        .asked(Bound::AtMost(5.0));
    Ok(Outcome {
        name,
        series: vec![ours, theirs],
        rows: vec![row],
    })
}
