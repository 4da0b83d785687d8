//! Whatever dies, and wherever: afterwards what was acknowledged is so, nothing is orphaned, and everything goes on.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use choir_api::client::{ClientError, SlotVerb};
use choir_api::workspaces::{CreateRelease, Deploy, Deployment, Fork, Rollback};
use choir_core::deployment::Step;
use choir_core::{ReleaseId, Slot, SnapshotId};
use choir_e2e::instance::Instance;
use choir_e2e::numbered::Visitors;
use choir_e2e::person::{app_config, run, workspace};
use choir_e2e::skip;
use choir_e2e::waiting::{PATIENCE, rounds, step, until};
use choir_hypervisor::fail::POINTS;
use rustix::process::{Pid, Signal, kill_process};

use crate::Scene;

mod monitors;

/// What is asked for while something dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Op {
    Create,
    Start,
    Stop,
    Restart,
    Pause,
    Thaw,
    Swap,
    Warm,
    Cold,
    Deploy,
    BadDeploy,
    Fork,
    Restore,
    Take,
    Remove,
    Make,
    Discard,
}

/// The last number, and below it each that the app wrote down more than once; as a control that one again. Found where they are:
/// all of them are more than one answer holds.
const TWICE: &str = r#"last=$(tail -n 1 ~/numbers); echo "$last"; { cat ~/numbers; echo "$last"; } | sort | uniq -d"#;

/// Every failpoint, by what passes it.
const MATRIX: &[(Op, &[&str])] = &[
    (Op::Create, &["create.derived"]),
    (
        Op::Start,
        &["desire.recorded", "start.recorded", "start.created", "start.started"],
    ),
    (Op::Stop, &["desire.recorded", "stop.stopped", "remove.removed"]),
    (
        Op::Restart,
        &[
            "desire.recorded",
            "stop.stopped",
            "remove.removed",
            "start.recorded",
            "start.created",
            "start.started",
        ],
    ),
    (Op::Pause, &["pause.frozen"]),
    (Op::Thaw, &["thaw.thawed"]),
    (
        Op::Swap,
        &[
            "deployment.begun",
            "exchange.verified",
            "snapshot.begun",
            "snapshot.copied",
            "exchange.kept",
            "exchange.switched",
            "exchange.published",
            "pause.frozen",
            "exchange.frozen",
            "deployment.ending",
            "deployment.ended",
        ],
    ),
    (
        Op::Warm,
        &[
            "deployment.begun",
            "thaw.thawed",
            "exchange.verified",
            "snapshot.begun",
            "snapshot.copied",
            "exchange.kept",
            "exchange.switched",
            "exchange.published",
            "pause.frozen",
            "exchange.frozen",
            "deployment.ending",
            "deployment.ended",
        ],
    ),
    (
        Op::Cold,
        &[
            "deployment.begun",
            "contents.switched",
            "stop.stopped",
            "remove.removed",
            "refill.begun",
            "refill.kept",
            "refill.deleted",
            "refill.filled",
            "refill.recorded",
            "start.recorded",
            "start.created",
            "start.started",
            "deployment.ending",
            "deployment.ended",
        ],
    ),
    (
        Op::Deploy,
        &[
            "deployment.begun",
            "contents.switched",
            "stop.stopped",
            "remove.removed",
            "refill.begun",
            "refill.kept",
            "refill.filled",
            "refill.recorded",
            "start.recorded",
            "start.created",
            "start.started",
            "deployment.ending",
            "deployment.ended",
        ],
    ),
    (Op::BadDeploy, &["contents.returning", "refill.begun"]),
    (
        Op::Fork,
        &[
            "deployment.begun",
            "snapshot.begun",
            "snapshot.copied",
            "contents.switched",
            "stop.stopped",
            "remove.removed",
            "refill.begun",
            "refill.kept",
            "refill.deleted",
            "refill.filled",
            "refill.recorded",
            "start.recorded",
            "start.created",
            "start.started",
            "deployment.ending",
            "deployment.ended",
        ],
    ),
    (
        Op::Restore,
        &[
            "deployment.begun",
            "contents.switched",
            "refill.begun",
            "refill.kept",
            "refill.deleted",
            "refill.filled",
            "refill.recorded",
            "deployment.ending",
            "deployment.ended",
        ],
    ),
    (Op::Take, &["snapshot.begun", "snapshot.copied"]),
    (Op::Remove, &["prune.marked", "prune.deleted"]),
    (Op::Make, &["release.taken"]),
    (Op::Discard, &["release.retired", "release.cleared"]),
];

