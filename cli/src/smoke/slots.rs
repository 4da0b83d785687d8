//! What the smoke does with live and dev: health, tasks, an app with a websocket, logs. It must not reach a sandbox
//! other than through the hypervisor.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use choir_api::client::{Client, SlotVerb};
use choir_api::sandbox::{Command, CreateTask, TaskEventKind, TaskState};
use choir_api::workspaces::SlotView;
use choir_core::{Name, SandboxId, Slot};
use url::Url;

use super::account::expect;
use super::browser::Browser;
use crate::context::Context;
use crate::failure::Failure;
use crate::waiting::until;

/// A tiny app: HTTP and a websocket echo.
const APP: &str = include_str!("app.py");

/// How long the app may take to listen, and a task to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// Both slots, and what they are expected to say.
pub struct Pair<'a> {
    client: &'a Client,
    workspace: &'a Name,
    app_port: u16,
    addresses: BTreeMap<Slot, Url>,
    sandboxes: BTreeMap<Slot, SandboxId>,
}

impl<'a> Pair<'a> {
    /// Both are ready, at the same time, and are who the hypervisor says they are.
    pub async fn check(ctx: &Context, client: &'a Client, workspace: &'a Name) -> Result<Self, Failure> {
        let view = client.workspace(workspace).await?;
        let slots = Slot::ALL.map(|slot| view.slots.get(slot));
        expect(
            slots.iter().all(|s| s.state == "ready"),
            "live and dev are not both ready at once",
        )?;
        expect(
            slots[0].sandbox != slots[1].sandbox,
            "live and dev point at the same sandbox",
        )?;
        let mut pair = Self {
            client,
            workspace,
            app_port: view.slots.live.app_port,
            addresses: BTreeMap::new(),
            sandboxes: BTreeMap::new(),
        };
        for slot in slots {
            pair.health(slot).await?;
            pair.addresses.insert(slot.slot, ctx.absolute(&slot.address)?);
            pair.sandboxes.insert(slot.slot, slot.sandbox.clone());
        }
        Ok(pair)
    }

    async fn health(&self, view: &SlotView) -> Result<(), Failure> {
        let health = self.client.sandbox(self.workspace, view.slot).health().await?;
        let same = health.service == "sandbox"
            && health.sandbox_id == view.sandbox.as_str()
            && Some(health.generation) == view.generation;
        let told = format!(
            "{}'s health is that of {} generation {} and not that of {}",
            view.slot, health.sandbox_id, health.generation, view.sandbox
        );
        expect(same, &told)
    }

    pub async fn task(&self, slot: Slot) -> Result<(), Failure> {
        let mark = format!("hello from {slot}");
        let line = format!("echo {mark}; test -w \"$HOME\"");
        let output = self.output(slot, line).await?;
        expect(
            output.trim() == mark,
            &format!("the task in {slot} wrote `{}` and not `{mark}`", output.trim()),
        )
    }

    async fn output(&self, slot: Slot, line: String) -> Result<String, Failure> {
        let sandbox = self.client.sandbox(self.workspace, slot);
        let id = sandbox.create_task(&task(Command::Line(line))).await?.id;
        let mut output = Vec::new();
        let follow = async {
            let mut events = sandbox.task_events(&id, 0).await?;
            while let Some(event) = events.next().await? {
                match event.what {
                    TaskEventKind::Output { chunk, .. } => output.extend(chunk.into_bytes().unwrap_or_default()),
                    TaskEventKind::State { state, .. } if state.is_final() => return Ok(Some(state)),
                    _ => {}
                }
            }
            Ok::<_, Failure>(None)
        };
        let ended = tokio::time::timeout(PATIENCE, follow).await;
        let ended = ended.map_err(|_| Failure::Failed(format!("the task in {slot} did not end within 30 s")))?;
        match ended? {
            Some(TaskState::Succeeded) => Ok(String::from_utf8_lossy(&output).into_owned()),
            other => Err(Failure::Failed(format!(
                "the task in {slot} ended as {other:?}: {}",
                String::from_utf8_lossy(&output).trim()
            ))),
        }
    }

