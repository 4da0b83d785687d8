//! The container every generation gets, and what a running one may not differ in. It must not talk to anything.
//!
//! The host lends a sandbox nothing but what is named here: no network, its own ids, few capabilities, a committed
//! seccomp profile, sized memory file systems, and files of our own where Podman would copy the host's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use choir_core::{IdRange, Limits, Slot};
use choir_link::message::{AGENT_BINARY, RUN_DIR};
use serde::{Deserialize, Serialize};

use crate::libpod::{Cpu, Memory, Pids, Resources};
use crate::{Places, Spec};

/// The seccomp profile, in the format of containers/common.
pub const SECCOMP: &str = include_str!("../seccomp.json");

/// What the agent and `sudo` may do; a user's processes get none of it.
pub const CAPABILITIES: [(&str, u8); 11] = [
    ("CHOWN", 0),
    ("DAC_OVERRIDE", 1),
    ("FOWNER", 3),
    ("FSETID", 4),
    ("KILL", 5),
    ("SETGID", 6),
    ("SETUID", 7),
    ("SETPCAP", 8),
    ("NET_BIND_SERVICE", 10),
    ("SYS_CHROOT", 18),
    ("SETFCAP", 31),
];

/// Label of every container of ours: the sandbox's id.
pub const LABEL_SANDBOX: &str = "choir.sandbox";
/// Label: the generation's number.
pub const LABEL_GENERATION: &str = "choir.generation";
/// Label: the start nonce. It proves an agent to us, and is no secret from the host.
pub const LABEL_NONCE: &str = "choir.nonce";

/// Where the sandbox's persistent home is mounted.
pub const HOME: &str = "/home/choir";

/// Bytes of /run, which holds sockets and pid files.
const RUN_SIZE: u64 = 16 << 20;
/// Bytes of /dev/shm.
const SHM_SIZE: i64 = 64 << 20;
/// Bytes of container log that Podman keeps.
const LOG_SIZE: i64 = 10 << 20;
/// The kernel's own period, in microseconds.
const CPU_PERIOD: u64 = 100_000;
/// Open files a process may have, where the host allows as many.
const NOFILE: u64 = 16_384;
/// Processes of one user. The pids limit of the cgroup is what counts, and can change while running; this one is here
/// because for what is missing Podman sets values of its own, beyond the host's. Podman may run with lower limits
/// than this process, so it is well below what any distribution gives.
const NPROC: u64 = 16_384;

/// Names that may be in the agent's environment; Podman adds all but PATH.
const ENVIRONMENT: [&str; 5] = ["PATH", "HOME", "HOSTNAME", "TERM", "container"];
pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Interfaces that some kernels put into every network namespace. They lead nowhere.
pub(crate) const INTERFACES: [&str; 11] = [
    "lo", "tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0", "teql0",
];

/// Hard limits of this host's processes; asking for more would make the start fail.
#[derive(Debug, Clone, Copy)]
pub struct HostLimits {
    pub nofile: u64,
    pub nproc: u64,
}

impl HostLimits {
    /// Those of this process.
    pub fn own() -> Self {
        let hard = |resource| rustix::process::getrlimit(resource).maximum.unwrap_or(u64::MAX);
        Self {
            nofile: hard(rustix::process::Resource::Nofile),
            nproc: hard(rustix::process::Resource::Nproc),
        }
    }
}

