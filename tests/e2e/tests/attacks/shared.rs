//! The control host and all sandboxes below one registrable domain, over TLS: to a browser they are one site, so
//! `SameSite` keeps no cookie back, and what refuses is the hypervisor alone.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use choir_api::client::{Client, CreateInvite};
use choir_core::settings::{Access, PerSlot};
use choir_core::{Slot, WorkspaceSettings};
use choir_e2e::browser::Browser;
use choir_e2e::front::{Front, Passed};
use choir_e2e::instance::Instance;
use choir_e2e::page::Page;
use choir_e2e::person::{self, USER, WORKSPACE, workspace};
use choir_e2e::waiting::{step, until};
use choir_hypervisor::auth::{APP_COOKIE, SESSION_COOKIE};
use serde_json::{Value, json};
use tokio::net::TcpStream;

use super::requests::{attack, nothing_learnt, probe};
use super::state::{targets, things};
use super::without_a_schedule;

/// Another user, whose live sandbox is public and hostile.
const OTHER: &str = "bob";

/// The other user comes by an invite, and serves an app to everybody.
pub async fn another_user_arrives(page: &Page, instance: &Instance, client: &Client) -> Result<()> {
    let invite = client.create_invite(&CreateInvite { role: None }).await?;
    person::join(page, &invite.url, OTHER).await?;
    let client = person::token(page, instance, &["read", "write"]).await?;
    client.create_workspace(&workspace()).await?;
    let public = WorkspaceSettings {
        access: Some(PerSlot {
            live: Access::Public,
            dev: Access::Private,
        }),
        ..without_a_schedule()
    };
    client.patch_workspace(&workspace(), &public).await?;
    person::start(&client, Slot::Live).await?;
    person::serve_app(&client, Slot::Live, "app-of-bob").await
}

/// Where everything is.
struct Site<'a> {
    instance: &'a Instance,
    front: &'a Front,
    /// A tab at the control host, signed in as the first user.
    control: &'a Page,
    /// A tab of the same browser for the attacker's pages.
    evil: &'a Page,
}

impl Site<'_> {
    fn app(&self, slot: Slot) -> String {
        self.front.app(slot.as_str(), WORKSPACE, USER)
    }

    fn hostile(&self) -> String {
        self.front.app("live", WORKSPACE, OTHER)
    }
}

/// Apps run in both slots of the first user and in the other user's live; `code` is the third to be used.
pub async fn hosts_of_one_site_are_strangers(instance: &Instance, code: &str) -> Result<()> {
    let front = Front::start(instance.port()).await?;
    instance.reconfigure(|config| front.configure(config))?;
    until("the hypervisor at its new address", async || {
        let stream = TcpStream::connect(("127.0.0.1", instance.port())).await?;
        let host = front.control().replace("https://", "");
        let answer = choir_e2e::http::send_over(stream, "GET", &host, "/readyz", &[], "").await?;
        Ok((answer.status == 200).then_some(()))
    })
    .await?;
    let browser = Browser::start_with(&front.flags()).await?;
    let (control, evil) = (browser.page().await?, browser.page().await?);
    let site = Site {
        instance,
        front: &front,
        control: &control,
        evil: &evil,
    };
    step("one site: honest use", honest_use(&site, code)).await?;
    step("one site: another user's page, apps", apps_of_another_user(&site)).await?;
    step("one site: live and dev", slots_of_one_workspace(&site)).await?;
    step("one site: another user's page, control", the_control_host(&site)).await?;
    step("one site: cookies", cookies_of_a_sibling(&site)).await?;
    step("one site: honest use, still", works(&site)).await
}

/// Recovers, signs out and in, and opens both apps: everything works behind TLS and on one site.
async fn honest_use(site: &Site<'_>, code: &str) -> Result<()> {
    site.control.goto(&format!("{}/login", site.front.control())).await?;
    person::recover(site.control, code, 7).await?;
    person::log_out(site.control).await?;
    person::log_in(site.control).await?;
    works(site).await
}

async fn works(site: &Site<'_>) -> Result<()> {
    person::is_signed_in(site.control).await?;
    for slot in Slot::ALL {
        site.evil.goto(&site.app(slot)).await?;
        site.evil
            .wait("document.querySelector('p').textContent.endsWith(':ping')")
            .await?;
        let own = site
            .evil
            .eval("fetch('/own', {method: 'POST'}).then(it => it.ok)")
            .await?;
        ensure!(own == true, "{slot}'s own page cannot post to its app");
        let came = came_with(&site.front.passed(&site.app(slot), "/own"), APP_COOKIE);
        ensure!(came > 0, "{slot}'s own page sends no cookie");
        reached(site.evil, "/own").await?.context("the app records nothing")?;
    }
    Ok(())
}

