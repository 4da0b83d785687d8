//! What a sandbox may use of the box, and how it ends: processes, memory, log, grace.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use choir_runtime::{Error, Notice, Runtime, Seen};
use rustix::process::{Pid, Signal};

use super::inside;
use crate::rig::{PATIENCE, Rig, await_exit, await_notice, await_seen, run, sh};

/// E09: the pids limit holds, the agent still answers, and the sandbox can be stopped and started again.
pub async fn a_fork_bomb_ends_at_the_pids_limit(rig: &Rig) {
    let mut inside = inside(rig).await;
    inside.ok("for i in 1 2 3; do sleep 1 & done; wait").await;
    let bomb = "i=0; while [ $i -lt 400 ]; do sleep 30 & i=$((i+1)); done; wait";
    let (runtime, generation) = (Arc::clone(&inside.runtime), inside.spec.generation.clone());
    let bombing = tokio::spawn(async move { sh(&runtime, &generation, bomb).await });
    let full = async {
        while inside.runtime.stats(&inside.spec.generation).await.unwrap().pids < 120 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, full)
        .await
        .expect("it fills up to its limit");
    let pids = inside.runtime.stats(&inside.spec.generation).await.unwrap().pids;
    assert!(pids <= inside.spec.limits.pids, "{pids}");
    assert_eq!(
        crate::rig::health(&inside.runtime, &inside.spec.generation).await["status"],
        "ok"
    );
    bombing.abort();
    inside
        .runtime
        .stop(&inside.spec.generation, Duration::from_secs(1))
        .await
        .unwrap();
    inside.runtime.remove(&inside.spec.generation).await.unwrap();
    inside.spec.generation.number = 2;
    run(&inside.runtime, &mut inside.notices, &inside.spec).await;
    inside.end().await;
}

/// E10: memory, tmpfs included, is charged to the sandbox that uses it.
pub async fn a_memory_hog_dies_alone(rig: &Rig) {
    let mut hog = inside(rig).await;
    let other = rig.spec();
    run(&hog.runtime, &mut hog.notices, &other).await;
    hog.ok("dd if=/dev/zero of=/dev/shm/some bs=1M count=32").await;
    let full = hog.refused("dd if=/dev/zero of=/dev/shm/more bs=1M count=100").await;
    assert!(full.contains("No space left"), "{full}");
    hog.refused("sudo -n dd if=/dev/zero of=/run/more bs=1M count=20").await;
    hog.ok("rm -f /dev/shm/* && sudo -n rm -f /run/more").await;
    // `tail` keeps what it reads. The agent may be what the kernel picks: then the exit says why.
    let (runtime, generation) = (Arc::clone(&hog.runtime), hog.spec.generation.clone());
    let eat = tokio::spawn(async move {
        sh(
            &runtime,
            &generation,
            "dd if=/dev/zero bs=1M count=2000 | tail -c 1900m | wc -c",
        )
        .await
    });
    let survived = await_notice(&mut hog.notices, |notice| match notice {
        Notice::Activity { oom_kills, .. } if oom_kills > 0 => Some(true),
        Notice::Exited { generation, exit } if generation == hog.spec.generation => {
            assert!(exit.oom_killed, "{exit:?}");
            Some(false)
        }
        _ => None,
    })
    .await;
    if survived {
        let (_, output) = eat.await.unwrap();
        assert!(!output.trim().ends_with("1992294400"), "it got 1.9 GB: {output}");
    }
    let memory = hog.runtime.stats(&other.generation).await.unwrap().memory;
    assert!(memory < other.limits.memory);
    assert_eq!(
        crate::rig::health(&hog.runtime, &other.generation).await["status"],
        "ok"
    );
    hog.runtime.remove(&other.generation).await.unwrap();
    hog.end().await;
}