/// A SpecGenerator of libpod: the fields we set, and no others.
#[derive(Debug, Clone, Serialize)]
pub struct Container {
    pub name: String,
    pub command: Vec<String>,
    pub env: BTreeMap<String, String>,
    pub env_host: bool,
    pub httpproxy: bool,
    pub rootfs: PathBuf,
    pub hostname: String,
    pub labels: BTreeMap<String, String>,
    pub stop_signal: u8,
    pub systemd: &'static str,
    #[serde(rename = "sdnotifyMode")]
    pub sdnotify_mode: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub oci_runtime: String,
    pub image_volume_mode: &'static str,
    pub restart_policy: &'static str,
    pub log_configuration: LogConfiguration,
    pub mounts: Vec<Mount>,
    pub use_image_hosts: bool,
    pub use_image_resolve_conf: bool,
    pub manage_password: bool,
    pub shm_size: i64,
    pub no_new_privileges: bool,
    pub cap_drop: Vec<String>,
    pub cap_add: Vec<String>,
    pub seccomp_profile_path: PathBuf,
    pub userns: Namespace,
    pub netns: Namespace,
    pub pidns: Namespace,
    pub ipcns: Namespace,
    pub utsns: Namespace,
    pub cgroupns: Namespace,
    pub idmappings: IdMappings,
    pub resource_limits: Resources,
    pub r_limits: Vec<Rlimit>,
}

#[derive(Debug, Clone, Serialize)]
pub struct LogConfiguration {
    pub driver: &'static str,
    /// Bytes.
    pub size: i64,
}