    /// Starts the app with the sandbox's id as its mark, and waits until the proxy reaches it.
    pub async fn app(&self, browser: &mut Browser, slot: Slot) -> Result<(), Failure> {
        let argv = ["python3", "-c", APP, &self.app_port.to_string(), self.mark(slot)];
        let command = Command::Argv(argv.map(str::to_owned).into());
        let sandbox = self.client.sandbox(self.workspace, slot);
        let id = sandbox.create_task(&task(command)).await?.id;
        let begun = Instant::now();
        loop {
            match self.answer(browser, slot).await {
                Ok(()) => return Ok(()),
                Err(failure) if begun.elapsed() >= PATIENCE => return Err(failure),
                Err(_) => {
                    let state = sandbox.task(&id).await?.state;
                    if state.is_final() {
                        let told = format!("the app in {slot} ended at once ({state:?}); see `choir tasks follow`");
                        return Err(Failure::Failed(told));
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// One page of the slot's app, as its own sandbox's.
    async fn answer(&self, browser: &mut Browser, slot: Slot) -> Result<(), Failure> {
        let url = self.address(slot)?;
        let visit = browser.navigate(url).await?;
        let good = visit.status == 200 && visit.body == self.mark(slot);
        let shown: String = visit.body.chars().take(200).collect();
        let told = format!(
            "{url} answered {} `{}` and not as {}",
            visit.status,
            shown,
            self.mark(slot)
        );
        expect(good, &told)
    }

    pub async fn echo(&self, browser: &Browser, slot: Slot) -> Result<(), Failure> {
        let talking = browser.echo(self.address(slot)?, "ping");
        let answer = tokio::time::timeout(PATIENCE, talking)
            .await
            .map_err(|_| Failure::Failed(format!("the websocket of {slot} was silent for 30 s")))??;
        let wanted = format!("{}:ping", self.mark(slot));
        expect(
            answer == wanted,
            &format!("the websocket of {slot} said `{answer}` and not `{wanted}`"),
        )
    }

    /// After a swap each slot is expected to be the other's sandbox.
    pub fn exchange(&mut self) {
        if let (Some(live), Some(dev)) = (self.sandboxes.remove(&Slot::Live), self.sandboxes.remove(&Slot::Dev)) {
            self.sandboxes.extend([(Slot::Live, dev), (Slot::Dev, live)]);
        }
    }

    pub async fn answers(&self, browser: &mut Browser) -> Result<(), Failure> {
        for slot in Slot::ALL {
            self.answer(browser, slot).await?;
            self.echo(browser, slot).await?;
        }
        Ok(())
    }

    pub async fn logs(&self) -> Result<(), Failure> {
        for slot in Slot::ALL {
            self.client.logs(self.workspace, slot, 50).await?;
            let stats = self.client.stats(self.workspace, slot).await?;
            expect(stats.pids > 0, &format!("{slot} runs and has no processes"))?;
        }
        Ok(())
    }

    pub async fn restart(&self) -> Result<(), Failure> {
        let before = self.client.workspace(self.workspace).await?.slots.live.generation;
        let view = until(self.client, self.workspace, Slot::Live, SlotVerb::Restart).await?;
        expect(
            view.generation > before,
            "live was restarted and has the same generation",
        )?;
        self.health(&view).await
    }

    fn mark(&self, slot: Slot) -> &str {
        self.sandboxes.get(&slot).map_or("", SandboxId::as_str)
    }

    fn address(&self, slot: Slot) -> Result<&Url, Failure> {
        let missing = || Failure::Failed(format!("{slot} has no address"));
        self.addresses.get(&slot).ok_or_else(missing)
    }
}

fn task(command: Command) -> CreateTask {
    CreateTask {
        command,
        cwd: None,
        env: BTreeMap::new(),
        timeout_ms: None,
    }
}
