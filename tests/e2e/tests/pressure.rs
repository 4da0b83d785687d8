//! Sandboxes that take all that they may, and one that refuses to end: the hypervisor answers as before, and what is to
//! end ends.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use choir_api::audit::AuditQuery;
use choir_api::client::{Client, ClientError, SlotVerb};
use choir_api::sandbox::{Command, CreateTask, TaskState};
use choir_api::workspaces::SlotView;
use choir_core::deployment::Step;
use choir_core::limits::LimitsPatch;
use choir_core::memory::Memory;
use choir_core::{Slot, WorkspaceSettings};
use choir_e2e::instance::Instance;
use choir_e2e::load::Tally;
use choir_e2e::person::{self, exec, run, workspace};
use choir_e2e::waiting::{PATIENCE, rounds, step, until};
use choir_e2e::{http, processes, skip};
use tokio::time::{Instant, interval};

/// Of what is asked while every core is taken: in a quick run, where the machine does other things, and as promised.
const P99: [Duration; 2] = [Duration::from_millis(500), Duration::from_millis(100)];
/// From one question to the next.
const EVERY: Duration = Duration::from_millis(20);
/// How long the time before it is measured.
const QUIET: Duration = Duration::from_secs(5);
/// How much work is measured where a limit is.
const WORK: Duration = Duration::from_secs(1);
/// From asking for a stop until nothing is left.
const STOPPED_WITHIN: Duration = Duration::from_secs(15);

/// Starts what it waits for again and again, and writes down both process ids. No signal but KILL ends it or that.
const STUBBORN: &str =
    r#"trap "" TERM INT HUP; while :; do sleep 1000 & echo "$$ $!" > "$0.new"; mv "$0.new" "$0"; wait "$!"; done"#;

/// Waits without being interruptible (state D): for its child to become another program, which it never does.
const ASLEEP: &str = "#include <signal.h>\n#include <unistd.h>\n\
    int main(void) { signal(SIGTERM, SIG_IGN); if (vfork() == 0) for (;;) pause(); return 0; }\n";

/// Bytes that one program takes. Half of it is more than what a machine has available goes up and down by meanwhile: its own
/// host may take some of it back.
const HOG: u64 = 4 << 30;

struct Scene {
    instance: Instance,
    client: Client,
    token: String,
}

#[tokio::test(flavor = "multi_thread")]
async fn sandboxes_that_take_all_they_may_or_refuse_to_end_hold_nobody_up() -> Result<()> {
    if skip::cannot_run("pressure") {
        return Ok(());
    }
    let instance = Instance::up(&[])?;
    let (client, token) = person::sign_in_with_token(&instance).await?;
    client.create_workspace(&workspace()).await?;
    let scene = Scene {
        instance,
        client,
        token,
    };
    for slot in Slot::ALL {
        person::start(&scene.client, slot).await?;
    }
    step("every core is busy", busy_loops_do_not_slow_the_hypervisor(&scene)).await?;
    step("live comes first", live_gets_more_of_the_processors(&scene)).await?;
    step("a limit of cores", busy_loops_get_no_more_than_their_limit(&scene)).await?;
    step(
        "nothing ends by itself",
        what_ignores_signals_ends_with_its_sandbox(&scene),
    )
    .await?;
    step("no memory is left", dev_gives_way_when_memory_runs_short(&scene)).await
}

impl Scene {
    async fn patch(&self, limits: LimitsPatch) -> Result<()> {
        let patch = WorkspaceSettings {
            limits: Some(limits),
            ..WorkspaceSettings::default()
        };
        self.client.patch_workspace(&workspace(), &patch).await?;
        Ok(())
    }

