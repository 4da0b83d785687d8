//! A person with a real browser: from the claim link to a swap, and what pages of other sites try meanwhile.

mod attacks;

use anyhow::{Result, ensure};
use choir_api::client::Client;
use choir_core::Slot;
use choir_e2e::browser::Browser;
use choir_e2e::instance::Instance;
use choir_e2e::page::Page;
use choir_e2e::person::{self, USER, WORKSPACE};
use choir_e2e::skip;
use choir_e2e::waiting::{step, until};

const SECTION: &str = "[data-workspace=main]";

#[tokio::test]
async fn a_person_registers_recovers_and_swaps_in_a_browser_and_no_other_site_can_interfere() -> Result<()> {
    if skip::cannot_run("browser") {
        return Ok(());
    }
    let before = attacks::Before::now()?;
    let instance = Instance::up(&[])?;
    let browser = Browser::start().await?;
    let page = browser.page().await?;

    let codes = step("register by the claim link", person::register(&page, &instance)).await?;
    ensure!(codes.len() == 10, "{} recovery codes were shown", codes.len());
    step("log out", person::log_out(&page)).await?;
    step("log in", person::log_in(&page)).await?;
    step("log out again", person::log_out(&page)).await?;
    step("recover with a code", recover(&page, &codes[0])).await?;
    let client = person::token(&page, &instance, &person::EVERYTHING).await?;

    step("create a workspace", create_workspace(&page, &instance)).await?;
    for slot in Slot::ALL {
        step(&format!("start {slot}"), start_by_button(&page, slot)).await?;
        person::serve_app(&client, slot, &format!("app-of-{slot}")).await?;
    }
    for slot in Slot::ALL {
        step(
            &format!("open {slot}"),
            open_app(&page, &instance, slot, &format!("app-of-{slot}")),
        )
        .await?;
    }
    step("swap", swap_by_button(&page, &instance, &client)).await?;
    for (slot, app) in [(Slot::Live, "app-of-dev"), (Slot::Dev, "app-of-live")] {
        step(&format!("open {slot}, swapped"), open_app(&page, &instance, slot, app)).await?;
    }

    let stranger = browser.stranger().await?;
    step(
        "another user",
        attacks::another_user_arrives(&stranger, &instance, &client),
    )
    .await?;
    attacks::all(&browser, &page, &instance, &client, &before, &codes[1]).await?;
    drop(browser);
    attacks::hosts_of_one_site_are_strangers(&instance, &codes[2]).await
}

/// On the device that still has the old passkey, which can hold no second one for the account, and then on a new one.
async fn recover(page: &Page, code: &str) -> Result<()> {
    person::show_code(page, code).await?;
    page.click("form[data-do=new-passkey] button").await?;
    let told = page
        .wait("document.querySelector('#error:not([hidden])')?.textContent")
        .await?;
    let told = told.as_str().unwrap_or_default();
    ensure!(
        told.contains("already has a passkey"),
        "a device with the old passkey is told: {told}"
    );
    page.new_device().await?;
    person::make_passkey(page, 9).await
}

async fn create_workspace(page: &Page, instance: &Instance) -> Result<()> {
    page.goto(instance.origin().as_str()).await?;
    page.fill("#name", WORKSPACE).await?;
    page.click("form[data-do=create] button").await?;
    page.wait(&format!("document.querySelector('{SECTION}')")).await?;
    Ok(())
}

async fn start_by_button(page: &Page, slot: Slot) -> Result<()> {
    let row = format!("{SECTION} [data-slot={slot}]");
    page.click(&format!("{row} button[data-do=start]")).await?;
    page.wait_text(&format!("{row} [data-show=state]"), "ready").await
}

/// By the link on the status page; the login at the sandbox's host happens by itself.
async fn open_app(page: &Page, instance: &Instance, slot: Slot, mark: &str) -> Result<()> {
    page.goto(instance.origin().as_str()).await?;
    page.click(&format!("{SECTION} [data-slot={slot}] a")).await?;
    page.wait_text("h1", mark).await?;
    page.wait_text("p", &format!("{mark}:ping")).await?;
    let at = page.eval("location.href").await?;
    let expected = instance.app(slot.as_str(), WORKSPACE, USER);
    ensure!(at == expected.as_str(), "{slot} opened at {at} and not at {expected}");
    Ok(())
}

async fn swap_by_button(page: &Page, instance: &Instance, client: &Client) -> Result<()> {
    let before = client.workspace(&person::workspace()).await?.slots;
    page.goto(instance.origin().as_str()).await?;
    page.click(&format!("{SECTION} button[data-do=swap]")).await?;
    page.wait("document.querySelector('#status').textContent.startsWith('Swapped in ')")
        .await?;
    until("the swapped slots", async || {
        let after = client.workspace(&person::workspace()).await?.slots;
        let swapped = after.live.sandbox == before.dev.sandbox && after.dev.sandbox == before.live.sandbox;
        Ok(swapped.then_some(()))
    })
    .await
}
