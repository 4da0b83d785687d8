//! The simulated runtime and volumes: in memory, deterministic, with scripted failures. For tests and benchmarks.
//! Ships beside the real ones and passes the same contract suite.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use choir_core::sandbox::Exit;
use choir_core::{Door, Generation, Limits, Own, SandboxId, Slot};
use choir_link::ListenerKind;
use tokio::sync::mpsc;

use crate::gate;
use crate::sim_app::{self, Answerer, Inside};
use crate::sweep::{Frame, Part};
use crate::{Error, Found, LogLine, Notice, Result, Runtime, Seen, Spec, Stats, Stream};

/// What goes wrong with the next start of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// `create` is refused.
    FailCreate,
    /// It runs, and its agent never comes.
    NeverReady,
    /// It becomes ready and ends with this code.
    ExitAfterReady(i32),
    /// `start` does not return.
    Hang,
    /// Its processes do not go on, though it is seen running.
    Frozen,
}

/// A world of containers that outlives the runtimes looking at it, as Podman's does.
#[derive(Debug, Clone, Default)]
pub struct World(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    containers: HashMap<Generation, Contained>,
    faults: HashMap<SandboxId, VecDeque<Fault>>,
    /// Containers started, ever.
    starts: u64,
    /// Ports something listens on in every sandbox; what is not here refuses.
    ports: Vec<u16>,
    /// Ports that were dialled, whether or not something listened there.
    dialled: HashSet<(Generation, u16)>,
    /// Bytes of memory that sandboxes hold, where it is not what all hold.
    held: HashMap<SandboxId, u64>,
    /// Sandboxes whose next pause is not told.
    forgetful: HashSet<SandboxId>,
    /// The `choir.toml` in sandboxes' homes, or why it cannot be read.
    own: HashMap<SandboxId, Result<String, String>>,
    /// What is to be seen in sandboxes beside what the simulation puts there.
    planted: HashMap<SandboxId, Vec<(Part, String, Vec<u8>)>>,
    /// Where the runtime that looks at this world is told what happens: the last one, as those before belong to processes
    /// that have ended.
    watcher: Option<mpsc::Sender<Notice>>,
}

#[derive(Debug)]
struct Contained {
    spec: Spec,
    seen: Seen,
    fault: Option<Fault>,
    log: Vec<LogLine>,
    limits: Limits,
    /// What its home said when it was started.
    own: Option<Result<String, String>>,
}

impl World {
    /// An empty world in which an echo app listens on 3000 in every sandbox.
    pub fn new() -> Self {
        let world = Self::default();
        world.lock().ports.push(choir_core::settings::DEFAULT_APP_PORT);
        world
    }

    /// Scripts the next creation of a container of this sandbox; several calls queue up.
    pub fn fail_next(&self, sandbox: &SandboxId, fault: Fault) {
        self.lock().faults.entry(sandbox.clone()).or_default().push_back(fault);
    }

    /// How many containers were started so far.
    pub fn starts(&self) -> u64 {
        self.lock().starts
    }

    /// How much memory a sandbox holds from now on.
    pub fn holds(&self, sandbox: &SandboxId, bytes: u64) {
        self.lock().held.insert(sandbox.clone(), bytes);
    }

    /// Has the next pause of this sandbox take effect without being told, as where the service is killed over it.
    pub fn freeze_untold(&self, sandbox: &SandboxId) {
        self.lock().forgetful.insert(sandbox.clone());
    }

    /// Lets the echo app listen on one more port in every sandbox.
    pub fn listen(&self, port: u16) {
        self.lock().ports.push(port);
    }

    /// Which ports of which containers were dialled so far.
    pub fn dialled(&self) -> HashSet<(Generation, u16)> {
        self.lock().dialled.clone()
    }

    /// Puts something into a sandbox: a file, or a process with this environment or command line.
    pub fn plant(&self, sandbox: &SandboxId, part: Part, name: &str, bytes: &[u8]) {
        let planted = (part, name.to_owned(), bytes.to_vec());
        self.lock().planted.entry(sandbox.clone()).or_default().push(planted);
    }

