//! Swap, rollback and the rest, with real containers and a real disk: under load, and while everything dies.

mod kills;
mod load;
mod runbook;

use std::time::Duration;

use anyhow::{Result, ensure};
use choir_api::client::Client;
use choir_api::workspaces::{CreateRelease, CreateWorkspace, Deployment, Rollback};
use choir_core::deployment::Step;
use choir_core::settings::{Access, PerSlot};
use choir_core::{Slot, WorkspaceSettings};
use choir_e2e::instance::Instance;
use choir_e2e::person::{self, USER, WORKSPACE, app_config, run, workspace};
use choir_e2e::waiting::{PATIENCE, until};
use url::Url;

/// A workspace whose live serves the app under the mark `good`, and dev under `new`, both to everybody.
struct Scene {
    instance: Instance,
    client: Client,
    token: String,
    live: Url,
}

impl Scene {
    async fn new(instance: Instance) -> Result<Self> {
        let (client, token) = person::sign_in_with_token(&instance).await?;
        let image = client.releases().await?.items.remove(0).image_digest;
        let config = app_config();
        let release = client
            .create_release(&CreateRelease::of_image(&image, config))
            .await?
            .id;
        let made = CreateWorkspace {
            name: workspace(),
            release: Some(release),
        };
        client.create_workspace_from(&made).await?;
        let everybody = WorkspaceSettings {
            access: Some(PerSlot {
                live: Access::Public,
                dev: Access::Public,
            }),
            ..WorkspaceSettings::default()
        };
        client.patch_workspace(&workspace(), &everybody).await?;
        for (slot, mark) in [(Slot::Live, "good"), (Slot::Dev, "new")] {
            person::start(&client, slot).await?;
            run(&client, slot, &format!("echo {mark} > ~/mark")).await?;
            let restart = choir_api::client::SlotVerb::Restart;
            client.ask_slot(&workspace(), slot, restart, PATIENCE).await?;
        }
        let live = instance.app("live", WORKSPACE, USER);
        let scene = Self {
            instance,
            client,
            token,
            live,
        };
        scene.serves("good").await?;
        Ok(scene)
    }

    /// Live answers under this mark.
    async fn serves(&self, mark: &str) -> Result<()> {
        until(&format!("live to serve {mark}"), async || {
            Ok(self.answers_as(mark).await?.then_some(()))
        })
        .await
    }

    async fn answers_as(&self, mark: &str) -> Result<bool> {
        let answer = choir_e2e::http::send("GET", &self.live.join("count")?, &[], "").await?;
        Ok(answer.body.contains(&format!("\"mark\": \"{mark}\"")))
    }

    async fn swap(&self, key: &str) -> Result<Deployment> {
        well(self.client.swap(&workspace(), key, PATIENCE).await?)
    }

    async fn rollback(&self, key: &str) -> Result<Deployment> {
        let asked = Rollback { to: None };
        well(self.client.rollback(&workspace(), &asked, key, PATIENCE).await?)
    }

    /// What the app wrote down, in both sandboxes.
    async fn numbers(&self) -> Result<String> {
        let mut all = String::new();
        for slot in Slot::ALL {
            all += &run(&self.client, slot, "cat ~/numbers").await?;
        }
        Ok(all)
    }

    /// Which processes live and dev are, and since when; both run.
    async fn processes(&self) -> Result<[String; 2]> {
        let slots = self.client.workspace(&workspace()).await?.slots;
        let live = self.instance.container(slots.live.sandbox.as_str()).await?;
        let dev = self.instance.container(slots.dev.sandbox.as_str()).await?;
        Ok([self.instance.process(&live).await?, self.instance.process(&dev).await?])
    }

    /// How long each switch took, from before its commit until the routes are others, as the log says.
    fn switches(&self) -> Result<Vec<Duration>> {
        let log = std::fs::read_to_string(self.instance.path("up.log"))?;
        let times = log.lines().filter(|line| line.contains("switched"));
        let times = times.filter_map(|line| line.split("took_us=").nth(1)?.split(' ').next()?.parse().ok());
        Ok(times.map(Duration::from_micros).collect())
    }

    /// The invariants hold, once what was under way is done: as `fsck` sees it, and the hypervisor itself.
    async fn fits_together(&self) -> Result<()> {
        until("the invariants to hold", async || {
            let inside = self.client.fsck().await?.items;
            ensure!(inside.is_empty(), "{inside:?}");
            Ok(self.instance.operate(&["fsck"])?.starts_with("clean").then_some(()))
        })
        .await
    }
}

fn well(deployment: Deployment) -> Result<Deployment> {
    let step = deployment.step;
    ensure!(step == Step::Succeeded, "{}: {:?}", step.as_str(), deployment.reason);
    Ok(deployment)
}
