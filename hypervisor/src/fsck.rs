//! Whether the database, the containers, the disks and the routes say the same: the invariants of the design, by their
//! numbers. It changes nothing, unless it is asked to remove what belongs to nobody.

use std::collections::{BTreeMap, BTreeSet};

use choir_api::admin as api;
use choir_core::sandbox::Observed;
use choir_core::{Generation, Slot};
use choir_runtime::{Runtime, Volumes};
use choir_store::{Claims, ReleaseState, SnapshotState, Store};

use crate::app::App;
use crate::reconcile::trial::tried_in;
use crate::table::Table;

/// One thing that does not fit.
#[derive(Debug, Clone)]
pub struct Finding {
    pub told: api::Finding,
    stray: Option<Stray>,
}

/// What is there and belongs to nobody.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Stray {
    Container(Generation),
    Volume(String),
}

impl Finding {
    fn new(invariant: &str, what: impl Into<String>) -> Self {
        let told = api::Finding {
            invariant: invariant.to_owned(),
            what: what.into(),
            repaired: false,
        };
        Self { told, stray: None }
    }

    fn stray(stray: Stray) -> Self {
        let what = match &stray {
            Stray::Container(generation) => format!("container {generation} belongs to no sandbox that is there"),
            Stray::Volume(id) => format!("volume {id} is in no row of the database"),
        };
        Self {
            stray: Some(stray),
            ..Self::new("I2", what)
        }
    }
}

/// What does not fit now. While something is being done, what is half done may be found, too.
async fn check(
    store: &Store,
    runtime: &dyn Runtime,
    volumes: &dyn Volumes,
    table: Option<&Table>,
) -> anyhow::Result<Vec<Finding>> {
    // A row is there before what it speaks of, and after it: so the rows are read last.
    let (containers, disks) = (runtime.list().await?, volumes.list().await?);
    let claims = store.claims().await?;
    let broken = claims
        .broken
        .iter()
        .map(|(invariant, what)| Finding::new(invariant, what.as_str()));
    let mut findings: Vec<Finding> = broken.collect();
    if !findings.is_empty() {
        // Rows that contradict each other do not say what belongs to nobody, and what is called a stray may be removed.
        return Ok(findings);
    }
    let mut current = BTreeMap::new();
    for sandbox in claims
        .workspaces
        .iter()
        .flat_map(|v| Slot::ALL.map(|slot| v.slot(slot)))
    {
        current.insert(sandbox.id.clone(), sandbox.generation);
    }
    for container in containers {
        if current.get(&container.generation.sandbox) != Some(&container.generation.number) {
            findings.push(Finding::stray(Stray::Container(container.generation)));
        }
    }
    let disks: BTreeSet<String> = disks.into_iter().collect();
    let known = known_volumes(&claims);
    for id in disks.iter().filter(|id| !known.contains_key(id.as_str())) {
        findings.push(Finding::stray(Stray::Volume(id.clone())));
    }
    for (id, (invariant, _)) in known.iter().filter(|(id, (_, must))| *must && !disks.contains(*id)) {
        findings.push(Finding::new(invariant, format!("volume {id} is missing")));
    }
    if let Some(table) = table {
        findings.extend(claims.workspaces.iter().filter_map(|view| stale(table, view)));
    }
    Ok(findings)
}

/// The same beside a hypervisor, which may be trying a release.
pub async fn beside(store: &Store, runtime: &dyn Runtime, volumes: &dyn Volumes) -> anyhow::Result<Vec<Finding>> {
    let found = check(store, runtime, volumes, None).await?;
    let mut trials = BTreeSet::new();
    for release in store.releases().await? {
        if release.state == ReleaseState::Importing {
            trials.insert(tried_in(&release.id).to_string());
        }
    }
    Ok(without(found, |sandbox| trials.contains(sandbox)))
}

fn without(mut findings: Vec<Finding>, is_trial: impl Fn(&str) -> bool) -> Vec<Finding> {
    findings.retain(|finding| match &finding.stray {
        Some(Stray::Container(generation)) => !is_trial(generation.sandbox.as_str()),
        Some(Stray::Volume(id)) => !is_trial(id),
        None => true,
    });
    findings
}

/// Removes what belongs to nobody.
pub async fn repair(findings: &mut [Finding], runtime: &dyn Runtime, volumes: &dyn Volumes) -> anyhow::Result<()> {
    for finding in findings {
        match &finding.stray {
            Some(Stray::Container(generation)) => runtime.remove(generation).await?,
            Some(Stray::Volume(id)) => volumes.delete(id).await?,
            None => continue,
        }
        finding.told.repaired = true;
    }
    Ok(())
}

/// Each volume that may be there, the invariant that its lack breaks, and whether it must be there.
fn known_volumes(claims: &Claims) -> BTreeMap<String, (&'static str, bool)> {
    let mut known = BTreeMap::new();
    for view in &claims.workspaces {
        for sandbox in Slot::ALL.map(|slot| view.slot(slot)) {
            let settled = !matches!(
                sandbox.observed,
                Observed::Creating { .. } | Observed::Failed { .. } | Observed::Deleting { .. } | Observed::Deleted
            );
            let must = settled && sandbox.refill.is_none() && !view.workspace.deleting;
            known.insert(sandbox.id.to_string(), ("I1", must));
        }
    }
    for snapshot in &claims.snapshots {
        let must = snapshot.state == SnapshotState::Ready;
        known.insert(snapshot.id.to_string(), ("I5", must));
    }
    for release in &claims.releases {
        known.insert(release.clone(), ("I5", false));
    }
    known
}

fn stale(table: &Table, view: &choir_store::WorkspaceView) -> Option<Finding> {
    let workspace = &view.workspace;
    let entry = table.get(&workspace.user_name, &workspace.name);
    let routed = entry.map(|e| (e.epoch, e.live.handle.id.clone(), e.dev.handle.id.clone()));
    let wanted = (!workspace.deleting).then(|| (workspace.epoch, view.live.id.clone(), view.dev.id.clone()));
    (routed != wanted).then(|| {
        Finding::new(
            "I3",
            format!(
                "the routes of workspace {} are not what the database says",
                workspace.id
            ),
        )
    })
}

impl App {
    /// What does not fit, the routes in memory included.
    pub async fn fsck(&self) -> anyhow::Result<Vec<Finding>> {
        let services = &self.fleet.services;
        let found = check(&self.store, &*services.runtime, &*services.volumes, Some(&self.table)).await?;
        Ok(without(found, |sandbox| self.fleet.is_trial(sandbox)))
    }

    /// Volumes stay: what is in them cannot be made again.
    pub async fn remove_stray_containers(&self) -> anyhow::Result<()> {
        for finding in self.fsck().await? {
            if let Some(Stray::Container(generation)) = &finding.stray {
                tracing::warn!(%generation, "a container that belongs to nobody is removed");
                self.fleet.services.runtime.remove(generation).await?;
            }
        }
        Ok(())
    }
}
