//! Waking a paused sandbox by a request to its app, until the first byte of the answer.

use anyhow::{Result, ensure};
use choir_api::client::SlotVerb;
use choir_core::Slot;

use crate::measure::{Bound, Outcome, Row, Series};
use crate::podman;
use crate::stage::Stage;

const ROUNDS: usize = 30;

pub async fn run(name: &'static str, stage: &mut Stage) -> Result<Outcome> {
    stage.start_app().await?;
    let container = stage.container(Slot::Live).await?;
    let mut ours = Series::new("ChoirOS, paused until the first byte", "ms");
    let mut theirs = Series::new("podman unpause", "ms");
    for _ in 0..=stage.rounds(ROUNDS) {
        stage.quiet().await?;
        stage.change(Slot::Live, SlotVerb::Pause, "paused").await?;
        let (status, first) = stage.proxied()?.get()?;
        ensure!(status == 200, "the app answered {status}");
        ours.round([first.as_secs_f64() * 1e3]);
        podman::run(&stage.setup.podman, &["pause", &container])?;
        let (took, _) = podman::run(&stage.setup.podman, &["unpause", &container])?;
        theirs.round([took.as_secs_f64() * 1e3]);
    }
    // The first round warms up.
    ours.rounds.remove(0);
    theirs.rounds.remove(0);
    let row = Row::new("wake: paused to first byte, p50", ours.percentile(50.0), "ms")
        .against("podman unpause", theirs.percentile(50.0), ours.ratio(&theirs))
        .asked(Bound::AtMost(50.0));
    Ok(Outcome {
        name,
        series: vec![ours, theirs],
        rows: vec![row],
    })
}
