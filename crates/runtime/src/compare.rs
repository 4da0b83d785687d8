//! What a real container may not differ in from its template. Pure: it gets what was seen and answers with
//! sentences, and must not ask anybody.

use std::collections::{BTreeMap, BTreeSet};

use choir_core::IdRange;
use choir_link::SelfReport;
use choir_link::message::{AGENT_BINARY, RUN_DIR};
use serde_json::Value;

use crate::libpod::{Inspect, Mounted};
use crate::template::{self, Container, FILES, HOME};

/// Collects differences.
#[derive(Default)]
struct Differences(Vec<String>);

impl Differences {
    fn check(&mut self, same: bool, what: impl FnOnce() -> String) {
        if !same {
            self.0.push(what());
        }
    }

    fn equal<T: PartialEq + std::fmt::Debug>(&mut self, name: &str, is: &T, want: &T) {
        self.check(is == want, || format!("{name} is {is:?} instead of {want:?}"));
    }
}

/// How Podman's inspection of a container differs from what was asked for. Resource limits are left out: they may
/// have been changed since, and are set again at adoption.
pub fn inspected(want: &Container, is: &Inspect) -> Vec<String> {
    let mut d = Differences::default();
    d.equal("rootfs", &is.rootfs, &want.rootfs.display().to_string());
    d.equal("command", &is.config.cmd, &want.command);
    let caps: BTreeSet<String> = want.cap_add.iter().map(|name| format!("CAP_{name}")).collect();
    let set = |caps: &Option<Vec<String>>| caps.iter().flatten().cloned().collect::<BTreeSet<_>>();
    d.equal("the capability bounding set", &set(&is.bounding_caps), &caps);
    d.equal("the effective capability set", &set(&is.effective_caps), &caps);
    compare_mounts(&mut d, want, &is.mounts, &is.host_config.tmpfs);
    let host = &is.host_config;
    for (name, mode, wanted) in [
        ("network", &host.network_mode, "none"),
        ("pid namespace", &host.pid_mode, "private"),
        ("UTS namespace", &host.uts_mode, "private"),
        ("user namespace", &host.userns_mode, "private"),
        ("cgroup namespace", &host.cgroup_mode, "private"),
    ] {
        d.equal(name, &mode.as_str(), &wanted);
    }
    // Podman calls its private IPC namespaces shareable.
    d.check(matches!(host.ipc_mode.as_str(), "private" | "shareable"), || {
        format!("IPC namespace is {:?}", host.ipc_mode)
    });
    d.check(!host.privileged, || "it is privileged".to_owned());
    let options: Vec<&str> = host.security_opt.iter().map(String::as_str).collect();
    d.check(options.contains(&"no-new-privileges"), || {
        "no-new-privileges is off".to_owned()
    });
    d.check(!options.iter().any(|o| o.contains("unconfined")), || {
        format!("security options are {options:?}")
    });
    d.check(host.devices.as_ref().is_none_or(Vec::is_empty), || {
        "it has host devices".to_owned()
    });
    d.equal("the size of /dev/shm", &host.shm_size, &want.shm_size);
    for limit in &want.r_limits {
        let name = format!("RLIMIT_{}", limit.r#type.to_uppercase());
        let found = host.ulimits.iter().find(|u| u.name == name);
        let same = found.is_some_and(|u| (u.soft as u64, u.hard as u64) == (limit.soft, limit.hard));
        d.check(same, || format!("{name} is {found:?}"));
    }
    for variable in &is.config.env {
        let name = variable.split('=').next().unwrap_or_default();
        d.check(template::is_expected_variable(name), || {
            format!("its environment has {name:?}")
        });
    }
    for (label, value) in &want.labels {
        d.check(is.config.labels.get(label) == Some(value), || {
            format!("label {label} is another")
        });
    }
    d.0
}

fn compare_mounts(d: &mut Differences, want: &Container, mounts: &[Mounted], tmpfs: &BTreeMap<String, String>) {
    let seen: BTreeMap<&str, &Mounted> = mounts.iter().map(|m| (m.destination.as_str(), m)).collect();
    let (binds, memory): (Vec<_>, Vec<_>) = want.mounts.iter().partition(|m| m.r#type == "bind");
    for mount in &binds {
        let same = seen.get(mount.destination.as_str()).is_some_and(|m| {
            m.source == mount.source.display().to_string()
                && m.r#type == "bind"
                && m.rw == mount.options.iter().any(|o| o == "rw")
                && ["nosuid", "nodev"].iter().all(|o| m.options.iter().any(|is| is == o))
        });
        d.check(same, || format!("the mount at {} is another", mount.destination));
    }
    for mount in &memory {
        let same = tmpfs.get(&mount.destination).is_some_and(|options| {
            let options: Vec<&str> = options.split(',').collect();
            mount
                .options
                .iter()
                .all(|o| options.contains(&o.as_str()) || o == "notmpcopyup")
        });
        d.check(same, || format!("the tmpfs at {} is another", mount.destination));
    }
    let known: BTreeSet<&str> = want.mounts.iter().map(|m| m.destination.as_str()).collect();
    for extra in seen.keys().copied().chain(tmpfs.keys().map(String::as_str)) {
        d.check(known.contains(extra), || format!("there is a mount at {extra}"));
    }
}

/// How the configuration the OCI runtime was given differs, for what inspection leaves out.
pub fn configured(want: &Container, config: &Value) -> Vec<String> {
    let mut d = Differences::default();
    let no_new = config.pointer("/process/noNewPrivileges");
    d.check(no_new == Some(&Value::Bool(true)), || {
        "noNewPrivileges is off".to_owned()
    });
    for (name, maps) in [("uid", "/linux/uidMappings"), ("gid", "/linux/gidMappings")] {
        let map = &want.idmappings.uid_map[0];
        let wanted = serde_json::json!([{"containerID": 0, "hostID": map.host_id, "size": map.size}]);
        d.check(config.pointer(maps) == Some(&wanted), || {
            format!("the {name} map is another")
        });
    }
    let list = |at: &str| {
        config
            .pointer(at)
            .and_then(Value::as_array)
            .cloned()
            .unwrap_or_default()
    };
    let namespaces = list("/linux/namespaces");
    for kind in ["pid", "network", "ipc", "uts", "user", "mount"] {
        let own = namespaces.iter().any(|n| n["type"] == kind && n.get("path").is_none());
        d.check(own, || format!("it has no {kind} namespace of its own"));
    }
    let masked = list("/linux/maskedPaths");
    d.check(masked.iter().any(|p| p == "/proc/kcore"), || {
        "/proc is not masked".to_owned()
    });
    d.check(list("/linux/devices").is_empty(), || "it has host devices".to_owned());
    let allowed = freely_allowed(&serde_json::from_str(template::SECCOMP).unwrap_or_default());
    let refuses = config.pointer("/linux/seccomp/defaultAction") == Some(&Value::from("SCMP_ACT_ERRNO"));
    d.check(refuses, || "there is no seccomp filter".to_owned());
    let extra: Vec<String> = freely_allowed(&config["linux"]["seccomp"])
        .difference(&allowed)
        .cloned()
        .collect();
    d.check(extra.is_empty(), || format!("seccomp allows {}", extra.join(", ")));
    d.0
}

/// Names of system calls that a profile allows whatever the arguments.
fn freely_allowed(profile: &Value) -> BTreeSet<String> {
    let rules = profile["syscalls"].as_array().into_iter().flatten();
    rules
        .filter(|r| r["action"] == "SCMP_ACT_ALLOW" && r["args"].as_array().is_none_or(Vec::is_empty))
        .flat_map(|r| r["names"].as_array().into_iter().flatten())
        .filter_map(|name| name.as_str().map(str::to_owned))
        .collect()
}

/// How the agent's view of its own confinement differs.
pub fn reported(want: &Container, is: &SelfReport) -> Vec<String> {
    let mut d = Differences::default();
    for (name, text) in [("CapBnd", &is.cap_bounding), ("CapEff", &is.cap_effective)] {
        let mask = u64::from_str_radix(text, 16).unwrap_or(u64::MAX);
        d.check(mask & !template::capability_mask() == 0, || {
            format!("{name} is {text:?}")
        });
    }
    d.equal("NoNewPrivs", &is.no_new_privs, &1);
    d.equal("Seccomp", &is.seccomp, &2);
    // From inside, the ids of the namespace that Podman made this one in are seen: those that Podman was told.
    let map = format!("0 {} {}", want.idmappings.uid_map[0].host_id, IdRange::SIZE);
    d.equal("the uid map", &is.uid_map, &vec![map]);
    for name in &is.interfaces {
        d.check(template::INTERFACES.contains(&name.as_str()), || {
            format!("it has the network interface {name:?}")
        });
    }
    for limit in &want.r_limits {
        d.check(is.rlimits.get(limit.r#type) == Some(&limit.soft), || {
            format!("its limit {} is {:?}", limit.r#type, is.rlimits.get(limit.r#type))
        });
    }
    for name in &is.env_names {
        d.check(template::is_expected_variable(name), || {
            format!("the agent's environment has {name:?}")
        });
    }
    compare_own_mounts(&mut d, want, &is.mounts);
    d.0
}

fn compare_own_mounts(d: &mut Differences, want: &Container, mounts: &BTreeMap<String, String>) {
    let has = |at: &str, wanted: &[&str]| {
        mounts.get(at).is_some_and(|options| {
            let options: Vec<&str> = options.split(',').collect();
            wanted.iter().all(|o| options.contains(o))
        })
    };
    // The first option is the mount's own; `ro` or `rw` of the file system below it comes later.
    let read_only = |at: &str| mounts.get(at).is_some_and(|o| o == "ro" || o.starts_with("ro,"));
    d.check(has(HOME, &["nosuid", "nodev"]), || {
        format!("{HOME} is not mounted nosuid,nodev")
    });
    d.check(has("/run", &["nosuid", "nodev", "size=16384k"]), || {
        "/run is not sized".to_owned()
    });
    d.check(has("/dev/shm", &["nosuid", "nodev", "size=65536k"]), || {
        "/dev/shm is not sized".to_owned()
    });
    for at in FILES.into_iter().chain([RUN_DIR, AGENT_BINARY]) {
        d.check(read_only(at), || format!("{at} is not mounted read-only"));
    }
    let ours: BTreeSet<&str> = want.mounts.iter().map(|m| m.destination.as_str()).collect();
    for at in mounts.keys() {
        let kernel = ["/proc", "/sys", "/dev"].iter().any(|top| {
            at.strip_prefix(top)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        });
        d.check(at == "/" || kernel || ours.contains(at.as_str()), || {
            format!("there is a mount at {at:?}")
        });
    }
}
