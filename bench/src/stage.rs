//! What every benchmark stands on: a user, a workspace whose sandboxes both run, and the app in live. It must reach
//! sandboxes through the front door alone.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use choir_api::client::{Client, Credential, Sandbox, SlotVerb};
use choir_api::sandbox::{Chunk, Command, CreateTask, ExecRequest, Stdin};
use choir_api::workspaces::SlotView;
use choir_core::{Generation, Name, Slot};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CpuSet, sched_setaffinity};
use tempfile::TempDir;
use url::Url;

use crate::person::{self, Person};
use crate::podman;
use crate::setup::Setup;
use crate::wire::Wire;

/// A first start makes the user's own copy of the default release.
pub const PATIENCE: Duration = Duration::from_secs(180);
/// For a quiet machine, in all rounds together.
const QUIET_WITHIN: Duration = Duration::from_secs(600);
/// And before one round.
const QUIET_ONCE: Duration = Duration::from_secs(10);
/// How long the machine is looked at.
const LOOK: Duration = Duration::from_millis(300);
/// The share of its processors' time that a quiet machine uses at most.
const BUSY: f64 = 0.1;
const PAUSE: Duration = Duration::from_millis(50);

/// A ChoirOS with one user and nothing else to do.
pub struct Stage {
    pub setup: Setup,
    /// Short rounds, few of them.
    pub quick: bool,
    pub client: Client,
    pub workspace: Name,
    /// Live's app.
    pub app: Url,
    /// What live's app is opened with.
    pub cookie: String,
    pub scratch: TempDir,
    /// Left for waiting for a quiet machine.
    patience: Duration,
}

impl Stage {
    pub async fn open(setup: Setup, quick: bool) -> Result<Self> {
        let anonymous = Client::new(&setup.address, Credential::None)?;
        until("the hypervisor is not ready", async || {
            Ok(anonymous.readiness().await?.ready)
        })
        .await?;
        let mut person = Person::default();
        let name = format!("bench-{}", person::random_name()?);
        let client = person.register(&anonymous, &name, &setup.invite).await?;
        let workspace: Name = "bench".parse()?;
        client.create_workspace(&workspace).await?;
        for slot in Slot::ALL {
            let view = client.ask_slot(&workspace, slot, SlotVerb::Start, PATIENCE).await?;
            ensure!(
                view.state == "ready",
                "{slot} does not start: it is {} {:?}",
                view.state,
                view.reason
            );
        }
        let view = client.workspace(&workspace).await?;
        let app = Url::parse(&setup.address)?.join(&view.slots.live.address)?;
        let cookie = person.open(&client, &app).await?;
        let scratch = tempfile::Builder::new().prefix("choir-bench-").tempdir()?;
        Ok(Self {
            setup,
            quick,
            client,
            workspace,
            app,
            cookie,
            scratch,
            patience: if quick { LOOK } else { QUIET_WITHIN },
        })
    }

    /// `many`, or few of them where a look is enough.
    pub fn rounds(&self, many: usize) -> usize {
        if self.quick { many.min(3) } else { many }
    }

    pub async fn view(&self, slot: Slot) -> Result<SlotView> {
        Ok(self.client.workspace(&self.workspace).await?.slots.get(slot).clone())
    }

    /// Waits until the machine has little else to do, while there is patience left: a round that shares it with a
    /// compiler says nothing about either side.
    pub async fn quiet(&mut self) -> Result<()> {
        let begun = Instant::now();
        loop {
            let before = Work::now()?;
            tokio::time::sleep(LOOK).await;
            if before.until(&Work::now()?) < BUSY || begun.elapsed() > self.patience.min(QUIET_ONCE) {
                self.patience = self.patience.saturating_sub(begun.elapsed());
                return Ok(());
            }
        }
    }

    /// Asks for a change and waits until it is so.
    pub async fn change(&self, slot: Slot, verb: SlotVerb, state: &str) -> Result<SlotView> {
        let view = self.client.ask_slot(&self.workspace, slot, verb, PATIENCE).await?;
        ensure!(
            view.state == state,
            "{slot} is {} and not {state}: {:?}",
            view.state,
            view.reason
        );
        Ok(view)
    }

