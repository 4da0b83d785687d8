//! What an origin may do to another: frame it, use its passkeys, read it.

use anyhow::{Result, ensure};
use choir_core::Slot;
use choir_e2e::waiting::until;
use choir_e2e::{http, person};
use choir_hypervisor::router;
use serde_json::{Value, json};

use super::Scene;

pub async fn the_control_host_cannot_be_framed(scene: &Scene<'_>) -> Result<()> {
    scene.evil.goto(&scene.app(Slot::Live)).await?;
    for (framed, address) in [(false, scene.base()), (true, scene.other.origin())] {
        let loaded = format!(
            "new Promise(done => {{ const it = document.createElement('iframe'); it.src = '{address}/login'; \
             it.onload = () => done(true); document.body.append(it); }})"
        );
        scene.evil.eval(&loaded).await?;
        until("the frame to show the page, or the browser's refusal", async || {
            let frames = scene.browser.frames().await?;
            let shown = frames.iter().any(|it| it.starts_with(&address));
            Ok((shown == framed).then_some(()))
        })
        .await?;
    }
    Ok(())
}

pub async fn a_sandbox_page_gets_no_passkey_assertion(scene: &Scene<'_>) -> Result<()> {
    let call = "(path, body) => fetch(path, {method: 'POST', body: JSON.stringify(body), headers: \
                {'Content-Type': 'application/json', 'X-Choir': '1'}})";
    let sign = "options => navigator.credentials.get({publicKey: \
                PublicKeyCredential.parseRequestOptionsFromJSON(options.publicKey)})\
                .then(it => it.toJSON(), error => error.name)";
    let start = format!("({call})('/auth/login/start', {{}}).then(it => it.json())");

    let options = scene.control.eval(&start).await?;
    scene.evil.goto(&scene.app(Slot::Live)).await?;
    let forged = scene.evil.eval(&format!("({sign})({options})")).await?;
    ensure!(
        forged == "SecurityError",
        "a sandbox's page asked for our passkey and got {forged}"
    );

    // The control: the same challenge on our own page, sent, is a login.
    let before = scene.control.cookies(&scene.base()).await?;
    let own = scene.control.eval(&format!("({sign})({options})")).await?;
    let finish = format!("({call})('/auth/login/finish', {{credential: {own}}}).then(it => it.status)");
    let status = scene.control.eval(&finish).await?;
    ensure!(status == 200, "our own page's assertion was answered {status}: {own}");
    let after = scene.control.cookies(&scene.base()).await?;
    ensure!(before != after, "the login made no new session");
    person::is_signed_in(scene.control).await
}

pub async fn live_and_dev_are_strangers(scene: &Scene<'_>) -> Result<()> {
    for (from, to) in [(Slot::Live, Slot::Dev), (Slot::Dev, Slot::Live)] {
        let (here, there) = (scene.app(from), scene.app(to));
        scene.evil.goto(&here).await?;
        scene
            .evil
            .eval(&format!("localStorage.setItem('mark', '{from}')"))
            .await?;
        let probe = format!(
            "(async () => {{ const got = []; const note = what => () => got.push(what); \
             await fetch('{there}/from-{from}', {{credentials: 'include'}}).then(note('cors'), () => {{}}); \
             await fetch('{there}/from-{from}', {{credentials: 'include', mode: 'no-cors'}}).catch(() => {{}}); \
             await fetch('{there}/from-{from}', {{method: 'POST', body: 'x', credentials: 'include', mode: 'no-cors'}}).catch(() => {{}}); \
             await new Promise(done => {{ const it = new WebSocket('{there}/from-{from}'.replace('http', 'ws')); \
               it.onopen = () => {{ got.push('websocket'); it.close(); }}; it.onclose = done; }}); \
             return got; }})()"
        );
        let got = scene.evil.eval(&probe).await?;
        ensure!(got == json!([]), "{from}'s page got through to {to} by {got}");
        scene.evil.goto(&there).await?;
        let stored = scene.evil.eval("localStorage.getItem('mark')").await?;
        ensure!(stored != from.as_str(), "{to} reads what {from} stored");
        // The control: its own page gets through, and is recorded.
        let seen = scene
            .evil
            .eval("fetch('/own').then(() => fetch('/seen')).then(it => it.json())")
            .await?;
        let paths: Vec<_> = seen
            .as_array()
            .into_iter()
            .flatten()
            .map(|it| it["path"].clone())
            .collect();
        ensure!(paths.contains(&json!("/own")), "{to}'s app records nothing: {seen}");
        let foreign = json!(format!("/from-{from}"));
        ensure!(!paths.contains(&foreign), "{from}'s page reached {to}'s app");
        let cookie = seen.as_array().into_iter().flatten().find(|it| it["cookie"] != "");
        ensure!(cookie.is_none(), "a cookie of ours reached {to}'s app: {cookie:?}");
    }
    Ok(())
}

pub async fn no_origin_may_read_the_control_host(scene: &Scene<'_>) -> Result<()> {
    // From a sandbox's page: a server that allows it is read, the control host is not.
    scene.evil.goto(&scene.app(Slot::Live)).await?;
    for (address, readable) in [
        (scene.other.origin() + "/open", true),
        (scene.base() + "/auth/me", false),
    ] {
        let read = format!("fetch('{address}', {{credentials: 'include'}}).then(it => it.ok, () => false)");
        ensure!(
            scene.evil.eval(&read).await? == readable,
            "a sandbox's page may not read {address}, or may"
        );
    }
    no_answer_allows_an_origin(scene).await
}

async fn no_answer_allows_an_origin(scene: &Scene<'_>) -> Result<()> {
    let cookie = scene.control.cookies(scene.instance.origin().as_str()).await?;
    ensure!(!cookie.is_empty(), "the control host has no session");
    let base = scene.base();
    let app = scene.app(Slot::Live);
    let origins = [
        "null",
        &app,
        "http://evil.example",
        &format!("{base}.evil.example"),
        &format!("{base}1"),
        "http://localhost",
    ];
    let state = Value::Null;
    let paths: Vec<_> = super::state::targets(&state);
    ensure!(paths.len() > router::tables().len(), "no routes");
    for path in paths.iter().filter(|it| it["method"] == "GET") {
        let url = scene.instance.origin().join(path["path"].as_str().unwrap_or("/"))?;
        for origin in origins {
            for method in ["GET", "OPTIONS"] {
                let asked = [
                    ("Cookie", cookie.as_str()),
                    ("Origin", origin),
                    ("Access-Control-Request-Method", "POST"),
                    ("Access-Control-Request-Headers", "x-choir, content-type"),
                ];
                let answer = http::send(method, &url, &asked, "").await?;
                let allowed = answer
                    .headers
                    .iter()
                    .find(|(name, _)| name.starts_with("access-control-"));
                ensure!(allowed.is_none(), "{method} {url} for {origin} answered {allowed:?}");
                ensure!(
                    answer.header("x-content-type-options") == Some("nosniff"),
                    "{method} {url} is not guarded"
                );
            }
        }
    }
    Ok(())
}
