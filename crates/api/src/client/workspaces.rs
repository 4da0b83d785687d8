//! Calls about workspaces, slots, deployments and releases. It must not know how they are shown.

use std::io::Read;
use std::time::Duration;

use choir_core::snapshot::Diff;
use choir_core::{Name, ReleaseConfig, ReleaseId, Slot, SnapshotId, WorkspaceSettings};
use reqwest::Method;
use reqwest::header::ACCEPT;

use super::{Client, ClientError, Download, Events, Request, Sandbox, read, segment};
use crate::workspaces::{
    CreateRelease, CreateWorkspace, Deploy, Deployment, EffectiveConfig, Fork, LogLine, Page, Release, Rollback,
    SlotStats, SlotView, Snapshot, Workspace,
};

/// As long as the hypervisor waits for a comparison.
const COMPARING: Duration = Duration::from_secs(120);

/// What can be asked of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotVerb {
    Start,
    Stop,
    Restart,
    Pause,
}

impl SlotVerb {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Restart => "restart",
            Self::Pause => "pause",
        }
    }
}

fn workspace(name: &Name) -> String {
    format!("/api/workspaces/{}", segment(name.as_str()))
}

fn slot_path(name: &Name, slot: Slot) -> String {
    format!("{}/slots/{slot}", workspace(name))
}

impl Client {
    /// Every workspace of the caller.
    ///
    /// # Errors
    /// Any.
    pub async fn workspaces(&self) -> Result<Vec<Workspace>, ClientError> {
        let mut all = Vec::new();
        let mut path = "/api/workspaces".to_owned();
        loop {
            let page: Page<Workspace> = self.get(&path).await?;
            all.extend(page.items);
            match page.next_cursor {
                Some(cursor) => path = format!("/api/workspaces?cursor={}", segment(&cursor)),
                None => return Ok(all),
            }
        }
    }

    /// # Errors
    /// Any; 404 where there is none of this name.
    pub async fn workspace(&self, name: &Name) -> Result<Workspace, ClientError> {
        self.get(&workspace(name)).await
    }

    /// # Errors
    /// Any; 409 where the name is taken.
    pub async fn create_workspace(&self, name: &Name) -> Result<Workspace, ClientError> {
        let body = CreateWorkspace {
            name: name.clone(),
            release: None,
        };
        self.create_workspace_from(&body).await
    }

    /// # Errors
    /// Any; 409 where the name is taken.
    pub async fn create_workspace_from(&self, asked: &CreateWorkspace) -> Result<Workspace, ClientError> {
        self.post("/api/workspaces", asked).await
    }

    /// Deletes both sandboxes with everything in them. `patience`: how long the server may take.
    ///
    /// # Errors
    /// Any.
    pub async fn delete_workspace(&self, name: &Name, patience: Duration) -> Result<(), ClientError> {
        let path = format!("{}?wait_s={}", workspace(name), patience.as_secs());
        let request = Request::new(Method::DELETE, path).patient(Some(patience));
        self.send(request).await.map(drop)
    }

    /// # Errors
    /// Any.
    pub async fn patch_workspace(&self, name: &Name, patch: &WorkspaceSettings) -> Result<Workspace, ClientError> {
        self.json(Method::PATCH, &workspace(name), Some(patch)).await
    }

    /// # Errors
    /// Any.
    pub async fn config(&self, name: &Name, slot: Slot) -> Result<EffectiveConfig, ClientError> {
        self.get(&format!("{}/config?slot={slot}", workspace(name))).await
    }

    /// Asks and waits up to `wait` for it to be so; the answer may still be on its way.
    ///
    /// # Errors
    /// Any.
    pub async fn ask_slot(
        &self,
        name: &Name,
        slot: Slot,
        verb: SlotVerb,
        wait: Duration,
    ) -> Result<SlotView, ClientError> {
        let path = format!("{}/{}?wait_s={}", slot_path(name, slot), verb.as_str(), wait.as_secs());
        let request = Request::new(Method::POST, path)
            .body(&serde_json::json!({}))?
            .patient(Some(wait));
        read(self.send(request).await?).await
    }

    /// Live becomes dev and dev live. The same key is the same swap, however often it is sent.
    ///
    /// # Errors
    /// Any; 409 `deployment_open` while another runs.
    pub async fn swap(&self, name: &Name, key: &str, wait: Duration) -> Result<Deployment, ClientError> {
        self.deployment_of(name, "/swap", serde_json::json!({}), key, wait)
            .await
    }

