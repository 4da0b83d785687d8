//! Requests that a page of another site makes the browser send to the control host.

use anyhow::{Result, ensure};
use choir_core::Slot;
use choir_e2e::page::Page;
use choir_e2e::waiting::until;
use choir_hypervisor::auth::SESSION_COOKIE;
use serde_json::{Value, json};

use super::Scene;
use super::state::{targets, things};

const ATTACK: &str = include_str!("requests.js");

/// Lets the page send everything to these routes below `base`.
pub async fn attack(page: &Page, base: &str, routes: &[Value]) -> Result<Value> {
    page.eval(&format!(
        "({})({}, {})",
        ATTACK.trim_end().trim_end_matches(';'),
        json!(base),
        json!(routes)
    ))
    .await
}

pub fn nothing_learnt(learnt: &Value) -> Result<()> {
    ensure!(learnt["read"] == json!([]), "the page could read {}", learnt["read"]);
    ensure!(learnt["open"] == json!([]), "websockets opened: {}", learnt["open"]);
    Ok(())
}

/// One request of each kind to the recorder, so that it is seen which carry the cookie.
pub fn probe(name: &str) -> Vec<Value> {
    ["GET", "POST", "DELETE"]
        .map(|method| json!({"method": method, "path": format!("/{name}")}))
        .into()
}

pub async fn a_sandbox_page_calls_every_route_without_the_cookie(scene: &Scene<'_>) -> Result<()> {
    scene.evil.goto(&scene.app(Slot::Live)).await?;
    let routes = targets(&things(scene.control).await?);
    let before = scene.instance.database()?;
    let learnt = attack(scene.evil, &scene.base(), &routes).await?;
    ensure!(
        learnt["sent"].as_u64() > Some(100),
        "hardly anything was sent: {learnt}"
    );
    nothing_learnt(&learnt)?;
    scene.instance.database()?.same_as(&before)?;
    our_own_request_shows_in_the_database(scene).await?;

    let other = scene.other;
    attack(scene.evil, &other.origin(), &probe("from-sandbox")).await?;
    let cookies: Vec<_> = other.seen("/from-sandbox").into_iter().map(|it| it.cookie).collect();
    ensure!(cookies.len() >= 7, "only {} kinds of request arrived", cookies.len());
    ensure!(
        cookies.iter().all(String::is_empty),
        "a cookie came along from a sandbox's page: {cookies:?}"
    );
    Ok(())
}

/// The control of every comparison: one of the requests above, from a page of the control host.
async fn our_own_request_shows_in_the_database(scene: &Scene<'_>) -> Result<()> {
    let before = scene.instance.database()?;
    let made = "fetch('/admin/invites', {method: 'POST', body: '{}', \
                headers: {'Content-Type': 'application/json', 'X-Choir': '1'}}).then(it => it.ok)";
    ensure!(scene.control.eval(made).await? == true, "our own page could not invite");
    let changed = scene.instance.database()?.same_as(&before);
    ensure!(changed.is_err(), "an invite does not show in the database");
    Ok(())
}

pub async fn a_page_on_another_port_is_refused_although_the_cookie_comes(scene: &Scene<'_>) -> Result<()> {
    let other = scene.other;
    scene.evil.goto(&format!("{}/page", other.origin())).await?;
    // The control of this and of A01: from a page of `localhost` the same requests carry the cookie.
    attack(scene.evil, &other.origin(), &probe("from-port")).await?;
    let seen = other.seen("/from-port");
    let with = seen.iter().filter(|it| it.cookie.contains(SESSION_COOKIE)).count();
    ensure!(with >= 7, "the cookie came with {with} of {} requests only", seen.len());

    let routes = targets(&things(scene.control).await?);
    let before = scene.instance.database()?;
    nothing_learnt(&attack(scene.evil, &scene.base(), &routes).await?)?;
    scene.instance.database()?.same_as(&before)?;
    only_our_own_page_may(scene).await
}

/// The control: what was refused above works from a page of the control host.
async fn only_our_own_page_may(scene: &Scene<'_>) -> Result<()> {
    let call = "(method, path, body) => fetch(path, {method, body, headers: \
                {'Content-Type': 'application/json', 'X-Choir': '1'}})";
    let terminals = "/api/workspaces/main/slots/live/sandbox/terminals";
    let made = scene
        .control
        .eval(&format!(
            "({call})('POST', '{terminals}', '{{\"cols\":80,\"rows\":24}}').then(it => it.json())"
        ))
        .await?;
    let terminal = format!("{terminals}/{}", made["id"].as_str().unwrap_or_default());
    let socket = format!("{}{terminal}/attach", scene.base().replace("http", "ws"));
    let open = format!(
        "new Promise(done => {{ const it = new WebSocket('{socket}'); \
         it.onopen = () => {{ it.close(); done(true); }}; it.onerror = () => done(false); }})"
    );
    scene.evil.goto(&format!("{}/page", scene.other.origin())).await?;
    ensure!(
        scene.evil.eval(&open).await? == false,
        "another site's page opened a terminal's websocket"
    );
    ensure!(
        scene.control.eval(&open).await? == true,
        "our own page could not open a terminal's websocket"
    );
    let ended = scene
        .control
        .eval(&format!("({call})('DELETE', '{terminal}').then(it => it.ok)"))
        .await?;
    ensure!(ended == true, "our own page could not end its terminal");
    Ok(())
}

pub async fn navigating_to_any_route_changes_nothing(scene: &Scene<'_>) -> Result<()> {
    let evil = scene.app(Slot::Live);
    scene.evil.goto(&evil).await?;
    let routes = targets(&things(scene.control).await?);
    let before = scene.instance.database()?;
    let mut paths: Vec<_> = routes
        .iter()
        .map(|it| it["path"].as_str().unwrap_or("/").to_owned())
        .collect();
    paths.sort();
    paths.dedup();
    for path in paths {
        scene.evil.goto(&evil).await?;
        let there = json!(format!("{}{path}", scene.base()));
        // A new entry each time, so that this also sees an answer that is no page.
        scene
            .evil
            .eval(&format!("setTimeout(() => location.assign({there})); 1"))
            .await?;
        let arrived = format!(
            "location.origin === '{}' && document.readyState === 'complete'",
            scene.base()
        );
        scene
            .evil
            .wait(&arrived)
            .await
            .map_err(|error| error.context(path.clone()))?;
        if path == "/account" {
            // The control: the cookie came along.
            scene.evil.wait("document.querySelector('#passkeys')").await?;
        }
    }
    scene.instance.database()?.same_as(&before)?;
    until("live to be ready still", async || {
        let view = scene.client.workspace(&choir_e2e::person::workspace()).await?;
        Ok((view.slots.live.state == "ready").then_some(()))
    })
    .await
}
