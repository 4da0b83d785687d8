//! What the hypervisor and each agent hold in memory while both sandboxes run and nobody asks anything.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use choir_api::client::SlotVerb;
use choir_core::Slot;

use crate::measure::{Bound, Outcome, Row, Series};
use crate::podman;
use crate::stage::Stage;

const ROUNDS: usize = 10;
/// Between two looks.
const REST: Duration = Duration::from_secs(1);

pub async fn run(name: &'static str, stage: &mut Stage) -> Result<Outcome> {
    let mut processes = vec![("hypervisor".to_owned(), stage.setup.hypervisor()?, 30.0)];
    for slot in Slot::ALL {
        stage.change(slot, SlotVerb::Start, "ready").await?;
        let pid = podman::pid(&stage.setup.podman, &stage.container(slot).await?)?;
        processes.push((format!("agent of {slot}"), pid, 6.0));
    }
    let (mut series, mut rows) = (Vec::new(), Vec::new());
    for (process, ..) in &processes {
        series.extend(["resident", "proportional"].map(|kind| Series::new(format!("{process}, {kind}"), "MiB")));
    }
    for _ in 0..stage.rounds(ROUNDS) {
        tokio::time::sleep(REST).await;
        for (both, (_, pid, _)) in series.chunks_mut(2).zip(&processes) {
            let (resident, proportional) = of(*pid)?;
            both[0].round([resident]);
            both[1].round([proportional]);
        }
    }
    for (both, (process, _, limit)) in series.chunks(2).zip(&processes) {
        // The most of all looks.
        rows.push(
            Row::new(format!("memory: {process}, resident"), both[0].percentile(100.0), "MiB")
                .asked(Bound::AtMost(*limit)),
        );
        rows.push(Row::new(
            format!("memory: {process}, proportional"),
            both[1].percentile(100.0),
            "MiB",
        ));
    }
    Ok(Outcome { name, series, rows })
}

/// Resident and proportional set size, MiB.
pub fn of(pid: u32) -> Result<(f64, f64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).context("cannot read a process's memory")?;
    let size = |name: &str| -> Result<f64> {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .context("smaps_rollup lacks a line")?;
        let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kib / 1024.0)
    };
    Ok((size("Rss:")?, size("Pss:")?))
}