    /// Puts a `choir.toml` into a sandbox's home, or something there that cannot be read. Its next generation sees it.
    pub fn say(&self, sandbox: &SandboxId, file: Result<&str, &str>) {
        let file = file.map(str::to_owned).map_err(str::to_owned);
        self.lock().own.insert(sandbox.clone(), file);
    }

    /// As if a program inside had written a line to its container's log.
    pub fn print(&self, generation: &Generation, line: &str) -> Result<()> {
        let line = LogLine {
            stream: "stdout".to_owned(),
            line: line.to_owned(),
        };
        self.with(generation, |c| c.log.push(line))
    }

    /// As if the process inside had ended; the runtime over this world tells. Nothing happens where none runs.
    pub async fn exit(&self, generation: &Generation, exit: Exit) {
        let watcher = {
            let mut world = self.lock();
            match world.containers.get_mut(generation) {
                Some(c) if matches!(c.seen, Seen::Running | Seen::Paused) => c.seen = Seen::Exited(exit.clone()),
                _ => return,
            }
            world.watcher.clone()
        };
        if let Some(watcher) = watcher {
            let notice = Notice::Exited {
                generation: generation.clone(),
                exit: exit.clone(),
            };
            let _ = watcher.send(notice).await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, generation: &Generation, f: impl FnOnce(&mut Contained) -> T) -> Result<T> {
        self.lock().containers.get_mut(generation).map(f).ok_or(Error::NotFound)
    }
}

/// A runtime over a `World`.
#[derive(Debug)]
pub struct Sim {
    world: World,
    sender: mpsc::Sender<Notice>,
    notices: Mutex<Option<mpsc::Receiver<Notice>>>,
    /// Generations whose agent came to this process's door: one that was frozen comes when it is thawed.
    heard: Mutex<HashSet<Generation>>,
}

impl Sim {
    /// A runtime that sees the world's containers.
    pub fn new(world: World) -> Self {
        let (sender, notices) = gate::notices();
        world.lock().watcher = Some(sender.clone());
        Self {
            world,
            sender,
            notices,
            heard: Mutex::default(),
        }
    }

    /// As if a program inside had connected to the broker or egress port; the program's end is returned.
    pub async fn connect_inside(&self, generation: &Generation, kind: ListenerKind) -> Stream {
        let (near, far) = tokio::io::duplex(64 << 10);
        self.tell(Notice::Inside {
            generation: generation.clone(),
            kind,
            stream: Stream::Memory(far),
        })
        .await;
        Stream::Memory(near)
    }

    /// As if the agent had reported what runs, and how many processes have run out of memory.
    pub async fn activity(&self, generation: &Generation, tasks: u32, terminals: u32, oom_kills: u64) {
        self.tell(Notice::Activity {
            generation: generation.clone(),
            tasks,
            terminals,
            oom_kills,
        })
        .await;
    }

    fn heard(&self) -> MutexGuard<'_, HashSet<Generation>> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn tell(&self, notice: Notice) {
        let _ = self.sender.send(notice).await;
    }

    async fn ready(&self, generation: &Generation, fault: Option<Fault>) {
        if fault == Some(Fault::NeverReady) {
            return;
        }
        self.heard().insert(generation.clone());
        let own = self.world.with(generation, |c| Own::of(c.own.clone()));
        self.tell(Notice::Ready {
            generation: generation.clone(),
            own: Arc::new(own.unwrap_or_default()),
        })
        .await;
        if let Some(Fault::ExitAfterReady(code)) = fault {
            let exit = Exit {
                code,
                oom_killed: false,
            };
            self.world.exit(generation, exit).await;
        }
    }
}

#[async_trait]
impl Runtime for Sim {
    async fn describe(&self) -> Result<BTreeMap<String, String>> {
        Ok(BTreeMap::from([("runtime".to_owned(), "sim".to_owned())]))
    }