    async fn limit(&self, cpus: f64) -> Result<()> {
        self.patch(LimitsPatch {
            cpus: Some(cpus),
            ..LimitsPatch::default()
        })
        .await?;
        for slot in Slot::ALL {
            until("the limit of cores to hold", async || {
                let limits = "cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/cpu/cpu.cfs_quota_us";
                let seen = exec(&self.client, slot, limits).await?.stdout;
                let quota = seen.split_whitespace().next().and_then(|it| it.parse::<f64>().ok());
                // Of a period of 100 ms, in microseconds.
                Ok((quota == Some((cpus * 100_000.0).round())).then_some(()))
            })
            .await?;
        }
        Ok(())
    }

    async fn limit_memory(&self, bytes: u64) -> Result<()> {
        self.patch(LimitsPatch {
            memory: Some(bytes),
            ..LimitsPatch::default()
        })
        .await?;
        until("dev's limit of memory to hold", async || {
            let limits = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes";
            let seen = exec(&self.client, Slot::Dev, limits).await?.stdout;
            Ok((seen.trim() == bytes.to_string()).then_some(()))
        })
        .await
    }

    /// A task of so many loops that do nothing; its id.
    async fn busy(&self, slot: Slot, loops: usize) -> Result<String> {
        let line = format!("for i in $(seq {loops}); do while :; do :; done & done; wait");
        self.task(slot, line).await
    }

    async fn task(&self, slot: Slot, line: String) -> Result<String> {
        let asked = CreateTask {
            command: Command::Line(line),
            cwd: None,
            env: [].into(),
            timeout_ms: None,
        };
        Ok(self.client.sandbox(&workspace(), slot).create_task(&asked).await?.id)
    }

    async fn runs(&self, slot: Slot, task: &str) -> Result<bool> {
        let state = self.client.sandbox(&workspace(), slot).task(task).await?.state;
        Ok(state == TaskState::Running)
    }

    /// What it has had of the processors.
    async fn used(&self, slot: Slot) -> Result<Duration> {
        let stats = self.client.stats(&workspace(), slot).await?;
        Ok(Duration::from_nanos(stats.cpu_ns))
    }

    /// Has the hypervisor keep so many bytes of the box's memory for itself and live.
    async fn reserve(&self, bytes: u64) -> Result<()> {
        let before = self.instance.hypervisor_pid()?;
        let bytes = toml::Value::Integer(i64::try_from(bytes)?);
        self.instance.reconfigure(|config| {
            let sandboxes = config.entry("sandboxes").or_insert(toml::Table::new().into());
            if let Some(table) = sandboxes.as_table_mut() {
                table.insert("memory_reserve".to_owned(), bytes);
            }
        })?;
        until("another hypervisor that is ready", async || {
            let other = self.instance.hypervisor_pid()? != before;
            Ok((other && self.client.readiness().await?.ready).then_some(()))
        })
        .await
    }

    async fn becomes(&self, slot: Slot, state: &str) -> Result<()> {
        until(&format!("{slot} to be {state}"), async || {
            Ok((self.slot(slot).await?.state == state).then_some(()))
        })
        .await
    }

    /// How long it takes to get `WORK` of the processors.
    async fn working(&self, slot: Slot) -> Result<Duration> {
        let (before, begun) = (self.used(slot).await?, Instant::now());
        until("a sandbox to work", async || {
            Ok((self.used(slot).await? >= before + WORK).then_some(()))
        })
        .await?;
        Ok(begun.elapsed())
    }

    async fn slot(&self, slot: Slot) -> Result<SlotView> {
        Ok(self.client.workspace(&workspace()).await?.slots.get(slot).clone())
    }

    /// Liveness, and what only its user is told, both asked steadily.
    async fn answers(&self, lasting: Duration) -> Result<[Tally; 2]> {
        let health = self.asked("/healthz", "\"status\":\"ok\"", lasting);
        let own = self.asked("/api/workspaces/main", "\"name\":\"main\"", lasting);
        let (health, own) = tokio::try_join!(health, own)?;
        Ok([health, own])
    }

