//! What xtask says about the machine and the product that runs on it. It must not find out anything itself.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;

/// Written by `cargo xtask bench`.
#[derive(Deserialize)]
pub struct Setup {
    /// The control origin.
    pub address: String,
    /// The invite of the claim link: the product has no user yet.
    pub invite: String,
    /// The hypervisor's pid file, and that of the `up` which starts it again when it ends.
    pub hypervisor: PathBuf,
    pub up: PathBuf,
    /// What the hypervisor logs.
    pub log: PathBuf,
    pub volumes_socket: PathBuf,
    /// Where choir-volumes keeps its volumes.
    pub volumes: PathBuf,
    /// `podman` on the product's own storage.
    pub podman: Program,
    /// choir-bench-app, linked statically.
    pub app: PathBuf,
    /// configurable-http-proxy's script.
    pub node_proxy: PathBuf,
    /// Where the JSON goes.
    pub out: PathBuf,
    pub about: About,
}

/// A command as far as it is always the same.
#[derive(Deserialize)]
pub struct Program {
    pub program: String,
    pub arguments: Vec<String>,
    pub environment: BTreeMap<String, String>,
}

/// What a figure is worth nothing without.
#[derive(Deserialize, serde::Serialize, Clone)]
pub struct About {
    /// Git's, with `-dirty` where files were changed.
    pub commit: String,
    /// RFC 3339.
    pub date: String,
    pub kernel: String,
    pub machine: String,
    /// Versions of the peers by name.
    pub peers: BTreeMap<String, String>,
}

impl Setup {
    /// The hypervisor's process now.
    pub fn hypervisor(&self) -> Result<u32> {
        pid(&self.hypervisor)
    }

    /// The process that keeps the hypervisor running.
    pub fn up(&self) -> Result<u32> {
        pid(&self.up)
    }

    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).context("the setup is not of this version; run `cargo xtask bench`")
    }
}

/// The first line of a pid file.
fn pid(file: &Path) -> Result<u32> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let line = text.lines().next().unwrap_or_default();
    line.parse()
        .with_context(|| format!("{} names no process", file.display()))
}
