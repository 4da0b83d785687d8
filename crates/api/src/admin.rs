//! What an admin sees of the whole box.

use std::collections::BTreeMap;

use choir_core::{Name, SandboxId, Slot};
use serde::{Deserialize, Serialize};

/// `GET /admin/stats`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BoxStats {
    /// Name → version or fact: `hypervisor`, `sqlite`, `podman`, `oci_runtime`, `volumes`, …
    pub versions: BTreeMap<String, String>,
    /// Sandboxes by observed state.
    pub sandboxes: BTreeMap<String, usize>,
    /// One sentence for each thing an operator should mend.
    pub findings: Vec<String>,
    /// One sentence for each thing that works, and would be better otherwise.
    #[serde(default)]
    pub advice: Vec<String>,
}

/// One row of `GET /admin/sandboxes`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BoxSandbox {
    pub sandbox: SandboxId,
    pub user: Name,
    pub workspace: Name,
    pub slot: Slot,
    pub state: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// One row of `GET /admin/fsck`: something that does not fit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// `I1` to `I6`.
    pub invariant: String,
    /// One sentence.
    pub what: String,
    /// Whether it was removed.
    pub repaired: bool,
}
