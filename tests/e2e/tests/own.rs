//! `choir.toml` in a home: what it says is in effect from the next start on, over a swap and a crash of the hypervisor,
//! and what it must not say, or is no such file, changes nothing and is told.

use anyhow::{Context as _, Result, ensure};
use choir_api::client::{Client, SlotVerb};
use choir_api::workspaces::ChoirToml;
use choir_core::deployment::Step;
use choir_core::settings::{Access, PerSlot};
use choir_core::{Slot, WorkspaceSettings};
use choir_e2e::instance::Instance;
use choir_e2e::person::{self, USER, WORKSPACE, run, workspace};
use choir_e2e::waiting::{PATIENCE, step, until};
use choir_e2e::{http, skip};
use rustix::process::{Pid, Signal, kill_process};

const FILE: &str = "\
start = \"exec python3 -m http.server 5173 --directory $HOME/site\"
app_port = 5173
[env]
GREETING = \"of the file\"
[limits]
memory = 402653184
[health]
path = \"/mark\"
";

/// What the file asks for, in bytes.
const MEMORY: &str = "402653184";

struct Scene {
    instance: Instance,
    client: Client,
    token: String,
}

#[tokio::test(flavor = "multi_thread")]
async fn a_home_says_how_its_sandbox_is_run_and_nothing_beyond_that() -> Result<()> {
    if skip::cannot_run("own") {
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
    let patch = WorkspaceSettings {
        app_port: Some(4000),
        env: Some([("GREETING".to_owned(), "of the workspace".to_owned())].into()),
        access: Some(PerSlot {
            live: Access::Public,
            dev: Access::Public,
        }),
        ..WorkspaceSettings::default()
    };
    scene.client.patch_workspace(&workspace(), &patch).await?;
    for slot in Slot::ALL {
        person::start(&scene.client, slot).await?;
    }
    step("from the next start on", scene.is_in_effect()).await?;
    step("over a crash of the hypervisor", scene.outlives_a_crash()).await?;
    step("over a swap", scene.goes_along()).await?;
    step("a file that is wrong", scene.is_refused()).await?;
    step("no file at all", scene.is_no_file()).await
}

impl Scene {
    async fn restart(&self, slot: Slot) -> Result<Option<ChoirToml>> {
        let client = &self.client;
        let view = client.ask_slot(&workspace(), slot, SlotVerb::Restart, PATIENCE).await?;
        ensure!(view.state == "ready", "{slot} is {} ({:?})", view.state, view.reason);
        Ok(view.choir_toml)
    }

    /// What the app of a slot answers, once it does.
    async fn mark(&self, slot: Slot) -> Result<String> {
        let url = self.instance.app(slot.as_str(), WORKSPACE, USER).join("mark")?;
        let answer = http::send("GET", &url, &[], "").await?;
        ensure!(
            answer.status == 200,
            "{slot} answers {}: {}",
            answer.status,
            answer.body
        );
        Ok(answer.body)
    }

    fn says(&self, arguments: &[&str]) -> Result<String> {
        let output = self.instance.choir(&self.token)?.args(arguments).output()?;
        let told = String::from_utf8(output.stderr)?;
        ensure!(output.status.success(), "choir {arguments:?}: {told}");
        Ok(String::from_utf8(output.stdout)?)
    }

    async fn is_in_effect(&self) -> Result<()> {
        let client = &self.client;
        let made = format!("mkdir -p ~/site && echo first > ~/site/mark && cat > ~/choir.toml <<'END'\n{FILE}END");
        run(client, Slot::Dev, &made).await?;
        let before = run(client, Slot::Dev, "echo $GREETING").await?;
        ensure!(before == "of the workspace\n", "{before}");
        let shown = self.restart(Slot::Dev).await?;
        ensure!(shown == Some(ChoirToml::InEffect), "{shown:?}");
        // The first request waits until the app listens, as the file's check allows.
        let mark = self.mark(Slot::Dev).await?;
        ensure!(mark == "first\n", "{mark}");
        let greeting = run(client, Slot::Dev, "echo $GREETING").await?;
        ensure!(greeting == "of the file\n", "{greeting}");
        until("the lower limit to hold", async || {
            let limit = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null; true";
            let seen = run(client, Slot::Dev, limit).await?;
            Ok((seen.trim() == MEMORY).then_some(()))
        })
        .await?;
        let config = self.says(&["config", "--slot", "dev"])?;
        let port = config.lines().find(|line| line.starts_with("app_port"));
        let port = port.context("it lists no app_port")?;
        ensure!(port.contains("5173") && port.contains("choir.toml"), "{config}");
        let other = self.says(&["config"])?;
        let port = other.lines().find(|line| line.starts_with("app_port"));
        ensure!(
            port.is_some_and(|port| port.contains("4000") && port.contains("workspace")),
            "{other}"
        );
        Ok(())
    }

    async fn outlives_a_crash(&self) -> Result<()> {
        let pid = self.instance.hypervisor_pid()?;
        kill_process(Pid::from_raw(pid).context("a process has a number")?, Signal::KILL)?;
        until("another hypervisor", async || {
            Ok(self.instance.hypervisor_pid().ok().filter(|now| *now != pid))
        })
        .await?;
        until("the slot to be ready", async || {
            let Ok(found) = self.client.workspace(&workspace()).await else {
                return Ok(None);
            };
            Ok((found.slots.dev.state == "ready").then_some(found.slots.dev))
        })
        .await
        .and_then(|dev| {
            ensure!(dev.choir_toml == Some(ChoirToml::InEffect), "{dev:?}");
            ensure!(dev.app_port == 5173, "{dev:?}");
            Ok(())
        })?;
        let mark = self.mark(Slot::Dev).await?;
        ensure!(mark == "first\n", "{mark}");
        Ok(())
    }

    async fn goes_along(&self) -> Result<()> {
        let swapped = self.client.swap(&workspace(), "own", PATIENCE).await?;
        ensure!(swapped.step == Step::Succeeded, "{:?}", swapped.reason);
        let mark = self.mark(Slot::Live).await?;
        ensure!(mark == "first\n", "{mark}");
        Ok(())
    }

    async fn is_refused(&self) -> Result<()> {
        let client = &self.client;
        let spoilt = "cp choir.toml good.toml && sed -i '2a strat = 1' choir.toml";
        run(client, Slot::Live, spoilt).await?;
        let shown = self.restart(Slot::Live).await?;
        let Some(ChoirToml::Refused { reason }) = shown else {
            anyhow::bail!("it is {shown:?}");
        };
        ensure!(reason.starts_with("line 3: unknown field `strat`"), "{reason}");
        let greeting = run(client, Slot::Live, "echo $GREETING").await?;
        ensure!(
            greeting == "of the workspace\n",
            "nothing of it is in effect: {greeting}"
        );
        for verb in [&["status"][..], &["config"], &["logs", "live"]] {
            let said = self.says(verb)?;
            ensure!(said.contains("choir.toml is not in effect: line 3"), "{verb:?}: {said}");
        }
        run(client, Slot::Live, "mv good.toml choir.toml").await?;
        self.restart(Slot::Live).await?;
        let mark = self.mark(Slot::Live).await?;
        ensure!(mark == "first\n", "{mark}");
        Ok(())
    }

    /// The agent reads it as root: what lies elsewhere is none of its business, and it waits for nobody.
    async fn is_no_file(&self) -> Result<()> {
        for (made, says) in [
            ("ln -sf /etc/shadow choir.toml", "it is a link that leaves the home"),
            ("rm choir.toml && mkfifo choir.toml", "it is no file"),
            ("rm choir.toml && mkdir choir.toml", "it is no file"),
            (
                "rmdir choir.toml && head -c 20000 /dev/zero > choir.toml",
                "it is longer than 16 KiB",
            ),
        ] {
            run(&self.client, Slot::Live, made).await?;
            let shown = self.restart(Slot::Live).await?;
            let refused = ChoirToml::Refused {
                reason: says.to_owned(),
            };
            ensure!(shown == Some(refused), "{made}: {shown:?}");
        }
        run(&self.client, Slot::Live, "rm choir.toml").await?;
        let shown = self.restart(Slot::Live).await?;
        ensure!(shown.is_none(), "{shown:?}");
        Ok(())
    }
}
