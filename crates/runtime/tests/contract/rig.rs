//! A runtime under test with everything around it: volumes, agent, a Podman of its own. Cleans up after itself.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use choir_core::sandbox::Exit;
use choir_core::{Door, Generation, IdRange, Limits, SandboxId};
use choir_link::AgentConfig;
use choir_runtime::libpod::Libpod;
use choir_runtime::sim::World;
use choir_runtime::{Notice, Places, Podman, PodmanOptions, Process, Runtime, Seen, Sim, Spec, Stream};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::mpsc;

use crate::root::{busybox, populate};
use crate::service::{Service, new_network, oci_runtime};

/// How long anything may take on a busy machine before a test says it did not happen.
pub const PATIENCE: Duration = Duration::from_secs(30);
pub const IDS: IdRange = IdRange { base: 1_000_000 };

pub enum Kind {
    Sim(World),
    Process,
    Podman(Service),
}

/// Dropped in this order: containers, what is mounted, the directory.
pub struct Rig {
    pub kind: Kind,
    pub places: Places,
    disk: Option<Disk>,
    _dir: TempDir,
}

/// A file system that is mounted while this lives.
struct Disk(PathBuf);

impl Drop for Disk {
    fn drop(&mut self) {
        if !Command::new("umount").arg(&self.0).status().is_ok_and(|s| s.success()) {
            eprintln!("left mounted: {}", self.0.display());
        }
    }
}

/// Says aloud what is left out and why, also to whoever counts.
fn skip<T>(test: &str, reason: &str) -> Option<T> {
    eprintln!("skipped: {test}: {reason}");
    if let Some(path) = std::env::var_os("CHOIR_SKIP_LOG")
        && let Ok(mut log) = fs::OpenOptions::new().create(true).append(true).open(path)
    {
        let _ = writeln!(log, "{test}: {reason}");
    }
    None
}

/// The agent to test with: `CHOIR_AGENT`, or what was built here.
fn agent(is_static: bool) -> Option<PathBuf> {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target");
    let musl = ["x86_64-unknown-linux-musl", "aarch64-unknown-linux-musl"];
    let built = musl.iter().flat_map(|t| [format!("{t}/debug"), format!("{t}/release")]);
    let built = built.chain((!is_static).then(|| "debug".to_owned()));
    let given = std::env::var_os("CHOIR_AGENT").map(PathBuf::from);
    given
        .into_iter()
        .chain(built.map(|dir| target.join(dir).join("choir-sandbox")))
        .find(|path| path.is_file())
}

pub fn random() -> [u8; 16] {
    let mut bytes = [0; 16];
    fs::File::open("/dev/urandom").unwrap().read_exact(&mut bytes).unwrap();
    bytes
}

impl Rig {
    fn new(kind: impl FnOnce(&Path) -> Kind, agent: PathBuf) -> Self {
        // Short, because socket paths are.
        let dir = tempfile::Builder::new().prefix("choir-").tempdir_in("/tmp").unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
        let places = Places {
            volumes: dir.path().join("v"),
            run: dir.path().join("r"),
            agent,
        };
        fs::create_dir(&places.volumes).unwrap();
        fs::set_permissions(&places.volumes, fs::Permissions::from_mode(0o711)).unwrap();
        Self {
            kind: kind(dir.path()),
            places,
            disk: None,
            _dir: dir,
        }
    }

    pub async fn sim(_test: &str) -> Option<Self> {
        Some(Self::new(|_| Kind::Sim(World::new()), PathBuf::new()))
    }

    pub async fn process(test: &str) -> Option<Self> {
        let Some(agent) = agent(false) else {
            return skip(test, "there is no agent; build choir-sandbox or set CHOIR_AGENT");
        };
        if busybox().is_none() {
            return skip(test, "there is no busybox; install busybox-static");
        }
        Some(Self::new(|_| Kind::Process, agent))
    }

    pub async fn podman(test: &str) -> Option<Self> {
        Self::podman_in(test, None).await
    }

    /// A Podman whose host network is a namespace of its own.
    pub async fn podman_apart(test: &str) -> Option<Self> {
        if Command::new("iptables").arg("--version").output().is_err() {
            return skip(
                test,
                "there is no iptables, which Podman's default network needs; install it",
            );
        }
        let network = rustix::process::geteuid().is_root() && busybox().is_some();
        Self::podman_in(test, network.then(new_network)).await
    }

    /// A Podman whose volumes are on a btrfs.
    pub async fn podman_on_btrfs(test: &str) -> Option<Self> {
        let mut rig = Self::podman_in(test, None).await?;
        let image = rig.places.volumes.with_file_name("image");
        fs::File::create(&image).unwrap().set_len(1 << 30).unwrap();
        let Ok(made) = Command::new("mkfs.btrfs")
            .args(["-q", "--nodesize", "4096"])
            .arg(&image)
            .status()
        else {
            return skip(test, "there is no mkfs.btrfs; install btrfs-progs");
        };
        assert!(made.success());
        let volumes = rig.places.volumes.clone();
        let mounted = Command::new("mount")
            .args(["-o", "loop"])
            .args([&image, &volumes])
            .status();
        assert!(mounted.unwrap().success(), "a btrfs can be mounted");
        rig.disk = Some(Disk(volumes));
        Some(rig)
    }

