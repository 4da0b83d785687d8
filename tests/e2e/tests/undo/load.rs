//! Under load nothing is lost and nothing comes twice, and what was live comes back within its time.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use choir_api::workspaces::{CreateRelease, Deploy, Deployment, Fork};
use choir_core::Slot;
use choir_core::deployment::{Kind, Step};
use choir_e2e::instance::Instance;
use choir_e2e::numbered::{Report, Visitors, twice};
use choir_e2e::person::{self, app_config, run, workspace};
use choir_e2e::skip;
use choir_e2e::waiting::{PATIENCE, rounds, step, until};
use rustix::process::{Pid, Signal, kill_process};

use crate::{Scene, well};

/// Visitors that ask fifty times a second each.
const ASKING: usize = 4;
/// What a request may take while the hypervisor is started again.
const QUEUED: Duration = Duration::from_secs(2);

/// From the first step to that in which traffic goes elsewhere, and to the end.
fn took(deployment: &Deployment, until: Step) -> Duration {
    let passed = deployment.steps.iter().find(|s| s.step == until);
    let from = deployment.created_at;
    passed.map_or(Duration::MAX, |s| s.at.duration_since(from).unsigned_abs())
}

fn worst(mut times: Vec<Duration>, percent: usize) -> Duration {
    times.sort();
    let index = (times.len() * percent).div_ceil(100).saturating_sub(1);
    times.get(index).copied().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_live_comes_back_and_no_request_is_lost_or_comes_twice() -> Result<()> {
    if skip::cannot_run("undo") {
        return Ok(());
    }
    let scene = step("set up", Scene::new(Instance::up(&[])?)).await?;
    step("swaps under load", swaps_under_load(&scene)).await?;
    step("a restart under load", a_restart_under_load(&scene)).await?;
    step("a deploy under load", a_deploy_under_load(&scene)).await?;
    step("warm rollbacks under load", warm_rollbacks(&scene)).await?;
    step("cold rollbacks under load", cold_rollbacks(&scene)).await?;
    step("a deploy that is not well", a_deploy_that_is_not_well(&scene)).await?;
    step("fork and restore", fork_and_restore(&scene)).await?;
    step("everything fits together", scene.fits_together()).await
}

async fn swaps_under_load(scene: &Scene) -> Result<()> {
    let mut visitors = Visitors::come(&scene.live, "quiet", 4, 50);
    visitors.answers(400).await?;
    let quiet = visitors.leave().await?;
    let mut visitors = Visitors::come(&scene.live, "swap", 4, 50);
    for nth in 0..rounds(20, 100) {
        visitors.answers(50).await?;
        scene.swap(&format!("swap {nth}")).await?;
        let [came, left] = if nth % 2 == 0 { ["new", "good"] } else { ["good", "new"] };
        ensure!(
            scene.answers_as(came).await?,
            "swap {nth} is done, and {left} still answers"
        );
    }
    visitors.answers(50).await?;
    let busy = visitors.leave().await?;
    let switches = scene.switches()?;
    eprintln!(
        "quiet: {quiet}\nswaps: {busy}; {} switches, p50 {:?}, p99 {:?}",
        switches.len(),
        worst(switches.clone(), 50),
        worst(switches, 99)
    );
    let numbers = scene.numbers().await?;
    quiet.reconcile(&numbers)?;
    busy.reconcile(&numbers)?;
    ensure!(busy.told > 0, "no websocket was told to come again");
    controls(scene, &busy).await
}

/// The hypervisor is told to end and started again, as a unit's restart does it (F16).
async fn a_restart_under_load(scene: &Scene) -> Result<()> {
    // What left live was frozen.
    person::start(&scene.client, Slot::Dev).await?;
    let (processes, pid) = (scene.processes().await?, scene.instance.hypervisor_pid()?);
    let mut visitors = Visitors::come(&scene.live, "restart", ASKING, 50);
    visitors.answers(400).await?;
    kill_process(Pid::from_raw(pid).context("no process")?, Signal::TERM)?;
    until("another hypervisor", async || {
        Ok((scene.instance.hypervisor_pid()? != pid).then_some(()))
    })
    .await?;
    visitors.answers(400).await?;
    let report = visitors.leave().await?;
    eprintln!("restart: {report}");
    // At most the one request of each kept connection that was on its way when that was closed.
    ensure!(report.failed.len() <= ASKING, "{:?}", report.failed);
    let refused = report.failed.iter().find(|failure| failure.contains("refused"));
    ensure!(refused.is_none(), "{refused:?}");
    ensure!(report.told > 0, "no websocket was told to come again");
    ensure!(report.percentile(100) < QUEUED, "a request waited: {report}");
    ensure!(
        scene.processes().await? == processes,
        "the sandboxes' processes are others"
    );
    let numbers = scene.numbers().await?;
    ensure!(
        twice(&numbers).is_empty(),
        "delivered more than once: {:?}",
        twice(&numbers)
    );
    let lost = report.answered.iter().find(|n| !numbers.lines().any(|line| line == *n));
    ensure!(lost.is_none(), "answered, and not delivered: {lost:?}");
    Ok(())
}

/// What must be noticed is.
async fn controls(scene: &Scene, report: &Report) -> Result<()> {
    let number = report.answered.first().context("nothing was answered")?;
    let line = format!("curl -fsS http://127.0.0.1:3000/n/{number} && cat ~/numbers");
    run(&scene.client, Slot::Live, &line).await?;
    let twice = scene.numbers().await?;
    ensure!(
        report.reconcile(&twice).is_err(),
        "a request that came twice was not noticed"
    );
    let lost: String = twice
        .lines()
        .filter(|n| n != number)
        .map(|n| format!("{n}\n"))
        .collect();
    ensure!(
        report.reconcile(&lost).is_err(),
        "a request that was lost was not noticed"
    );
    for slot in Slot::ALL {
        run(&scene.client, slot, "truncate -s 0 ~/numbers").await?;
    }
    Ok(())
}

/// Live starts anew on another release: who asks meanwhile waits, and is answered once.
async fn a_deploy_under_load(scene: &Scene) -> Result<()> {
    let client = &scene.client;
    let image = client.releases().await?.items.remove(0).image_digest;
    let release = CreateRelease::of_image(&image, app_config());
    let release = client.create_release(&release).await?.id;
    let mut visitors = Visitors::come(&scene.live, "deploy", ASKING, 10);
    visitors.answers(50).await?;
    let asked = Deploy {
        release: release.clone(),
    };
    well(
        client
            .deploy(&workspace(), Slot::Live, &asked, "under load", PATIENCE)
            .await?,
    )?;
    visitors.answers(50).await?;
    let report = visitors.leave().await?;
    eprintln!("deploy: {report}");
    report.reconcile(&scene.numbers().await?)?;
    ensure!(report.told > 0, "no websocket was told to come again");
    let live = client.workspace(&workspace()).await?.slots.live;
    ensure!(live.release == release, "live has another release");
    Ok(())
}

async fn warm_rollbacks(scene: &Scene) -> Result<()> {
    let mut visitors = Visitors::come(&scene.live, "warm", 4, 10);
    let mut times = Vec::new();
    for nth in 0..rounds(10, 20) {
        visitors.answers(50).await?;
        scene.swap(&format!("before warm {nth}")).await?;
        let undo = scene
            .client
            .workspace(&workspace())
            .await?
            .undo
            .context("nothing to undo")?;
        ensure!(undo.warm && undo.kind == Kind::Swap, "{undo:?}");
        let back = scene.rollback(&format!("warm {nth}")).await?;
        times.push(took(&back, Step::Draining));
    }
    let report = visitors.leave().await?;
    let p95 = worst(times, 95);
    eprintln!("warm rollback: p95 {p95:?}; {report}");
    report.reconcile(&scene.numbers().await?)?;
    ensure!(p95 < Duration::from_secs(1), "warm rollbacks took {p95:?}");
    Ok(())
}

/// What is written down meanwhile goes with the files that are brought back, so that only failures are counted.
async fn cold_rollbacks(scene: &Scene) -> Result<()> {
    run(&scene.client, Slot::Live, "echo good > ~/mark; sync").await?;
    run(&scene.client, Slot::Dev, "echo worse > ~/mark; sync").await?;
    let mut visitors = Visitors::come(&scene.live, "cold", 4, 10);
    let mut times = Vec::new();
    for nth in 0..rounds(5, 20) {
        visitors.answers(50).await?;
        scene.swap(&format!("before cold {nth}")).await?;
        // Whoever uses what was displaced ends its being as it was.
        run(&scene.client, Slot::Dev, "true").await?;
        let undo = scene
            .client
            .workspace(&workspace())
            .await?
            .undo
            .context("nothing to undo")?;
        ensure!(!undo.warm, "it is still warm");
        let back = scene.rollback(&format!("cold {nth}")).await?;
        times.push(took(&back, Step::Succeeded));
        let mark = run(&scene.client, Slot::Live, "cat ~/mark").await?;
        ensure!(mark == "good\n", "live holds {mark}");
        run(&scene.client, Slot::Dev, "echo worse > ~/mark; sync").await?;
    }
    let report = visitors.leave().await?;
    let p95 = worst(times, 95);
    eprintln!("cold rollback: p95 {p95:?}; {report}");
    ensure!(report.failed.is_empty(), "{:?}", report.failed);
    ensure!(p95 < Duration::from_secs(10), "cold rollbacks took {p95:?}");
    Ok(())
}

async fn a_deploy_that_is_not_well(scene: &Scene) -> Result<()> {
    let client = &scene.client;
    let before = client.workspace(&workspace()).await?.slots.live;
    run(client, Slot::Live, "echo steady > ~/mark; sync").await?;
    let image = client.releases().await?.items.remove(0).image_digest;
    let mut config = app_config();
    config.start = Some("exec sleep 1000".to_owned());
    if let Some(check) = &mut config.health {
        check.timeout_s = 2;
    }
    let broken = client
        .create_release(&CreateRelease::of_image(&image, config))
        .await?
        .id;
    let asked = Deploy { release: broken };
    let ended = client
        .deploy(&workspace(), Slot::Live, &asked, "broken", PATIENCE)
        .await?;
    ensure!(ended.step == Step::RolledBack, "it ended as {}", ended.step.as_str());
    let reason = ended.reason.unwrap_or_default();
    ensure!(reason.contains("did not become healthy within 2 s"), "{reason}");
    let after = client.workspace(&workspace()).await?.slots.live;
    ensure!(after.release == before.release, "live has another release");
    scene.serves("steady").await
}

async fn fork_and_restore(scene: &Scene) -> Result<()> {
    let client = &scene.client;
    run(client, Slot::Dev, "echo of dev > ~/mine; sync").await?;
    let taken = client.take_snapshot(&workspace(), Slot::Dev).await?;
    well(
        client
            .fork(&workspace(), &Fork { from: None }, "fork", PATIENCE)
            .await?,
    )?;
    ensure!(
        run(client, Slot::Dev, "cat ~/mark").await? == "steady\n",
        "dev is no copy of live"
    );
    well(
        client
            .restore(&workspace(), Slot::Dev, &taken.id, "restore", PATIENCE)
            .await?,
    )?;
    ensure!(
        run(client, Slot::Dev, "cat ~/mine").await? == "of dev\n",
        "dev did not come back"
    );
    client.delete_snapshot(&workspace(), Slot::Dev, &taken.id).await?;
    Ok(())
}
