//! What the kernel and Podman say of a sandbox's confinement, and that every difference is found. What of the host's
//! environment arrives.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt;

use choir_runtime::{Notice, Runtime};
use serde_json::{Value, json};

use super::{inside, unguarded};
use crate::rig::{IDS, Rig, await_notice};
use crate::root::give;

/// What is taken from the template, and a part of the sentence that says so.
type Weakening = (&'static str, fn(&mut Value));

const WEAKENINGS: [Weakening; 18] = [
    ("NET_ADMIN", |c| {
        c["cap_add"].as_array_mut().unwrap().push(json!("NET_ADMIN"))
    }),
    ("no-new-privileges", |c| c["no_new_privileges"] = json!(false)),
    ("seccomp", |c| c["seccomp_profile_path"] = json!("unconfined")),
    ("seccomp", |c| {
        c["seccomp_profile_path"] = json!("/usr/share/containers/seccomp.json")
    }),
    ("network", |c| c["netns"] = json!({"nsmode": "host"})),
    ("user namespace", |c| c["userns"] = json!({"nsmode": "host"})),
    ("the uid map", |c| c["idmappings"]["UIDMap"][0]["host_id"] = json!(0)),
    ("the gid map", |c| c["idmappings"]["GIDMap"][0]["host_id"] = json!(0)),
    // The next owner's ids beside one's own.
    ("the uid map", |c| c["idmappings"]["UIDMap"][0]["size"] = json!(131_072)),
    ("there is a mount at /host", |c| {
        let mut extra = mount(c, "/home/choir").clone();
        extra["destination"] = json!("/host");
        extra["source"] = json!("/usr/share");
        c["mounts"].as_array_mut().unwrap().push(extra);
    }),
    ("the mount at /home/choir is another", |c| {
        replace(c, "/home/choir", "nosuid", "suid")
    }),
    ("the mount at /home/choir is another", |c| {
        replace(c, "/home/choir", "nodev", "dev")
    }),
    ("the mount at /run/choir is another", |c| {
        replace(c, "/run/choir", "ro", "rw")
    }),
    ("the mount at /etc/hosts is another", |c| {
        replace(c, "/etc/hosts", "ro", "rw")
    }),
    ("host devices", |c| c["devices"] = json!([{"path": "/dev/kmsg"}])),
    ("RLIMIT_NOFILE", |c| {
        c["r_limits"][1]["soft"] = json!(1000);
    }),
    ("size of /dev/shm", |c| c["shm_size"] = json!(128 << 20)),
    ("environment", |c| c["env"]["LEAK"] = json!("1")),
];

fn mount<'a>(container: &'a mut Value, destination: &str) -> &'a mut Value {
    let mounts = container["mounts"].as_array_mut().unwrap();
    mounts.iter_mut().find(|m| m["destination"] == destination).unwrap()
}

fn replace(container: &mut Value, destination: &str, option: &str, by: &str) {
    for is in mount(container, destination)["options"].as_array_mut().unwrap() {
        if is == option {
            *is = json!(by);
        }
    }
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
    let home = rig.volume(&inside.spec.generation).join("home");
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
    let mut wanted = HashMap::new();
    for (what, weaken) in WEAKENINGS {
        let spec = rig.spec();
        let template = serde_json::to_value(runtime.template(&spec)).unwrap();
        let mut container = template.clone();
        weaken(&mut container);
        assert_ne!(container, template, "{what}");
        // The weakened one in the place of the one that was made.
        runtime.create(&spec).await.unwrap();
        rig.libpod().remove(&spec.generation.container_name()).await.unwrap();
        let root = u32::try_from(container["idmappings"]["UIDMap"][0]["host_id"].as_u64().unwrap()).unwrap();
        if root != IDS.base {
            // Else it could not even start.
            give(&rig.volume(&spec.generation), root);
        }
        rig.libpod().create(&container).await.expect(what);
        runtime.start(&spec.generation).await.expect(what);
        wanted.insert(spec.generation, what);
    }
    let mut ended = HashSet::new();
    while !wanted.is_empty() || ended.len() < WEAKENINGS.len() {
        let notice = await_notice(&mut notices, Some).await;
        match notice {
            Notice::Refused { generation, reason } => {
                let what = wanted.remove(&generation).expect("it is refused once");
                assert!(reason.contains(what), "{what}: {reason}");
            }
            Notice::Exited { generation, exit } => {
                assert_eq!(exit.code, 137, "{:?}", wanted.get(&generation));
                ended.insert(generation);
            }
            Notice::Ready { generation, .. } => panic!("{}: it was let in", wanted[&generation]),
            _ => {}
        }
    }
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

    let passed_on = |c: &mut Value| {
        c["httpproxy"] = json!(true);
        c["env_host"] = json!(true);
    };
    let control = unguarded(rig, &rig.spec(), passed_on, "env").await;
    for secret in ["https_proxy=http://user:CANARY@proxy.example:1", "CANARY=CANARY"] {
        assert!(control.lines().any(|l| l == secret), "passed on, it arrives: {control}");
    }
}
