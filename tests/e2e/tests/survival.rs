//! What must go on when something dies or goes wild: the hypervisor under load, a sandbox, a sandbox's programs.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use choir_api::client::{Client, ClientError};
use choir_api::sandbox::{Command, CreateTask, TaskState};
use choir_api::workspaces::SlotView;
use choir_core::limits::LimitsPatch;
use choir_core::{Slot, WorkspaceSettings};
use choir_e2e::browser::Browser;
use choir_e2e::instance::Instance;
use choir_e2e::load::{Load, Tally};
use choir_e2e::page::Page;
use choir_e2e::person::{self, USER, WORKSPACE, exec, run, workspace};
use choir_e2e::waiting::{PATIENCE, step, until};
use choir_e2e::{http, skip};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// For a request that has nothing to do with what goes wrong, unoptimised programs and a busy machine included.
const P99: Duration = Duration::from_secs(1);

/// A running instance with both slots ready, each serving its app, and a person who is signed in.
struct Scene {
    instance: Instance,
    page: Page,
    _browser: Browser,
    client: Client,
    /// What the browser sends to live's host.
    cookie: String,
}

#[tokio::test(flavor = "multi_thread")]
async fn what_dies_comes_back_and_hurts_nobody_else() -> Result<()> {
    if skip::cannot_run("survival") {
        return Ok(());
    }
    let scene = scene().await?;
    step("the hypervisor is killed under load", the_hypervisor_is_killed(&scene)).await?;
    step("two swaps at once", two_swaps_at_once(&scene)).await?;
    step(
        "a sandbox dies while nobody looks",
        a_sandbox_that_died_unseen_is_started_once(&scene),
    )
    .await?;
    step("a sandbox dies", a_dead_sandbox_is_restarted(&scene)).await?;
    step(
        "a sandbox keeps dying",
        a_sandbox_that_keeps_dying_is_left_with_its_reason(&scene),
    )
    .await?;
    step("dev forks without end", a_fork_bomb_hurts_nobody_else(&scene)).await?;
    step("dev fills its disk", a_full_disk_hurts_nobody_else(&scene)).await?;
    step("dev floods its output", a_flood_of_output_hurts_nobody_else(&scene)).await?;
    step("dev falls asleep", an_idle_sandbox_keeps_its_files(&scene)).await
}

async fn scene() -> Result<Scene> {
    let instance = Instance::up(&[])?;
    let browser = Browser::start().await?;
    let page = browser.page().await?;
    person::register(&page, &instance).await?;
    let client = person::token(&page, &instance, &person::EVERYTHING).await?;
    client.create_workspace(&workspace()).await?;
    for slot in Slot::ALL {
        person::start(&client, slot).await?;
        person::serve_app(&client, slot, &format!("app-of-{slot}")).await?;
    }
    let live = instance.app("live", WORKSPACE, USER);
    page.goto(live.as_str()).await?;
    page.wait_text("h1", "app-of-live").await?;
    let cookie = page.cookies(live.as_str()).await?;
    Ok(Scene {
        instance,
        page,
        _browser: browser,
        client,
        cookie,
    })
}

impl Scene {
    /// Clients of live's app, who expect this one there.
    fn load(&self, mark: &str) -> Load {
        let mut url = self.instance.app("live", WORKSPACE, USER);
        url.set_path("/count");
        Load::start(4, &url, ("Cookie", &self.cookie), &format!("\"mark\": \"{mark}\""))
    }

    /// What live's app says of itself: its mark, which run of it this is, and how many requests it had.
    async fn app(&self) -> Result<Value> {
        let mut url = self.instance.app("live", WORKSPACE, USER);
        url.set_path("/count");
        let answer = http::send("GET", &url, &[("Cookie", &self.cookie)], "").await?;
        serde_json::from_str(&answer.body).with_context(|| format!("live answered {answer:?}"))
    }

    async fn slot(&self, slot: Slot) -> Result<SlotView> {
        Ok(self.client.workspace(&workspace()).await?.slots.get(slot).clone())
    }

    async fn containers(&self) -> Result<[String; 2]> {
        let slots = self.client.workspace(&workspace()).await?.slots;
        let live = self.instance.container(slots.live.sandbox.as_str()).await?;
        Ok([live, self.instance.container(slots.dev.sandbox.as_str()).await?])
    }

    /// Which processes live and dev are, and since when.
    async fn processes(&self) -> Result<[String; 2]> {
        let [live, dev] = self.containers().await?;
        Ok([self.instance.process(&live).await?, self.instance.process(&dev).await?])
    }

