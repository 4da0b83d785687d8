//! The rehearsal of a rollback: a scratch workspace is loaded, broken, and brought back, warm and cold. It must not touch
//! any other workspace, nor report a step that it did not run.

mod visitors;

use choir_api::client::{Client, SlotVerb};
use choir_api::sandbox::{Command, ExecRequest};
use choir_api::workspaces::{CreateRelease, CreateWorkspace, Deployment, Rollback};
use choir_core::settings::{Access, HealthCheck, PerSlot};
use choir_core::{Name, ReleaseConfig, ReleaseId, Slot, WorkspaceSettings};
use serde::Serialize;
use tokio::signal::unix::{Signal, SignalKind, signal};
use url::Url;

use self::visitors::{Tally, Visitors};
use crate::context::Context;
use crate::deploying::{self, CALL};
use crate::failure::Failure;
use crate::output;
use crate::progress::Line;
use crate::report::Report;
use crate::throwaway::{letters, unmake};
use crate::verbs::swap::swap;
use crate::waiting::until;

const APP: &str = include_str!("app.py");
/// Those who ask for live all the time.
const VISITORS: usize = 8;
/// How long the app may take to listen.
const WELL_WITHIN_S: u64 = 10;

/// What the rehearsal found, besides its steps.
#[derive(Debug, Default, Serialize)]
struct Figures {
    /// From asking until it was done, in milliseconds.
    warm_ms: Option<u64>,
    cold_ms: Option<u64>,
    requests: Option<Tally>,
}

#[derive(Serialize)]
struct Found {
    #[serde(flatten)]
    report: Report,
    #[serde(flatten)]
    figures: Figures,
}

pub async fn rollback(ctx: &Context, keep: bool) -> Result<(), Failure> {
    let client = ctx.client()?;
    let mut report = Report::new(ctx.json);
    let mut figures = Figures::default();
    let scratch = Scratch {
        client: &client,
        name: format!("drill-{}", letters()?)
            .parse()
            .map_err(|e: choir_core::name::NameError| Failure::Failed(e.to_string()))?,
    };
    let mut told = Told::new()?;
    let made = report
        .step("make a scratch workspace that runs an app", told.unless(scratch.make()))
        .await;
    let done = match &made {
        Ok(live) => told.unless(scratch.rehearse(live, &mut report, &mut figures)).await,
        Err(_) => Ok(()),
    };
    if keep && made.is_ok() {
        let kept = format!(
            "kept: workspace {}; delete it with: choir workspaces delete {} --yes",
            scratch.name, scratch.name
        );
        if !ctx.json {
            output::line(&kept)?;
        }
    } else {
        let cleaned = report.step("delete it with all that was in it", scratch.unmake()).await;
        // The report has why.
        drop(cleaned);
    }
    let ok = made.is_ok() && done.is_ok() && report.ok;
    if ctx.json {
        output::json(&Found { report, figures })?;
    } else {
        output::line(&verdict(ok, &report, &figures))?;
    }
    if ok { Ok(()) } else { Err(Failure::Exit(1)) }
}

/// Whether somebody wants it to end: by then there is something to delete.
struct Told {
    interrupt: Signal,
    terminate: Signal,
}

impl Told {
    fn new() -> Result<Self, Failure> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn unless<T>(&mut self, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        tokio::select! {
            done = work => return done,
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
        Err(Failure::Failed("it was told to end before it was done".to_owned()))
    }
}

fn verdict(ok: bool, report: &Report, figures: &Figures) -> String {
    let total: u64 = report.steps.iter().map(|s| s.ms).sum();
    let word = if ok { "passed" } else { "FAILED" };
    let mut text = format!("{word}: {} steps in {}", report.steps.len(), output::duration(total));
    for (what, ms) in [("warm", figures.warm_ms), ("cold", figures.cold_ms)] {
        if let Some(ms) = ms {
            text += &format!("; {what} rollback in {}", output::duration(ms));
        }
    }
    if let Some(tally) = &figures.requests {
        let (all, longest) = (tally.answered, output::duration(tally.longest_ms));
        text += &format!("; {all} requests meanwhile, none failed, the longest took {longest}");
    }
    text
}

struct Scratch<'a> {
    client: &'a Client,
    name: Name,
}

