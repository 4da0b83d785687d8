//! What containers need on the host dies at any instant: Podman's service, and the monitor of each container, without
//! which Podman does not learn that one ended. It must not help anything to end.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use choir_api::client::SlotVerb;
use choir_core::Slot;
use choir_e2e::person::workspace;
use choir_e2e::processes::{self, Process};
use choir_e2e::waiting::{PATIENCE, rounds, until};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::{Op, Stage};

/// From one instant of an operation to the next.
const APART: Duration = Duration::from_millis(40);

impl Stage {
    pub(super) async fn podman_is_killed(&mut self) -> Result<()> {
        for nth in 0..rounds(10, 60) {
            let killed = self.killed(nth, Self::service).await?;
            self.nothing_is_orphaned(&killed).await?;
        }
        Ok(())
    }

    pub(super) async fn monitors_are_killed(&mut self) -> Result<()> {
        let mut killed = Vec::new();
        for nth in 0..rounds(10, 60) {
            self.both_are_watched_over().await?;
            let now = self.killed(nth, Self::monitors).await?;
            ensure!(!now.is_empty(), "there was no monitor to kill");
            killed.extend(now);
            self.nothing_is_orphaned(&killed).await?;
        }
        eprintln!("{} monitors were killed", killed.len());
        Ok(())
    }

    /// Kills these processes when an operation has been under way for so long; what was told of it is then so.
    async fn killed(&mut self, nth: usize, victims: fn(&Self) -> Result<Vec<Process>>) -> Result<Vec<Process>> {
        let op = [Op::Restart, Op::Swap, Op::Fork, Op::Deploy][nth % 4];
        let before = self.prepare(op).await?;
        let wanted = self.wanted(op, &before).await?;
        let at = APART * u32::try_from(nth)?;
        let begun = Instant::now();
        let stage = &*self;
        let killing = async {
            tokio::time::sleep(at).await;
            let victims = victims(stage)?;
            for victim in &victims {
                kill(victim.pid)?;
            }
            Ok::<_, anyhow::Error>(victims)
        };
        let (answer, killed) = tokio::join!(stage.ask(op), killing);
        let killed = killed.with_context(|| format!("{op:?}, after {at:?}"))?;
        self.settled().await?;
        let what = format!("{op:?}, {} processes killed after {at:?}", killed.len());
        self.recoveries.push((begun.elapsed(), what));
        let judged = self.judge(&before, &wanted, answer.ok().flatten()).await;
        judged.with_context(|| format!("{op:?}, {killed:?} killed after {at:?}"))?;
        Ok(killed)
    }

    /// The process of Podman's service.
    fn service(&self) -> Result<Vec<Process>> {
        let text = std::fs::read_to_string(self.scene.instance.path("run/podman.pid"))?;
        let pid = text.lines().next().and_then(|l| l.parse().ok()).and_then(Pid::from_raw);
        let process = pid.and_then(Process::read);
        Ok(vec![process.with_context(|| {
            format!("no process of Podman's service in {text}")
        })?])
    }

    /// The monitors of all containers of this instance.
    pub(super) fn monitors(&self) -> Result<Vec<Process>> {
        processes::monitors(&self.storage()?)
    }

    fn storage(&self) -> Result<PathBuf> {
        Ok(self.scene.instance.path("podman/storage").canonicalize()?)
    }

    async fn container(&self, slot: Slot) -> Result<String> {
        let slots = self.scene.client.workspace(&workspace()).await?.slots;
        self.scene.instance.container(slots.get(slot).sandbox.as_str()).await
    }

    /// A sandbox whose monitor is gone runs on, and can be stopped, removed and started again.
    async fn both_are_watched_over(&self) -> Result<()> {
        for slot in Slot::ALL {
            let container = self.container(slot).await?;
            if self
                .monitors()?
                .iter()
                .any(|it| it.container.as_ref() == Some(&container))
            {
                continue;
            }
            let restart = SlotVerb::Restart;
            let view = self
                .scene
                .client
                .ask_slot(&workspace(), slot, restart, PATIENCE)
                .await?;
            ensure!(view.state == "ready", "{slot} is {}: {:?}", view.state, view.reason);
            let other = self.container(slot).await?;
            ensure!(other != container, "{slot} was not restarted");
        }
        Ok(())
    }

    /// Nothing runs in a container that is not there any more, nor watches over one.
    async fn nothing_is_orphaned(&self, killed: &[Process]) -> Result<()> {
        until("what belongs to no container to end", async || {
            let listed = self.scene.instance.containers().await?;
            let mut left = self.monitors()?;
            for container in killed.iter().filter_map(|it| it.container.as_deref()) {
                left.extend(processes::of(container)?);
            }
            left.retain(|it| it.container.as_ref().is_none_or(|id| !listed.contains(id)));
            ensure!(left.is_empty(), "orphans: {left:?}");
            Ok(Some(()))
        })
        .await
    }

    /// Podman goes on saying that it runs.
    pub(super) async fn an_end_that_no_monitor_told_of_is_noticed(&self) -> Result<()> {
        let (client, instance) = (&self.scene.client, &self.scene.instance);
        let before = client.workspace(&workspace()).await?.slots.dev.generation;
        let path = format!("/containers/{}/json", self.container(Slot::Dev).await?);
        let told: Value = serde_json::from_str(&instance.podman("GET", &path).await?.body)?;
        for process in ["ConmonPid", "Pid"] {
            let pid = told["State"][process].as_i64().context("no such process")?;
            kill(Pid::from_raw(i32::try_from(pid)?).context("it does not run")?)?;
        }
        until("dev to be ready in a new generation", async || {
            let dev = client.workspace(&workspace()).await?.slots.dev;
            Ok((dev.state == "ready" && dev.generation > before).then_some(()))
        })
        .await?;
        self.scene.fits_together().await
    }

    pub(super) async fn nothing_outlives_it(&self) -> Result<()> {
        self.scene.instance.stop()?;
        let left = self.monitors()?;
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    }
}

/// What ended just before needs no signal.
fn kill(pid: Pid) -> Result<()> {
    match kill_process(pid, Signal::KILL) {
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot kill {pid:?}")),
    }
}
