//! The first user of an instance, at a browser, and the same person's command-line token. It must not do anything that
//! a person could not.

use anyhow::{Context as _, Result};
use choir_api::client::{Client, Credential, SlotVerb};
use choir_api::sandbox::{Command, CreateTask, ExecRequest, ExecResult};
use choir_api::workspaces::SlotView;
use choir_core::settings::HealthCheck;
use choir_core::{Name, ReleaseConfig, Slot};
use serde_json::json;

use crate::browser::Browser;
use crate::instance::Instance;
use crate::page::Page;
use crate::waiting::{PATIENCE, until};

/// Who everybody is in these tests.
pub const USER: &str = "ada";
/// What the first user's token may do.
pub const EVERYTHING: [&str; 3] = ["read", "write", "admin"];
/// The one workspace.
pub const WORKSPACE: &str = "main";

/// An app with a websocket; see its first line.
const APP: &str = include_str!("app.py");

/// Claims the box, and returns the recovery codes the page shows.
pub async fn register(page: &Page, instance: &Instance) -> Result<Vec<String>> {
    join(page, &instance.claim_link()?, USER).await
}

/// Opens a claim or invite link, makes an account with a passkey, and returns the recovery codes the page shows.
pub async fn join(page: &Page, link: &str, name: &str) -> Result<Vec<String>> {
    page.goto(link).await?;
    page.fill("#username", name).await?;
    page.click("form[data-do=register] button").await?;
    let codes = page
        .wait("[...document.querySelectorAll('#codes:not([hidden]) li')].map(it => it.textContent)")
        .await?;
    page.click("button[data-do=saved]").await?;
    page.wait("location.pathname === '/' && document.querySelector('form[data-do=create]')")
        .await?;
    serde_json::from_value(codes).context("the page shows no codes")
}

/// Signs in by the button on the login page.
pub async fn log_in(page: &Page) -> Result<()> {
    page.click("form[data-do=login] button").await?;
    page.wait("location.pathname === '/' && document.querySelector('form[data-do=create]')")
        .await?;
    is_signed_in(page).await
}

/// Signs out by the button that every page of the control host has.
pub async fn log_out(page: &Page) -> Result<()> {
    page.click("button[data-do=logout]").await?;
    page.wait("location.pathname === '/login' && document.querySelector('form[data-do=login]')")
        .await?;
    let me = page.eval("fetch('/auth/me').then(it => it.json())").await?;
    anyhow::ensure!(me["authenticated"] == false, "still signed in after signing out: {me}");
    Ok(())
}

/// From the login page: a recovery code opens the way to a new passkey; `left` codes are good after it.
pub async fn recover(page: &Page, code: &str, left: usize) -> Result<()> {
    show_code(page, code).await?;
    make_passkey(page, left).await
}

/// The first half: the page takes the code, and offers to make a passkey.
pub async fn show_code(page: &Page, code: &str) -> Result<()> {
    page.click("a[href='/recover']").await?;
    page.fill("#username", USER).await?;
    page.fill("#code", code).await?;
    page.click("form[data-do=recover] button").await?;
    page.wait("!document.querySelector('form[data-do=new-passkey]').hidden")
        .await?;
    Ok(())
}

/// The second half.
pub async fn make_passkey(page: &Page, left: usize) -> Result<()> {
    page.click("form[data-do=new-passkey] button").await?;
    page.wait("location.pathname === '/account' && document.querySelector('#passkeys')")
        .await?;
    is_signed_in(page).await?;
    let text = page.eval("document.body.innerText").await?;
    let text = text.as_str().unwrap_or_default();
    anyhow::ensure!(
        text.contains(&format!("{left} of 10 are left")),
        "not {left} codes are left: {text}"
    );
    Ok(())
}

/// Whether a page of the control host is the first user's.
pub async fn is_signed_in(page: &Page) -> Result<()> {
    let me = page.eval("fetch('/auth/me').then(it => it.json())").await?;
    anyhow::ensure!(
        me["user"]["name"] == USER && me["by"] == "session",
        "not signed in: {me}"
    );
    Ok(())
}

/// A client with a token, made with the session of a page of the control host that is fresh.
pub async fn token(page: &Page, instance: &Instance, scopes: &[&str]) -> Result<Client> {
    let token = token_text(page, scopes).await?;
    Ok(Client::new(instance.origin().as_str(), Credential::Token(token))?)
}