    /// Counts from when each question was due, so that a late answer makes those behind it late, too.
    async fn asked(&self, path: &str, wanted: &str, lasting: Duration) -> Result<Tally> {
        let (url, bearer) = (self.instance.origin().join(path)?, format!("Bearer {}", self.token));
        let mut times = Vec::new();
        let (mut ticks, begun) = (interval(EVERY), Instant::now());
        while begun.elapsed() < lasting {
            let due = ticks.tick().await;
            let answer = http::send("GET", &url, &[("Authorization", bearer.as_str())], "").await?;
            let good = answer.status == 200 && answer.body.contains(wanted);
            ensure!(good, "{url} answered {answer:?}");
            times.push(due.elapsed());
        }
        times.sort();
        Ok(Tally { broken: 0, times })
    }
}

/// E11: twice as many busy loops as there are cores, in both sandboxes at once.
async fn busy_loops_do_not_slow_the_hypervisor(scene: &Scene) -> Result<()> {
    let cores = std::thread::available_parallelism()?.get();
    scene.limit(cores as f64).await?;
    let idle = scene.answers(QUIET).await?;
    let (live, dev) = (scene.slot(Slot::Live).await?, scene.slot(Slot::Dev).await?);
    let mut tasks = Vec::new();
    for slot in Slot::ALL {
        tasks.push((slot, scene.busy(slot, 2 * cores).await?));
    }
    for slot in Slot::ALL {
        scene.working(slot).await?;
    }
    let before = [scene.used(Slot::Live).await?, scene.used(Slot::Dev).await?];
    let begun = Instant::now();
    let busy = scene
        .answers(rounds(Duration::from_secs(20), Duration::from_secs(300)))
        .await?;
    let lasted = begun.elapsed();
    let used = [
        scene.used(Slot::Live).await?.saturating_sub(before[0]),
        scene.used(Slot::Dev).await?.saturating_sub(before[1]),
    ];
    eprintln!("live worked {:.1?} and dev {:.1?} in {lasted:.1?}", used[0], used[1]);
    // The machine has other work, too; what matters is that both wanted all of it.
    for (slot, task) in &tasks {
        ensure!(scene.runs(*slot, task).await?, "the loops in {slot} ended");
    }
    ensure!(used.iter().all(|it| *it > lasted / 10), "a sandbox hardly worked");
    ensure!(used[0] + used[1] > lasted / 2, "the sandboxes hardly worked");
    for ((what, idle), busy) in ["/healthz", "the workspace"].iter().zip(&idle).zip(&busy) {
        let ratio = busy.p99().as_secs_f64() / idle.p99().as_secs_f64();
        eprintln!("{what}: before {idle}\n{what}: beside {busy}; p99 {ratio:.1} times as long");
        // A machine that is as slow without the loops is not slow because of them.
        let allowed = rounds(P99[0], P99[1]).max(idle.p99() * 2);
        ensure!(busy.p99() < allowed, "{what} waits: {busy}; {allowed:?} are allowed");
    }
    for (slot, was) in [(Slot::Live, live), (Slot::Dev, dev)] {
        let now = scene.slot(slot).await?;
        let same = now.state == "ready" && now.generation == was.generation;
        ensure!(same, "{slot} is {} in generation {:?}", now.state, now.generation);
    }
    for (slot, task) in &tasks {
        scene.client.sandbox(&workspace(), *slot).cancel_task(task).await?;
    }
    Ok(())
}

