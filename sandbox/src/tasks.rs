//! `/tasks`: commands that outlive their request. Here is which tasks there are and which may run; `task_run` runs
//! one. It must not know how events are sent.
//!
//! ```text
//! Queued ──▶ Running ──▶ Succeeded | Failed
//!    │          └──────▶ TimedOut
//!    └──────────┴──────▶ Cancelled
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::extract::{Path, State};
use axum::http::{StatusCode, Uri};
use bytes::Bytes;
use choir_api::sandbox::{CreateTask, Task, TaskEventKind, TaskState};
use choir_api::workspaces::Page;
use jiff::Timestamp;
use serde::Deserialize;
use tokio::sync::watch;

use crate::agent::Agent;
use crate::api::{ApiError, Json, Status, query};
use crate::command;
use crate::reaper::Exit;
use crate::task_log::{Record, TaskLog};
use crate::task_run;

/// At once; more wait.
const RUNNING: usize = 64;
/// Waiting; more are refused.
const QUEUED: usize = 1000;
/// Finished tasks remembered, and bytes of their output on disk; the oldest is forgotten first.
const FINISHED: usize = 1000;
const FINISHED_BYTES: u64 = 256 << 20;

/// Kinds of records in a task's log.
pub const STDOUT: u8 = 0;
pub const STDERR: u8 = 1;
/// The data is the event as JSON.
pub const STATE: u8 = 2;

/// All tasks of this generation.
pub struct Tasks {
    directory: PathBuf,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// By order of creation.
    all: BTreeMap<u64, Arc<Entry>>,
    next: u64,
    waiting: VecDeque<(Arc<Entry>, CreateTask)>,
    running: usize,
    finished: VecDeque<u64>,
}

/// One task.
pub struct Entry {
    number: u64,
    pub id: String,
    now: Mutex<Now>,
    /// Number of the newest event.
    seq: watch::Sender<u64>,
    cancelled: watch::Sender<bool>,
}

struct Now {
    task: Task,
    log: TaskLog,
}

impl Entry {
    /// As it is now.
    pub fn task(&self) -> Task {
        let now = self.now();
        Task {
            last_seq: now.log.last(),
            ..now.task.clone()
        }
    }

    pub fn state(&self) -> TaskState {
        self.now().task.state
    }

