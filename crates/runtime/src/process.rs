//! The development runtime: the agent as a plain child process. No isolation whatsoever; for machines without Podman
//! and for quick tests. It must not be reachable from anywhere but this machine, which its user sees to.
//!
//! What is known of a process is in its generation's directory, so that another process of ours can adopt it: pid
//! numbers are reused, a pid with its start time is not.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use choir_core::sandbox::Exit;
use choir_core::{Door, Generation, Limits, Slot};
use choir_link::SelfReport;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::gate::{self, Examiner, Gates};
use crate::process_tree::{self, Proc};
use crate::{Error, Found, LogLine, Notice, Places, Result, Runtime, Seen, Spec, Stats, Stream, process_log};

/// From SIGKILL until it must be gone.
const KILL: Duration = Duration::from_secs(10);
/// How often the log's size is looked at.
const LOG_CHECK: Duration = Duration::from_secs(1);

/// Agents as child processes.
pub struct Process {
    places: Places,
    gates: Gates,
    sender: mpsc::Sender<Notice>,
    notices: Mutex<Option<mpsc::Receiver<Notice>>>,
    waiters: Mutex<HashMap<Generation, JoinHandle<()>>>,
}

/// What the directory of a generation remembers.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    generation: Generation,
    nonce: String,
    process: Option<Started>,
    exit: Option<Exit>,
}

/// A process that was started: its id, and when, in the kernel's clock ticks since boot.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Started {
    pid: i32,
    at: u64,
}

/// There is no confinement to compare with.
struct Unconfined;

#[async_trait]
impl Examiner for Unconfined {
    async fn examine(&self, _: &Generation, _: &SelfReport) -> Result<(), String> {
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        for waiter in self.waiters().values() {
            waiter.abort();
        }
    }
}

impl Process {
    /// A runtime that keeps its files in `places.run`. Needs a tokio runtime.
    pub fn new(places: Places) -> Self {
        let (sender, notices) = gate::notices();
        Self {
            gates: Gates::new(&places.run, false, Arc::new(Unconfined), sender.clone()),
            places,
            sender,
            notices,
            waiters: Mutex::default(),
        }
    }

    fn waiters(&self) -> MutexGuard<'_, HashMap<Generation, JoinHandle<()>>> {
        self.waiters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self, generation: &Generation) -> PathBuf {
        self.gates.directory(generation).join("process.json")
    }

    fn log(&self, generation: &Generation) -> PathBuf {
        self.gates.directory(generation).join("log")
    }

    fn record(&self, generation: &Generation) -> Result<Record> {
        read(&self.file(generation))?.ok_or(Error::NotFound)
    }

    /// The agent's process, if it lives.
    fn alive(&self, generation: &Generation) -> Result<Started> {
        let record = self.record(generation)?;
        match record.process {
            Some(started) if is_alive(started) => Ok(started),
            _ => Err(Error::Busy("it does not run".into())),
        }
    }

    fn spawn(&self, generation: &Generation) -> Result<Started> {
        let directory = self.gates.directory(generation);
        let home = self.places.volumes.join(generation.sandbox.as_str()).join("home");
        let agent = directory.join("agent");
        fs::create_dir_all(&home)?;
        fs::create_dir_all(&agent)?;
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log(generation))?;
        let child = Command::new(&self.places.agent)
            .arg("agent")
            .env_clear()
            .env("PATH", crate::template::PATH)
            .env("CHOIR_RUN_DIR", directory.join("choir"))
            .env("CHOIR_AGENT_DIR", agent)
            .env("CHOIR_HOME", &home)
            .current_dir(&home)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .map_err(|e| {
                Error::Refused(format!(
                    "the agent {} cannot be started: {e}; build it, or correct its path",
                    self.places.agent.display()
                ))
            })?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        let at = process_tree::one(pid).map_or(0, |p| p.started);
        Ok(Started { pid, at })
    }

    fn watch(&self, generation: &Generation, started: Started) {
        let (file, log) = (self.file(generation), self.log(generation));
        let (sender, named) = (self.sender.clone(), generation.clone());
        let waiter = tokio::spawn(async move {
            let exit = ended(started, &log).await;
            if let Ok(Some(mut record)) = read(&file) {
                record.exit = Some(exit.clone());
                if let Err(error) = write(&file, &record) {
                    tracing::warn!(%error, "an exit could not be written down");
                }
            }
            let _ = sender
                .send(Notice::Exited {
                    generation: named,
                    exit,
                })
                .await;
        });
        if let Some(before) = self.waiters().insert(generation.clone(), waiter) {
            before.abort();
        }
    }

    /// Signals are sent at once and take effect a moment later.
    async fn freeze(&self, generation: &Generation, signal: Signal, stopped: bool) -> Result<()> {
        for _ in 0..100 {
            let tree = self.tree(generation)?;
            process_tree::signal(&tree, signal);
            if tree.iter().all(|p| p.is_zombie() || p.is_stopped() == stopped) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Err(Error::Busy("its processes do not follow".into()))
    }

    /// The agent and everything below it.
    fn tree(&self, generation: &Generation) -> Result<Vec<Proc>> {
        let started = self.alive(generation)?;
        Ok(process_tree::below(started.pid))
    }
}

