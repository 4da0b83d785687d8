//! Workspaces: making, showing, changing and deleting them, and what is asked of a slot. It must not know HTTP.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use choir_api::workspaces as api;
use choir_core::own::FILE;
use choir_core::sandbox::Desired;
use choir_core::settings::DEFAULT_APP_PORT;
use choir_core::{Awake, Name, Own, ReleaseConfig, SandboxId, Slot, UserId, WorkspaceId, WorkspaceSettings};
use choir_store::{AuditEvent, NewWorkspace, User, WorkspaceView};
use serde_json::Value;

use crate::app::{App, apart};
use crate::error::{ApiError, ApiResult};
use crate::random::draw;
use crate::reconcile::{Handle, launch};
use crate::releases::DefaultRelease;

pub mod routes;
mod slots;

/// Workspaces one user may have.
const MOST_WORKSPACES: usize = 50;

impl App {
    /// Makes a workspace; its volumes are made in the background.
    pub async fn create_workspace(
        self: &Arc<Self>,
        user: &User,
        asked: api::CreateWorkspace,
    ) -> ApiResult<WorkspaceView> {
        if self.store.workspaces_of(&user.id).await?.len() >= MOST_WORKSPACES {
            let message = format!("You have {MOST_WORKSPACES} workspaces, which is the most; delete one first.");
            return Err(ApiError::conflict("too_many_workspaces", message));
        }
        let release = match asked.release {
            Some(id) => self.releases.usable(&id, &user.id).await?,
            None => self.releases.newest().await?.ok_or_else(|| self.no_release())?,
        };
        let new = NewWorkspace {
            id: WorkspaceId::from_random(draw(&*self.random)),
            user: user.id.clone(),
            name: asked.name,
            release: release.id,
            live: SandboxId::from_random(draw(&*self.random)),
            dev: SandboxId::from_random(draw(&*self.random)),
            desired: match self.config.sandboxes.awake {
                Awake::Always => Desired::Running,
                Awake::OnDemand | Awake::At(_) => Desired::Stopped,
            },
            at: self.clock.now(),
        };
        let audit = AuditEvent {
            at: new.at,
            actor: user.id.to_string(),
            user: Some(user.id.clone()),
            action: "workspace.create",
            subject: new.id.to_string(),
            outcome: "ok",
        };
        let app = self.clone();
        apart(async move { app.record_workspace(new, audit).await }).await
    }

    async fn record_workspace(&self, new: NewWorkspace, audit: AuditEvent) -> ApiResult<WorkspaceView> {
        let (user, name) = (new.user.clone(), new.name.clone());
        let view = match self.store.create_workspace(new, audit).await {
            Err(choir_store::Error::Exists) => return Err(self.name_taken(&user, &name).await),
            made => made?,
        };
        for slot in Slot::ALL {
            self.fleet.add(&view, view.slot(slot));
        }
        self.publish(&view).await;
        Ok(view)
    }

    async fn name_taken(&self, user: &UserId, name: &Name) -> ApiError {
        let message = match self.store.workspace_named(user, name).await {
            Err(choir_store::Error::NotFound) => {
                format!("A workspace named {name} is still being deleted; try again in a moment.")
            }
            _ => format!("You have a workspace named {name} already; choose another name."),
        };
        ApiError::conflict("name_taken", message)
    }

    fn no_release(&self) -> ApiError {
        let (code, message) = match self.releases.default_state() {
            DefaultRelease::Failed(reason) => (
                "no_release",
                format!("There is no release to start from: {reason}. Ask the operator to look at the log."),
            ),
            DefaultRelease::Missing => (
                "release_missing",
                "The default release is still being made, which takes some minutes after installing; try again then."
                    .to_owned(),
            ),
            _ => (
                "release_importing",
                "The default release is still being imported; try again in a minute.".to_owned(),
            ),
        };
        ApiError::unavailable(code, message).retry_after(10)
    }

    /// A user's own workspace by name; anybody else's is not there.
    pub async fn workspace(&self, user: &User, name: &str) -> ApiResult<WorkspaceView> {
        let name: Name = name
            .parse()
            .map_err(|e| ApiError::bad_request("bad_name", format!("{e}.")))?;
        Ok(self.store.workspace_named(&user.id, &name).await?)
    }

