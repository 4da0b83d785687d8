//! What a box of ours can carry: many starts at once, a dev that runs out of memory again and again, hundreds of stopped
//! workspaces, a fork of very many files. Prints each figure; with `--slow` at the sizes that are promised.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use choir_api::client::{Client, CreateInvite, Credential, SlotVerb};
use choir_api::workspaces::{CreateRelease, CreateWorkspace, Fork};
use choir_core::deployment::Step;
use choir_core::limits::LimitsPatch;
use choir_core::settings::{Access, PerSlot};
use choir_core::{Name, Slot, WorkspaceSettings};
use choir_e2e::browser::Browser;
use choir_e2e::instance::Instance;
use choir_e2e::load::{Load, Tally};
use choir_e2e::person::{self, EVERYTHING, USER, WORKSPACE, app_config, exec, run, workspace};
use choir_e2e::skip;
use choir_e2e::waiting::{PATIENCE, rounds, step, until};
use tokio::time::Instant;

/// Sandboxes that run at once.
const RUNNING: usize = 8;
/// Below which a time is noise on a machine that does other things, too.
const NOISE: Duration = Duration::from_millis(30);

struct Scene {
    instance: Instance,
    browser: Browser,
    client: Client,
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_box_carries_many_starts_many_files_and_many_workspaces() -> Result<()> {
    if skip::cannot_run("figures") {
        return Ok(());
    }
    let scene = step("set up", Scene::new()).await?;
    step("dev runs out of memory", scene.out_of_memory()).await?;
    step("a fork", scene.forks()).await?;
    step("many starts at once", scene.starts()).await?;
    step("many workspaces", scene.many_workspaces()).await
}

fn name(text: String) -> Result<Name> {
    text.parse().with_context(|| format!("{text} is no name"))
}

/// Waits until all volumes of these workspaces are there.
async fn made(client: &Client, names: &[Name]) -> Result<()> {
    for name in names {
        until("the volumes to be made", async || {
            let slots = client.workspace(name).await?.slots;
            let made = Slot::ALL.map(|slot| slots.get(slot).state == "stopped");
            Ok((made == [true; 2]).then_some(()))
        })
        .await?;
    }
    Ok(())
}

impl Scene {
    async fn new() -> Result<Self> {
        let instance = Instance::up(&[])?;
        let browser = Browser::start().await?;
        let page = browser.page().await?;
        person::register(&page, &instance).await?;
        let client = person::token(&page, &instance, &EVERYTHING).await?;
        let image = client.releases().await?.items.remove(0).image_digest;
        let asked = CreateRelease::of_image(&image, app_config());
        let release = Some(client.create_release(&asked).await?.id);
        let made = CreateWorkspace {
            name: workspace(),
            release,
        };
        client.create_workspace_from(&made).await?;
        let settings = WorkspaceSettings {
            access: Some(PerSlot {
                live: Access::Public,
                dev: Access::Private,
            }),
            ..WorkspaceSettings::default()
        };
        client.patch_workspace(&workspace(), &settings).await?;
        for slot in Slot::ALL {
            person::start(&client, slot).await?;
        }
        Ok(Self {
            instance,
            browser,
            client,
        })
    }

    fn visitors(&self) -> Result<Load> {
        let url = self.instance.app("live", WORKSPACE, USER).join("count")?;
        Ok(Load::start(2, &url, ("X-Figure", "1"), "\"mark\""))
    }

    /// What visitors of live see while nothing else happens.
    async fn idle(&self) -> Result<Tally> {
        let mut visitors = self.visitors()?;
        visitors.answers(rounds(300, 20_000)).await?;
        visitors.finish().await
    }

    /// No slower than twice what it is when nothing else happens.
    fn holds(what: &str, idle: &Tally, busy: &Tally) -> Result<()> {
        let ratio = busy.p99().as_secs_f64() / idle.p99().as_secs_f64();
        eprintln!("live while idle: {idle}; {what}: {busy}; p99 {ratio:.1} times as long");
        let limit = rounds(Duration::from_secs(1), (idle.p99() * 2).max(NOISE));
        ensure!(busy.p99() <= limit, "live is too slow: {what}");
        Ok(())
    }