/// Both want all of the processors, and live gets most; whichever sandbox live is.
async fn live_gets_more_of_the_processors(scene: &Scene) -> Result<()> {
    let cores = std::thread::available_parallelism()?.get();
    for slot in Slot::ALL {
        scene.busy(slot, 2 * cores).await?;
    }
    for key in ["before a swap", "after a swap"] {
        for slot in Slot::ALL {
            person::start(&scene.client, slot).await?;
            scene.working(slot).await?;
        }
        // The shares follow a swap at once, but not in the same instant.
        until("live to get most of the processors", async || {
            let before = [scene.used(Slot::Live).await?, scene.used(Slot::Dev).await?];
            scene.working(Slot::Live).await?;
            let live = scene.used(Slot::Live).await?.saturating_sub(before[0]);
            let dev = scene.used(Slot::Dev).await?.saturating_sub(before[1]);
            eprintln!("{key}: live worked {live:.1?}, dev {dev:.1?}");
            Ok((live > dev * 2).then_some(()))
        })
        .await?;
        let swapped = scene.client.swap(&workspace(), key, PATIENCE).await?;
        ensure!(swapped.step == Step::Succeeded, "{swapped:?}");
    }
    // Ends all that is busy.
    for slot in Slot::ALL {
        let restart = SlotVerb::Restart;
        scene.client.ask_slot(&workspace(), slot, restart, PATIENCE).await?;
    }
    Ok(())
}

/// A quarter of a core takes four times as long; without that limit the same loops are much faster.
async fn busy_loops_get_no_more_than_their_limit(scene: &Scene) -> Result<()> {
    let task = scene.busy(Slot::Dev, 4).await?;
    let free = scene.working(Slot::Dev).await?;
    scene.limit(0.25).await?;
    let limited = scene.working(Slot::Dev).await?;
    eprintln!("{WORK:?} of work took {free:.1?}, and with a quarter of a core {limited:.1?}");
    ensure!(limited > WORK * 3, "a quarter of a core does {WORK:?} in {limited:?}");
    ensure!(free * 2 < limited, "without the limit it took {free:?}");
    scene.client.sandbox(&workspace(), Slot::Dev).cancel_task(&task).await?;
    scene.limit(1.0).await
}

/// E16: a program that starts its child again, one that left its session and its parent, and one that is stopped.
async fn what_ignores_signals_ends_with_its_sandbox(scene: &Scene) -> Result<()> {
    let client = &scene.client;
    let sandbox = scene.slot(Slot::Dev).await?.sandbox;
    let container = scene.instance.container(sandbox.as_str()).await?;
    let line = format!(
        "mkdir -p ~/ids; echo '{ASLEEP}' > ~/asleep.c; cc -o ~/asleep ~/asleep.c; \
         sh -c '{STUBBORN}' ~/ids/child & (setsid sh -c '{STUBBORN}' ~/ids/apart &); \
         sleep 1000 & kill -STOP $!; echo $! > ~/ids/frozen; ~/asleep & echo $! > ~/ids/asleep; wait"
    );
    scene.task(Slot::Dev, line).await?;
    let ids = until("the stubborn to run", async || {
        let seen = exec(
            client,
            Slot::Dev,
            "cat ~/ids/child ~/ids/apart ~/ids/frozen ~/ids/asleep",
        )
        .await?;
        let ids: Vec<String> = seen.stdout.split_whitespace().map(str::to_owned).collect();
        Ok((ids.len() == 6).then_some(ids))
    })
    .await?;
    they_are_stubborn(client, &ids).await?;
    let inside = processes::of(&container)?;
    ensure!(inside.len() > 7, "the host sees only {inside:?}");

    let mut choir = scene.instance.choir(&scene.token)?;
    let begun = Instant::now();
    let output = choir.args(["stop", "dev"]).output()?;
    ensure!(output.status.success(), "`choir stop dev` failed: {output:?}");
    let told = begun.elapsed();
    until("dev's container to be gone", async || {
        let left = processes::of(&container)?;
        ensure!(left.is_empty(), "still there: {left:?}");
        Ok((!scene.instance.containers().await?.contains(&container)).then_some(()))
    })
    .await?;
    let gone = begun.elapsed();
    eprintln!("stopped in {told:.1?}, and nothing was left after {gone:.1?}");
    ensure!(gone < STOPPED_WITHIN, "it took {gone:?}");

    person::start(client, Slot::Dev).await?;
    let kept = run(client, Slot::Dev, "cat ~/ids/frozen").await?;
    ensure!(kept.trim() == ids[4], "its files are others: {kept}");
    Ok(())
}

