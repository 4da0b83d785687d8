//! What pages of other sites try against a signed-in person: the cases of the threat model's section on browser
//! origins. Each has a control that shows the attack would work where nothing stops it.

mod origins;
mod requests;
mod sessions;
mod shared;
mod sockets;
mod state;

pub use shared::{another_user_arrives, hosts_of_one_site_are_strangers};
pub use sockets::Before;

use anyhow::{Result, ensure};
use choir_api::client::Client;
use choir_core::{Slot, WorkspaceSettings};
use choir_e2e::browser::Browser;
use choir_e2e::instance::Instance;
use choir_e2e::page::Page;
use choir_e2e::person::{USER, WORKSPACE, workspace};
use choir_e2e::recorder::Recorder;
use choir_e2e::waiting::step;

/// Where everything is.
pub struct Scene<'a> {
    pub instance: &'a Instance,
    pub browser: &'a Browser,
    /// A tab at the control host, signed in.
    pub control: &'a Page,
    /// A tab for the attacker's pages, in the same browser.
    pub evil: &'a Page,
    /// Another server on `localhost`.
    pub other: &'a Recorder,
    pub client: &'a Client,
}

impl Scene<'_> {
    /// The control host's origin without a slash at its end.
    pub fn base(&self) -> String {
        self.instance.origin().origin().ascii_serialization()
    }

    pub fn app(&self, slot: Slot) -> String {
        let url = self.instance.app(slot.as_str(), WORKSPACE, USER);
        url.origin().ascii_serialization()
    }
}

/// What the hypervisor does by itself must not look like what an attack did.
pub fn without_a_schedule() -> WorkspaceSettings {
    WorkspaceSettings {
        snapshot_every_s: Some(0),
        ..WorkspaceSettings::default()
    }
}

/// `control` is signed in; live and dev serve their apps. The last of it uses a recovery code, and ends the token.
pub async fn all(
    browser: &Browser,
    control: &Page,
    instance: &Instance,
    client: &Client,
    before: &Before,
    code: &str,
) -> Result<()> {
    control.goto(instance.origin().as_str()).await?;
    client.patch_workspace(&workspace(), &without_a_schedule()).await?;
    let (evil, other) = (browser.page().await?, Recorder::start().await?);
    let scene = Scene {
        instance,
        browser,
        control,
        evil: &evil,
        other: &other,
        client,
    };
    step("A03", sockets::only_the_hypervisor_listens(&scene, before)).await?;
    step(
        "A01",
        requests::a_sandbox_page_calls_every_route_without_the_cookie(&scene),
    )
    .await?;
    step(
        "A02",
        requests::a_page_on_another_port_is_refused_although_the_cookie_comes(&scene),
    )
    .await?;
    step("A04", requests::navigating_to_any_route_changes_nothing(&scene)).await?;
    step("A05", origins::the_control_host_cannot_be_framed(&scene)).await?;
    step("A09", origins::a_sandbox_page_gets_no_passkey_assertion(&scene)).await?;
    step("A10", origins::live_and_dev_are_strangers(&scene)).await?;
    step("A14", origins::no_origin_may_read_the_control_host(&scene)).await?;
    let me = client.me().await?;
    ensure!(me.authenticated, "the token died under the attacks");
    step("B13", sessions::websockets_end_with_their_session(&scene, code)).await
}