    async fn kill_container(&self, slot: Slot) -> Result<()> {
        let id = self.instance.container(self.slot(slot).await?.sandbox.as_str()).await?;
        self.kill(&id).await
    }

    async fn kill(&self, container: &str) -> Result<()> {
        let killed = self
            .instance
            .podman("POST", &format!("/containers/{container}/kill?signal=KILL"))
            .await?;
        ensure!(killed.status < 300, "the container could not be killed: {killed:?}");
        Ok(())
    }

    async fn limit(&self, limits: LimitsPatch) -> Result<()> {
        let patch = WorkspaceSettings {
            limits: Some(limits),
            ..WorkspaceSettings::default()
        };
        self.client.patch_workspace(&workspace(), &patch).await?;
        Ok(())
    }

    /// Dev is as good as new after a restart; nothing outside it needs one.
    async fn restart_dev(&self) -> Result<()> {
        let verb = choir_api::client::SlotVerb::Restart;
        let view = self.client.ask_slot(&workspace(), Slot::Dev, verb, PATIENCE).await?;
        ensure!(
            view.state == "ready",
            "dev is {} after its restart: {:?}",
            view.state,
            view.reason
        );
        run(&self.client, Slot::Dev, "true").await?;
        Ok(())
    }
}

async fn the_hypervisor_is_killed(scene: &Scene) -> Result<()> {
    scene.client.swap(&workspace(), "before the kill", PATIENCE).await?;
    // What left live was frozen.
    person::start(&scene.client, Slot::Dev).await?;
    let (containers, app) = (scene.containers().await?, scene.app().await?);
    let processes = scene.processes().await?;
    let slots = scene.client.workspace(&workspace()).await?.slots;
    let pid = scene.instance.hypervisor_pid()?;

    let mut load = scene.load("app-of-dev");
    load.answers(20).await?;
    let victim = Pid::from_raw(pid).context("no process")?;
    kill_process(victim, Signal::KILL)?;
    load.answers(20).await?;
    let tally = load.finish().await?;
    eprintln!("{tally}");
    ensure!(scene.instance.hypervisor_pid()? != pid, "the hypervisor was not killed");
    ensure!(
        tally.broken <= 4,
        "more connections broke than were open when it was killed: {tally}"
    );

    ensure!(
        scene.containers().await? == containers,
        "the sandboxes' containers are others"
    );
    ensure!(
        scene.processes().await? == processes,
        "the sandboxes' processes are others"
    );
    // Live has answered; the agent of dev may still be calling.
    let after = until("both sandboxes to be ready", async || {
        let slots = scene.client.workspace(&workspace()).await?.slots;
        let ready = Slot::ALL.map(|slot| slots.get(slot).state == "ready");
        Ok((ready == [true; 2]).then_some(slots))
    })
    .await?;
    for slot in Slot::ALL {
        let (before, after) = (slots.get(slot), after.get(slot));
        ensure!(before.sandbox == after.sandbox, "{slot} points elsewhere");
        ensure!(before.generation == after.generation, "{slot} has a new generation");
    }
    let app_after = scene.app().await?;
    ensure!(
        app["run"] == app_after["run"],
        "the app in live was restarted: {app_after}"
    );
    ensure!(
        app["requests"].as_u64() < app_after["requests"].as_u64(),
        "the app in live does not count on"
    );
    scene.page.goto(scene.instance.origin().as_str()).await?;
    let me = scene.page.eval("fetch('/auth/me').then(it => it.json())").await?;
    ensure!(me["user"]["name"] == USER, "the session ended: {me}");
    Ok(())
}

async fn two_swaps_at_once(scene: &Scene) -> Result<()> {
    for round in 0..5 {
        let before = scene.client.workspace(&workspace()).await?.slots;
        let (name, keys) = (workspace(), [format!("{round} a"), format!("{round} b")]);
        let swap = |key| scene.client.swap(&name, key, PATIENCE);
        let (first, second) = tokio::join!(swap(&keys[0]), swap(&keys[1]));
        let mut done = 0;
        for result in [first, second] {
            match result {
                Ok(deployment) => {
                    ensure!(deployment.reason.is_none(), "a swap failed: {:?}", deployment.reason);
                    done += 1;
                }
                Err(ClientError::Refused { status: 409, detail }) if detail.code == "deployment_open" => {}
                Err(error) => return Err(error.into()),
            }
        }
        ensure!(done > 0, "neither of two swaps was carried out");
        let after = scene.client.workspace(&workspace()).await?.slots;
        let swapped = after.live.sandbox == before.dev.sandbox && after.dev.sandbox == before.live.sandbox;
        let as_before = after.live.sandbox == before.live.sandbox && after.dev.sandbox == before.dev.sandbox;
        ensure!(
            if done == 1 { swapped } else { as_before },
            "{done} swaps left {after:?} of {before:?}"
        );
    }
    Ok(())
}