/// What dev takes beyond what is to stay free is taken from dev; live is asked all the while and answers.
async fn dev_gives_way_when_memory_runs_short(scene: &Scene) -> Result<()> {
    let client = &scene.client;
    scene.limit_memory(HOG + (1 << 30)).await?;
    let meminfo = std::fs::read_to_string("/proc/meminfo")?;
    let available = Memory::parse(&meminfo, None).context("no MemAvailable")?.available;
    scene.reserve(available.saturating_sub(HOG / 2)).await?;
    for slot in Slot::ALL {
        person::start(client, slot).await?;
    }
    let generation = scene.slot(Slot::Live).await?.generation;
    let story = async {
        let line = format!("exec python3 -c 'import time; a = bytearray(b\"x\") * {HOG}; time.sleep(1000)'");
        scene.task(Slot::Dev, line).await?;
        let begun = Instant::now();
        scene.becomes(Slot::Dev, "stopped").await?;
        eprintln!("dev was stopped {:.1?} after it began to take memory", begun.elapsed());
        match exec(client, Slot::Dev, "true").await {
            Err(error) => match error.downcast_ref::<ClientError>() {
                Some(ClientError::Refused { status: 503, detail }) if detail.code == "short_of_memory" => {}
                _ => return Err(error),
            },
            Ok(done) => bail!("dev runs: {done:?}"),
        }
        until("memory to be enough again", async || {
            match client
                .ask_slot(&workspace(), Slot::Dev, SlotVerb::Start, PATIENCE)
                .await
            {
                Ok(view) => Ok((view.state == "ready").then_some(())),
                Err(ClientError::Refused { status: 503, .. }) => Ok(None),
                Err(error) => Err(error.into()),
            }
        })
        .await?;
        Ok(())
    };
    let live = "/api/workspaces/main/slots/live/sandbox/health";
    let (asked, ()) = tokio::try_join!(scene.asked(live, "\"status\":\"ok\"", Duration::from_secs(15)), story)?;
    eprintln!("live, meanwhile: {asked}");
    ensure!(
        scene.slot(Slot::Live).await?.generation == generation,
        "live was not left alone"
    );
    let shed = client
        .audit(&AuditQuery {
            action: Some("sandbox.shed".to_owned()),
            ..AuditQuery::default()
        })
        .await?;
    ensure!(shed.items.len() == 2, "{shed:?}");
    Ok(())
}

/// TERM ends what does not ignore it, and none of these; of what KILL ends another comes; the last one is stopped.
async fn they_are_stubborn(client: &Client, ids: &[String]) -> Result<()> {
    let [_, child, _, apart, frozen, asleep] = ids else {
        bail!("six ids, not {ids:?}");
    };
    let all = ids.join(" ");
    let term =
        format!("kill -TERM {all} && {{ sleep 1000 & kill -TERM $!; wait $!; test $? -eq 143; }} && kill -0 {all}");
    run(client, Slot::Dev, &term).await?;
    run(client, Slot::Dev, &format!("kill -KILL {child} {apart}")).await?;
    until("other children", async || {
        let now = run(client, Slot::Dev, "cat ~/ids/child ~/ids/apart").await?;
        let now: Vec<&str> = now.split_whitespace().collect();
        let are_others = now.len() == 4 && now[1] != child && now[3] != apart;
        Ok(are_others.then_some(()))
    })
    .await?;
    let states = format!("cut -d' ' -f3 /proc/{frozen}/stat /proc/{asleep}/stat");
    let states = run(client, Slot::Dev, &states).await?;
    ensure!(states == "T\nD\n", "stopped and uninterruptible are in state {states}");
    Ok(())
}
