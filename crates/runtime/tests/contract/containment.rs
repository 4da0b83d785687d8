//! What hostile code inside a real container cannot do. Each beside the same thing succeeding where it may, so that
//! a refusal means something. The ids are those of the project's security cases.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::Duration;

use choir_runtime::{Error, Notice, Runtime, Seen, Spec};
use tokio::sync::mpsc;

use crate::rig::{IDS, Kind, PATIENCE, Rig, await_exit, await_notice, await_seen, run, sh};

struct Inside {
    runtime: Arc<dyn Runtime>,
    notices: mpsc::Receiver<Notice>,
    spec: Spec,
}

async fn inside(rig: &Rig) -> Inside {
    let runtime = rig.runtime();
    let mut notices = runtime.notices().unwrap();
    let spec = rig.spec();
    run(&runtime, &mut notices, &spec).await;
    Inside { runtime, notices, spec }
}

impl Inside {
    async fn sh(&self, line: &str) -> (i64, String) {
        sh(&self.runtime, &self.spec.generation, line).await
    }

    async fn ok(&self, line: &str) -> String {
        let (code, output) = self.sh(line).await;
        assert_eq!(code, 0, "{line}: {output}");
        output
    }

    async fn refused(&self, line: &str) -> String {
        let (code, output) = self.sh(line).await;
        assert_ne!(code, 0, "{line} succeeded: {output}");
        output
    }

    async fn end(self) {
        self.runtime.remove(&self.spec.generation).await.unwrap();
    }
}

/// E01, E03: no interface but loopback, so no host port and no metadata service.
pub async fn nothing_outside_is_reachable_over_a_network(rig: &Rig) {
    let host = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = host.local_addr().unwrap().port();
    std::net::TcpStream::connect(("127.0.0.1", port)).expect("from the host the port is open");
    let reach = |address: &str, port: u16| format!("timeout 3 nc -w 2 {address} {port} -e /bin/true");

    let inside = inside(rig).await;
    for address in ["127.0.0.1", "10.88.0.1", "169.254.169.254", "host.containers.internal"] {
        inside.refused(&reach(address, port)).await;
    }
    inside.refused(&reach("169.254.169.254", 80)).await;
    inside.ok(&reach("127.0.0.1", 9091)).await;
    assert_eq!(inside.ok("cat /proc/net/route | wc -l").await.trim(), "1");
    inside.end().await;
}

/// E02: nothing is shared, not even with the same owner's other sandbox.
pub async fn another_sandbox_is_out_of_reach(rig: &Rig) {
    let mut one = inside(rig).await;
    let two = rig.spec();
    run(&one.runtime, &mut one.notices, &two).await;
    let other = |line: &'static str| sh(&one.runtime, &two.generation, line);
    one.ok("echo here > /dev/shm/mark; echo here > /tmp/mark; echo here > ~/mark")
        .await;
    one.ok("cat /dev/shm/mark /tmp/mark ~/mark").await;
    let (code, _) = other("cat /dev/shm/mark || cat /tmp/mark || cat ~/mark").await;
    assert_ne!(code, 0);
    one.ok("(sleep 4242 >/dev/null 2>&1 &) ; ps | grep -q '[s]leep 4242'")
        .await;
    let (code, _) = other("ps | grep -q '[s]leep 4242'").await;
    assert_ne!(code, 0);
    let (_, sockets) = other("cat /proc/net/unix").await;
    assert!(!sockets.contains('@'), "{sockets}");
    let (code, _) = other("test -S /run/choir/hypervisor.sock").await;
    assert_eq!(code, 0);
    one.runtime.remove(&two.generation).await.unwrap();
    one.end().await;
}

/// E04: what the kernel says of the agent and of a user's process.
pub async fn processes_have_the_documented_confinement(rig: &Rig) {
    let inside = inside(rig).await;
    let field = |status: &str, name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name).map(str::trim));
        line.unwrap_or_default().to_owned()
    };
    let own = inside.ok("cat /proc/self/status").await;
    assert_eq!(field(&own, "NoNewPrivs:"), "1");
    assert_eq!(field(&own, "Seccomp:"), "2");
    assert_eq!(u64::from_str_radix(&field(&own, "CapEff:"), 16), Ok(0));
    assert_eq!(field(&own, "Uid:").split('\t').next(), Some("1000"));
    let first = inside.ok("cat /proc/1/status").await;
    assert_eq!(field(&first, "CapBnd:"), "00000000800405fb");
    assert_eq!(field(&first, "NoNewPrivs:"), "1");
    let map = inside.ok("cat /proc/self/uid_map").await;
    assert_eq!(map.split_whitespace().collect::<Vec<_>>(), ["0", "1000000", "65536"]);
    inside.ok("touch ~/made").await;
    let home = rig
        .places
        .volumes
        .join(inside.spec.generation.sandbox.as_str())
        .join("home");
    assert_eq!(fs::metadata(home.join("made")).unwrap().uid(), IDS.base + 1000);
    for path in [
        "/run/choir/x",
        "/etc/hosts",
        "/usr/libexec/choir/choir-sandbox",
        "/proc/sys/kernel/hostname",
    ] {
        inside.refused(&format!("sudo -n sh -c 'echo x >> {path}'")).await;
    }
    inside.ok("sudo -n sh -c 'echo x >> /etc/motd'").await;
    inside
        .refused("ls /dev/vda || ls /dev/sda || ls /dev/mem || ls /dev/kmsg")
        .await;
    inside.end().await;
}