/// How many of these carried our cookie.
fn came_with(passed: &[Passed], cookie: &str) -> usize {
    let has = |it: &&Passed| {
        it.cookie
            .split("; ")
            .any(|pair| pair.starts_with(&format!("{cookie}=")))
    };
    passed.iter().filter(has).count()
}

/// What the app of the page's own host recorded for a path.
async fn reached(own: &Page, path: &str) -> Result<Option<Value>> {
    let seen = own.eval("fetch('/seen').then(it => it.json())").await?;
    let cookies = seen
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|it| it["cookie"].as_str());
    for cookie in cookies {
        let ours = cookie.split("; ").any(|pair| pair.starts_with("__Host-choir"));
        ensure!(!ours, "a cookie of ours reached an app: {cookie}");
    }
    Ok(seen
        .as_array()
        .into_iter()
        .flatten()
        .find(|it| it["path"] == path)
        .cloned())
}

async fn apps_of_another_user(site: &Site<'_>) -> Result<()> {
    for slot in Slot::ALL {
        site.evil.goto(&site.hostile()).await?;
        site.evil.wait_text("h1", "app-of-bob").await?;
        let victim = site.app(slot);
        nothing_learnt(&attack(site.evil, &victim, &probe("from-bob")).await?)?;
        let passed = site.front.passed(&victim, "/from-bob");
        let kinds: BTreeSet<_> = passed.iter().map(|it| (&it.method, &it.dest, it.upgrade)).collect();
        ensure!(kinds.len() >= 7, "only {kinds:?} arrived at {victim}");
        let came = came_with(&passed, APP_COOKIE);
        ensure!(
            came >= 8,
            "the cookie came with {came} of {} requests only",
            passed.len()
        );
        for it in passed {
            ensure!(it.status == 403, "not refused: {it:?}");
            // Chromium says it of everything but websockets.
            ensure!(it.upgrade || it.site == "same-site", "not of the same site: {it:?}");
        }
        // Following a link is how people come to an app, from wherever.
        site.evil
            .eval(&format!("setTimeout(() => location.assign('{victim}/')); 1"))
            .await?;
        site.evil
            .wait("document.querySelector('p')?.textContent.endsWith(':ping') && !document.title.endsWith('bob')")
            .await?;
        let seen = reached(site.evil, "/from-bob").await?;
        ensure!(seen.is_none(), "a page of {OTHER} reached {slot}'s app: {seen:?}");
    }
    without_the_check_they_are_reached(site).await
}

/// The control: the same requests, where the hypervisor is not told who asked.
async fn without_the_check_they_are_reached(site: &Site<'_>) -> Result<()> {
    site.evil.goto(&site.hostile()).await?;
    site.front.keep_origins_back(true);
    let victim = site.app(Slot::Live);
    attack(site.evil, &victim, &probe("unchecked")).await?;
    site.front.keep_origins_back(false);
    let passed = site.front.passed(&victim, "/unchecked");
    let through = passed.iter().filter(|it| it.status == 200).count();
    ensure!(through >= 6, "nothing stopped them, and yet: {passed:?}");
    site.evil.goto(&victim).await?;
    reached(site.evil, "/unchecked")
        .await?
        .context("the app recorded none of them")?;
    Ok(())
}

/// What names another slot of the workspace as its origin is let through by design, what names none is not; nothing of
/// it can be read, and storage is apart.
async fn slots_of_one_workspace(site: &Site<'_>) -> Result<()> {
    for (from, to) in [(Slot::Live, Slot::Dev), (Slot::Dev, Slot::Live)] {
        site.evil.goto(&site.app(from)).await?;
        site.evil
            .eval(&format!("localStorage.setItem('mark', '{from}')"))
            .await?;
        let path = format!("/of-{from}");
        let learnt = attack(site.evil, &site.app(to), &probe(&path[1..])).await?;
        ensure!(learnt["read"] == json!([]), "{from}'s page read {}", learnt["read"]);
        let passed = site.front.passed(&site.app(to), &path);
        let (nameless, named): (Vec<_>, Vec<_>) = passed.into_iter().partition(|it| it.origin.is_empty());
        ensure!(
            nameless.len() == 3 && came_with(&nameless, APP_COOKIE) == 3,
            "image, frame and simple request did not come with the cookie: {nameless:?}"
        );
        ensure!(named.len() > 5, "only {} requests named their origin", named.len());
        for it in nameless {
            ensure!(it.status == 403, "not refused: {it:?}");
        }
        site.evil.goto(&site.app(to)).await?;
        let stored = site.evil.eval("localStorage.getItem('mark')").await?;
        ensure!(stored != from.as_str(), "{to} reads what {from} stored");
        reached(site.evil, &path)
            .await?
            .context("a friend's post did not arrive")?;
    }
    Ok(())
}