    pub fn sandbox(&self, slot: Slot) -> Sandbox<'_> {
        self.client.sandbox(&self.workspace, slot)
    }

    /// The container that a slot runs in now.
    pub async fn container(&self, slot: Slot) -> Result<String> {
        let view = self.view(slot).await?;
        let number = view.generation.with_context(|| format!("{slot} does not run"))?;
        let generation = Generation {
            sandbox: view.sandbox,
            number,
        };
        Ok(generation.container_name())
    }

    /// A connection to live's app through the proxy.
    pub fn proxied(&self) -> Result<Wire> {
        let port = self
            .app
            .port_or_known_default()
            .context("the app's address has no port")?;
        Wire::connect(port, &self.host(), Some(&self.cookie))
    }

    /// The `Host` of live's app.
    pub fn host(&self) -> String {
        let port = self.app.port().map(|port| format!(":{port}")).unwrap_or_default();
        format!("{}{port}", self.app.host_str().unwrap_or_default())
    }

    /// Starts the app in live, unless it answers already.
    pub async fn start_app(&self) -> Result<()> {
        self.change(Slot::Live, SlotVerb::Start, "ready").await?;
        if self.app_answers() {
            return Ok(());
        }
        let program = fs::read(&self.setup.app).context("cannot read the app")?;
        let upload = ExecRequest {
            command: Command::Line("cat > ~/app && chmod 0755 ~/app".into()),
            cwd: None,
            env: BTreeMap::new(),
            stdin: Some(Stdin::Chunk(Chunk::new(&program))),
            timeout_ms: None,
            max_output_bytes: None,
        };
        let uploaded = self.sandbox(Slot::Live).exec(&upload).await?;
        ensure!(
            uploaded.exit.exit_code == 0,
            "the app cannot be copied: {}",
            uploaded.stderr
        );
        let port = self.view(Slot::Live).await?.app_port;
        let task = CreateTask {
            command: Command::Argv(
                ["/home/choir/app", "serve", &format!("tcp:127.0.0.1:{port}")]
                    .map(Into::into)
                    .into(),
            ),
            cwd: None,
            env: BTreeMap::new(),
            timeout_ms: None,
        };
        self.sandbox(Slot::Live).create_task(&task).await?;
        until("the app does not answer through the proxy", async || {
            Ok(self.app_answers())
        })
        .await
    }

    fn app_answers(&self) -> bool {
        self.proxied()
            .and_then(|mut wire| wire.get())
            .is_ok_and(|(status, _)| status == 200)
    }

    /// Starts the hypervisor again, bound to these processors from its beginning, as `taskset` does with a peer: it
    /// has as many threads as it finds processors.
    pub async fn restart_hypervisor(&self, processors: &[usize]) -> Result<()> {
        let before = self.setup.hypervisor()?;
        pin(self.setup.up()?, processors)?;
        let pid = i32::try_from(before)
            .ok()
            .and_then(Pid::from_raw)
            .context("the pid file names no process")?;
        kill_process(pid, Signal::TERM)?;
        until("the hypervisor does not come back", async || {
            let another = self.setup.hypervisor().is_ok_and(|pid| pid != before);
            Ok(another && self.client.readiness().await.is_ok_and(|parts| parts.ready))
        })
        .await?;
        for slot in Slot::ALL {
            self.change(slot, SlotVerb::Start, "ready").await?;
        }
        Ok(())
    }

    /// Binds the app in live to these processors, and nothing else of the sandbox.
    pub async fn pin_app(&self, processors: &[usize]) -> Result<()> {
        let agent = podman::pid(&self.setup.podman, &self.container(Slot::Live).await?)?;
        let children = fs::read_to_string(format!("/proc/{agent}/task/{agent}/children"))?;
        let is_app = |pid: &u32| {
            fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.starts_with(b"/home/choir/app\0"))
        };
        let mut pids = children.split_whitespace().filter_map(|pid| pid.parse().ok());
        pin(
            pids.find(is_app).context("the app is not a process of the sandbox")?,
            processors,
        )
    }
}

/// What the machine's processors did since it was started, in clock ticks.
struct Work {
    idle: f64,
    all: f64,
}

impl Work {
    /// From proc_stat(5): user, nice, system, idle, iowait, irq, softirq, steal.
    fn now() -> Result<Self> {
        let text = fs::read_to_string("/proc/stat")?;
        let line = text.lines().next().unwrap_or_default();
        let ticks: Vec<f64> = line
            .split_whitespace()
            .skip(1)
            .take(8)
            .filter_map(|n| n.parse().ok())
            .collect();
        ensure!(ticks.len() == 8, "/proc/stat has another shape here");
        Ok(Self {
            idle: ticks[3] + ticks[4],
            all: ticks.iter().sum(),
        })
    }

    /// The share of time that was not idle between two looks.
    fn until(&self, later: &Self) -> f64 {
        1.0 - (later.idle - self.idle) / (later.all - self.all)
    }
}

/// Binds all threads of a process to these processors.
pub fn pin(pid: u32, processors: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    for processor in processors {
        set.set(*processor);
    }
    for thread in fs::read_dir(Path::new("/proc").join(pid.to_string()).join("task"))? {
        let thread = thread?.file_name().to_string_lossy().parse()?;
        // A thread that has ended since needs no place.
        let _ended = sched_setaffinity(Pid::from_raw(thread), &set);
    }
    Ok(())
}

/// Asks again until it is so.
pub async fn until(otherwise: &str, is_so: impl AsyncFn() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    while !is_so().await? {
        if begun.elapsed() > PATIENCE {
            bail!("{otherwise}");
        }
        tokio::time::sleep(PAUSE).await;
    }
    Ok(())
}
