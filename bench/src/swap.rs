//! Exchanging live and dev, both ready: from the request until it has succeeded, durably.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
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
    }
    let p99 = Row::new("swap, both ready, p99", whole.percentile(99.0), "ms").asked(Bound::AtMost(20.0));
    let p50 = Row::new("swap, both ready, p50", whole.percentile(50.0), "ms");
    Ok(Outcome {
        name,
        series: vec![whole],
        rows: vec![p99, p50],
    })
}