async fn the_control_host(site: &Site<'_>) -> Result<()> {
    site.evil.goto(&site.app(Slot::Live)).await?;
    let routes = targets(&things(site.control).await?);
    let of_the_account = |it: &&Value| it["path"].as_str().is_some_and(|path| path.starts_with("/me/"));
    let some: Vec<_> = routes.iter().filter(of_the_account).cloned().collect();
    let before = site.instance.database()?;
    let earlier = site.front.count();
    // The person's own sandbox is as foreign to the control host as another user's.
    for (page, routes) in [(site.app(Slot::Live), some), (site.hostile(), routes)] {
        site.evil.goto(&page).await?;
        nothing_learnt(&attack(site.evil, &site.front.control(), &routes).await?)?;
    }
    site.instance.database()?.same_as(&before)?;
    let passed: Vec<_> = site.front.passed(&site.front.control(), "/");
    let attacks: Vec<_> = passed
        .into_iter()
        .filter(|it| it.site == "same-site" || it.upgrade)
        .collect();
    ensure!(site.front.count() > earlier + 300, "hardly anything was sent");
    let changing: Vec<_> = attacks
        .iter()
        .filter(|it| it.upgrade || !["GET", "OPTIONS"].contains(&it.method.as_str()))
        .cloned()
        .collect();
    let came = came_with(&changing, SESSION_COOKIE);
    ensure!(
        came > 100,
        "the cookie came with {came} of {} requests only",
        changing.len()
    );
    for it in changing {
        ensure!(it.status == 403, "not refused: {it:?}");
    }
    cannot_be_framed(site).await
}

/// The cookie comes along to a frame of the same site, so that only the headers keep our page from being shown.
async fn cannot_be_framed(site: &Site<'_>) -> Result<()> {
    for (address, shown) in [(site.front.control() + "/account", false), (site.hostile(), true)] {
        site.evil.goto(&site.hostile()).await?;
        let loaded = format!(
            "new Promise(done => {{ const it = document.createElement('iframe'); it.src = '{address}'; \
             it.onload = () => done(true); document.body.append(it); }})"
        );
        site.evil.eval(&loaded).await?;
        let tree = site.evil.call("Page.getFrameTree", json!({})).await?;
        let frame = &tree["frameTree"]["childFrames"][0]["frame"];
        let refused = frame["url"] == "chrome-error://chromewebdata/";
        ensure!(refused != shown, "{address} in a frame: {frame}");
    }
    let account = site.front.passed(&site.front.control(), "/account");
    let framed: Vec<_> = account.into_iter().filter(|it| it.dest == "iframe").collect();
    ensure!(
        came_with(&framed, SESSION_COOKIE) > 0,
        "the frame came without the cookie"
    );
    Ok(())
}

/// A sibling may set cookies for the whole site. None of them is ever taken for ours, and ours are not lost.
async fn cookies_of_a_sibling(site: &Site<'_>) -> Result<()> {
    site.evil.goto(&site.hostile()).await?;
    let forged = "A".repeat(43);
    let names = [
        "tossed",
        SESSION_COOKIE,
        APP_COOKIE,
        "\u{2000}__Host-choir",
        "__host-choir",
    ];
    for name in names {
        let cookie = json!(format!(
            "{name}={forged}; Domain=choir.test; Path=/; Secure; SameSite=Lax"
        ));
        site.evil.eval(&format!("document.cookie = {cookie}; 1")).await?;
    }
    let earlier = site.front.passed(&site.front.control(), "/auth/me").len();
    person::is_signed_in(site.control).await?;
    let asked = site.front.passed(&site.front.control(), "/auth/me");
    let cookie = &asked.get(earlier).context("nothing was asked")?.cookie;
    // The control: what the sibling set does arrive at the control host, the look-alike included.
    for name in ["tossed", "\u{2000}__Host-choir"] {
        ensure!(
            cookie.contains(&format!("{name}={forged}")),
            "{name} was not tossed: {cookie}"
        );
    }
    Ok(())
}