/// E04's positive control: each weakening, by itself, is found and ends the container.
pub async fn a_weakened_container_is_killed(rig: &Rig) {
    let runtime = rig.podman_runtime();
    let mut notices = runtime.notices().unwrap();
    type Weaken = fn(&mut choir_runtime::template::Container);
    let weakenings: [(&str, Weaken); 8] = [
        ("NET_ADMIN", |c| c.cap_add.push("NET_ADMIN".into())),
        ("no-new-privileges", |c| c.no_new_privileges = false),
        ("seccomp", |c| c.seccomp_profile_path = "unconfined".into()),
        ("seccomp", |c| {
            c.seccomp_profile_path = "/usr/share/containers/seccomp.json".into()
        }),
        ("network", |c| c.netns.nsmode = "host"),
        ("mount", |c| {
            let mut extra = c.mounts[0].clone();
            extra.destination = "/host".into();
            extra.source = "/usr/share".into();
            c.mounts.push(extra);
        }),
        ("size of /dev/shm", |c| c.shm_size *= 2),
        ("environment", |c| {
            c.env.insert("LEAK".into(), "1".into());
        }),
    ];
    for (what, weaken) in weakenings {
        let spec = rig.spec();
        let mut container = runtime.template(&spec);
        weaken(&mut container);
        // The weakened one in the place of the one that was made.
        runtime.create(&spec).await.unwrap();
        rig.libpod().remove(&container.name).await.unwrap();
        rig.libpod().create(&container).await.unwrap();
        runtime.start(&spec.generation).await.unwrap();
        let reason = await_notice(&mut notices, |n| match n {
            Notice::Refused { generation, reason } if generation == spec.generation => Some(reason),
            Notice::Ready { .. } => panic!("{what}: it was let in"),
            _ => None,
        })
        .await;
        assert!(reason.contains(what), "{what}: {reason}");
        assert_eq!(await_exit(&mut notices, &spec.generation).await.code, 137, "{what}");
        runtime.remove(&spec.generation).await.unwrap();
    }
}

/// E08: a setuid file of the sandbox's root has the bit, and gives its caller nothing.
pub async fn a_setuid_program_on_the_volume_gives_nothing(rig: &Rig) {
    let inside = inside(rig).await;
    inside
        .ok("cp /bin/busybox ~/busybox && sudo -n sh -c 'chown 0:0 /home/choir/busybox; chmod 4755 /home/choir/busybox'")
        .await;
    let home = rig
        .places
        .volumes
        .join(inside.spec.generation.sandbox.as_str())
        .join("home");
    let planted = fs::metadata(home.join("busybox")).unwrap();
    assert_eq!(
        (planted.mode() & 0o4000, planted.uid()),
        (0o4000, IDS.base),
        "the bit is there"
    );
    assert_eq!(inside.ok("~/busybox id -u").await.trim(), "1000");
    inside
        .ok("sudo -n sh -c 'mkdir /planted; cp /bin/busybox /planted/; chmod 4755 /planted/busybox'")
        .await;
    assert_eq!(inside.ok("/planted/busybox id -u").await.trim(), "1000");
    assert_eq!(
        inside.ok("sudo -n id -u").await.trim(),
        "0",
        "the way that is meant works"
    );
    inside.end().await;
}

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
    tokio::select! {
        eaten = eat => {
            let (_, output) = eaten.unwrap();
            assert!(!output.trim().ends_with("1992294400"), "it got 1.9 GB: {output}");
        }
        exit = await_exit(&mut hog.notices, &hog.spec.generation) => assert!(exit.oom_killed, "{exit:?}"),
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

/// E17: Podman itself runs with a proxy and a variable that would be worth stealing.
pub async fn nothing_of_the_hosts_environment_or_names_comes_in(rig: &Rig) {
    let inside = inside(rig).await;
    let everything = inside
        .ok("env; sudo -n sh -c 'tr \"\\0\" \"\\n\" < /proc/1/environ; cat /etc/hosts /etc/resolv.conf /etc/hostname'")
        .await;
    assert!(everything.contains("127.0.0.1 localhost box"), "{everything}");
    let host = fs::read_to_string("/proc/sys/kernel/hostname")
        .unwrap()
        .trim()
        .to_owned();
    for secret in ["CANARY", "proxy.example"] {
        assert!(!everything.contains(secret), "{everything}");
    }
    assert!(
        !everything.lines().any(|l| l.split_whitespace().any(|w| w == host)),
        "{everything}"
    );
    inside.end().await;
}

/// E21: what would open the kernel's rarely walked parts. The default profile lets `unshare` through.
pub async fn forbidden_system_calls_are_refused(rig: &Rig) {
    let inside = inside(rig).await;
    for command in [
        "unshare -U true",
        "unshare -r true",
        "unshare -n true",
        "unshare -m true",
    ] {
        let why = inside.refused(command).await;
        assert!(why.contains("not permitted"), "{command}: {why}");
        inside.refused(&format!("sudo -n {command}")).await;
    }
    for command in [
        "mount -t tmpfs none /mnt",
        "mount -t proc proc /mnt",
        "mount --bind /tmp /mnt",
        "chroot / mount -t sysfs s /mnt",
    ] {
        inside.refused(&format!("sudo -n {command}")).await;
    }
    inside.ok("sudo -n chroot / true").await;
    let default: serde_json::Value =
        serde_json::from_slice(&fs::read("/usr/share/containers/seccomp.json").unwrap()).unwrap();
    let allowed = default.pointer("/syscalls/1/names").and_then(|n| n.as_array()).unwrap();
    assert!(
        allowed.iter().any(|n| n == "unshare"),
        "the default is no weaker: this test shows nothing"
    );
    let control = std::process::Command::new("busybox")
        .args(["unshare", "-U", "true"])
        .status();
    assert!(control.unwrap().success(), "the kernel itself allows it");
    inside.end().await;
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
    let Kind::Podman(service) = &rig.kind else {
        unreachable!("only Podman has a service")
    };
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