#[async_trait]
impl Runtime for Process {
    async fn describe(&self) -> Result<BTreeMap<String, String>> {
        Ok(BTreeMap::from([
            ("runtime".to_owned(), "process".to_owned()),
            ("isolation".to_owned(), "none: development only".to_owned()),
        ]))
    }

    async fn list(&self) -> Result<Vec<Found>> {
        let mut all = Vec::new();
        let entries = match fs::read_dir(&self.places.run) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(all),
            entries => entries?,
        };
        for entry in entries {
            if let Some(record) = read(&entry?.path().join("process.json"))? {
                all.push(Found {
                    seen: seen(&record),
                    generation: record.generation,
                    nonce: record.nonce,
                });
            }
        }
        Ok(all)
    }

    async fn create(&self, spec: &Spec) -> Result<()> {
        match read(&self.file(&spec.generation))? {
            Some(record) if record.nonce != spec.nonce => {
                return Err(Error::Busy("the name is taken; start another generation".into()));
            }
            present => {
                self.gates.open(spec)?;
                if present.is_none() {
                    let record = Record {
                        generation: spec.generation.clone(),
                        nonce: spec.nonce.clone(),
                        process: None,
                        exit: None,
                    };
                    write(&self.file(&spec.generation), &record)?;
                }
            }
        }
        Ok(())
    }

    async fn adopt(&self, spec: &Spec) -> Result<()> {
        let record = self.record(&spec.generation)?;
        if record.nonce != spec.nonce {
            let notice = Notice::Refused {
                generation: spec.generation.clone(),
                reason: "its nonce is another".into(),
            };
            let _ = self.sender.send(notice).await;
            return Ok(());
        }
        self.gates.open(spec)?;
        if let (Some(started), None) = (record.process, &record.exit) {
            self.watch(&spec.generation, started);
        }
        Ok(())
    }

    async fn start(&self, generation: &Generation) -> Result<()> {
        let mut record = self.record(generation)?;
        match record.process {
            None => {}
            Some(started) if is_alive(started) => return Ok(()),
            Some(_) => return Err(Error::Busy("a generation starts once".into())),
        }
        let started = self.spawn(generation)?;
        record.process = Some(started);
        write(&self.file(generation), &record)?;
        self.watch(generation, started);
        Ok(())
    }

    async fn stop(&self, generation: &Generation, grace: Duration) -> Result<Exit> {
        for (signal, patience) in [(Signal::TERM, grace), (Signal::KILL, KILL)] {
            let Ok(tree) = self.tree(generation) else { break };
            let all = if signal == Signal::KILL { &tree[..] } else { &tree[..1] };
            process_tree::signal(all, signal);
            process_tree::signal(&tree, Signal::CONT);
            let by = Instant::now() + patience;
            while self.alive(generation).is_ok() && Instant::now() < by {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            if self.alive(generation).is_err() {
                // What outlived the agent has nobody to answer to.
                process_tree::signal(&tree[1..], Signal::KILL);
            }
        }
        // The waiter writes the exit down; it sees the end a moment after it happened.
        for _ in 0..100 {
            let record = self.record(generation)?;
            match record.exit {
                Some(exit) => return Ok(exit),
                None if record.process.is_none() || !self.waiters().contains_key(generation) => break,
                None => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
        Ok(match seen(&self.record(generation)?) {
            Seen::Exited(exit) => exit,
            // It never ran.
            _ => Exit {
                code: 0,
                oom_killed: false,
            },
        })
    }

    async fn pause(&self, generation: &Generation) -> Result<()> {
        self.freeze(generation, Signal::STOP, true).await
    }

    async fn unpause(&self, generation: &Generation) -> Result<()> {
        self.freeze(generation, Signal::CONT, false).await
    }

    async fn remove(&self, generation: &Generation) -> Result<()> {
        match self.stop(generation, Duration::ZERO).await {
            Ok(_) | Err(Error::NotFound) => {}
            Err(e) => return Err(e),
        }
        if let Some(waiter) = self.waiters().remove(generation) {
            waiter.abort();
        }
        self.gates.close(generation)
    }

    async fn inspect(&self, generation: &Generation) -> Result<Seen> {
        Ok(read(&self.file(generation))?.map_or(Seen::Absent, |record| seen(&record)))
    }

    /// Nothing is known of a process but the record that is kept of it.
    async fn description(&self, generation: &Generation) -> Result<Vec<u8>> {
        Ok(serde_json::to_vec(&self.record(generation)?).map_err(io::Error::from)?)
    }

    /// Accepted and not enforced: nothing here confines a process.
    async fn limit(&self, generation: &Generation, _: &Limits, _: Slot) -> Result<()> {
        self.record(generation).map(|_| ())
    }

    async fn stats(&self, generation: &Generation) -> Result<Stats> {
        let tree = self.tree(generation)?;
        Ok(Stats {
            cpu_ns: tree.iter().map(|p| p.cpu_ns).sum(),
            memory: tree.iter().map(|p| p.resident).sum(),
            memory_limit: 0,
            pids: tree.len() as u64,
        })
    }

    async fn logs(&self, generation: &Generation, tail: usize, follow: bool) -> Result<mpsc::Receiver<LogLine>> {
        self.record(generation)?;
        Ok(process_log::lines(self.log(generation), tail, follow)?)
    }

    async fn open(&self, generation: &Generation, door: Door) -> Result<Stream> {
        self.gates.enter(generation, door).await
    }

    fn notices(&self) -> Option<mpsc::Receiver<Notice>> {
        self.notices.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

fn read(path: &Path) -> io::Result<Option<Record>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(e) => Err(e),
    }
}

fn write(path: &Path, record: &Record) -> io::Result<()> {
    let new = path.with_extension("new");
    fs::write(&new, serde_json::to_vec(record)?)?;
    fs::rename(new, path)
}

fn is_alive(started: Started) -> bool {
    process_tree::one(started.pid).is_some_and(|p| p.started == started.at && !p.is_zombie())
}

fn seen(record: &Record) -> Seen {
    match (&record.exit, record.process) {
        (Some(exit), _) => Seen::Exited(exit.clone()),
        (None, None) => Seen::Created,
        (None, Some(started)) if is_alive(started) => match process_tree::one(started.pid) {
            Some(p) if p.is_stopped() => Seen::Paused,
            _ => Seen::Running,
        },
        // It ended while nobody watched.
        (None, Some(_)) => Seen::Exited(UNKNOWN),
    }
}

/// The exit of a process that was not our child.
const UNKNOWN: Exit = Exit {
    code: 255,
    oom_killed: false,
};

/// Waits for the end of a process, keeping its log in bounds meanwhile.
async fn ended(started: Started, log: &Path) -> Exit {
    let Some(pid) =
        Pid::from_raw(started.pid).filter(|_| process_tree::one(started.pid).is_some_and(|p| p.started == started.at))
    else {
        return UNKNOWN;
    };
    let Ok(fd) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else {
        return UNKNOWN;
    };
    // SAFETY: the `AsyncFd` owns the open descriptor and nobody else has it.
    let Ok(fd) = (unsafe { AsyncFd::register(fd) }) else {
        return UNKNOWN;
    };
    loop {
        tokio::select! {
            _ = fd.readable() => break,
            () = tokio::time::sleep(LOG_CHECK) => process_log::bound(log),
        }
    }
    match rustix::process::waitpid(Some(pid), WaitOptions::NOHANG) {
        Ok(Some((_, status))) => Exit {
            code: status
                .exit_status()
                .or_else(|| status.terminating_signal().map(|signal| 128 + signal))
                .unwrap_or(255),
            oom_killed: false,
        },
        _ => UNKNOWN,
    }
}
