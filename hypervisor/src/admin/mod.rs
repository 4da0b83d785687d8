//! What an operator asks of the whole box: versions, states, and what should be mended. It must not know HTTP.

use std::collections::BTreeMap;

use choir_api::admin::{BoxSandbox, BoxStats};
use choir_core::Slot;

use crate::app::App;
use crate::doctor;
use crate::error::ApiResult;

pub mod routes;

/// The first Podman whose image annotations cannot drop all sandboxing (CVE-2026-94603).
const SAFE_PODMAN: [u64; 3] = [6, 1, 3];

impl App {
    pub async fn stats(&self) -> BoxStats {
        let services = &self.fleet.services;
        let (mut findings, mut advice) = (Vec::new(), Vec::new());
        let mut versions = BTreeMap::from([
            ("hypervisor".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
            ("sqlite".to_owned(), choir_store::sqlite_version().to_owned()),
        ]);
        match services.runtime.describe().await {
            Ok(facts) => versions.extend(facts),
            Err(error) => findings.push(format!("{error}; start the container service")),
        }
        match services.volumes.backend().await {
            Ok(backend) => {
                if backend == "plain" {
                    advice.push("volumes are plain copies: slow, and without disk limits; use btrfs".to_owned());
                }
                versions.insert("volumes".to_owned(), backend);
            }
            Err(error) => findings.push(format!(
                "the volumes helper does not answer ({error}); start choir-volumes"
            )),
        }
        advice.extend(versions.get("podman").and_then(|version| podman_advice(version)));
        if self.vault.is_sealed() {
            findings.push(
                "sealed: the master key is missing or another database's, so secrets and recovery codes do not work; \
                 put the right key file back and restart"
                    .to_owned(),
            );
        }
        if self.fleet.admission.is_short_of_memory() {
            findings.push(
                "the box is short of memory: dev slots wait; stop what is not needed, lower limits, or add memory"
                    .to_owned(),
            );
        }
        findings.extend(doctor::disks(&self.config).filter_map(Result::err));
        findings.extend(self.providers.degraded().await.into_iter().map(|(_, finding)| finding));
        let mut sandboxes: BTreeMap<String, usize> = BTreeMap::new();
        for handle in self.fleet.handles() {
            *sandboxes
                .entry(handle.status.borrow().observed.name().to_owned())
                .or_default() += 1;
        }
        BoxStats {
            versions,
            sandboxes,
            findings,
            advice,
        }
    }

    /// Every sandbox of every user.
    pub async fn all_sandboxes(&self) -> ApiResult<Vec<BoxSandbox>> {
        let mut rows = Vec::new();
        for view in self.store.all_workspaces().await? {
            for slot in Slot::ALL {
                let shown = self.show_slot(&view, slot).await;
                rows.push(BoxSandbox {
                    sandbox: shown.sandbox,
                    user: view.workspace.user_name.clone(),
                    workspace: view.workspace.name.clone(),
                    slot,
                    state: shown.state,
                    reason: shown.reason,
                });
            }
        }
        Ok(rows)
    }
}

/// A sentence about a Podman that would be unsafe without what is done here.
pub fn podman_advice(version: &str) -> Option<String> {
    let mut parts = version.split(['.', '-']).map(|part| part.parse::<u64>().unwrap_or(0));
    let version_is = [parts.next(), parts.next(), parts.next()].map(Option::unwrap_or_default);
    (version_is < SAFE_PODMAN).then(|| {
        format!(
            "Podman {version} lets an image's annotations drop all sandboxing (CVE-2026-94603); images are vetted here \
             before use, but upgrade to 6.1.3 or later"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::podman_advice;

    #[test]
    fn an_unpatched_podman_is_spoken_of_and_a_patched_one_is_not() {
        for old in ["4.3.1", "5.8.0", "6.1.2", "garbage"] {
            assert!(podman_advice(old).is_some(), "{old}");
        }
        for new in ["6.1.3", "6.2.0", "7.0.0-rc1"] {
            assert!(podman_advice(new).is_none(), "{new}");
        }
    }
}
