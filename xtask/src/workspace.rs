//! What Cargo knows about this checkout: where it is, where builds go, which crate uses which.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::command;

/// The part of `cargo metadata` (format version 1) that is used here.
#[derive(Debug, Deserialize)]
pub struct Workspace {
    pub workspace_root: PathBuf,
    pub target_directory: PathBuf,
    pub packages: Vec<Package>,
}

/// One crate of the workspace.
#[derive(Debug, Deserialize)]
pub struct Package {
    pub name: String,
    pub manifest_path: PathBuf,
    pub dependencies: Vec<Dependency>,
}

/// One edge: `kind` is absent for ordinary dependencies, else `dev` or `build`.
#[derive(Debug, Deserialize)]
pub struct Dependency {
    pub name: String,
    pub kind: Option<String>,
}

impl Workspace {
    /// Asks the Cargo that started us; needs no network.
    pub fn load() -> Result<Self> {
        let text = command::capture(cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
        serde_json::from_str(&text).context("`cargo metadata` wrote something unexpected")
    }
}

/// The Cargo that runs us, so that the pinned toolchain stays the same.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    if let Some(manifest) = std::env::var_os("CARGO_MANIFEST_DIR") {
        command.current_dir(manifest);
    }
    command
}

/// The target triple of the static agent on this machine's architecture.
pub fn agent_target() -> String {
    format!("{}-unknown-linux-musl", std::env::consts::ARCH)
}
