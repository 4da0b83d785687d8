//! The hypervisor's configuration for a data directory, as far as `up` decides it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::data::DataDir;
use crate::up::{Options, Runtime, podman};

/// A file without this first line is its owner's, and is left alone.
const MARKER: &str = "# Written by `cargo xtask up` at each start. To keep changes of your own, remove this line.";

#[derive(Serialize)]
pub struct Config {
    listen: Listen,
    control: Control,
    sandboxes: Sandboxes,
    store: Store,
    egress: Egress,
}

#[derive(Serialize)]
struct Listen {
    port: u16,
}

#[derive(Serialize)]
struct Control {
    origin: String,
    rp_id: &'static str,
}

#[derive(Serialize)]
struct Sandboxes {
    domain: &'static str,
    runtime: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    socket: Option<PathBuf>,
    volumes_socket: PathBuf,
    volumes: PathBuf,
    run: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    default_image: Option<PathBuf>,
    agent: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    oci_runtime: Option<&'static str>,
}

#[derive(Serialize)]
struct Store {
    path: PathBuf,
}

#[derive(Serialize)]
struct Egress {
    allow_networks: Vec<String>,
}

impl Config {
    /// `open` is the data directory by a path that sandboxes can walk; `image` the default release's
    /// tar, where sandboxes have a root file system of their own.
    pub fn new(data: &DataDir, open: &Path, port: u16, image: Option<&Path>, options: &Options) -> Self {
        let contained = options.runtime == Runtime::Podman;
        Self {
            listen: Listen { port },
            control: Control {
                origin: format!("http://localhost:{port}"),
                rp_id: "localhost",
            },
            sandboxes: Sandboxes {
                domain: "localhost",
                runtime: if contained { "podman" } else { "process" },
                socket: contained.then(|| data.podman_socket()),
                volumes_socket: data.volumes_socket(),
                volumes: open.join("volumes"),
                run: open.join("run/sandboxes"),
                default_image: image.map(Path::to_owned),
                agent: open.join("bin/choir-sandbox"),
                oci_runtime: contained.then(podman::oci_runtime),
            },
            store: Store { path: data.store() },
            egress: Egress {
                allow_networks: options.egress_allow.clone(),
            },
        }
    }

    /// Writes the file, unless its owner has made it theirs.
    pub fn write(&self, data: &DataDir) -> Result<()> {
        let file = data.config();
        if fs::read_to_string(&file).is_ok_and(|text| text.lines().next() != Some(MARKER)) {
            println!("==> {} is yours: used as it is", file.display());
            return Ok(());
        }
        let text = format!("{MARKER}\n\n{}", toml::to_string(self)?);
        fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
    }
}