/// What a slot holds: a file of its user, and the release it is of.
#[derive(Debug, Clone, PartialEq, Eq)]
struct One {
    file: String,
    release: ReleaseId,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Held {
    live: One,
    dev: One,
}

struct Stage {
    scene: Scene,
    releases: [ReleaseId; 2],
    broken: ReleaseId,
    /// From asking for what is cut short until the hypervisor answers and nothing is under way, and what that was.
    recoveries: Vec<(Duration, String)>,
    nth: usize,
}

#[tokio::test(flavor = "multi_thread")]
async fn wherever_the_hypervisor_dies_what_was_acknowledged_is_so_and_nothing_is_orphaned() -> Result<()> {
    if skip::cannot_run("kills") {
        return Ok(());
    }
    let named: BTreeSet<&str> = MATRIX.iter().flat_map(|(_, points)| points.iter().copied()).collect();
    let all: BTreeSet<&str> = POINTS.into_iter().collect();
    ensure!(named == all, "the matrix misses {:?}", all.symmetric_difference(&named));
    let scene = step("set up", Scene::new(Instance::up_faulty()?)).await?;
    let mut stage = Stage::new(scene).await?;
    step("every failpoint kills", stage.matrix(&["kill"])).await?;
    let rotating = step("every failpoint fails or hangs", stage.matrix(&["err", "hang"]));
    rotating.await?;
    step("random kills under load", stage.random_kills()).await?;
    step("Podman's service is killed", stage.podman_is_killed()).await?;
    step("the containers' monitors are killed", stage.monitors_are_killed()).await?;
    let unseen = stage.an_end_that_no_monitor_told_of_is_noticed();
    step("dev ends without its monitor", unseen).await?;
    step("everything is stopped", stage.nothing_outlives_it()).await?;
    stage.recoveries.sort();
    let at = |percent: usize| &stage.recoveries[(stage.recoveries.len() * percent).div_ceil(100) - 1];
    let (longest, what) = at(100);
    eprintln!(
        "{} deaths: recovery p50 {:.1?}, p99 {:.1?}, longest {longest:.1?} ({what}); 0 invariants broken",
        stage.recoveries.len(),
        at(50).0,
        at(99).0,
    );
    Ok(())
}

impl Stage {
    async fn new(scene: Scene) -> Result<Self> {
        let client = &scene.client;
        let image = client.releases().await?.items.remove(0).image_digest;
        let own = client.workspace(&workspace()).await?.slots.live.release;
        let config = app_config();
        let asked = CreateRelease::of_image(&image, config);
        let other = client.create_release(&asked).await?.id;
        let mut config = app_config();
        config.start = Some("exec sleep 1000".to_owned());
        if let Some(check) = &mut config.health {
            check.timeout_s = 1;
        }
        let broken = client
            .create_release(&CreateRelease::of_image(&image, config))
            .await?
            .id;
        Ok(Self {
            scene,
            releases: [own, other],
            broken,
            recoveries: Vec::new(),
            nth: 0,
        })
    }

    /// Each point with one of these ways, taking turns; with `--slow` with each.
    async fn matrix(&mut self, ways: &[&str]) -> Result<()> {
        let mut turn = 0;
        for (op, points) in MATRIX {
            for point in *points {
                let chosen: &[&str] = if rounds(0, 1) == 1 {
                    ways
                } else {
                    &ways[turn % ways.len()..][..1]
                };
                turn += 1;
                for how in chosen {
                    let tried = self.one(*op, point, how).await;
                    tried.with_context(|| format!("{op:?} with {point}:{how}"))?;
                }
            }
        }
        Ok(())
    }

    async fn one(&mut self, op: Op, point: &str, how: &str) -> Result<()> {
        let before = self.prepare(op).await?;
        let wanted = self.wanted(op, &before).await?;
        let pid = self.scene.instance.hypervisor_pid()?;
        let fail = self.scene.instance.path("fail");
        std::fs::write(&fail, format!("{point}:{how}"))?;
        let begun = Instant::now();
        let asked = self.ask(op);
        let reached = until("the failpoint to be reached", async || {
            Ok((!fail.exists()).then_some(()))
        });
        let asked = match how {
            // Nobody answers any more.
            "hang" => {
                tokio::select! {
                    answer = asked => Some(answer),
                    reached = reached => {
                        reached?;
                        None
                    }
                }
            }
            _ => {
                let (answer, reached) = tokio::join!(asked, reached);
                reached?;
                Some(answer)
            }
        };
        if how == "hang" {
            until("the failpoint to be reached", async || {
                Ok((!fail.exists()).then_some(()))
            })
            .await?;
            kill_process(Pid::from_raw(pid).context("no process")?, Signal::KILL)?;
        }
        if how != "err" {
            until("another hypervisor", async || {
                Ok((self.scene.instance.hypervisor_pid()? != pid).then_some(()))
            })
            .await?;
        }
        self.settled().await?;
        self.recoveries
            .push((begun.elapsed(), format!("{op:?} with {point}:{how}")));
        self.judge(&before, &wanted, asked.and_then(Result::ok).flatten()).await
    }