/// The hypervisor is stopped when it happens, and killed before it goes on: it has seen nothing of it.
async fn a_sandbox_that_died_unseen_is_started_once(scene: &Scene) -> Result<()> {
    // What left live was frozen.
    person::start(&scene.client, Slot::Dev).await?;
    let before = scene.slot(Slot::Dev).await?;
    let next = before.generation.map(|generation| generation + 1);
    let ([live, dev], [alive, _]) = (scene.containers().await?, scene.processes().await?);
    let hypervisor = Pid::from_raw(scene.instance.hypervisor_pid()?).context("no process")?;
    kill_process(hypervisor, Signal::STOP)?;
    scene.kill(&dev).await?;
    until("dev's container to end", async || {
        Ok((scene.instance.state(&dev).await?["Status"] == "exited").then_some(()))
    })
    .await?;
    kill_process(hypervisor, Signal::KILL)?;
    until("dev to be ready in its next generation", async || {
        let now = scene.slot(Slot::Dev).await?;
        ensure!(now.generation <= next, "dev was started more than once");
        Ok((now.state == "ready" && now.generation == next).then_some(()))
    })
    .await?;
    run(&scene.client, Slot::Dev, "true").await?;
    ensure!(
        scene.slot(Slot::Dev).await?.generation == next,
        "dev was started more than once"
    );
    ensure!(scene.instance.process(&live).await? == alive, "live is another process");
    Ok(())
}

async fn a_dead_sandbox_is_restarted(scene: &Scene) -> Result<()> {
    let before = scene.slot(Slot::Dev).await?;
    let marker = run(&scene.client, Slot::Dev, "echo kept > ~/kept; cat ~/kept").await?;
    scene.kill_container(Slot::Dev).await?;
    until("dev to be ready in a new generation", async || {
        let now = scene.slot(Slot::Dev).await?;
        Ok((now.state == "ready" && now.generation > before.generation).then_some(()))
    })
    .await?;
    ensure!(
        run(&scene.client, Slot::Dev, "cat ~/kept").await? == marker,
        "its files are gone"
    );
    Ok(())
}

/// Each death is a container that is killed as soon as it is ready.
async fn a_sandbox_that_keeps_dying_is_left_with_its_reason(scene: &Scene) -> Result<()> {
    let reason = until("dev to be left alone", async || {
        let now = scene.slot(Slot::Dev).await?;
        match now.state.as_str() {
            "failed" => Ok(Some(now.reason.unwrap_or_default())),
            "ready" => scene.kill_container(Slot::Dev).await.map(|()| None),
            _ => Ok(None),
        }
    })
    .await?;
    ensure!(reason.len() > 10, "dev shows no reason: `{reason}`");
    eprintln!("reason: {reason}");
    ensure!(scene.slot(Slot::Live).await?.state == "ready", "live is hurt");
    person::start(&scene.client, Slot::Dev).await?;
    Ok(())
}

async fn a_fork_bomb_hurts_nobody_else(scene: &Scene) -> Result<()> {
    scene
        .limit(LimitsPatch {
            pids: Some(200),
            ..LimitsPatch::default()
        })
        .await?;
    until("dev's limit of processes to hold", async || {
        let limits = "cat /sys/fs/cgroup/pids.max /sys/fs/cgroup/pids/pids.max";
        let seen = exec(&scene.client, Slot::Dev, limits).await?.stdout;
        Ok((seen.trim() == "200").then_some(()))
    })
    .await?;
    let quiet = visitors(scene).await?;
    let bomb = "timeout -s KILL 60 bash -c 'bomb() { bomb | bomb & }; bomb; wait; sleep 60' >/dev/null 2>&1 &";
    // It may be that nothing more can be started there, and so nothing answers.
    let _dev_is_hurt = exec(&scene.client, Slot::Dev, bomb).await;
    until("the bomb to go off", async || {
        Ok((pids_of_dev(scene).await? > 100).then_some(()))
    })
    .await?;
    let beside = visitors(scene).await?;
    let pids = pids_of_dev(scene).await?;
    ensure!(pids > 100, "the bomb ended before its neighbour was looked at");
    ensure!(pids <= 200, "dev has {pids} processes although it may have 200");
    ensure!(beside.p99() < P99, "live's visitors wait: {beside}");
    scene.restart_dev().await?;
    let after = visitors(scene).await?;
    eprintln!("before: {quiet}\nbeside {pids} processes: {beside}\nafter: {after}");
    Ok(())
}