impl Scratch<'_> {
    /// Both slots run the app, live as `good` and dev as `broken`; where live is.
    async fn make(&self) -> Result<Url, Failure> {
        let of_box =
            |r: &&choir_api::workspaces::Release| !r.own && matches!(r.state.as_str(), "candidate" | "verified");
        let releases = self.client.releases().await?.items;
        let newest = releases.iter().find(of_box);
        let image = newest.ok_or_else(|| Failure::Failed("the box has no release yet; see `choir releases`".into()))?;
        let app = APP.replace('\'', r"'\''");
        let config = ReleaseConfig {
            start: Some(format!("exec python3 -c '{app}'")),
            health: Some(HealthCheck {
                path: "/well".to_owned(),
                port: None,
                expect: 200,
                timeout_s: WELL_WITHIN_S,
                websocket: None,
            }),
            ..ReleaseConfig::default()
        };
        let asked = CreateRelease {
            name: Some(self.name.to_string()),
            ..CreateRelease::of_image(&image.image_digest, config)
        };
        let release = self.client.create_release(&asked).await?.id;
        self.with(&release).await
    }

    /// What was made is found again by nobody else.
    async fn unmake(&self) -> Result<(), Failure> {
        let releases = self.client.releases().await?.items;
        let own = releases.iter().find(|release| release.name == self.name.as_str());
        unmake(self.client, &self.name, own.map(|release| &release.id)).await
    }

    async fn with(&self, release: &ReleaseId) -> Result<Url, Failure> {
        let asked = CreateWorkspace {
            name: self.name.clone(),
            release: Some(release.clone()),
        };
        self.client.create_workspace_from(&asked).await?;
        let everybody = WorkspaceSettings {
            access: Some(PerSlot {
                live: Access::Public,
                dev: Access::Private,
            }),
            ..WorkspaceSettings::default()
        };
        self.client.patch_workspace(&self.name, &everybody).await?;
        for (slot, mark) in [(Slot::Live, "good"), (Slot::Dev, "broken")] {
            self.marked(slot, mark).await?;
        }
        let address = self.client.workspace(&self.name).await?.slots.live.address;
        Url::parse(&address).map_err(|e| Failure::Failed(format!("{address} is no address: {e}")))
    }

    /// Has a slot's app serve this.
    async fn marked(&self, slot: Slot, mark: &str) -> Result<(), Failure> {
        until(self.client, &self.name, slot, SlotVerb::Start).await?;
        self.run(slot, &format!("echo {mark} > ~/mark")).await?;
        until(self.client, &self.name, slot, SlotVerb::Restart).await.map(drop)
    }

    async fn run(&self, slot: Slot, line: &str) -> Result<(), Failure> {
        let request = ExecRequest {
            command: Command::Line(line.to_owned()),
            cwd: None,
            env: [].into(),
            stdin: None,
            timeout_ms: None,
            max_output_bytes: None,
        };
        let done = self.client.sandbox(&self.name, slot).exec(&request).await?;
        match done.exit.exit_code {
            0 => Ok(()),
            code => Err(Failure::Failed(format!(
                "`{line}` in {slot} ended with {code}: {}",
                done.stderr
            ))),
        }
    }

    async fn rehearse(&self, live: &Url, report: &mut Report, figures: &mut Figures) -> Result<(), Failure> {
        let visitors = Visitors::come(self.client, live, VISITORS);
        report
            .step("visitors see the good version", visitors.see("good"))
            .await?;
        report
            .step("swap: the broken version is live", self.swapped(&visitors, "broken"))
            .await?;
        let warm = report
            .step(
                "roll back, warm: the good one is live",
                self.rolled_back(&visitors, true),
            )
            .await?;
        figures.warm_ms = Some(warm);
        report.step("swap again", self.swapped(&visitors, "broken")).await?;
        // What was displaced runs again, so it cannot simply be swapped back.
        report
            .step("use dev, which ends the warm undo", self.run(Slot::Dev, "true"))
            .await?;
        let cold = report
            .step(
                "roll back, cold: the good one is live",
                self.rolled_back(&visitors, false),
            )
            .await?;
        figures.cold_ms = Some(cold);
        let refused = self.refused(&visitors);
        report
            .step("a version that is not well does not become live", refused)
            .await?;
        let counted = async { visitors.all_answered() };
        figures.requests = Some(report.step("no request failed", counted).await?);
        match self.client.fsck().await {
            // Only those who run the box may ask.
            Err(error) if error.status() == Some(403) => Ok(()),
            found => {
                report
                    .step("everything fits together", async { clean(&found?.items) })
                    .await
            }
        }
    }

    async fn swapped(&self, visitors: &Visitors, mark: &str) -> Result<(), Failure> {
        swap(self.client, &self.name).await?;
        visitors.see(mark).await
    }

    /// How long it took, in milliseconds. It must be of the kind that is rehearsed.
    async fn rolled_back(&self, visitors: &Visitors, warm: bool) -> Result<u64, Failure> {
        let undo = self.client.workspace(&self.name).await?.undo;
        if undo.is_none_or(|undo| undo.warm != warm) {
            let kind = if warm { "warm" } else { "cold" };
            return Err(Failure::Failed(format!(
                "there is nothing that could be rolled back {kind}"
            )));
        }
        let begun = std::time::Instant::now();
        self.roll_back().await?;
        let took = begun.elapsed();
        visitors.see("good").await?;
        Ok(u64::try_from(took.as_millis()).unwrap_or(u64::MAX))
    }

    async fn roll_back(&self) -> Result<Deployment, Failure> {
        let (mut quiet, asked) = (Line::begin(true), Rollback { to: None });
        deploying::carry_out(self.client, &self.name, "rollback", &mut quiet, async |key| {
            self.client.rollback(&self.name, &asked, &key, CALL).await
        })
        .await
    }

    async fn refused(&self, visitors: &Visitors) -> Result<(), Failure> {
        self.run(Slot::Dev, "touch ~/unwell").await?;
        match swap(self.client, &self.name).await {
            Ok(_) => return Err(Failure::Failed("it was swapped in although its check fails".to_owned())),
            Err(Failure::Failed(why)) if why.contains("did not become healthy") => {}
            Err(other) => return Err(other),
        }
        visitors.see("good").await
    }
}

fn clean(found: &[choir_api::admin::Finding]) -> Result<(), Failure> {
    match found.first() {
        None => Ok(()),
        Some(first) => Err(Failure::Failed(format!("{}: {}", first.invariant, first.what))),
    }
}
