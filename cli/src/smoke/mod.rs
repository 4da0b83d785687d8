//! The production smoke: a throw-away user with a software passkey does what people do, through the front door only.
//! It must not report a step that it did not run, and cleans up after one that failed.

mod account;
mod browser;
mod passkey;
mod slots;

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use choir_api::client::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use choir_api::client::{Client, SlotVerb};
use choir_core::{Name, Slot};

use self::account::{Account, expect};
use self::browser::Browser;
use self::slots::Pair;
use crate::context::Context;
use crate::failure::Failure;
use crate::output;
use crate::report::Report;
use crate::throwaway::letters;
use crate::verbs::swap::swap;
use crate::verbs::workspaces::DELETION;
use crate::waiting::until;

/// How long a hypervisor may take to be ready.
const READY_WITHIN: Duration = Duration::from_secs(180);

/// How long deleted sandboxes may take to be gone.
const GONE_WITHIN: Duration = Duration::from_secs(30);

/// What was asked for.
pub struct Options {
    pub invite: Option<String>,
    pub metrics_token: Option<String>,
    pub keep: bool,
    pub token_file: Option<PathBuf>,
}

pub async fn run(ctx: &Context, options: Options) -> Result<(), Failure> {
    let mut report = Report::new(ctx.json);
    let client = ctx.anonymous()?;
    let done = everything(ctx, &client, &options, &mut report).await;
    if ctx.json {
        output::json(&report)?;
    } else {
        let total: u64 = report.steps.iter().map(|s| s.ms).sum();
        let verdict = if done.is_ok() && report.ok { "passed" } else { "FAILED" };
        output::line(&format!(
            "{verdict}: {} steps in {}",
            report.steps.len(),
            output::duration(total)
        ))?;
    }
    // The failing step said why already.
    if done.is_ok() && report.ok {
        Ok(())
    } else {
        Err(Failure::Exit(1))
    }
}

async fn everything(ctx: &Context, client: &Client, options: &Options, report: &mut Report) -> Result<(), Failure> {
    let mut browser = Browser::new(client.clone())?;
    report.step("the hypervisor is alive and ready", ready(client)).await?;
    let username = format!("smoke-{}", letters()?);
    let registering = Account::register(&mut browser, &username, options.invite.as_deref());
    let mut account = report
        .step("register a throw-away user with a passkey", registering)
        .await?;
    report.step("log out", account.logout(&mut browser)).await?;
    report
        .step("log in with the passkey", account.login(&mut browser))
        .await?;
    report
        .step(
            "recover with a code, make a new passkey, log in with it",
            account.recover(&mut browser),
        )
        .await?;
    report
        .step(
            "log a command line in with a device code, and out",
            account.device(&mut browser),
        )
        .await?;
    let workspace: Name = "smoke"
        .parse()
        .map_err(|e: choir_core::name::NameError| Failure::Failed(e.to_string()))?;
    let session = browser.session();
    report
        .step("create a workspace", async {
            Ok(session.create_workspace(&workspace).await?)
        })
        .await?;
    let done = with_workspace(ctx, &session, &mut browser, &workspace, options, report).await;
    if options.keep {
        if let Some(file) = &options.token_file {
            let leaving = leave_token(&account, &mut browser, file);
            report.step("leave a token of the kept user", leaving).await?;
        }
        if !ctx.json {
            output::line(&format!("kept: workspace {workspace} of user {username}"))?;
        }
        return done;
    }
    let deleted = report
        .step("delete the workspace with both sandboxes", async {
            session.delete_workspace(&workspace, DELETION).await?;
            let after = session.workspace(&workspace).await;
            expect(
                after.is_err_and(|e| e.status() == Some(404)),
                "a deleted workspace is still there",
            )
        })
        .await;
    let freed = match &deleted {
        Ok(()) => {
            report
                .step(
                    "its name is free again: create it and delete it",
                    again(&session, &workspace),
                )
                .await
        }
        Err(_) => Ok(()),
    };
    let out = report.step("log out for good", account.logout(&mut browser)).await;
    done.and(deleted).and(freed).and(out)
}