    async fn podman_in(test: &str, network: Option<OwnedFd>) -> Option<Self> {
        if std::env::var_os("CHOIR_FAST").is_some_and(|v| v == "1") {
            return skip(test, "CHOIR_FAST=1 leaves Podman out");
        }
        if !rustix::process::geteuid().is_root() {
            return skip(test, "it needs root");
        }
        if Command::new("podman").arg("--version").output().is_err() {
            return skip(test, "there is no Podman");
        }
        let Some(agent) = agent(true) else {
            return skip(
                test,
                "there is no static agent; build choir-sandbox for musl or set CHOIR_AGENT",
            );
        };
        if busybox().is_none() {
            return skip(test, "there is no busybox; install busybox-static");
        }
        if !Path::new("/usr/bin/perl").is_file() {
            return skip(test, "there is no /usr/bin/perl; install perl-base");
        }
        let mut rig = Self::new(|dir| Kind::Podman(Service::new(dir, network)), PathBuf::new());
        rig.places.agent = rig.places.volumes.with_file_name("agent");
        fs::copy(agent, &rig.places.agent).unwrap();
        fs::set_permissions(&rig.places.agent, fs::Permissions::from_mode(0o755)).unwrap();
        let client = rig.libpod();
        let up = async {
            while client.version().await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, up)
            .await
            .expect("Podman's service answers");
        Some(rig)
    }

    /// A runtime that looks at this rig's containers. There may be several, one after another.
    pub fn runtime(&self) -> Arc<dyn Runtime> {
        match &self.kind {
            Kind::Sim(world) => Arc::new(Sim::new(world.clone())),
            Kind::Process => Arc::new(Process::new(self.places.clone())),
            Kind::Podman(_) => Arc::new(self.podman_runtime()),
        }
    }

    pub fn podman_runtime(&self) -> Podman {
        let options = PodmanOptions {
            socket: self.service().socket.clone(),
            oci_runtime: oci_runtime(),
        };
        Podman::new(self.places.clone(), options).unwrap()
    }

    pub fn libpod(&self) -> Libpod {
        Libpod::new(&self.service().socket)
    }

    pub fn service(&self) -> &Service {
        match &self.kind {
            Kind::Podman(service) => service,
            _ => panic!("this rig has no Podman"),
        }
    }

    pub fn volume(&self, generation: &Generation) -> PathBuf {
        self.places.volumes.join(generation.sandbox.as_str())
    }

    /// A sandbox with its volume, and the specification of its first generation. An app there answers with its id.
    pub fn spec(&self) -> Spec {
        let generation = Generation {
            sandbox: SandboxId::from_random(random()),
            number: 1,
        };
        let volume = self.volume(&generation);
        match &self.kind {
            Kind::Sim(_) => {}
            Kind::Process => fs::create_dir_all(volume.join("home")).unwrap(),
            Kind::Podman(_) => populate(&volume),
        }
        let nonce = random()
            .iter()
            .chain(&random())
            .map(|b| format!("{b:02x}"))
            .collect::<String>();
        let port = self.port();
        let home = match &self.kind {
            Kind::Process => volume.join("home").display().to_string(),
            _ => "/home/choir".to_owned(),
        };
        let sandbox = &generation.sandbox;
        let start = format!("echo {sandbox} > {home}/index.html; exec busybox httpd -f -p 127.0.0.1:{port} -h {home}");
        Spec {
            ids: IDS,
            limits: Limits {
                memory: 256 << 20,
                cpus: 1.0,
                pids: 128,
                disk: 1 << 30,
            },
            slot: choir_core::Slot::Dev,
            hostname: "box".to_owned(),
            agent: AgentConfig {
                sandbox_id: sandbox.to_string(),
                generation: 1,
                nonce: nonce.clone(),
                env: BTreeMap::from([
                    ("PATH".to_owned(), "/usr/bin:/bin:/usr/sbin:/sbin".to_owned()),
                    ("HOME".to_owned(), home),
                    ("APP_PORT".to_owned(), port.to_string()),
                ]),
                services: BTreeMap::from([("start".to_owned(), start)]),
                authority: None,
                unheeded: None,
            },
            nonce,
            generation,
        }
    }

    /// Where the app of the next sandbox listens: sandboxes without isolation share this machine's ports.
    fn port(&self) -> u16 {
        match &self.kind {
            Kind::Process => {
                let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
                free.local_addr().unwrap().port()
            }
            _ => 3000,
        }
    }

