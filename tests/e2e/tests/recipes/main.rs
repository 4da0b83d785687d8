//! The recipes are true: their blocks, read by the real proxies before a real hypervisor, carry what people do, and
//! without one of the lines they do not.

mod proxies;
mod visitor;

use anyhow::{Context as _, Result, ensure};
use choir_api::client::{Client, CreateInvite};
use choir_api::sandbox::{Command, CreateTask};
use choir_core::settings::{Access, PerSlot};
use choir_core::{Slot, WorkspaceSettings};
use choir_e2e::instance::Instance;
use choir_e2e::person::{self, exec, workspace};
use choir_e2e::skip;
use choir_e2e::waiting::{step, until};
use choir_hypervisor::config::Config;

use crate::proxies::{Place, Proxy, SANDBOXES, blocks};
use crate::visitor::{Carries, Visitor, app};

/// Every page with settings of the hypervisor.
const PAGES: [&str; 7] = [
    "nginx.md",
    "caddy.md",
    "traefik.md",
    "lan.md",
    "tailscale.md",
    "cloudflare-tunnel.md",
    "one-domain.md",
];

const APP: &str = include_str!("app.py");

#[tokio::test(flavor = "multi_thread")]
async fn what_people_do_goes_through_the_proxy_of_every_recipe() -> Result<()> {
    if skip::cannot_run("recipes") {
        return Ok(());
    }
    let scene = step("the box", Scene::up()).await?;
    step("nginx", scene.nginx()).await?;
    step("nginx without one of its lines", scene.nginx_without()).await?;
    step("Caddy", scene.caddy("caddy.md")).await?;
    step("Caddy, on demand", scene.on_demand()).await?;
    step("a LAN", scene.caddy("lan.md")).await?;
    step("Tailscale", scene.caddy("tailscale.md")).await?;
    if !skip::is_installed("traefik") {
        let reason = "there is no traefik on the path, so its files were only parsed";
        skip::says("recipes, Traefik", reason);
        return Ok(());
    }
    step("Traefik", scene.traefik()).await
}

#[test]
fn the_hypervisor_takes_the_settings_of_every_recipe() -> Result<()> {
    for page in PAGES {
        let all = blocks(page, "toml")?;
        ensure!(all.len() == 1, "{page} has {} blocks of settings", all.len());
        let warnings = judged(&all[0]).with_context(|| page.to_owned())?;
        ensure!(
            warnings == usize::from(page == "one-domain.md"),
            "{page}: {warnings} warnings"
        );
    }
    // The control: the one domain is refused where nobody said that it is meant.
    let one = blocks("one-domain.md", "toml")?.concat();
    let unsaid = one.replace("allow_shared_domain = true\n", "");
    ensure!(unsaid != one && judged(&unsaid).is_err(), "one domain passes unsaid");
    Ok(())
}

#[test]
fn the_files_of_traefik_name_both_kinds_of_host() -> Result<()> {
    let read = |kind: &str| -> Result<toml::Table> { Ok(blocks("traefik.md", kind)?.concat().parse()?) };
    let (fixed, dynamic) = (read("traefik-static")?, read("traefik-dynamic")?);
    let timeouts = &fixed["entryPoints"]["websecure"]["transport"]["respondingTimeouts"];
    ensure!(timeouts["readTimeout"].as_str() == Some("0s"), "{timeouts}");
    let http = &dynamic["http"];
    let rule = http["routers"]["choir"]["rule"].as_str().unwrap_or_default();
    ensure!(
        rule.contains("choir.example.com") && rule.contains("choir-apps"),
        "{rule}"
    );
    let server = &http["services"]["choir"]["loadBalancer"]["servers"][0];
    ensure!(server["url"].as_str() == Some("http://127.0.0.1:9090"), "{server}");
    Ok(())
}

/// How many warnings settings have that are not refused.
fn judged(settings: &str) -> Result<usize> {
    let config: Config = toml::from_str(settings)?;
    Ok(config.judge()?.len())
}

/// A box whose hypervisor is set as the recipes say, and an app that everybody may open.
struct Scene {
    instance: Instance,
    place: Place,
    invites: Vec<String>,
}

impl Scene {
    async fn up() -> Result<Self> {
        let instance = Instance::up(&[])?;
        let client = person::sign_in(&instance).await?;
        serve(&client).await?;
        let mut invites = Vec::new();
        for _ in 0..3 {
            invites.push(client.create_invite(&CreateInvite { role: None }).await?.url);
        }
        let place = Place::new(instance.port())?;
        let settings = place.block("nginx.md", "toml", 0)?;
        for page in ["caddy.md", "traefik.md", "lan.md", "tailscale.md"] {
            ensure!(place.block(page, "toml", 0)? == settings, "{page} has other settings");
        }
        let settings: toml::Table = settings.parse()?;
        instance.reconfigure(|config| set(config, settings))?;
        Ok(Self {
            instance,
            place,
            invites,
        })
    }