    /// What live was before a deployment comes back.
    ///
    /// # Errors
    /// Any; 409 `nothing_to_undo` where there is nothing, or not any more.
    pub async fn rollback(
        &self,
        name: &Name,
        asked: &Rollback,
        key: &str,
        wait: Duration,
    ) -> Result<Deployment, ClientError> {
        self.deployment_of(name, "/rollback", asked, key, wait).await
    }

    /// Dev becomes a copy.
    ///
    /// # Errors
    /// Any.
    pub async fn fork(&self, name: &Name, asked: &Fork, key: &str, wait: Duration) -> Result<Deployment, ClientError> {
        self.deployment_of(name, "/fork", asked, key, wait).await
    }

    /// A release into a slot.
    ///
    /// # Errors
    /// Any; 409 `release_not_usable`.
    pub async fn deploy(
        &self,
        name: &Name,
        slot: Slot,
        asked: &Deploy,
        key: &str,
        wait: Duration,
    ) -> Result<Deployment, ClientError> {
        let path = format!("/slots/{slot}/deploy");
        self.deployment_of(name, &path, asked, key, wait).await
    }

    /// A snapshot into a slot.
    ///
    /// # Errors
    /// Any.
    pub async fn restore(
        &self,
        name: &Name,
        slot: Slot,
        snapshot: &SnapshotId,
        key: &str,
        wait: Duration,
    ) -> Result<Deployment, ClientError> {
        let path = format!("/slots/{slot}/snapshots/{snapshot}/restore");
        self.deployment_of(name, &path, serde_json::json!({}), key, wait).await
    }

    async fn deployment_of(
        &self,
        name: &Name,
        path: &str,
        asked: impl serde::Serialize,
        key: &str,
        wait: Duration,
    ) -> Result<Deployment, ClientError> {
        let path = format!("{}{path}?wait_s={}", workspace(name), wait.as_secs());
        let request = Request::new(Method::POST, path)
            .header("idempotency-key", key)?
            .body(&asked)?
            .patient(Some(wait));
        read(self.send(request).await?).await
    }

    /// Those of a slot, newest first.
    ///
    /// # Errors
    /// Any.
    pub async fn snapshots(&self, name: &Name, slot: Slot) -> Result<Page<Snapshot>, ClientError> {
        self.get(&format!("{}/snapshots", slot_path(name, slot))).await
    }

    /// # Errors
    /// Any.
    pub async fn take_snapshot(&self, name: &Name, slot: Slot) -> Result<Snapshot, ClientError> {
        let path = format!("{}/snapshots", slot_path(name, slot));
        read(
            self.send(Request::new(Method::POST, path).body(&serde_json::json!({}))?)
                .await?,
        )
        .await
    }

    /// What another snapshot, or the slot now, holds otherwise than a snapshot.
    ///
    /// # Errors
    /// Any.
    pub async fn diff_snapshots(
        &self,
        name: &Name,
        slot: Slot,
        from: &SnapshotId,
        to: Option<&SnapshotId>,
    ) -> Result<Diff, ClientError> {
        let mut path = format!("{}/snapshots/{from}/diff", slot_path(name, slot));
        if let Some(to) = to {
            path.push_str(&format!("?to={to}"));
        }
        let request = Request::new(Method::GET, path).patient(Some(COMPARING));
        read(self.send(request).await?).await
    }

    /// All that a snapshot holds, as a tar.
    ///
    /// # Errors
    /// Any; 429 while as many are under way as may be.
    pub async fn export_snapshot(&self, name: &Name, slot: Slot, id: &SnapshotId) -> Result<Download, ClientError> {
        let path = format!("{}/snapshots/{id}/archive", slot_path(name, slot));
        let request = Request::new(Method::GET, path).header(ACCEPT.as_str(), "application/x-tar")?;
        Ok(Download::new(self.send(request).await?))
    }

    /// Makes a snapshot of a slot of such a tar.
    ///
    /// # Errors
    /// Any; 422 where the archive is refused.
    pub async fn import_snapshot(
        &self,
        name: &Name,
        slot: Slot,
        archive: impl Read + Send + 'static,
    ) -> Result<Snapshot, ClientError> {
        let path = format!("{}/snapshots/archive", slot_path(name, slot));
        let request = Request::new(Method::POST, path).archive(archive)?.patient(None);
        read(self.send(request).await?).await
    }