    /// Ends the sandbox's first process from outside, without the runtime.
    pub async fn crash(&self, generation: &Generation) {
        match &self.kind {
            Kind::Sim(world) => {
                let exit = Exit {
                    code: 137,
                    oom_killed: false,
                };
                world.exit(generation, exit).await;
            }
            Kind::Process => {
                let pid = self.identity(generation).await.parse().unwrap();
                let pid = rustix::process::Pid::from_raw(pid).unwrap();
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
            }
            Kind::Podman(_) => self.libpod().kill(&generation.container_name(), "KILL").await.unwrap(),
        }
    }

    /// What changes when a container is started anew and stays when it is adopted.
    pub async fn identity(&self, generation: &Generation) -> String {
        match &self.kind {
            Kind::Sim(world) => world.starts().to_string(),
            Kind::Process => {
                let file = format!("{}-{}/process.json", generation.sandbox, generation.number);
                let record: Value = serde_json::from_slice(&fs::read(self.places.run.join(file)).unwrap()).unwrap();
                record["process"]["pid"].to_string()
            }
            Kind::Podman(_) => {
                let inspect = self.libpod().inspect(&generation.container_name()).await.unwrap();
                format!("{} {}", inspect.id, inspect.state.pid)
            }
        }
    }
}

/// Waits for a notice that `pick` takes; drops the others.
pub async fn await_notice<T>(notices: &mut mpsc::Receiver<Notice>, mut pick: impl FnMut(Notice) -> Option<T>) -> T {
    let wait = async {
        loop {
            let notice = notices.recv().await.expect("the runtime still speaks");
            if let Notice::Refused { reason, .. } = &notice {
                eprintln!("refused: {reason}");
            }
            if let Some(picked) = pick(notice) {
                return picked;
            }
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("the notice comes")
}

pub async fn await_ready(notices: &mut mpsc::Receiver<Notice>, generation: &Generation) {
    await_notice(notices, |n| match n {
        Notice::Ready { generation: g, .. } if g == *generation => Some(()),
        Notice::Refused { reason, .. } => panic!("refused: {reason}"),
        _ => None,
    })
    .await;
}

pub async fn await_exit(notices: &mut mpsc::Receiver<Notice>, generation: &Generation) -> Exit {
    await_notice(notices, |n| match n {
        Notice::Exited { generation: g, exit } if g == *generation => Some(exit),
        _ => None,
    })
    .await
}

/// Creates and starts a generation and waits until it is ready.
pub async fn run(runtime: &Arc<dyn Runtime>, notices: &mut mpsc::Receiver<Notice>, spec: &Spec) {
    runtime.create(spec).await.unwrap();
    runtime.start(&spec.generation).await.unwrap();
    await_ready(notices, &spec.generation).await;
}

pub async fn request(stream: Stream, method: &str, path: &str, body: Option<Value>) -> (u16, String) {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    let body = body.map(|b| b.to_string()).unwrap_or_default();
    let request = http::Request::builder()
        .method(method)
        .uri(path)
        .header("host", "localhost")
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body)))
        .unwrap();
    let response = sender.send_request(request).await.unwrap();
    let status = response.status().as_u16();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8_lossy(&bytes).into_owned())
}

/// What the app of a sandbox answers, once it listens.
pub async fn ask_app(runtime: &Arc<dyn Runtime>, spec: &Spec) -> String {
    let port = spec.agent.env["APP_PORT"].parse().unwrap();
    let ask = async {
        loop {
            match runtime.open(&spec.generation, Door::Port(port)).await {
                Ok(stream) => return request(stream, "GET", "/index.html", None).await.1,
                Err(choir_runtime::Error::NotListening) => tokio::time::sleep(Duration::from_millis(20)).await,
                Err(e) => panic!("{e}"),
            }
        }
    };
    tokio::time::timeout(PATIENCE, ask).await.expect("the app listens")
}

pub async fn health(runtime: &Arc<dyn Runtime>, generation: &Generation) -> Value {
    let stream = runtime.open(generation, Door::Agent).await.unwrap();
    let (status, body) = request(stream, "GET", "/health", None).await;
    assert_eq!(status, 200, "{body}");
    serde_json::from_str(&body).unwrap()
}

/// Runs a shell line inside as the user `choir`; exit code, then both outputs.
pub async fn sh(runtime: &Arc<dyn Runtime>, generation: &Generation, line: &str) -> (i64, String) {
    let stream = runtime.open(generation, Door::Agent).await.unwrap();
    let command = json!({"command": line, "timeout_ms": 20_000});
    let (status, body) = request(stream, "POST", "/exec", Some(command)).await;
    assert_eq!(status, 200, "{line}: {body}");
    let done: Value = serde_json::from_str(&body).unwrap();
    let text = |name: &str| done[name].as_str().unwrap_or_default().to_owned();
    (
        done["exit_code"].as_i64().unwrap_or(-1),
        text("stdout") + &text("stderr"),
    )
}

pub async fn await_seen(runtime: &Arc<dyn Runtime>, generation: &Generation, wanted: impl Fn(&Seen) -> bool) {
    let wait = async {
        while !wanted(&runtime.inspect(generation).await.unwrap()) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("the state comes");
}