#[derive(Debug, Clone, Serialize)]
pub struct Mount {
    pub destination: String,
    pub r#type: &'static str,
    pub source: PathBuf,
    pub options: Vec<String>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Namespace {
    pub nsmode: &'static str,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct IdMappings {
    #[serde(rename = "UIDMap")]
    pub uid_map: Vec<IdMapping>,
    #[serde(rename = "GIDMap")]
    pub gid_map: Vec<IdMapping>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMapping {
    pub container_id: u32,
    pub host_id: u32,
    pub size: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Rlimit {
    pub r#type: &'static str,
    pub soft: u64,
    pub hard: u64,
}

/// Files of ours, under their last name in a generation's directory, that stand where Podman would put the host's. Its
/// own `.containerenv` (from version 5 on) is a file of the host that the sandbox could write without end.
pub const FILES: [&str; 4] = ["/etc/hosts", "/etc/resolv.conf", "/etc/hostname", "/run/.containerenv"];

/// What one of `FILES` holds.
pub fn file(path: &str, hostname: &str) -> String {
    match path {
        "/etc/hosts" => format!("127.0.0.1 localhost {hostname}\n::1 localhost ip6-localhost ip6-loopback\n"),
        // The agent, which asks nobody: names are resolved by whoever makes the connection, the egress proxy.
        "/etc/resolv.conf" => "nameserver 127.0.0.53\noptions attempts:3 timeout:1\n".to_owned(),
        "/etc/hostname" => format!("{hostname}\n"),
        _ => String::new(),
    }
}

/// Where one of `FILES` is on the host.
pub fn own_file(directory: &Path, path: &str) -> PathBuf {
    directory.join(path.rsplit('/').next().unwrap_or(path))
}

/// The container of `spec`, whose directory of ours is `directory`, whose seccomp profile is at `seccomp`, and of whose ids
/// Podman calls the first one `base`.
pub fn container(
    spec: &Spec,
    base: u32,
    places: &Places,
    directory: &Path,
    seccomp: &Path,
    oci_runtime: &str,
    host: HostLimits,
) -> Container {
    let generation = &spec.generation;
    let volume = places.volumes.join(generation.sandbox.as_str());
    let mapping = vec![IdMapping {
        container_id: 0,
        host_id: base,
        size: IdRange::SIZE,
    }];
    let private = Namespace { nsmode: "private" };
    Container {
        name: generation.container_name(),
        command: vec![AGENT_BINARY.to_owned(), "agent".to_owned()],
        env: BTreeMap::from([("PATH".to_owned(), PATH.to_owned())]),
        env_host: false,
        httpproxy: false,
        rootfs: volume.join("root"),
        hostname: spec.hostname.clone(),
        labels: BTreeMap::from([
            (LABEL_SANDBOX.to_owned(), generation.sandbox.to_string()),
            (LABEL_GENERATION.to_owned(), generation.number.to_string()),
            (LABEL_NONCE.to_owned(), spec.nonce.clone()),
        ]),
        stop_signal: 15,
        systemd: "false",
        sdnotify_mode: "ignore",
        oci_runtime: oci_runtime.to_owned(),
        image_volume_mode: "ignore",
        restart_policy: "no",
        log_configuration: LogConfiguration {
            driver: "k8s-file",
            size: LOG_SIZE,
        },
        mounts: mounts(places, &volume, directory),
        use_image_hosts: true,
        use_image_resolve_conf: true,
        manage_password: false,
        shm_size: SHM_SIZE,
        no_new_privileges: true,
        cap_drop: vec!["ALL".to_owned()],
        cap_add: CAPABILITIES.iter().map(|(name, _)| (*name).to_owned()).collect(),
        seccomp_profile_path: seccomp.to_owned(),
        userns: private.clone(),
        netns: Namespace { nsmode: "none" },
        pidns: private.clone(),
        ipcns: private.clone(),
        utsns: private.clone(),
        cgroupns: private,
        idmappings: IdMappings {
            uid_map: mapping.clone(),
            gid_map: mapping,
        },
        resource_limits: resources(&spec.limits, spec.slot),
        r_limits: rlimits(host),
    }
}

fn mounts(places: &Places, volume: &Path, directory: &Path) -> Vec<Mount> {
    let bind = |destination: &str, source: PathBuf, options: &[&str]| Mount {
        destination: destination.to_owned(),
        r#type: "bind",
        source,
        options: options.iter().map(|o| (*o).to_owned()).collect(),
    };
    let read_only = ["bind", "ro", "nosuid", "nodev"];
    let mut mounts = vec![
        bind(HOME, volume.join("home"), &["bind", "rw", "nosuid", "nodev"]),
        Mount {
            destination: "/run".to_owned(),
            r#type: "tmpfs",
            source: "tmpfs".into(),
            options: vec![
                "rw".into(),
                "nosuid".into(),
                "nodev".into(),
                "mode=755".into(),
                format!("size={RUN_SIZE}"),
                // What a release has in its /run is from another life.
                "notmpcopyup".into(),
            ],
        },
        bind(RUN_DIR, directory.join("choir"), &read_only),
        bind(AGENT_BINARY, places.agent.clone(), &read_only),
    ];
    mounts.extend(FILES.map(|path| bind(path, own_file(directory, path), &read_only)));
    mounts
}

/// What live gets of a processor where dev gets one part of it.
const LIVE_TO_DEV: u64 = 4;
/// The kernel's share of a group that nobody said anything about.
const SHARES: u64 = 1024;

/// Limits in the kernel's units, and the share of the slot. Swap counts memory too, so equal values mean no swap.
pub fn resources(limits: &Limits, slot: Slot) -> Resources {
    let memory = i64::try_from(limits.memory).unwrap_or(i64::MAX);
    Resources {
        memory: Memory {
            limit: memory,
            swap: memory,
        },
        cpu: Cpu {
            shares: match slot {
                Slot::Live => SHARES,
                Slot::Dev => SHARES / LIVE_TO_DEV,
            },
            quota: (limits.cpus * CPU_PERIOD as f64).round() as i64,
            period: CPU_PERIOD,
        },
        pids: Pids {
            limit: i64::try_from(limits.pids).unwrap_or(i64::MAX),
        },
    }
}

/// Always all three: for those left out, Podman 4 asks for more than a host may have.
fn rlimits(host: HostLimits) -> Vec<Rlimit> {
    let same = |r#type, value| Rlimit {
        r#type,
        soft: value,
        hard: value,
    };
    vec![
        same("core", 0),
        same("nofile", NOFILE.min(host.nofile)),
        same("nproc", NPROC.min(host.nproc)),
    ]
}

/// Whether the agent's environment may have this name.
pub(crate) fn is_expected_variable(name: &str) -> bool {
    ENVIRONMENT.contains(&name)
}

/// The bits of `CAPABILITIES`, as in `/proc/<pid>/status`.
pub(crate) fn capability_mask() -> u64 {
    CAPABILITIES.iter().fold(0, |mask, (_, bit)| mask | 1 << bit)
}