    async fn list(&self) -> Result<Vec<Found>> {
        let world = self.world.lock();
        let found = world.containers.values().map(|c| Found {
            generation: c.spec.generation.clone(),
            nonce: c.spec.nonce.clone(),
            seen: c.seen.clone(),
        });
        Ok(found.collect())
    }

    async fn create(&self, spec: &Spec) -> Result<()> {
        let mut world = self.world.lock();
        match world.containers.get(&spec.generation) {
            Some(present) if present.spec.nonce == spec.nonce => return Ok(()),
            Some(_) => return Err(Error::Busy("the name is taken; start another generation".into())),
            None => {}
        }
        let fault = world
            .faults
            .get_mut(&spec.generation.sandbox)
            .and_then(VecDeque::pop_front);
        if fault == Some(Fault::FailCreate) {
            return Err(Error::Refused("the script says so".into()));
        }
        let contained = Contained {
            spec: spec.clone(),
            seen: Seen::Created,
            fault,
            log: Vec::new(),
            limits: spec.limits,
            own: world.own.get(&spec.generation.sandbox).cloned(),
        };
        world.containers.insert(spec.generation.clone(), contained);
        Ok(())
    }

    async fn adopt(&self, spec: &Spec) -> Result<()> {
        let (seen, nonce) = self
            .world
            .with(&spec.generation, |c| (c.seen.clone(), c.spec.nonce.clone()))?;
        if nonce != spec.nonce {
            let reason = "label choir.nonce is another".to_owned();
            let generation = spec.generation.clone();
            self.tell(Notice::Refused { generation, reason }).await;
        } else if seen == Seen::Running {
            self.ready(&spec.generation, None).await;
        }
        Ok(())
    }

    async fn start(&self, generation: &Generation) -> Result<()> {
        let fault = {
            let mut world = self.world.lock();
            let contained = world.containers.get_mut(generation).ok_or(Error::NotFound)?;
            match contained.seen {
                Seen::Created => {}
                Seen::Running => return Ok(()),
                _ => return Err(Error::Busy("a container starts once".into())),
            }
            let fault = contained.fault;
            if fault != Some(Fault::Hang) {
                contained.seen = Seen::Running;
                contained.log.push(LogLine {
                    stream: "stdout".to_owned(),
                    line: format!("generation {} started", generation.number),
                });
                world.starts += 1;
            }
            fault
        };
        if fault == Some(Fault::Hang) {
            std::future::pending::<()>().await;
        }
        self.ready(generation, fault).await;
        Ok(())
    }

    async fn stop(&self, generation: &Generation, _grace: Duration) -> Result<Exit> {
        let ended = match self.world.with(generation, |c| c.seen.clone())? {
            Seen::Exited(exit) => return Ok(exit),
            Seen::Created | Seen::Absent => Exit {
                code: 0,
                oom_killed: false,
            },
            Seen::Running | Seen::Paused => Exit {
                code: 143,
                oom_killed: false,
            },
        };
        self.world.exit(generation, ended.clone()).await;
        Ok(ended)
    }

    async fn pause(&self, generation: &Generation) -> Result<()> {
        if self.world.lock().forgetful.remove(&generation.sandbox) {
            self.world.with(generation, |c| c.fault = Some(Fault::Frozen))?;
            return Err(Error::Unavailable("it hung up".into()));
        }
        self.world.with(generation, |c| match c.seen {
            Seen::Running | Seen::Paused => {
                c.seen = Seen::Paused;
                Ok(())
            }
            _ => Err(Error::Busy("it does not run".into())),
        })?
    }

    async fn unpause(&self, generation: &Generation) -> Result<()> {
        let before = self
            .world
            .with(generation, |c| match std::mem::replace(&mut c.seen, Seen::Running) {
                before @ (Seen::Running | Seen::Paused) => Ok(before),
                other => {
                    c.seen = other;
                    Err(Error::Busy("it is not paused".into()))
                }
            })??;
        let is_new = before == Seen::Paused && !self.heard().contains(generation);
        if is_new {
            self.ready(generation, None).await;
        }
        Ok(())
    }