    /// Waits until the hypervisor answers, and nothing is under way.
    async fn settled(&self) -> Result<()> {
        until("the deployment to end", async || {
            let view = self.scene.client.workspace(&workspace()).await?;
            Ok(view.open_deployment.is_none().then_some(()))
        })
        .await
    }

    /// Both slots run, each with something of its own.
    async fn prepare(&mut self, op: Op) -> Result<Held> {
        let client = &self.scene.client;
        self.nth += 1;
        for slot in Slot::ALL {
            run(client, slot, &format!("echo {slot} {} > ~/held; sync", self.nth)).await?;
        }
        match op {
            Op::Start => drop(
                client
                    .ask_slot(&workspace(), Slot::Dev, SlotVerb::Stop, PATIENCE)
                    .await?,
            ),
            Op::Thaw => drop(
                client
                    .ask_slot(&workspace(), Slot::Dev, SlotVerb::Pause, PATIENCE)
                    .await?,
            ),
            Op::Warm | Op::Cold => {
                let swapped = client
                    .swap(&workspace(), &format!("before {}", self.nth), PATIENCE)
                    .await?;
                ensure!(swapped.step == Step::Succeeded, "{swapped:?}");
            }
            _ => {}
        }
        if op == Op::Cold {
            run(client, Slot::Dev, "true").await?;
        }
        // What was displaced must not be looked into.
        let swapped = matches!(op, Op::Warm | Op::Cold);
        let slots = client.workspace(&workspace()).await?.slots;
        let one = |now: Slot| {
            let wrote = if swapped { now.other() } else { now };
            One {
                file: format!("{wrote} {}\n", self.nth),
                release: slots.get(now).release.clone(),
            }
        };
        Ok(Held {
            live: one(Slot::Live),
            dev: one(Slot::Dev),
        })
    }

    /// What is there once it was done.
    async fn wanted(&self, op: Op, before: &Held) -> Result<Held> {
        let mut wanted = before.clone();
        match op {
            Op::Swap | Op::Warm => std::mem::swap(&mut wanted.live, &mut wanted.dev),
            Op::Cold => wanted.live = before.dev.clone(),
            Op::Fork => wanted.dev = before.live.clone(),
            Op::Deploy => wanted.live.release = self.other(&before.live.release),
            _ => {}
        }
        Ok(wanted)
    }

    /// The release that a slot of this one is not of.
    fn other(&self, now: &ReleaseId) -> ReleaseId {
        let [own, other] = &self.releases;
        if now == own { other.clone() } else { own.clone() }
    }

    /// Asks once; the deployment, where it is one and its end was told.
    async fn ask(&self, op: Op) -> Result<Option<Deployment>, ClientError> {
        let (client, name, key) = (&self.scene.client, workspace(), format!("op {}", self.nth));
        let slot = |verb| client.ask_slot(&name, Slot::Dev, verb, PATIENCE);
        let release = match op {
            Op::Deploy => self.other(&client.workspace(&name).await?.slots.live.release),
            _ => self.broken.clone(),
        };
        Ok(match op {
            Op::Create => {
                let extra = format!("w{}", self.nth).parse().expect("a name");
                client.create_workspace(&extra).await?;
                None
            }
            Op::Start | Op::Thaw => slot(SlotVerb::Start).await.map(|_| None)?,
            Op::Stop => slot(SlotVerb::Stop).await.map(|_| None)?,
            Op::Restart => slot(SlotVerb::Restart).await.map(|_| None)?,
            Op::Pause => slot(SlotVerb::Pause).await.map(|_| None)?,
            Op::Swap => Some(client.swap(&name, &key, PATIENCE).await?),
            Op::Warm | Op::Cold => Some(client.rollback(&name, &Rollback { to: None }, &key, PATIENCE).await?),
            Op::Deploy | Op::BadDeploy => {
                let asked = Deploy { release };
                Some(client.deploy(&name, Slot::Live, &asked, &key, PATIENCE).await?)
            }
            Op::Fork => Some(client.fork(&name, &Fork { from: None }, &key, PATIENCE).await?),
            Op::Restore => {
                let own = self.newest().await?;
                Some(client.restore(&name, Slot::Dev, &own, &key, PATIENCE).await?)
            }
            Op::Take => client.take_snapshot(&name, Slot::Dev).await.map(|_| None)?,
            Op::Remove => {
                let own = self.newest().await?;
                client.delete_snapshot(&name, Slot::Dev, &own).await?;
                None
            }
            Op::Make => self.make().await.map(|_| None)?,
            Op::Discard => {
                let own = self.make().await?;
                client.delete_release(&own).await?;
                None
            }
        })
    }