    async fn nginx(&self) -> Result<()> {
        let proxy = self.place.nginx(None).await?;
        let visitor = self.everything(&proxy).await?;
        visitor.smoke(&self.instance, &self.invites[0])?;
        let block = blocks("nginx.md", "nginx")?.concat();
        for line in [
            "proxy_read_timeout 1h;",
            "proxy_send_timeout 1h;",
            "proxy_request_buffering off;",
        ] {
            ensure!(block.contains(line), "`{line}` is gone");
        }
        Ok(())
    }

    async fn nginx_without(&self) -> Result<()> {
        for (line, lost) in [
            ("header Host", Carries::Pages),
            ("header X-Forwarded-For", Carries::Requests),
            ("header X-Forwarded-Proto", Carries::Websockets),
            ("header Upgrade", Carries::Websockets),
            ("header Connection", Carries::Websockets),
            ("client_max_body_size", Carries::Uploads),
            ("proxy_buffering", Carries::Parts),
        ] {
            let proxy = self.place.nginx(Some(line)).await?;
            let visitor = Visitor::new(self.place.port, &proxy)?;
            let wanted = if lost == Carries::Pages { 421 } else { 200 };
            let status = visitor.liveness().await?;
            ensure!(status == wanted, "without `{line}` the liveness is {status}");
            visitor
                .misses(lost)
                .await
                .with_context(|| format!("without `{line}`"))?;
        }
        Ok(())
    }

    async fn caddy(&self, page: &str) -> Result<()> {
        let proxy = self.place.caddy(page, 0).await?;
        let visitor = self.everything(&proxy).await?;
        if page == "caddy.md" {
            visitor.smoke(&self.instance, &self.invites[1])?;
        }
        Ok(())
    }

    async fn on_demand(&self) -> Result<()> {
        let proxy = self.place.caddy("caddy.md", 1).await?;
        let visitor = self.everything(&proxy).await?;
        for host in ["live--main--nobody", "5174--live--main--ada", "www"] {
            let host = format!("{host}.{SANDBOXES}");
            ensure!(visitor.status_of(&host).await.is_err(), "{host} has a certificate");
        }
        // The controls: a host beside them, and a port that the workspace names.
        ensure!(visitor.status_of(&app()).await? == 200, "{} has none", app());
        let named = format!("5173--{}", app());
        ensure!(visitor.status_of(&named).await? == 401, "{named} is open");
        Ok(())
    }

    async fn traefik(&self) -> Result<()> {
        let proxy = self.place.traefik().await?;
        let visitor = self.everything(&proxy).await?;
        visitor.smoke(&self.instance, &self.invites[2])
    }

    /// What every proxy must carry, once the hypervisor behind it is there.
    async fn everything<'p>(&self, proxy: &'p Proxy) -> Result<Visitor<'p>> {
        let visitor = Visitor::new(self.place.port, proxy)?;
        until("the hypervisor behind the proxy", async || {
            Ok((visitor.liveness().await? == 200).then_some(()))
        })
        .await?;
        for what in Carries::ALL {
            visitor.finds(what).await?;
        }
        visitor.http_2()?;
        Ok(visitor)
    }
}

/// Starts the app in a live that everybody may open, and names one more port.
async fn serve(client: &Client) -> Result<()> {
    client.create_workspace(&workspace()).await?;
    let open = WorkspaceSettings {
        access: Some(PerSlot {
            live: Access::Public,
            dev: Access::Private,
        }),
        ports: Some([(5173, Access::Private)].into()),
        ..WorkspaceSettings::default()
    };
    client.patch_workspace(&workspace(), &open).await?;
    person::start(client, Slot::Live).await?;
    let task = CreateTask {
        command: Command::Argv(["python3", "-c", APP].map(str::to_owned).into()),
        cwd: None,
        env: [].into(),
        timeout_ms: None,
    };
    client.sandbox(&workspace(), Slot::Live).create_task(&task).await?;
    until("the app to listen", async || {
        let asked = exec(client, Slot::Live, "curl -fsS http://127.0.0.1:3000/").await?;
        Ok((asked.exit.exit_code == 0).then_some(()))
    })
    .await
}

/// Puts a recipe's settings among those that are there. `up` names a relying party, which a recipe leaves out.
fn set(config: &mut toml::Table, settings: toml::Table) {
    for (name, values) in settings {
        let section = config.entry(name).or_insert_with(|| toml::Table::new().into());
        if let (Some(section), toml::Value::Table(values)) = (section.as_table_mut(), values) {
            section.remove("rp_id");
            section.extend(values);
        }
    }
}
