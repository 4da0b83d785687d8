//! Workspaces, lifecycle and swaps through the real router, over a simulated runtime and a temporary database.

mod access;
mod admission;
mod asleep;
mod audit;
mod backup;
mod clear;
mod deadline;
mod downloads;
mod egress;
mod events;
mod guard;
mod lifecycle;
mod own;
mod ports;
mod pressure;
mod prove;
mod raw;
mod releases;
mod secrets;
mod service;
mod sockets;
mod strangers;
mod swap;
mod tls_ask;
mod undo;
mod wire;

use std::sync::Arc;

use crate::support::Browser;
use axum::Router;
use axum::http::StatusCode;
use choir_core::{SandboxId, Slot};
use choir_hypervisor::app::App;
use choir_hypervisor::clock::{Clock, SystemClock};
use choir_hypervisor::config::Config;
use choir_hypervisor::egress::Outside;
use choir_hypervisor::random::OsRandom;
use choir_hypervisor::router::router;
use choir_hypervisor::serve::{Parts, compose, take_over};
use choir_runtime::sim::World;
use choir_runtime::{Sim, SimVolumes};
use serde_json::{Value, json};

/// One hypervisor over a world that outlives it.
struct Box {
    directory: Arc<tempfile::TempDir>,
    world: World,
    volumes: SimVolumes,
    sim: Arc<Sim>,
    app: Arc<App>,
    router: Router,
}

impl Box {
    async fn new() -> Self {
        Self::with(|_| {}).await
    }

    /// With another configuration than the default one.
    async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let start = Self::without_image(change).await;
        start
            .app
            .releases
            .ensure_default(std::path::Path::new("default-1.tar"))
            .await;
        start
    }

    /// Before there is anything for a workspace to start from.
    async fn without_image(change: impl FnOnce(&mut Config)) -> Self {
        let directory = Arc::new(tempfile::tempdir().unwrap());
        let mut config = Config::default();
        config.store.path = directory.path().join("choir.db");
        change(&mut config);
        Self::compose(
            directory,
            Arc::new(config),
            World::new(),
            SimVolumes::default(),
            Outside::system(),
        )
        .await
    }

    async fn compose(
        directory: Arc<tempfile::TempDir>,
        config: Arc<Config>,
        world: World,
        volumes: SimVolumes,
        outside: Outside,
    ) -> Self {
        let begun = Self::begin(directory, config, world, volumes, outside).await;
        take_over(&begun.app).await.unwrap();
        begun
    }

    /// A hypervisor that answers already and has not looked yet what runs.
    async fn begin(
        directory: Arc<tempfile::TempDir>,
        config: Arc<Config>,
        world: World,
        volumes: SimVolumes,
        outside: Outside,
    ) -> Self {
        let sim = Arc::new(Sim::new(world.clone()));
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let parts = Parts {
            runtime: sim.clone(),
            volumes: Arc::new(volumes.clone()),
            clock,
            random: Arc::new(OsRandom),
            outside,
        };
        let app = compose(config, parts).await.unwrap();
        let router = router(&app);
        Self {
            directory,
            world,
            volumes,
            sim,
            app,
            router,
        }
    }

    /// The same database and world under a new process: nothing is left in memory.
    async fn restarted(&self) -> Self {
        let config = self.app.config.clone();
        let outside = self.app.outside.clone();
        Self::compose(
            self.directory.clone(),
            config,
            self.world.clone(),
            self.volumes.clone(),
            outside,
        )
        .await
    }

    fn browser(&self) -> Browser {
        Browser::new(self.router.clone())
    }

    async fn ada(&self) -> Browser {
        let mut browser = self.browser();
        let claim = self
            .app
            .auth
            .ensure_claim()
            .await
            .unwrap()
            .expect("nobody has registered");
        browser
            .register("ada", Some(claim.expose()))
            .await
            .expect(StatusCode::OK);
        browser
    }

    async fn member(&self, admin: &mut Browser, name: &str) -> Browser {
        let invite = admin
            .post("/admin/invites", json!({}))
            .await
            .expect(StatusCode::CREATED);
        let mut browser = self.browser();
        browser
            .register(name, invite["invite"].as_str())
            .await
            .expect(StatusCode::OK);
        browser
    }
}

/// Makes the workspace `main` and returns its two sandboxes, live first.
async fn workspace(browser: &mut Browser) -> [SandboxId; 2] {
    let made = browser
        .post("/api/workspaces", json!({"name": "main"}))
        .await
        .expect(StatusCode::CREATED);
    Slot::ALL.map(|slot| sandbox(&made, slot))
}

fn sandbox(workspace: &Value, slot: Slot) -> SandboxId {
    workspace["slots"][slot.as_str()]["sandbox"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap()
}

/// Asks for a change of a slot and waits until it is so; the slot then.
async fn change(browser: &mut Browser, slot: Slot, verb: &str) -> Value {
    let path = format!("/api/workspaces/main/slots/{slot}/{verb}?wait_s=20");
    browser.post(&path, json!({})).await.expect(StatusCode::ACCEPTED)
}

async fn shown(browser: &mut Browser) -> Value {
    browser.get("/api/workspaces/main").await.expect(StatusCode::OK)
}
