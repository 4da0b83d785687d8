//! What a websocket is worth when the session it was opened with has ended.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use choir_core::Slot;
use choir_e2e::page::Page;
use choir_e2e::person;
use choir_e2e::waiting::step;
use serde_json::json;
use tokio::time::Instant;

use super::Scene;

/// How long a websocket may outlive its session.
const LIMIT: Duration = Duration::from_secs(5);

/// Ends every session and token that there was; `code` is a recovery code, the second to be used.
pub async fn websockets_end_with_their_session(scene: &Scene<'_>, code: &str) -> Result<()> {
    let terminal = scene.browser.page().await?;
    // The same person in another browser, whose session goes on.
    let other = scene.browser.stranger().await?;
    other.sync_passkeys(scene.control).await?;
    other.goto(&format!("{}/login", scene.base())).await?;
    person::log_in(&other).await?;
    scene.control.sync_passkeys(&other).await?;
    open_terminal(&other).await?;

    open_both(scene, &terminal).await?;
    step("B13: signing out", person::log_out(scene.control)).await?;
    both_are_closed(scene, &terminal).await?;
    echoes(&other).await.context("another session's terminal")?;

    person::log_in(scene.control).await?;
    open_both(scene, &terminal).await?;
    let own = scene
        .control
        .eval("fetch('/me/sessions').then(it => it.json()).then(it => it.items.find(it => it.current).id)")
        .await?;
    let path = json!(format!("/me/sessions/{}", own.as_str().unwrap_or_default()));
    let ended = other
        .eval(&format!(
            "fetch({path}, {{method: 'DELETE', headers: {{'X-Choir': '1'}}}}).then(it => it.ok)"
        ))
        .await?;
    ensure!(ended == true, "one session could not end another");
    both_are_closed(scene, &terminal).await?;
    echoes(&other).await.context("another session's terminal")?;

    scene.control.goto(&format!("{}/login", scene.base())).await?;
    person::log_in(scene.control).await?;
    open_both(scene, &terminal).await?;
    other.goto(&format!("{}/account", scene.base())).await?;
    person::log_out(&other).await?;
    other.new_device().await?;
    step("B13: recovering", person::recover(&other, code, 8)).await?;
    both_are_closed(scene, &terminal).await
}

/// The app's own websocket in the one tab, a terminal's in the other, both with the control tab's session.
async fn open_both(scene: &Scene<'_>, terminal: &Page) -> Result<()> {
    let app = scene.evil;
    app.goto(&scene.app(Slot::Live)).await?;
    app.wait("document.querySelector('p').textContent.endsWith(':ping')")
        .await?;
    app.eval("socket.onclose = event => { globalThis.endedWith = event.code; }; 1")
        .await?;
    terminal.goto(&scene.base()).await?;
    open_terminal(terminal).await?;
    for page in [app, terminal] {
        ensure!(
            page.eval("globalThis.endedWith ?? 0").await? == 0,
            "a websocket closed before its session"
        );
    }
    Ok(())
}

/// From a page of the control host.
async fn open_terminal(page: &Page) -> Result<()> {
    let list = "/api/workspaces/main/slots/live/sandbox/terminals";
    page.eval(&format!(
        "(async () => {{ const made = await fetch('{list}', {{method: 'POST', body: '{{\"cols\":80,\"rows\":24}}', \
         headers: {{'Content-Type': 'application/json', 'X-Choir': '1'}}}}).then(it => it.json()); \
         const socket = new WebSocket(`${{location.origin.replace('http', 'ws')}}{list}/${{made.id}}/attach`); \
         globalThis.terminal = socket; globalThis.heard = 0; socket.onmessage = () => {{ globalThis.heard += 1; }}; \
         socket.onclose = event => {{ globalThis.endedWith = event.code; }}; \
         await new Promise((done, failed) => {{ socket.onopen = done; socket.onerror = failed; }}); }})()"
    ))
    .await?;
    echoes(page).await
}

/// Whether the terminal that the page holds open answers to a keypress.
async fn echoes(page: &Page) -> Result<()> {
    let before = page.eval("globalThis.heard").await?;
    page.eval("terminal.send(new TextEncoder().encode('\\r')); 1").await?;
    page.wait(&format!("globalThis.heard > {before}")).await?;
    Ok(())
}

async fn both_are_closed(scene: &Scene<'_>, terminal: &Page) -> Result<()> {
    let begun = Instant::now();
    for (name, page) in [("app", scene.evil), ("terminal", terminal)] {
        let code = page
            .wait("globalThis.endedWith")
            .await
            .with_context(|| name.to_owned())?;
        let took = begun.elapsed();
        eprintln!(
            "the {name}'s websocket closed with {code} after {} ms",
            took.as_millis()
        );
        ensure!(took < LIMIT, "the {name}'s websocket outlived its session by {took:?}");
    }
    Ok(())
}