    /// Changes whenever an event is added.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.seq.subscribe()
    }

    /// Some events after number `after`, and the number of the oldest that is left.
    pub fn read(&self, after: u64) -> (Vec<Record>, u64) {
        let now = self.now();
        (now.log.read(after), now.log.first())
    }

    pub fn output(&self, kind: u8, data: Bytes) {
        if !data.is_empty() {
            self.add(&mut self.now(), kind, data);
        }
    }

    pub fn started(&self, at: Timestamp) {
        let mut now = self.now();
        now.task.started_at = Some(at);
        self.enter(&mut now, TaskState::Running);
    }

    pub fn finished(&self, at: Timestamp, state: TaskState, exit: Option<Exit>) {
        let mut now = self.now();
        now.task.finished_at = Some(at);
        now.task.exit_code = exit.map(|e| e.code);
        now.task.signal = exit.and_then(|e| e.signal_name());
        self.enter(&mut now, state);
        now.log.end();
    }

    /// Resolves when somebody wants it to end.
    pub async fn cancelled(&self) {
        // The sender is ours, so it cannot be gone.
        let _ = self.cancelled.subscribe().wait_for(|c| *c).await;
    }

    fn enter(&self, now: &mut Now, state: TaskState) {
        now.task.state = state;
        let event = TaskEventKind::State {
            state,
            exit_code: now.task.exit_code,
            signal: now.task.signal.clone(),
        };
        let json = serde_json::to_vec(&event).expect("wire types have no maps with odd keys");
        self.add(now, STATE, json.into());
    }

    fn add(&self, now: &mut Now, kind: u8, data: Bytes) {
        now.log.push(kind, data);
        self.seq.send_replace(now.log.last());
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tasks {
    /// No tasks. `directory` is for their output; what an earlier generation left there is removed.
    pub fn new(directory: PathBuf) -> Self {
        // Nothing there, most likely; and what cannot be removed is in nobody's way.
        let _ = std::fs::remove_dir_all(&directory);
        Self {
            directory,
            inner: Mutex::default(),
        }
    }

    /// How many run or wait.
    pub fn active(&self) -> u32 {
        let inner = self.lock();
        u32::try_from(inner.running + inner.waiting.len()).unwrap_or(u32::MAX)
    }

    pub fn find(&self, id: &str) -> Result<Arc<Entry>, ApiError> {
        let found = self.lock().all.values().find(|e| e.id == id).cloned();
        found.ok_or_else(|| {
            let message = "There is no such task; list them with GET /tasks.";
            ApiError::new(Status::NOT_FOUND, "no_such_task", message)
        })
    }

    /// One has ended: remembers it, forgets the oldest, and lets the next run.
    pub fn ended(&self, agent: &Arc<Agent>, entry: &Entry) {
        let mut inner = self.lock();
        inner.running -= 1;
        inner.remember(entry.number);
        inner.pump(agent);
        drop(inner);
        agent.count();
    }

    fn add(&self, agent: &Arc<Agent>, request: CreateTask) -> Result<Arc<Entry>, ApiError> {
        let mut inner = self.lock();
        if inner.waiting.len() >= QUEUED {
            let message = "Too many tasks are waiting; cancel some or try again later.";
            return Err(ApiError::new(StatusCode::TOO_MANY_REQUESTS, "too_many_tasks", message));
        }
        inner.next += 1;
        let id = agent.id("t-");
        let entry = Arc::new(Entry {
            number: inner.next,
            now: Mutex::new(Now {
                task: Task {
                    id: id.clone(),
                    command: request.command.clone(),
                    cwd: request.cwd.clone(),
                    state: TaskState::Queued,
                    exit_code: None,
                    signal: None,
                    created_at: (agent.clock)(),
                    started_at: None,
                    finished_at: None,
                    last_seq: 0,
                },
                log: TaskLog::new(self.directory.join(&id)),
            }),
            id,
            seq: watch::Sender::new(0),
            cancelled: watch::Sender::new(false),
        });
        inner.all.insert(entry.number, Arc::clone(&entry));
        inner.waiting.push_back((Arc::clone(&entry), request));
        entry.enter(&mut entry.now(), TaskState::Queued);
        inner.pump(agent);
        Ok(entry)
    }

    /// A waiting task is cancelled at once, a running one is told.
    fn cancel(&self, agent: &Agent, entry: &Arc<Entry>) {
        let mut inner = self.lock();
        let place = inner.waiting.iter().position(|(e, _)| Arc::ptr_eq(e, entry));
        if let Some(place) = place {
            inner.waiting.remove(place);
            entry.finished((agent.clock)(), TaskState::Cancelled, None);
            inner.remember(entry.number);
        } else {
            entry.cancelled.send_replace(true);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn pump(&mut self, agent: &Arc<Agent>) {
        while self.running < RUNNING
            && let Some((entry, request)) = self.waiting.pop_front()
        {
            self.running += 1;
            tokio::spawn(task_run::run(Arc::clone(agent), entry, request));
        }
    }

    fn remember(&mut self, number: u64) {
        self.finished.push_back(number);
        let sizes = self.finished.iter().filter_map(|n| self.all.get(n));
        let mut bytes: u64 = sizes.map(|e| e.now().log.spilled()).sum();
        while (self.finished.len() > FINISHED || bytes > FINISHED_BYTES)
            && let Some(oldest) = self.finished.pop_front()
        {
            if let Some(entry) = self.all.remove(&oldest) {
                bytes -= entry.now().log.spilled();
            }
        }
    }
}

#[derive(Deserialize)]
pub struct ListQuery {
    limit: Option<usize>,
    cursor: Option<u64>,
}

/// `GET /tasks`: newest first.
pub async fn list(State(agent): State<Arc<Agent>>, uri: Uri) -> Result<axum::Json<Page<Task>>, ApiError> {
    let ListQuery { limit, cursor } = query(&uri)?;
    let limit = limit.unwrap_or(100).clamp(1, 1000);
    let inner = agent.tasks.lock();
    let mut older = inner.all.range(..cursor.unwrap_or(u64::MAX)).rev();
    let page: Vec<_> = older.by_ref().take(limit).map(|(_, e)| e).collect();
    let last = page.last().map(|e| e.number.to_string());
    Ok(axum::Json(Page {
        next_cursor: older.next().and(last),
        items: page.iter().map(|e| e.task()).collect(),
    }))
}

/// `POST /tasks`.
pub async fn create(
    State(agent): State<Arc<Agent>>,
    Json(request): Json<CreateTask>,
) -> Result<(StatusCode, axum::Json<Task>), ApiError> {
    // Checked now, so that whoever asked hears of it; done again when its turn comes.
    command::launch(&agent, &request.command, request.cwd.as_deref(), &request.env)?;
    let entry = agent.tasks.add(&agent, request)?;
    agent.count();
    Ok((StatusCode::CREATED, axum::Json(entry.task())))
}

/// `GET /tasks/{id}`.
pub async fn get(State(agent): State<Arc<Agent>>, Path(id): Path<String>) -> Result<axum::Json<Task>, ApiError> {
    Ok(axum::Json(agent.tasks.find(&id)?.task()))
}

/// `DELETE /tasks/{id}`: 202, and the end comes as an event. A task that has ended stays as it is.
pub async fn cancel(
    State(agent): State<Arc<Agent>>,
    Path(id): Path<String>,
) -> Result<(StatusCode, axum::Json<Task>), ApiError> {
    let entry = agent.tasks.find(&id)?;
    if !entry.state().is_final() {
        agent.tasks.cancel(&agent, &entry);
        agent.count();
    }
    Ok((StatusCode::ACCEPTED, axum::Json(entry.task())))
}
