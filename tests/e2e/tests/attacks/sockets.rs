//! Which TCP ports the programs and sandboxes of an instance listen on, seen from the machine itself.

use std::collections::HashMap;
use std::fs;

use anyhow::{Context as _, Result, ensure};
use choir_core::Slot;
use choir_e2e::person;
use tokio::process::Command;

use super::Scene;

pub async fn only_the_hypervisor_listens(scene: &Scene<'_>) -> Result<()> {
    let listening = ports_of_instance(scene).await?;
    ensure!(!listening.is_empty(), "the hypervisor does not listen");
    for (port, program) in listening {
        ensure!(port == scene.instance.port(), "{program} listens on {port}, too");
    }
    // The control: the apps listen, where only their own sandboxes are.
    for slot in Slot::ALL {
        let inside = person::run(
            scene.client,
            slot,
            "curl -fsS -o /dev/null -w '%{http_code}' http://127.0.0.1:3000/",
        )
        .await?;
        ensure!(inside == "200", "the app in {slot} answered {inside}");
    }
    Ok(())
}

/// Port and program of every listening socket whose process belongs to the instance.
async fn ports_of_instance(scene: &Scene<'_>) -> Result<Vec<(u16, String)>> {
    let output = Command::new("ss")
        .args(["-H", "-ltnp"])
        .output()
        .await
        .context("cannot run ss")?;
    let parents = parents();
    let mut found = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        let port = words.get(3).and_then(|it| it.rsplit(':').next()?.parse().ok());
        let pids = line
            .split("pid=")
            .skip(1)
            .filter_map(|it| it.split(',').next()?.parse::<u32>().ok());
        for pid in pids {
            if belongs(scene, &parents, pid) {
                found.push((port.with_context(|| line.to_owned())?, line.to_owned()));
            }
        }
    }
    Ok(found)
}

/// Whether a process, or one above it, was started for the instance's data directory: its command line or the sandbox
/// it is in names it.
fn belongs(scene: &Scene<'_>, parents: &HashMap<u32, u32>, pid: u32) -> bool {
    let root = scene.instance.path("");
    let mut at = Some(pid);
    while let Some(pid) = at.filter(|pid| *pid > 1) {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&line).contains(root.to_str().unwrap_or_default()) {
            return true;
        }
        at = parents.get(&pid).copied();
    }
    false
}

/// The parent of each process, from field 4 of proc_pid_stat(5).
fn parents() -> HashMap<u32, u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|it| it.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
        Some((pid, parent))
    })
    .collect()
}
