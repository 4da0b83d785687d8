//! After each start: what Podman, the kernel and the agent say of a container, against its template. Any difference
//! ends it. The comparing itself is in `compare`; this module gathers and acts.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use choir_core::{Generation, IdRange};
use choir_link::SelfReport;
use rustix::fs::{Mode, OFlags, ResolveFlags};

use crate::gate::Examiner;
use crate::libpod::Inspect;
use crate::podman::{Known, Shared, pid};
use crate::{Error, Notice, compare};

#[async_trait]
impl Examiner for Shared {
    async fn examine(&self, generation: &Generation, report: &SelfReport) -> Result<(), String> {
        let known = self
            .get(generation)
            .ok_or_else(|| "its container is being removed".to_owned())?;
        self.inspect_once(&known).await?;
        let mut differences = compare::reported(&known.container, report);
        differences.extend(self.disprove(&known, &report.proof_file).await?);
        self.judge(&known, differences).await
    }
}

impl Shared {
    /// Begins the comparison with what Podman says, beside the agent's own start.
    pub fn inspect_soon(self: &Arc<Self>, known: Arc<Known>) {
        let shared = Arc::clone(self);
        tokio::spawn(async move {
            if let Err(why) = shared.inspect_once(&known).await {
                tracing::warn!(generation = %known.spec.generation, why, "a container was not accepted");
            }
        });
    }

    /// Done once a generation; a failure to ask, as opposed to a difference, is tried again by the next handshake.
    async fn inspect_once(&self, known: &Known) -> Result<(), String> {
        known.inspected.get_or_try_init(|| self.inspect(known)).await.copied()
    }

    async fn inspect(&self, known: &Known) -> Result<(), String> {
        let ask = async {
            let inspect = self.client.inspect(&known.container.name).await?;
            Ok::<_, Error>((inspect, self.is_rootless().await?))
        };
        let (inspect, rootless) = ask.await.map_err(|e| e.to_string())?;
        let mut differences = compare::inspected(&known.container, &inspect);
        if !rootless {
            differences.extend(kernel(known, &inspect));
        }
        self.judge(known, differences).await
    }

    /// What is wrong with the file by which the agent proves that its root is the owner's first id. Where this
    /// process may not look, or counts ids otherwise than Podman, nothing is.
    async fn disprove(&self, known: &Known, path: &str) -> Result<Option<String>, String> {
        if self.is_rootless().await.map_err(|e| e.to_string())? {
            return Ok(None);
        }
        let root = self
            .places
            .volumes
            .join(known.spec.generation.sandbox.as_str())
            .join("root");
        Ok(match owner_inside(&root, path) {
            Ok(owner) if owner == known.spec.ids.base => None,
            Ok(owner) => Some(format!("its root writes files as host user {owner}")),
            Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => None,
            Err(e) => Some(format!("its proof of ids is not on the volume: {e}")),
        })
    }

    /// Kills what differs and says so, once.
    async fn judge(&self, known: &Known, differences: Vec<String>) -> Result<(), String> {
        if differences.is_empty() {
            return Ok(());
        }
        let reason = differences.join("; ");
        if !std::mem::replace(&mut known.progress().refused, true) {
            if let Err(e) = self.client.kill(&known.container.name, "KILL").await {
                tracing::error!(generation = %known.spec.generation, error = %e, "a refused container lives on");
            }
            let notice = Notice::Refused {
                generation: known.spec.generation.clone(),
                reason: reason.clone(),
            };
            let _ = self.notices.send(notice).await;
        }
        Err(reason)
    }
}

/// The owner of a file on a volume. The sandbox made the file and every link on the way, so the volume's root is
/// where all links end.
fn owner_inside(root: &Path, path: &str) -> std::io::Result<u32> {
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(root, directory, Mode::empty())?;
    let file = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let within = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = rustix::fs::openat2(&root, path, file, Mode::empty(), within)?;
    Ok(rustix::fs::fstat(&file)?.st_uid)
}

/// What can be read of the container beside Podman's API, where this process may read it.
fn kernel(known: &Known, inspect: &Inspect) -> Vec<String> {
    let mut differences = Vec::new();
    let config = std::fs::read(&inspect.oci_config_path);
    if let Some(config) = config.ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()) {
        differences.extend(compare::configured(&known.container, &config));
    }
    let want = [0, known.spec.ids.base, IdRange::SIZE].map(|n| n.to_string());
    for file in ["uid_map", "gid_map"] {
        let text = pid(inspect).and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/{file}")).ok());
        // A process that has ended reads as empty.
        if let Some(text) = text.filter(|text| !text.is_empty())
            && !text.split_whitespace().eq(want.iter().map(String::as_str))
        {
            differences.push(format!("/proc says its {file} is {:?}", text.trim()));
        }
    }
    differences
}