/// A log without end costs what it may and no more. What flooded it stands where the agent would.
pub async fn a_flooded_log_stays_bounded(rig: &Rig) {
    let runtime = rig.podman_runtime();
    let spec = rig.spec();
    let name = spec.generation.container_name();
    let mut container = runtime.template(&spec);
    container.mounts.retain(|m| m.r#type == "tmpfs");
    container.command = [
        "/bin/busybox",
        "sh",
        "-c",
        "yes 0123456789abcdef0123456789abcdef | head -c 60000000",
    ]
    .map(str::to_owned)
    .to_vec();
    rig.libpod().create(&container).await.unwrap();
    rig.libpod().start(&name).await.unwrap();
    let runtime: Arc<dyn Runtime> = Arc::new(runtime);
    await_seen(&runtime, &spec.generation, |s| matches!(s, Seen::Exited(_))).await;
    let sizes = walk(&rig.places.volumes.with_file_name("p"));
    let log: u64 = sizes
        .iter()
        .filter(|(name, _)| name.contains("ctr.log"))
        .map(|(_, size)| size)
        .sum();
    assert!(log > 0 && log <= 24 << 20, "{log} bytes of log");
    let mut lines = runtime.logs(&spec.generation, 3, false).await.unwrap();
    assert!(lines.recv().await.unwrap().line.starts_with("0123456789abcdef"));
    runtime.remove(&spec.generation).await.unwrap();
}

/// F09, F17: events are lost with the service, exits are not.
pub async fn an_exit_while_the_service_is_away_is_noticed_when_it_is_back(rig: &Rig) {
    let service = rig.service();
    let mut inside = inside(rig).await;
    service.go_away();
    let away = inside.runtime.inspect(&inside.spec.generation).await;
    assert!(matches!(away, Err(Error::Unavailable(_))), "{away:?}");
    assert_eq!(
        crate::rig::health(&inside.runtime, &inside.spec.generation).await["status"],
        "ok"
    );
    let name = inside.spec.generation.container_name();
    assert!(
        service
            .command()
            .args(["kill", &name])
            .output()
            .unwrap()
            .status
            .success()
    );
    service.come_back();
    assert_eq!(await_exit(&mut inside.notices, &inside.spec.generation).await.code, 137);
    inside.end().await;
}

/// F09: Podman learns of an end from the monitor, and where that died before, says "running" for ever.
pub async fn without_its_monitor_a_container_can_be_stopped_and_its_own_end_is_seen(rig: &Rig) {
    let mut inside = inside(rig).await;
    let kill = |pid| rustix::process::kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    let name = inside.spec.generation.container_name();
    kill(rig.libpod().inspect(&name).await.unwrap().state.conmon_pid);
    inside.ok("true").await;
    let generation = inside.spec.generation.clone();
    let stopped = inside.runtime.stop(&generation, Duration::from_secs(20));
    tokio::time::timeout(Duration::from_secs(15), stopped)
        .await
        .expect("its end is seen before its grace is over")
        .unwrap();
    inside.runtime.remove(&generation).await.unwrap();

    inside.spec.generation.number = 2;
    run(&inside.runtime, &mut inside.notices, &inside.spec).await;
    let name = inside.spec.generation.container_name();
    let state = rig.libpod().inspect(&name).await.unwrap().state;
    kill(state.conmon_pid);
    assert_eq!(
        inside.runtime.inspect(&inside.spec.generation).await.unwrap(),
        Seen::Running
    );
    kill(state.pid);
    await_seen(&inside.runtime, &inside.spec.generation, |s| {
        matches!(s, Seen::Exited(_))
    })
    .await;
    inside.end().await;
}

/// E16: SIGTERM is a request.
pub async fn a_stubborn_process_is_killed_after_its_grace(rig: &Rig) {
    let inside = inside(rig).await;
    inside.ok("(trap '' TERM INT HUP; sleep 600 >/dev/null 2>&1 &)").await;
    let asked = std::time::Instant::now();
    inside
        .runtime
        .stop(&inside.spec.generation, Duration::from_secs(2))
        .await
        .unwrap();
    assert!(asked.elapsed() < Duration::from_secs(15), "{:?}", asked.elapsed());
    await_seen(&inside.runtime, &inside.spec.generation, |s| {
        matches!(s, Seen::Exited(_))
    })
    .await;
    inside.end().await;
}

fn walk(path: &std::path::Path) -> Vec<(String, u64)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        match entry.metadata() {
            Ok(m) if m.is_dir() => found.extend(walk(&entry.path())),
            Ok(m) => found.push((entry.file_name().to_string_lossy().into_owned(), m.len())),
            Err(_) => {}
        }
    }
    found
}