    /// # Errors
    /// Any; 409 where a rollback may need it.
    pub async fn delete_snapshot(&self, name: &Name, slot: Slot, id: &SnapshotId) -> Result<(), ClientError> {
        let path = format!("{}/snapshots/{id}", slot_path(name, slot));
        self.send(Request::new(Method::DELETE, path)).await.map(drop)
    }

    /// Newest first.
    ///
    /// # Errors
    /// Any.
    pub async fn deployments(&self, name: &Name) -> Result<Page<Deployment>, ClientError> {
        let list = format!("{}/deployments?limit=200", workspace(name));
        let mut all: Page<Deployment> = self.get(&list).await?;
        while let Some(cursor) = all.next_cursor.take() {
            let next: Page<Deployment> = self.get(&format!("{list}&cursor={}", segment(&cursor))).await?;
            all.items.extend(next.items);
            all.next_cursor = next.next_cursor;
        }
        Ok(all)
    }

    /// # Errors
    /// Any.
    pub async fn deployment(&self, name: &Name, id: &str) -> Result<Deployment, ClientError> {
        self.get(&format!("{}/deployments/{}", workspace(name), segment(id)))
            .await
    }

    /// The last `tail` lines of the container's log.
    ///
    /// # Errors
    /// Any.
    pub async fn logs(&self, name: &Name, slot: Slot, tail: u32) -> Result<Page<LogLine>, ClientError> {
        self.get(&format!("{}/logs?tail={tail}", slot_path(name, slot))).await
    }

    /// The log as it is written, after its last `tail` lines: events `line`, each a [`LogLine`].
    ///
    /// # Errors
    /// Any.
    pub async fn follow_logs(&self, name: &Name, slot: Slot, tail: u32) -> Result<Events, ClientError> {
        let path = format!("{}/logs?follow=true&tail={tail}", slot_path(name, slot));
        let request = Request::new(Method::GET, path).header(ACCEPT.as_str(), "text/event-stream")?;
        Ok(Events::new(self.send(request).await?))
    }

    /// # Errors
    /// Any; 409 where the slot does not run.
    pub async fn stats(&self, name: &Name, slot: Slot) -> Result<SlotStats, ClientError> {
        self.get(&format!("{}/stats", slot_path(name, slot))).await
    }

    /// # Errors
    /// Any.
    pub async fn releases(&self) -> Result<Page<Release>, ClientError> {
        self.get("/api/releases").await
    }

    /// An image that is here, with a config of one's own.
    ///
    /// # Errors
    /// Any.
    pub async fn create_release(&self, asked: &CreateRelease) -> Result<Release, ClientError> {
        self.post("/api/releases", asked).await
    }

    /// Sends an image archive, and waits up to `wait` until it is imported or refused.
    ///
    /// # Errors
    /// Any.
    pub async fn upload_release(
        &self,
        name: &str,
        config: Option<&ReleaseConfig>,
        archive: std::fs::File,
        wait: Duration,
    ) -> Result<Release, ClientError> {
        let config = config.map(serde_json::to_string).transpose();
        let config = config.map_err(|e| ClientError::Unexpected(e.to_string()))?;
        let mut path = format!("/api/releases/archive?wait_s={}&name={}", wait.as_secs(), segment(name));
        if let Some(config) = config {
            path.push_str(&format!("&config={}", segment(&config)));
        }
        let request = Request::new(Method::POST, path).archive(archive)?.patient(None);
        read(self.send(request).await?).await
    }

    /// # Errors
    /// Any.
    pub async fn release(&self, id: &ReleaseId) -> Result<Release, ClientError> {
        self.get(&format!("/api/releases/{}", segment(id.as_str()))).await
    }

    /// What changes, from now on or from after the event with this id; see [`crate::events`].
    ///
    /// # Errors
    /// Any.
    pub async fn events(&self, after: Option<&str>) -> Result<Events, ClientError> {
        let mut request = Request::new(Method::GET, "/api/events").header(ACCEPT.as_str(), "text/event-stream")?;
        if let Some(id) = after {
            request = request.header("last-event-id", id)?;
        }
        Ok(Events::new(self.send(request).await?))
    }

    /// # Errors
    /// Any; 409 while something uses it.
    pub async fn delete_release(&self, id: &ReleaseId) -> Result<(), ClientError> {
        self.delete(&format!("/api/releases/{}", segment(id.as_str()))).await
    }

    /// The API of the sandbox a slot points at. The first call wakes it.
    pub fn sandbox(&self, name: &Name, slot: Slot) -> Sandbox<'_> {
        Sandbox::new(self, format!("{}/sandbox", slot_path(name, slot)))
    }
}
