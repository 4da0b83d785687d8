//! Whether this box is well, as its own console sees it: beside a running hypervisor, or to learn why there is none. It
//! must not change what it looks at.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use choir_runtime::{Volumes as _, VolumesClient};
use choir_store::Store;
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;

use crate::config::Config;
use crate::random::{OsRandom, Random};
use crate::{admin, fsck, keys, places, serve};

/// How long one part may take to answer.
const WITHIN: Duration = Duration::from_secs(30);
/// What of a disk is to be free: a tenth, of large ones this many bytes.
const FREE: u64 = 5 << 30;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Ok,
    /// It works, and would be better otherwise.
    Advice,
    Failed,
}

impl Verdict {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Advice => "advice",
            Self::Failed => "FAILED",
        }
    }
}

#[derive(Debug, Serialize)]
pub struct Check {
    pub name: &'static str,
    pub result: Verdict,
    pub detail: String,
}

/// All that can be looked at from here, `warnings` of the configuration first.
pub async fn look(config: &Config, warnings: Vec<String>) -> Vec<Check> {
    let mut checks: Vec<Check> = warnings
        .into_iter()
        .map(|warning| check("configuration", Verdict::Advice, warning))
        .collect();
    if checks.is_empty() {
        checks.push(check("configuration", Verdict::Ok, String::new()));
    }
    let mut advice = None;
    checks.push(judged("hypervisor", answers(config)).await);
    checks.push(judged("keys", unlocked(config)).await);
    checks.push(judged("containers", containers(config, &mut advice)).await);
    checks.extend(advice.map(|advice| check("containers", Verdict::Advice, advice)));
    checks.push(judged("volumes", volumes(config)).await);
    checks.push(judged("invariants", invariants(config)).await);
    checks.extend(disks(config).map(|full| match full {
        Ok(room) => check("disk", Verdict::Ok, room),
        Err(full) => check("disk", Verdict::Failed, full),
    }));
    checks
}

fn check(name: &'static str, result: Verdict, detail: String) -> Check {
    Check { name, result, detail }
}

async fn judged(name: &'static str, looking: impl Future<Output = anyhow::Result<String>>) -> Check {
    let found = tokio::time::timeout(WITHIN, looking).await;
    match found.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer within {} s", WITHIN.as_secs()))) {
        Ok(detail) => check(name, Verdict::Ok, detail),
        Err(error) => check(name, Verdict::Failed, format!("{error:#}")),
    }
}

/// What `/readyz` says.
#[derive(Deserialize)]
struct Readiness {
    parts: BTreeMap<String, String>,
    degraded: Vec<String>,
}

/// Whether the hypervisor of this configuration runs and has all its parts.
async fn answers(config: &Config) -> anyhow::Result<String> {
    let address = match config.listen.address {
        any if any.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        one => one,
    };
    let address = SocketAddr::new(address, config.listen.port);
    let stream = TcpStream::connect(address).await;
    let stream = stream.with_context(|| format!("nothing answers at {address}; start it, or look into its log"))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = http::Request::get("/readyz")
        .header(http::header::HOST, config.control.origin.authority())
        .body(Empty::<bytes::Bytes>::new())?;
    let answer = sender.send_request(request).await?;
    let body = answer.into_body().collect().await?.to_bytes();
    let said: Readiness =
        serde_json::from_slice(&body).with_context(|| format!("what answers at {address} is no hypervisor"))?;
    let parts = said.parts.into_iter().filter(|(_, part)| part != "ok");
    let wrong: Vec<String> = parts
        .map(|(name, part)| format!("{name} {part}"))
        .chain(said.degraded)
        .collect();
    ensure!(wrong.is_empty(), "it answers, but for: {}", wrong.join(", "));
    Ok(format!("ready at {address}"))
}

fn store(config: &Config) -> anyhow::Result<Store> {
    Ok(Store::open_read_only(&config.store.path)?)
}

async fn unlocked(config: &Config) -> anyhow::Result<String> {
    let (file, store) = (config.key_file(), store(config)?);
    ensure!(file.exists(), "there is no key file at {}: put it back", file.display());
    let random: Arc<dyn Random> = Arc::new(OsRandom);
    let keys = keys::load(&file, &store, &random).await?;
    ensure!(
        !keys.vault.is_sealed(),
        "{} is another database's: put the right one back",
        file.display()
    );
    Ok(format!("{} is this database's", file.display()))
}

async fn containers(config: &Config, advice: &mut Option<String>) -> anyhow::Result<String> {
    let facts = serve::runtime(config)?.describe().await?;
    let podman = facts.iter().find(|(name, _)| *name == "podman");
    *advice = podman.and_then(|(_, version)| admin::podman_advice(version));
    let facts: Vec<String> = facts
        .into_iter()
        .map(|(name, version)| format!("{name} {version}"))
        .collect();
    Ok(facts.join(", "))
}

async fn volumes(config: &Config) -> anyhow::Result<String> {
    let client = VolumesClient::new(config.sandboxes.volumes_socket.clone());
    Ok(client.backend().await?)
}

async fn invariants(config: &Config) -> anyhow::Result<String> {
    let volumes = VolumesClient::new(config.sandboxes.volumes_socket.clone());
    let found = fsck::beside(&store(config)?, &*serve::runtime(config)?, &volumes).await?;
    match found.len() {
        0 => Ok("database, containers and volumes fit together".to_owned()),
        // What is half done now is found, too.
        some => bail!("{some} things do not fit together; see `choir-hypervisor fsck`"),
    }
}

/// What is free where the database and the volumes are, as an error where that is too little. Whether they are there at all
/// others look.
pub fn disks(config: &Config) -> impl Iterator<Item = Result<String, String>> {
    const OF_THE_DATABASE: &str = "look what else is there, as older backups, or make it larger";
    const OF_VOLUMES: &str = "delete snapshots, releases or workspaces that are not needed, or make it larger";
    let places = [
        (config.store.path.clone(), OF_THE_DATABASE),
        (config.volumes_dir(), OF_VOLUMES),
    ];
    places.into_iter().filter_map(|(place, advice)| {
        let (free, all) = places::room(&place).ok()?;
        let gib = |bytes: u64| format!("{}.{} GiB", bytes >> 30, ((bytes % (1 << 30)) * 10) >> 30);
        let left = format!("{}: {} of {} are free", place.display(), gib(free), gib(all));
        Some(match is_almost_full(free, all) {
            false => Ok(left),
            true => Err(format!("the disk is almost full at {left}; {advice}")),
        })
    })
}

fn is_almost_full(free: u64, all: u64) -> bool {
    free < FREE.min(all / 10)
}

#[cfg(test)]
mod tests {
    use super::is_almost_full;

    #[test]
    fn a_disk_is_almost_full_below_a_tenth_and_a_large_one_below_5_gib() {
        let gib = |n: u64| n << 30;
        for (free, all, full) in [
            (gib(1), gib(20), true),
            (gib(2), gib(20), false),
            (gib(4), gib(500), true),
            (gib(5), gib(500), false),
            (0, 0, false),
        ] {
            assert_eq!(is_almost_full(free, all), full, "{free} of {all}");
        }
    }
}