/// Such a token itself.
pub async fn token_text(page: &Page, scopes: &[&str]) -> Result<String> {
    let body = json!({"name": "e2e", "scopes": scopes});
    let made = page
        .eval(&format!(
            "fetch('/me/tokens', {{method: 'POST', headers: {{'X-Choir': '1', 'Content-Type': 'application/json'}}, \
             body: JSON.stringify({body})}}).then(it => it.json())"
        ))
        .await?;
    let token = made["token"].as_str().with_context(|| format!("no token: {made}"))?;
    Ok(token.to_owned())
}

/// Registers the first user in a browser, and goes on as a program that may do everything.
pub async fn sign_in(instance: &Instance) -> Result<Client> {
    Ok(sign_in_with_token(instance).await?.0)
}

/// The same, with the token that the program uses.
pub async fn sign_in_with_token(instance: &Instance) -> Result<(Client, String)> {
    let browser = Browser::start().await?;
    let page = browser.page().await?;
    register(&page, instance).await?;
    as_program(&page, instance).await
}

async fn as_program(page: &Page, instance: &Instance) -> Result<(Client, String)> {
    let token = token_text(page, &EVERYTHING).await?;
    let credential = Credential::Token(token.clone());
    Ok((Client::new(instance.origin().as_str(), credential)?, token))
}

/// The same, of a user whom the operator lets in by a recovery link.
pub async fn come_back(instance: &Instance) -> Result<(Client, String)> {
    let link = instance.operate(&["recover", USER])?;
    let browser = Browser::start().await?;
    let page = browser.page().await?;
    page.goto(link.trim()).await?;
    page.click("form[data-do=recover] button").await?;
    page.wait("!document.querySelector('form[data-do=new-passkey]').hidden")
        .await?;
    make_passkey(&page, 10).await?;
    as_program(&page, instance).await
}

/// The workspace's name as the typed client takes it.
pub fn workspace() -> Name {
    WORKSPACE.parse().expect("a valid name")
}

/// Starts a slot and waits until it is ready.
pub async fn start(client: &Client, slot: Slot) -> Result<SlotView> {
    let view = client.ask_slot(&workspace(), slot, SlotVerb::Start, PATIENCE).await?;
    anyhow::ensure!(view.state == "ready", "{slot} is {} ({:?})", view.state, view.reason);
    Ok(view)
}

/// Runs a shell line and returns how it ended.
pub async fn exec(client: &Client, slot: Slot, line: &str) -> Result<ExecResult> {
    let request = ExecRequest {
        command: Command::Line(line.to_owned()),
        cwd: None,
        env: [].into(),
        stdin: None,
        timeout_ms: None,
        max_output_bytes: Some(8 << 20),
    };
    Ok(client.sandbox(&workspace(), slot).exec(&request).await?)
}

/// Runs a shell line that must succeed, and returns what it wrote.
pub async fn run(client: &Client, slot: Slot, line: &str) -> Result<String> {
    let done = exec(client, slot, line).await?;
    let code = done.exit.exit_code;
    anyhow::ensure!(
        code == 0,
        "`{line}` in {slot} ended with {code}: {}{}",
        done.stdout,
        done.stderr
    );
    anyhow::ensure!(!done.exit.truncated, "`{line}` in {slot} said more than is kept");
    Ok(done.stdout)
}

/// What a release starts so that the app runs in every generation, under the mark that `~/mark` holds.
pub fn app_config() -> ReleaseConfig {
    let app = APP.replace('\'', r"'\''");
    ReleaseConfig {
        start: Some(format!(
            "exec python3 -c '{app}' \"$(cat ~/mark 2>/dev/null || echo new)\""
        )),
        health: Some(HealthCheck {
            path: "/".to_owned(),
            port: None,
            expect: 200,
            timeout_s: 20,
            websocket: Some("/socket".to_owned()),
        }),
        ..ReleaseConfig::default()
    }
}

/// Starts the app in a slot under this mark, and waits until it answers inside.
pub async fn serve_app(client: &Client, slot: Slot, mark: &str) -> Result<()> {
    let command = Command::Argv(["python3", "-c", APP, mark].map(str::to_owned).into());
    let task = CreateTask {
        command,
        cwd: None,
        env: [].into(),
        timeout_ms: None,
    };
    client.sandbox(&workspace(), slot).create_task(&task).await?;
    until("the app to listen", async || {
        let asked = exec(client, slot, "curl -fsS http://127.0.0.1:3000/count").await?;
        Ok((asked.exit.exit_code == 0).then_some(()))
    })
    .await
}