async fn leave_token(account: &Account, browser: &mut Browser, file: &Path) -> Result<(), Failure> {
    let token = account.token(browser, "choir smoke --keep").await?;
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    let written = options.open(file).and_then(|mut file| writeln!(file, "{token}"));
    written.map_err(|e| Failure::Failed(format!("cannot write the token to {}: {e}", file.display())))
}

async fn with_workspace(
    ctx: &Context,
    session: &Client,
    browser: &mut Browser,
    workspace: &Name,
    options: &Options,
    report: &mut Report,
) -> Result<(), Failure> {
    for slot in Slot::ALL {
        report
            .step(
                &format!("start {slot}"),
                until(session, workspace, slot, SlotVerb::Start),
            )
            .await?;
    }
    let mut pair = report
        .step(
            "both run at once, and each health is its own sandbox's and generation's",
            Pair::check(ctx, session, workspace),
        )
        .await?;
    for slot in Slot::ALL {
        report
            .step(&format!("run a task in {slot} and read its output"), pair.task(slot))
            .await?;
    }
    for slot in Slot::ALL {
        let name = format!("start an app in {slot} and reach it at its own host");
        report.step(&name, pair.app(browser, slot)).await?;
        report
            .step(
                &format!("talk to {slot}'s app over a websocket"),
                pair.echo(browser, slot),
            )
            .await?;
    }
    for name in ["swap", "swap back"] {
        report.step(name, swap(session, workspace)).await?;
        pair.exchange();
        report
            .step(
                "each address answers as what was the other's, over HTTP and websocket",
                pair.answers(browser),
            )
            .await?;
    }
    report.step("read both logs and stats", pair.logs()).await?;
    if let Some(token) = &options.metrics_token {
        report
            .step("read the metrics", metrics(browser, session, token))
            .await?;
    }
    report.step("restart live: a new generation", pair.restart()).await?;
    for slot in Slot::ALL {
        report
            .step(&format!("stop {slot}"), until(session, workspace, slot, SlotVerb::Stop))
            .await?;
    }
    Ok(())
}

/// A name is taken until the last of both sandboxes is gone.
async fn again(session: &Client, workspace: &Name) -> Result<(), Failure> {
    let begun = Instant::now();
    loop {
        match session.create_workspace(workspace).await {
            Ok(_) => return Ok(session.delete_workspace(workspace, DELETION).await?),
            Err(error) if error.status() != Some(409) => return Err(error.into()),
            Err(_) if begun.elapsed() >= GONE_WITHIN => {
                let told = "the deleted workspace's name is still taken after 30 s: its sandboxes are not gone";
                return Err(Failure::Failed(told.to_owned()));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}

/// A hypervisor that was just started may still import its first release.
async fn ready(client: &Client) -> Result<(), Failure> {
    client.alive().await?;
    let begun = Instant::now();
    loop {
        let parts = client.readiness().await?;
        if parts.ready {
            return Ok(());
        }
        if begun.elapsed() >= READY_WITHIN {
            let missing = parts.missing().join(", ");
            return Err(Failure::Failed(format!("it is not ready ({missing}); see its log")));
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

async fn metrics(browser: &Browser, client: &Client, token: &str) -> Result<(), Failure> {
    let url = browser
        .control()
        .join("/metrics")
        .map_err(|e| Failure::Failed(e.to_string()))?;
    let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
        .map_err(|_| Failure::Usage("the metrics token has characters no token has; check its file".to_owned()))?;
    value.set_sensitive(true);
    let visit = client
        .visit(&url, HeaderMap::from_iter([(AUTHORIZATION, value)]))
        .await?;
    let is_metrics = visit.status == 200 && visit.body.lines().any(|l| l.starts_with("choir_"));
    expect(
        is_metrics,
        "/metrics has nothing of ours with this token; check its file",
    )
}
