//! The real runtime: one Podman container a generation, through `libpod`, with our own template and gate.
//! It must not know users or sessions, nor trust that a container is gone because Podman says so once.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use choir_core::sandbox::Exit;
use choir_core::{Door, Generation, IdRange, Limits, Slot};
use tokio::sync::{OnceCell, mpsc};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::gate::{self, Gates};
use crate::libpod::{Inspect, Libpod, Listed, State};
use crate::own_ids::OwnIds;
use crate::template::{self, Container, HostLimits};
use crate::{Error, Found, LogLine, Notice, Places, Result, Runtime, Seen, Spec, Stats, Stream, logs, watch};

/// From SIGKILL until the container has ended.
const KILL: Duration = Duration::from_secs(10);
/// EBUSY for some seconds after a kill is normal.
const REMOVE: Duration = Duration::from_secs(15);

/// How to reach Podman.
#[derive(Debug, Clone)]
pub struct PodmanOptions {
    /// Its API socket.
    pub socket: PathBuf,
    /// `crun`, `runc` or another it knows; empty for its own choice.
    pub oci_runtime: String,
}

/// Containers in Podman.
pub struct Podman {
    shared: Arc<Shared>,
    gates: Gates,
    notices: Mutex<Option<mpsc::Receiver<Notice>>>,
    watcher: JoinHandle<()>,
}

/// What the gates' examiner and the watcher of exits need, too.
pub(crate) struct Shared {
    pub client: Libpod,
    pub places: Places,
    pub notices: mpsc::Sender<Notice>,
    oci_runtime: String,
    host: HostLimits,
    known: Mutex<HashMap<Generation, Arc<Known>>>,
    /// `None` where Podman counts ids as the host does.
    own_ids: OnceCell<Option<OwnIds>>,
}

/// A generation this process made or adopted.
pub(crate) struct Known {
    pub spec: Spec,
    pub container: Container,
    /// Set once inspection found no difference.
    pub inspected: OnceCell<()>,
    pub progress: Mutex<Progress>,
}

/// What was already done or said about a generation.
#[derive(Default)]
pub(crate) struct Progress {
    pub started: bool,
    pub ended: bool,
    pub refused: bool,
    /// Bytes of memory it was last given. Podman's statistics go on telling the first limit.
    pub memory: Option<u64>,
}

impl Drop for Podman {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

impl Podman {
    /// A runtime for the Podman service at the options' socket. Writes the seccomp profile into `places.run` and
    /// begins to watch for exits; needs a tokio runtime. The directories above volumes, run and agent must be
    /// passable (0711) for the sandboxes' ids.
    pub fn new(places: Places, options: PodmanOptions) -> Result<Self> {
        let (sender, receiver) = gate::notices();
        write_profile(&places.run).map_err(|e| {
            Error::Refused(format!(
                "{} cannot be written: {e}; create it, or choose another data directory",
                places.run.display()
            ))
        })?;
        let shared = Arc::new(Shared {
            client: Libpod::new(options.socket),
            notices: sender.clone(),
            oci_runtime: options.oci_runtime,
            host: HostLimits::own(),
            known: Mutex::default(),
            own_ids: OnceCell::new(),
            places,
        });
        Ok(Self {
            gates: Gates::new(&shared.places.run, true, shared.clone(), sender),
            notices: receiver,
            watcher: tokio::spawn(watch::exits(Arc::clone(&shared))),
            shared,
        })
    }

    /// The container `create` would make: what tests weaken to see that the comparison finds it.
    pub fn template(&self, spec: &Spec) -> Container {
        let own = self.shared.own_ids.get().and_then(Option::as_ref);
        let base = own.and_then(|own| own.first(spec.ids)).unwrap_or(spec.ids.base);
        template::container(
            spec,
            base,
            &self.shared.places,
            &self.gates.directory(&spec.generation),
            &profile(&self.shared.places.run),
            &self.shared.oci_runtime,
            self.shared.host,
        )
    }