    /// A snapshot of dev as it is.
    async fn newest(&self) -> Result<SnapshotId, ClientError> {
        Ok(self.scene.client.take_snapshot(&workspace(), Slot::Dev).await?.id)
    }

    /// A release of dev's system as it is.
    async fn make(&self) -> Result<ReleaseId, ClientError> {
        let dev = self.scene.client.workspace(&workspace()).await?.slots.dev.sandbox;
        let made = self
            .scene
            .client
            .create_release(&CreateRelease::of_sandbox(dev))
            .await?;
        Ok(made.id)
    }

    /// It was done or it was not, as the journal says; what was told is so; and everything fits together and goes on.
    async fn judge(&self, before: &Held, wanted: &Held, told: Option<Deployment>) -> Result<()> {
        let client = &self.scene.client;
        let key_of_this = client.deployments(&workspace()).await?.items;
        let last = key_of_this.first();
        if let (Some(told), Some(last)) = (&told, last)
            && told.step.is_final()
        {
            ensure!(
                last.id == told.id && last.step == told.step,
                "told {told:?}, and it is {last:?}"
            );
        }
        self.scene.fits_together().await?;
        for slot in Slot::ALL {
            client.ask_slot(&workspace(), slot, SlotVerb::Start, PATIENCE).await?;
        }
        let slots = client.workspace(&workspace()).await?.slots;
        let one = async |slot: Slot| {
            let file = run(client, slot, "cat ~/held").await?;
            let release = slots.get(slot).release.clone();
            Ok::<_, anyhow::Error>(One { file, release })
        };
        let now = Held {
            live: one(Slot::Live).await?,
            dev: one(Slot::Dev).await?,
        };
        ensure!(
            now == *before || now == *wanted,
            "{now:?} is neither {before:?} nor {wanted:?}"
        );
        let done = told.map(|t| t.step == Step::Succeeded);
        match done {
            Some(true) => ensure!(now == *wanted, "acknowledged, and {now:?} is there and not {wanted:?}"),
            Some(false) => ensure!(now == *before, "it failed, and {now:?} is there and not {before:?}"),
            None => {}
        }
        self.scene.fits_together().await
    }

    /// The hypervisor is killed at any moment while something is done and visitors come.
    async fn random_kills(&mut self) -> Result<()> {
        let mut visitors = Visitors::come(&self.scene.live, "storm", 4, 0);
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        for nth in 0..rounds(40, 1000) {
            visitors.answers(5).await?;
            let ops = [Op::Swap, Op::Warm, Op::Fork, Op::Restart, Op::Take, Op::Discard];
            let op = ops[nth % ops.len()];
            self.nth += 1;
            // Any sequence does, as long as a failure can be seen again.
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let at = Duration::from_millis((random >> 33) % 400);
            let pid = self.scene.instance.hypervisor_pid()?;
            let kill = async {
                tokio::time::sleep(at).await;
                kill_process(Pid::from_raw(pid).context("no process")?, Signal::KILL).context("cannot kill")
            };
            let begun = Instant::now();
            let (answer, killed) = tokio::join!(self.ask(op), kill);
            killed?;
            until("another hypervisor", async || {
                Ok((self.scene.instance.hypervisor_pid()? != pid).then_some(()))
            })
            .await?;
            self.settled().await?;
            self.recoveries
                .push((begun.elapsed(), format!("{op:?}, killed after {at:?}")));
            if let Ok(Some(told)) = answer
                && told.step.is_final()
            {
                let now = self.scene.client.deployment(&workspace(), told.id.as_str()).await?;
                ensure!(now.step == told.step, "told {told:?}, and it is {now:?}");
            }
            let whole = self.scene.fits_together().await;
            whole.with_context(|| format!("kill {nth}, {op:?} after {at:?}"))?;
        }
        let report = visitors.leave().await?;
        eprintln!("{report}");
        // A connection that broke with the hypervisor is not asked again. What a fork or a rollback took back is not lost.
        for slot in Slot::ALL {
            let twice = run(&self.scene.client, slot, TWICE).await?;
            let mut twice = twice.lines();
            let seeded = twice.next().context("nothing was delivered")?;
            let twice: Vec<&str> = twice.collect();
            ensure!(
                twice == [seeded],
                "delivered more than once, {seeded} beside: {twice:?}"
            );
        }
        Ok(())
    }
}