    async fn out_of_memory(&self) -> Result<()> {
        let limits = WorkspaceSettings {
            limits: Some(LimitsPatch {
                memory: Some(256 << 20),
                ..LimitsPatch::default()
            }),
            ..WorkspaceSettings::default()
        };
        self.client.patch_workspace(&workspace(), &limits).await?;
        let before = self.client.workspace(&workspace()).await?.slots.live.generation;
        let idle = self.idle().await?;
        let visitors = self.visitors()?;
        for _ in 0..rounds(2, 20) {
            let hog = "python3 -c 'a = []\nwhile True: a.append(bytearray(8 << 20))'";
            let done = exec(&self.client, Slot::Dev, hog).await?;
            ensure!(done.exit.exit_code == 137, "it did not run out of memory: {done:?}");
            person::start(&self.client, Slot::Dev).await?;
        }
        let busy = visitors.finish().await?;
        let after = self.client.workspace(&workspace()).await?.slots.live.generation;
        ensure!(before == after, "live was killed, too");
        Self::holds("while dev runs out of memory", &idle, &busy)
    }

    async fn forks(&self) -> Result<()> {
        let (files, mebibytes) = rounds((5_000, 100), (200_000, 5_000));
        let make = format!(
            "python3 -c '
import os
for n in range({files}):
    if n % 1000 == 0: os.makedirs(f\"many/{{n // 1000}}\", exist_ok=True)
    open(f\"many/{{n // 1000}}/{{n}}\", \"w\").write(str(n))
' && head -c {mebibytes}M /dev/urandom > large && sync"
        );
        run(&self.client, Slot::Live, &make).await?;
        let mut times = Vec::new();
        for nth in 0..rounds(3, 9) {
            let begun = Instant::now();
            let forked = self
                .client
                .fork(&workspace(), &Fork { from: None }, &format!("fork {nth}"), PATIENCE)
                .await?;
            ensure!(forked.step == Step::Succeeded, "{forked:?}");
            times.push(begun.elapsed());
        }
        let count = run(&self.client, Slot::Dev, "find many -type f | wc -l").await?;
        ensure!(count.trim() == files.to_string(), "dev has {count} files");
        let begun = Instant::now();
        self.client.take_snapshot(&workspace(), Slot::Live).await?;
        let volume = begun.elapsed();
        times.sort();
        let (median, longest) = (times[times.len() / 2], times[times.len() - 1]);
        eprintln!(
            "fork of {files} files and {mebibytes} MiB until dev runs: p50 {median:.1?}, longest {longest:.1?}; \
             one copy of the volume, asked for: {volume:.1?}"
        );
        ensure!(
            median <= rounds(PATIENCE, Duration::from_secs(1)),
            "a fork takes {median:?}"
        );
        Ok(())
    }

    /// More than may run at once, each stopped once it was ready.
    async fn starts(&self) -> Result<()> {
        let many = rounds(12, 49);
        self.again(|config| {
            let sandboxes = config.entry("sandboxes").or_insert(toml::Table::new().into());
            if let Some(table) = sandboxes.as_table_mut() {
                table.insert("max_running".to_owned(), toml::Value::Integer(RUNNING as i64));
            }
        })
        .await?;
        let dev = SlotVerb::Stop;
        self.client.ask_slot(&workspace(), Slot::Dev, dev, PATIENCE).await?;
        let names = (0..many)
            .map(|nth| name(format!("many-{nth}")))
            .collect::<Result<Vec<_>>>()?;
        for name in &names {
            self.client.create_workspace(name).await?;
        }
        // Until its volume is made, none can stand in line.
        made(&self.client, &names).await?;
        let idle = self.idle().await?;
        let visitors = self.visitors()?;
        let slots: Vec<(Name, Slot)> = names
            .iter()
            .flat_map(|name| Slot::ALL.map(|slot| (name.clone(), slot)))
            .collect();
        let begun = Instant::now();
        for (name, slot) in &slots {
            self.client
                .ask_slot(name, *slot, SlotVerb::Start, Duration::ZERO)
                .await?;
        }
        let asked = begun.elapsed();
        let served = slots.iter().map(|(name, slot)| self.serve(name, *slot));
        let ready = futures_util::future::try_join_all(served).await?;
        let took = begun.elapsed();
        let late = (0..ready.len())
            .map(|nth| ready[..nth].iter().filter(|earlier| **earlier > ready[nth]).count())
            .max();
        let busy = visitors.finish().await?;
        eprintln!(
            "{} starts asked for in {asked:.1?}, at most {RUNNING} at once: all served in {took:.1?}; \
             at most {} came before one that was asked earlier",
            slots.len(),
            late.unwrap_or_default()
        );
        // Places are given in order. While one starts slowly, as many as run at once may pass it, and those after them.
        let most = rounds(slots.len() - 2, 2 * RUNNING);
        ensure!(late <= Some(most), "{late:?} came before one that was asked earlier");
        Self::holds("while many start", &idle, &busy)?;
        for name in &names {
            self.client.delete_workspace(name, PATIENCE).await?;
        }
        Ok(())
    }

    /// Waits until it runs, and gives its place to the next one.
    async fn serve(&self, name: &Name, slot: Slot) -> Result<Instant> {
        let ready = loop {
            let view = self.client.ask_slot(name, slot, SlotVerb::Start, PATIENCE).await?;
            match view.state.as_str() {
                "ready" => break Instant::now(),
                "failed" => anyhow::bail!("{name}'s {slot} failed: {:?}", view.reason),
                _ => {}
            }
        };
        self.client.ask_slot(name, slot, SlotVerb::Stop, PATIENCE).await?;
        Ok(ready)
    }

    async fn many_workspaces(&self) -> Result<()> {
        let (people, each) = rounds((1, 20), (10, 50));
        person::start(&self.client, Slot::Dev).await?;
        self.again(|_| {}).await?;
        let alone = self.swap("alone").await?;
        for nth in 0..people {
            let client = self.friend(&format!("friend-{nth}")).await?;
            let names = (0..each)
                .map(|nth| name(format!("w-{nth}")))
                .collect::<Result<Vec<_>>>()?;
            for name in &names {
                client.create_workspace(name).await?;
            }
            made(&client, &names).await?;
        }
        let begun = Instant::now();
        self.again(|_| {}).await?;
        let up = begun.elapsed();
        let crowded = self.swap("crowded").await?;
        let memory = self.memory()?;
        eprintln!(
            "{} stopped workspaces: the hypervisor holds {memory} MiB, is up {up:.1?} after it was told to stop; \
             a swap takes {crowded:.1?}, alone it took {alone:.1?}",
            people * each
        );
        ensure!(
            crowded <= rounds(PATIENCE, (alone * 2).max(NOISE * 10)),
            "a swap takes {crowded:?} and not {alone:?}"
        );
        ensure!(memory <= 60, "the hypervisor holds {memory} MiB");
        ensure!(
            up <= rounds(PATIENCE, Duration::from_secs(2)),
            "it is up only {up:?} after it was told to stop"
        );
        Ok(())
    }

    /// Another user of the box.
    async fn friend(&self, name: &str) -> Result<Client> {
        let invite = self.client.create_invite(&CreateInvite { role: None }).await?;
        let page = self.browser.stranger().await?;
        person::join(&page, &invite.url, name).await?;
        let token = person::token_text(&page, &["read", "write"]).await?;
        Ok(Client::new(self.instance.origin().as_str(), Credential::Token(token))?)
    }

    /// The median of a few swaps, on a disk that has nothing else to write.
    async fn swap(&self, key: &str) -> Result<Duration> {
        tokio::task::spawn_blocking(rustix::fs::sync).await?;
        let mut times = Vec::new();
        for nth in 0..rounds(5, 21) {
            // What was displaced is frozen, and thawed by the next one.
            let begun = Instant::now();
            let swapped = self
                .client
                .swap(&workspace(), &format!("{key} {nth}"), PATIENCE)
                .await?;
            ensure!(swapped.step == Step::Succeeded, "{swapped:?}");
            times.push(begun.elapsed());
        }
        times.sort();
        Ok(times[times.len() / 2])
    }

    /// Has the hypervisor start again with another configuration.
    async fn again(&self, change: impl FnOnce(&mut toml::Table)) -> Result<()> {
        let before = self.instance.hypervisor_pid()?;
        self.instance.reconfigure(change)?;
        until("another hypervisor", async || {
            Ok((self.instance.hypervisor_pid()? != before).then_some(()))
        })
        .await?;
        until("the hypervisor to be ready", async || {
            Ok(self.client.readiness().await?.ready.then_some(()))
        })
        .await
    }

    /// Resident, in MiB.
    fn memory(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.instance.hypervisor_pid()?))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kibibytes = line
            .and_then(|rest| rest.split_whitespace().next())
            .context("no VmRSS")?;
        Ok(kibibytes.parse::<u64>()? / 1024)
    }
}