    fn client(&self) -> &Libpod {
        &self.shared.client
    }

    /// Opens the gate and remembers the generation.
    fn expect(&self, spec: &Spec, started: bool) -> Result<Arc<Known>> {
        let known = Arc::new(Known {
            spec: spec.clone(),
            container: self.template(spec),
            inspected: OnceCell::new(),
            progress: Mutex::new(Progress {
                started,
                memory: Some(spec.limits.memory),
                ..Progress::default()
            }),
        });
        self.shared.all().insert(spec.generation.clone(), Arc::clone(&known));
        self.gates.open(spec)?;
        Ok(known)
    }

    fn forget(&self, generation: &Generation) -> Result<()> {
        self.shared.all().remove(generation);
        self.gates.close(generation)
    }

    /// Whether a container of the wanted name is the one `known` describes, so that `create` was done before.
    async fn is_ours(&self, known: &Known) -> Result<bool> {
        match self.client().inspect(&known.container.name).await {
            Ok(inspect) => Ok(known
                .container
                .labels
                .iter()
                .all(|(k, v)| inspect.config.labels.get(k) == Some(v))),
            // The name is taken and yet not there: left behind by a killed Podman.
            Err(Error::NotFound) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Waits until the container has ended, at most `by`.
    async fn ended(&self, name: &str, by: Instant) -> Result<Option<Exit>> {
        let mut pause = Duration::from_millis(20);
        loop {
            match self.shared.look(name).await? {
                Seen::Exited(exit) => return Ok(Some(exit)),
                // It never ran.
                Seen::Created => {
                    return Ok(Some(Exit {
                        code: 0,
                        oom_killed: false,
                    }));
                }
                _ if Instant::now() >= by => return Ok(None),
                _ => tokio::time::sleep(pause).await,
            }
            pause = (pause * 2).min(Duration::from_millis(200));
        }
    }

    /// Whether a call that failed as `Busy` failed because it was already so.
    async fn already(&self, name: &str, done: Result<()>, wanted: &Seen) -> Result<()> {
        match done {
            Err(Error::Busy(why)) => match self.shared.look(name).await? {
                now if now == *wanted => Ok(()),
                _ => Err(Error::Busy(why)),
            },
            done => done,
        }
    }

    /// Removes by force, once.
    async fn remove_now(&self, name: &str) -> Result<()> {
        match self.shared.look(name).await {
            // A service that was killed while it started this knows nothing of the process that waits to become the
            // container. Told to make it, Podman finds that process, and ends it because it is in the way.
            Ok(Seen::Created) => drop(self.client().init(name).await),
            Err(e @ Error::Unavailable(_)) => return Err(e),
            _ => {}
        }
        self.client().remove(name).await
    }
}

#[async_trait]
impl Runtime for Podman {
    async fn describe(&self) -> Result<BTreeMap<String, String>> {
        let (version, info) = tokio::try_join!(self.client().version(), self.client().info())?;
        let text = |value: Option<&serde_json::Value>| match value {
            Some(serde_json::Value::String(text)) => text.lines().next().unwrap_or_default().to_owned(),
            Some(other) => other.to_string(),
            None => "unknown".to_owned(),
        };
        let configured = &self.shared.oci_runtime;
        let oci = match configured.as_str() {
            "" => text(info.pointer("/host/ociRuntime/name")),
            name => name.to_owned(),
        };
        Ok(BTreeMap::from([
            ("runtime".into(), "podman".into()),
            ("podman".into(), text(version.get("Version"))),
            ("kernel".into(), text(info.pointer("/host/kernel"))),
            ("cgroups".into(), text(info.pointer("/host/cgroupVersion"))),
            ("rootless".into(), text(info.pointer("/host/security/rootless"))),
            ("seccomp".into(), text(info.pointer("/host/security/seccompEnabled"))),
            ("oci_runtime".into(), oci),
            (
                "oci_runtime_version".into(),
                text(info.pointer("/host/ociRuntime/version")),
            ),
            ("conmon".into(), text(info.pointer("/host/conmon/version"))),
        ]))
    }

    async fn ping(&self) -> Result<()> {
        self.client().ping().await
    }

    async fn list(&self) -> Result<Vec<Found>> {
        let mut all = Vec::new();
        for listed in self.client().list(template::LABEL_SANDBOX).await? {
            let Some((generation, nonce)) = identity(&listed) else {
                tracing::warn!(names = ?listed.names, "a container has our label and no identity of ours");
                continue;
            };
            // Only inspection knows why a container ended.
            let seen = match listed.state.as_str() {
                "running" => Seen::Running,
                "paused" => Seen::Paused,
                _ => self.inspect(&generation).await?,
            };
            if seen != Seen::Absent {
                all.push(Found {
                    generation,
                    nonce,
                    seen,
                });
            }
        }
        Ok(all)
    }

    async fn create(&self, spec: &Spec) -> Result<()> {
        // Podman's ids are asked for here once, so that no start waits for it.
        self.shared.may_use(spec.ids).await?;
        let known = self.expect(spec, false)?;
        let created = match self.client().create(&known.container).await {
            Err(Error::Busy(why) | Error::Refused(why)) if why.contains("already in use") => {
                match self.is_ours(&known).await {
                    Ok(true) => Ok(()),
                    Ok(false) => Err(Error::Busy(format!(
                        "the name {} is taken by something else; start another generation",
                        known.container.name
                    ))),
                    Err(e) => Err(e),
                }
            }
            created => created.map(|_| ()),
        };
        if created.is_err() {
            self.forget(&spec.generation)?;
        }
        created
    }

    async fn adopt(&self, spec: &Spec) -> Result<()> {
        let name = spec.generation.container_name();
        let seen = self.shared.look(&name).await?;
        self.shared.may_use(spec.ids).await?;
        let known = self.expect(spec, true)?;
        match seen {
            Seen::Created => known.progress().started = false,
            Seen::Exited(exit) => self.shared.note_exit(&known, exit).await,
            _ => {
                // Whoever made it may have had other limits.
                let resources = template::resources(&spec.limits, spec.slot);
                if let Err(e) = self.client().update(&name, &resources).await {
                    tracing::warn!(generation = %spec.generation, error = %e, "limits could not be set at adoption");
                }
                self.shared.inspect_soon(known);
            }
        }
        Ok(())
    }

    async fn start(&self, generation: &Generation) -> Result<()> {
        let known = self.shared.get(generation).ok_or(Error::NotFound)?;
        known.progress().started = true;
        self.client().start(&known.container.name).await?;
        self.shared.inspect_soon(known);
        Ok(())
    }

    async fn stop(&self, generation: &Generation, grace: Duration) -> Result<Exit> {
        let name = generation.container_name();
        // A frozen process cannot take a signal.
        if let Seen::Paused = self.inspect(generation).await? {
            self.unpause(generation).await?;
        }
        let asked = Instant::now();
        for (signal, patience) in [("TERM", grace), ("KILL", KILL)] {
            match self.client().kill(&name, signal).await {
                // Not running any more: what `ended` will find.
                Ok(()) | Err(Error::Busy(_)) => {}
                Err(e) => return Err(e),
            }
            if let Some(exit) = self.ended(&name, Instant::now() + patience).await? {
                return Ok(exit);
            }
        }
        Err(Error::Busy(format!(
            "it has not ended {} s after it was told to",
            asked.elapsed().as_secs()
        )))
    }

    async fn pause(&self, generation: &Generation) -> Result<()> {
        let name = generation.container_name();
        let done = self.client().pause(&name).await;
        self.already(&name, done, &Seen::Paused).await
    }

    async fn unpause(&self, generation: &Generation) -> Result<()> {
        let name = generation.container_name();
        let done = self.client().unpause(&name).await;
        self.already(&name, done, &Seen::Running).await
    }

    async fn remove(&self, generation: &Generation) -> Result<()> {
        self.shared.all().remove(generation);
        let name = generation.container_name();
        let by = Instant::now() + REMOVE;
        let mut pause = Duration::from_millis(50);
        loop {
            let removed = self.remove_now(&name).await;
            // Only a list that does not have it counts: a half-removed container answers "no such container".
            let why = match removed {
                Ok(()) | Err(Error::NotFound) => match self.client().lists(&name).await {
                    Ok(false) => break,
                    Ok(true) => "Podman still lists it".to_owned(),
                    Err(e) => e.to_string(),
                },
                Err(e) => e.to_string(),
            };
            if Instant::now() + pause >= by {
                return Err(Error::Busy(format!("it could not be removed within 15 s: {why}")));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        }
        self.forget(generation)
    }

    async fn inspect(&self, generation: &Generation) -> Result<Seen> {
        match self.shared.look(&generation.container_name()).await {
            Err(Error::NotFound) => Ok(Seen::Absent),
            seen => seen,
        }
    }

    async fn description(&self, generation: &Generation) -> Result<Vec<u8>> {
        let told = self.client().description(&generation.container_name()).await?;
        Ok(told.to_vec())
    }

    async fn limit(&self, generation: &Generation, limits: &Limits, slot: Slot) -> Result<()> {
        let resources = template::resources(limits, slot);
        self.client().update(&generation.container_name(), &resources).await?;
        if let Some(known) = self.shared.get(generation) {
            known.progress().memory = Some(limits.memory);
        }
        Ok(())
    }

    async fn stats(&self, generation: &Generation) -> Result<Stats> {
        let usage = self.client().stats(&generation.container_name()).await?;
        let given = self.shared.get(generation).and_then(|known| known.progress().memory);
        Ok(Stats {
            cpu_ns: usage.cpu_ns,
            memory: usage.memory,
            memory_limit: given.unwrap_or(usage.memory_limit),
            pids: usage.pids,
        })
    }

    async fn logs(&self, generation: &Generation, tail: usize, follow: bool) -> Result<mpsc::Receiver<LogLine>> {
        let body = self.client().logs(&generation.container_name(), tail, follow).await?;
        Ok(logs::lines(body))
    }

    async fn open(&self, generation: &Generation, door: Door) -> Result<Stream> {
        self.gates.enter(generation, door).await
    }

    fn notices(&self) -> Option<mpsc::Receiver<Notice>> {
        self.notices.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Shared {
    pub fn all(&self) -> std::sync::MutexGuard<'_, HashMap<Generation, Arc<Known>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn get(&self, generation: &Generation) -> Option<Arc<Known>> {
        self.all().get(generation).cloned()
    }

    /// What a container is now. Podman learns of an end from the container's monitor alone: where that is gone, too, it
    /// says "running" for ever, and only a signal shows otherwise. This one changes nothing.
    pub async fn look(&self, name: &str) -> Result<Seen> {
        let state = self.client.inspect(name).await?.state;
        let now = seen(&state)?;
        if now != Seen::Running || is_there(state.conmon_pid) || is_there(state.pid) {
            return Ok(now);
        }
        match self.client.kill(name, "URG").await {
            Ok(()) => Ok(now),
            // The monitor may have told it just before it went.
            Err(Error::Busy(why)) if !why.contains("resource busy") => {
                match seen(&self.client.inspect(name).await?.state)? {
                    Seen::Running => Ok(Seen::Exited(Exit {
                        code: 137,
                        oom_killed: false,
                    })),
                    told => Ok(told),
                }
            }
            Err(e) => Err(e),
        }
    }

    /// Tells of an exit, once a generation.
    pub async fn note_exit(&self, known: &Known, exit: Exit) {
        if std::mem::replace(&mut known.progress().ended, true) {
            return;
        }
        let generation = known.spec.generation.clone();
        let _ = self.notices.send(Notice::Exited { generation, exit }).await;
    }

    /// Whether Podman runs without root, so that its host ids are not this process'.
    pub async fn is_rootless(&self) -> Result<bool> {
        Ok(self.own_ids().await?.is_some())
    }

    /// Refuses ids that Podman cannot give to a container.
    async fn may_use(&self, ids: IdRange) -> Result<()> {
        match self.own_ids().await? {
            Some(own) if own.first(ids).is_none() => Err(Error::Refused(format!(
                "Podman's user may not use the {} ids from {} on; give it these, in the same line of /etc/subuid and /etc/subgid",
                IdRange::SIZE,
                ids.base
            ))),
            _ => Ok(()),
        }
    }

    /// Asked once.
    async fn own_ids(&self) -> Result<Option<&OwnIds>> {
        let ask = || async {
            let info = self.client.info().await?;
            if info.pointer("/host/security/rootless") != Some(&serde_json::Value::Bool(true)) {
                return Ok::<_, Error>(None);
            }
            let ids = info.pointer("/host/idMappings").cloned().unwrap_or_default();
            let own = serde_json::from_value(ids);
            own.map(Some)
                .map_err(|e| Error::Protocol(format!("it does not say which ids it may use: {e}")))
        };
        Ok(self.own_ids.get_or_try_init(ask).await?.as_ref())
    }
}

impl Known {
    pub fn progress(&self) -> std::sync::MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Podman's state in our words.
fn seen(state: &State) -> Result<Seen> {
    Ok(match state.status.as_str() {
        "created" | "configured" | "initialized" => Seen::Created,
        "running" | "stopping" => Seen::Running,
        "paused" => Seen::Paused,
        "exited" | "stopped" | "removing" => Seen::Exited(exit(state)),
        other => {
            return Err(Error::Protocol(format!(
                "it says a container is {:?}",
                other.chars().take(40).collect::<String>()
            )));
        }
    })
}

/// Whether this process is seen from here, and has not ended.
fn is_there(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Before its state is its name in brackets, which may hold brackets itself.
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

fn exit(state: &State) -> Exit {
    Exit {
        code: state.exit_code,
        oom_killed: state.oom_killed,
    }
}

/// The generation and nonce a container's labels name.
pub(crate) fn identity(listed: &Listed) -> Option<(Generation, String)> {
    generation(&listed.labels).zip(listed.labels.get(template::LABEL_NONCE).cloned())
}

/// The generation that labels name.
pub(crate) fn generation(labels: &BTreeMap<String, String>) -> Option<Generation> {
    Some(Generation {
        sandbox: labels.get(template::LABEL_SANDBOX)?.parse().ok()?,
        number: labels.get(template::LABEL_GENERATION)?.parse().ok()?,
    })
}

fn profile(run: &Path) -> PathBuf {
    run.join("seccomp.json")
}

/// Puts the seccomp profile where Podman finds it, whole or not at all.
fn write_profile(run: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::create_dir_all(run)?;
    std::fs::set_permissions(run, std::fs::Permissions::from_mode(0o711))?;
    let path = profile(run);
    if std::fs::read_to_string(&path).is_ok_and(|text| text == template::SECCOMP) {
        return Ok(());
    }
    let new = path.with_extension("new");
    std::fs::write(&new, template::SECCOMP)?;
    // Podman may be another user's, and our umask may be for ourselves.
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o644))?;
    std::fs::rename(new, path)
}

/// For the examiner: the process that Podman says is the sandbox's first.
pub(crate) fn pid(inspect: &Inspect) -> Option<i32> {
    (inspect.state.pid > 0).then_some(inspect.state.pid)
}
