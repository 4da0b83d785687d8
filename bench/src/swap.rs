//! Exchanging live and dev, both ready: from the request until it has succeeded, durably, with a snapshot of both and what left
//! live frozen; and of that the switch, which is all that requests can notice.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use choir_api::client::SlotVerb;
use choir_core::Slot;
use choir_core::deployment::Step;

use crate::measure::{Bound, Outcome, Row, Series};
use crate::person;
use crate::stage::Stage;

const ROUNDS: usize = 20;
/// An even number, so that live is live again.
const SWAPS: usize = 10;
const WITHIN: Duration = Duration::from_secs(30);

pub async fn run(name: &'static str, stage: &mut Stage) -> Result<Outcome> {
    for slot in Slot::ALL {
        stage.change(slot, SlotVerb::Start, "ready").await?;
    }
    let prefix = person::random_name()?;
    let mut whole = Series::new("swap, from request to success", "ms");
    let mut switch = Series::new("swap, from before its commit until requests go elsewhere", "ms");
    for round in 0..stage.rounds(ROUNDS) {
        stage.quiet().await?;
        let mut samples = Vec::new();
        for swap in 0..SWAPS {
            let key = format!("{prefix}-{round}-{swap}");
            let begun = Instant::now();
            let done = stage.client.swap(&stage.workspace, &key, WITHIN).await?;
            samples.push(begun.elapsed().as_secs_f64() * 1e3);
            ensure!(
                done.step == Step::Succeeded,
                "a swap ended as {:?}: {:?}",
                done.step,
                done.reason
            );
        }
        whole.round(samples);
        let all = switches(&stage.setup.log)?;
        let new = all.len().checked_sub(SWAPS).context("the log has not all switches")?;
        switch.round(all[new..].to_vec());
    }
    let rows = vec![
        Row::new("swap: the switch, p99", switch.percentile(99.0), "ms").asked(Bound::AtMost(20.0)),
        Row::new("swap: the switch, p50", switch.percentile(50.0), "ms"),
        Row::new("swap: the whole, p99", whole.percentile(99.0), "ms"),
        Row::new("swap: the whole, p50", whole.percentile(50.0), "ms"),
    ];
    Ok(Outcome {
        name,
        series: vec![whole, switch],
        rows,
    })
}

/// How long each switch so far took, in milliseconds: from before its commit until requests go elsewhere.
fn switches(log: &Path) -> Result<Vec<f64>> {
    let log = std::fs::read_to_string(log)?;
    let times = log.lines().filter(|line| line.contains("switched"));
    let times = times.filter_map(|line| line.split("took_us=").nth(1)?.split(' ').next()?.parse::<f64>().ok());
    Ok(times.map(|us| us / 1e3).collect())
}