    async fn remove(&self, generation: &Generation) -> Result<()> {
        self.world.lock().containers.remove(generation);
        Ok(())
    }

    async fn inspect(&self, generation: &Generation) -> Result<Seen> {
        let world = self.world.lock();
        Ok(world
            .containers
            .get(generation)
            .map_or(Seen::Absent, |c| c.seen.clone()))
    }

    /// As Podman: names, labels and limits, and nothing of what the agent is told.
    async fn description(&self, generation: &Generation) -> Result<Vec<u8>> {
        self.world.with(generation, |c| {
            let labels = [c.spec.generation.to_string(), c.spec.nonce.clone()];
            serde_json::json!({"Name": c.spec.hostname, "Labels": labels, "Memory": c.limits.memory})
                .to_string()
                .into_bytes()
        })
    }

    async fn limit(&self, generation: &Generation, limits: &Limits, _: Slot) -> Result<()> {
        self.world.with(generation, |c| c.limits = *limits)
    }

    async fn stats(&self, generation: &Generation) -> Result<Stats> {
        let held = self.world.lock().held.get(&generation.sandbox).copied();
        self.world.with(generation, |c| Stats {
            cpu_ns: 1_000_000,
            memory: held.unwrap_or(1 << 20),
            memory_limit: c.limits.memory,
            pids: 1,
        })
    }

    async fn logs(&self, generation: &Generation, tail: usize, _follow: bool) -> Result<mpsc::Receiver<LogLine>> {
        let lines = self
            .world
            .with(generation, |c| c.log[c.log.len().saturating_sub(tail)..].to_vec())?;
        let (sender, receiver) = mpsc::channel(lines.len().max(1));
        for line in lines {
            let _ = sender.try_send(line);
        }
        Ok(receiver)
    }

    async fn open(&self, generation: &Generation, door: Door) -> Result<Stream> {
        let (near, far) = tokio::io::duplex(64 << 10);
        let by = {
            let mut world = self.world.lock();
            if let Door::Port(port) = door {
                world.dialled.insert((generation.clone(), port));
            }
            let contained = world.containers.get(generation).ok_or(Error::NotFound)?;
            if contained.fault == Some(Fault::Frozen) {
                tokio::spawn(async move {
                    let _held = far;
                    std::future::pending::<()>().await;
                });
                return Ok(Stream::Memory(near));
            }
            if contained.seen != Seen::Running || contained.fault == Some(Fault::NeverReady) {
                return Err(Error::Unavailable("its agent is not connected".into()));
            }
            match door {
                Door::Agent => Answerer::Agent(Inside {
                    config: contained.spec.agent.clone(),
                    frames: frames(&contained.spec.agent, world.planted.get(&generation.sandbox)),
                }),
                Door::Port(port) if world.ports.contains(&port) => Answerer::App(port),
                Door::Port(_) => return Err(Error::NotListening),
            }
        };
        tokio::spawn(sim_app::serve(far, generation.clone(), by));
        Ok(Stream::Memory(near))
    }

    fn notices(&self) -> Option<mpsc::Receiver<Notice>> {
        self.notices.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// What an agent would show: the environment of a user's process, and what was planted.
fn frames(config: &choir_link::AgentConfig, planted: Option<&Vec<(Part, String, Vec<u8>)>>) -> Vec<Frame> {
    let environment: String = config.env.iter().map(|(k, v)| format!("{k}={v}\0")).collect();
    let own = (Part::Environment, "process 1".to_owned(), environment.into_bytes());
    let all = std::iter::once(&own).chain(planted.into_iter().flatten());
    let mut frames: Vec<Frame> = all
        .flat_map(|(part, name, bytes)| {
            let (part, name) = (*part, name.clone());
            [Frame::Item { part, name }, Frame::Bytes(bytes.clone())]
        })
        .collect();
    frames.push(Frame::Done);
    frames
}