    /// Puts new settings into effect: routes and policy at once, limits as far as the runtime can.
    pub async fn patch_workspace(
        self: &Arc<Self>,
        view: &WorkspaceView,
        patch: WorkspaceSettings,
    ) -> ApiResult<WorkspaceView> {
        patch
            .validate()
            .map_err(|e| ApiError::bad_request("bad_setting", format!("{e}.")))?;
        let (app, view) = (self.clone(), view.clone());
        apart(async move { app.settle(&view, patch).await }).await
    }

    async fn settle(&self, view: &WorkspaceView, patch: WorkspaceSettings) -> ApiResult<WorkspaceView> {
        let audit = self.event(view, "workspace.change");
        let after = self
            .store
            .patch_settings(&view.workspace.id, patch.clone(), audit)
            .await?;
        self.publish(&after).await;
        if patch.limits.is_some() {
            self.fleet.limits_changed(&after).await;
        }
        for slot in Slot::ALL {
            let awake = patch.awake.as_ref().map(|awake| awake.get(slot));
            if awake == Some(&Awake::Always) {
                let audit = self.event(&after, "sandbox.start");
                self.handle(&after, slot)?.desire(Desired::Running, audit).await?;
            }
        }
        Ok(after)
    }

    /// Takes the hosts away and has containers, volumes and rows removed; whether they were within `wait`.
    pub async fn delete_workspace(self: &Arc<Self>, view: &WorkspaceView, wait: Duration) -> ApiResult<bool> {
        let handles = Slot::ALL.map(|slot| self.fleet.handle(&view.slot(slot).id));
        let (app, view) = (self.clone(), view.clone());
        apart(async move { app.begin_deletion(&view).await }).await?;
        let gone = async {
            for handle in handles.into_iter().flatten() {
                // Its worker ends after its rows.
                let mut status = handle.status.clone();
                while status.changed().await.is_ok() {}
            }
        };
        Ok(tokio::time::timeout(wait, gone).await.is_ok())
    }

    async fn begin_deletion(&self, view: &WorkspaceView) -> ApiResult<()> {
        let audit = self.event(view, "workspace.delete");
        let after = self.store.delete_workspace(&view.workspace.id, audit).await?;
        self.publish(&after).await;
        for slot in Slot::ALL {
            if let Some(handle) = self.fleet.handle(&after.slot(slot).id) {
                handle.delete().await;
            }
        }
        Ok(())
    }

    pub(crate) fn handle(&self, view: &WorkspaceView, slot: Slot) -> ApiResult<Handle> {
        self.fleet.handle(&view.slot(slot).id).ok_or_else(ApiError::not_found)
    }

    /// A workspace as the API shows it, with what is seen of its sandboxes now.
    pub async fn show(&self, view: &WorkspaceView) -> api::Workspace {
        let workspace = &view.workspace;
        api::Workspace {
            id: workspace.id.clone(),
            name: workspace.name.clone(),
            user: workspace.user_name.clone(),
            created_at: workspace.created_at,
            settings: workspace.settings.clone(),
            slots: api::Slots {
                live: self.show_slot(view, Slot::Live).await,
                dev: self.show_slot(view, Slot::Dev).await,
            },
            open_deployment: view.open_deployment.clone(),
            undo: self.show_undo(view).await,
        }
    }

    async fn show_undo(&self, view: &WorkspaceView) -> Option<api::Undo> {
        let undo = self.undo(view).await.ok().flatten()?;
        Some(api::Undo {
            kind: undo.deployment.kind,
            at: undo.deployment.finished_at.unwrap_or(undo.deployment.created_at),
            deployment: undo.deployment.id,
            warm: undo.warm,
        })
    }