/// What 400 requests to live are like now.
async fn visitors(scene: &Scene) -> Result<Tally> {
    let live = scene.app().await?;
    let mut load = scene.load(live["mark"].as_str().unwrap_or_default());
    load.answers(100).await?;
    load.finish().await
}

async fn pids_of_dev(scene: &Scene) -> Result<u64> {
    Ok(scene.client.stats(&workspace(), Slot::Dev).await?.pids)
}

/// Stopped for idleness and woken by the next call; live, whose app runs as a task, stays as it is.
async fn an_idle_sandbox_keeps_its_files(scene: &Scene) -> Result<()> {
    scene.restart_dev().await?;
    run(&scene.client, Slot::Dev, "echo asleep > ~/kept").await?;
    let live = scene.slot(Slot::Live).await?;
    let patch = WorkspaceSettings {
        idle_pause_s: Some(0),
        idle_stop_s: Some(1),
        ..WorkspaceSettings::default()
    };
    scene.client.patch_workspace(&workspace(), &patch).await?;
    until("dev to be stopped", async || {
        Ok((scene.slot(Slot::Dev).await?.state == "stopped").then_some(()))
    })
    .await?;
    let kept = run(&scene.client, Slot::Dev, "cat ~/kept").await?;
    ensure!(kept == "asleep\n", "its file holds `{kept}`");
    let after = scene.slot(Slot::Live).await?;
    ensure!(
        after.state == "ready" && after.generation == live.generation,
        "live is {} in generation {:?}, and was in {:?}",
        after.state,
        after.generation,
        live.generation
    );
    Ok(())
}

async fn a_full_disk_hurts_nobody_else(scene: &Scene) -> Result<()> {
    let used = scene.client.stats(&workspace(), Slot::Dev).await?.disk;
    let room = 256 << 20;
    scene
        .limit(LimitsPatch {
            disk: Some(used + room),
            ..LimitsPatch::default()
        })
        .await?;
    until("dev's disk limit to hold", async || {
        let limit = scene.client.stats(&workspace(), Slot::Dev).await?.disk_limit;
        Ok((limit == Some(used + room)).then_some(()))
    })
    .await?;
    let filled = exec(&scene.client, Slot::Dev, "head -c 2G /dev/zero > ~/big").await?;
    ensure!(filled.exit.exit_code != 0, "2 GB went into {room} bytes");
    ensure!(
        filled.stderr.contains("No space left") || filled.stderr.contains("quota"),
        "{}",
        filled.stderr
    );
    // Live has a volume of its own, and the database a disk of its own.
    run(
        &scene.client,
        Slot::Live,
        "head -c 64M /dev/zero > ~/fine && sync ~/fine && rm ~/fine",
    )
    .await?;
    scene
        .limit(LimitsPatch {
            disk: Some(20 << 30),
            ..LimitsPatch::default()
        })
        .await?;
    run(
        &scene.client,
        Slot::Dev,
        "rm ~/big && echo there is room again > ~/small",
    )
    .await?;
    Ok(())
}

/// A program's output is all that a sandbox can flood: the container's own log belongs to its first process.
async fn a_flood_of_output_hurts_nobody_else(scene: &Scene) -> Result<()> {
    let before = scene.slot(Slot::Dev).await?.generation;
    let live = scene.app().await?;
    let mut load = scene.load(live["mark"].as_str().unwrap_or_default());
    let flood = CreateTask {
        command: Command::Line("yes 'a line of output, and nothing of interest in it' | head -c 200M".to_owned()),
        cwd: None,
        env: [].into(),
        timeout_ms: None,
    };
    let (client, name) = (&scene.client, workspace());
    let sandbox = client.sandbox(&name, Slot::Dev);
    let task = sandbox.create_task(&flood).await?.id;
    until("the flood to end", async || {
        Ok(sandbox.task(&task).await?.state.is_final().then_some(()))
    })
    .await?;
    load.answers(5).await?;
    let tally = load.finish().await?;
    let stats = client.stats(&name, Slot::Dev).await?;
    eprintln!("{} MiB; {tally}", stats.memory >> 20);
    ensure!(
        sandbox.task(&task).await?.state == TaskState::Succeeded,
        "the flood did not run to its end"
    );
    ensure!(
        scene.slot(Slot::Dev).await?.generation == before,
        "dev did not survive its own output"
    );
    Ok(())
}