    pub async fn show_slot(&self, view: &WorkspaceView, slot: Slot) -> api::SlotView {
        let sandbox = view.slot(slot);
        let release = self.releases.config(&sandbox.release).await.unwrap_or_default();
        let own = self.says(view, slot);
        let mut shown = api::SlotView {
            slot,
            sandbox: sandbox.id.clone(),
            release: sandbox.release.clone(),
            desired: sandbox.desired,
            state: String::new(),
            generation: None,
            since: None,
            reason: None,
            address: self.address(view, slot),
            limits: launch::limits(view, &self.config, &release, &own),
            app_port: launch::app_port(view, &release, &own),
            choir_toml: shown_own(&own),
        };
        match self.fleet.handle(&sandbox.id) {
            Some(handle) => {
                let status = handle.status.borrow().clone();
                shown.desired = status.desired;
                shown.observe(&status.observed);
                shown.lacked_memory(status.oom_kills);
                if handle.held_back() {
                    shown.lacks_memory();
                }
                if let Some(before) = handle.in_line() {
                    shown.queue(self.config.sandboxes.max_running, before);
                }
            }
            None => shown.observe(&sandbox.observed),
        }
        shown
    }

    /// Each setting in effect for a slot and the layer it comes from.
    pub async fn effective(&self, view: &WorkspaceView, slot: Slot) -> ApiResult<api::EffectiveConfig> {
        let release = self.store.release(&view.slot(slot).release).await?.config;
        let settings = &view.workspace.settings;
        let mut effective: BTreeMap<String, api::EffectiveSetting> = BTreeMap::new();
        let mut layer = |from: &str, values: Value| {
            if values.get("health").is_some() {
                // A check takes the place of another one whole.
                effective.retain(|name, _| !name.starts_with("health."));
            }
            for (name, value) in flat(values) {
                // A value in parts takes the place of one word: `egress.allowlist` that of `egress`.
                if let Some((whole, _)) = name.split_once('.') {
                    effective.remove(whole);
                }
                effective.insert(
                    name,
                    api::EffectiveSetting {
                        value,
                        from: from.to_owned(),
                    },
                );
            }
        };
        layer("default", self.defaults());
        layer("release", without_empty(&release));
        layer("workspace", serde_json::to_value(settings).unwrap_or_default());
        let own = self.says(view, slot);
        if let Some(config) = own.config() {
            let allowed = launch::limits(view, &self.config, &release, &Own::Silent);
            let config = ReleaseConfig {
                limits: allowed.lowered_by(&config.limits),
                ..config.clone()
            };
            layer(FILE, without_empty(&config));
        }
        Ok(api::EffectiveConfig {
            settings: effective,
            choir_toml: shown_own(&own),
        })
    }

    fn defaults(&self) -> Value {
        let sandboxes = &self.config.sandboxes;
        serde_json::json!({
            "app_port": DEFAULT_APP_PORT,
            "limits": self.config.limits(),
            "access": {"live": "private", "dev": "private"},
            "awake": {"live": sandboxes.awake, "dev": sandboxes.awake},
            "idle_pause_s": sandboxes.idle_pause_s,
            "idle_stop_s": sandboxes.idle_stop_s,
            "snapshot_every_s": sandboxes.snapshot_every_s,
            "service_workers": false,
            "forward_authorization": false,
            "egress": "open",
            "intercept_tls": false,
            "provider_mode": "none",
        })
    }
}

/// Whether a slot's `choir.toml` is in effect; `None` where there is none.
fn shown_own(own: &Own) -> Option<api::ChoirToml> {
    match own {
        Own::Silent => None,
        Own::Says(_) => Some(api::ChoirToml::InEffect),
        Own::Refused(reason) => Some(api::ChoirToml::Refused { reason: reason.clone() }),
    }
}

/// A release's config without what it leaves open.
fn without_empty(release: &ReleaseConfig) -> Value {
    let mut value = serde_json::to_value(release).unwrap_or_default();
    if let Value::Object(fields) = &mut value {
        fields.retain(|_, v| v.as_object().is_none_or(|o| !o.is_empty()));
    }
    value
}

/// `{"limits":{"memory":1}}` as `limits.memory → 1`: one row a value.
fn flat(value: Value) -> Vec<(String, Value)> {
    let Value::Object(fields) = value else {
        return Vec::new();
    };
    let mut rows = Vec::new();
    for (name, value) in fields {
        match value {
            Value::Object(_) => rows.extend(flat(value).into_iter().map(|(inner, v)| (format!("{name}.{inner}"), v))),
            Value::Null => {}
            other => rows.push((name, other)),
        }
    }
    rows
}
