//! Runs one task from its turn to its end. It must not know of other tasks or of who is watching.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use choir_api::sandbox::{CreateTask, OutputStream, TaskState};
use tokio::time::Instant;

use crate::agent::Agent;
use crate::command::{launch, not_started, program};
use crate::process::{Carry, Process, Step};
use crate::reaper::{Exit, group_exists, kill_group};
use crate::tasks::{Entry, STDERR, STDOUT};

/// From SIGTERM to SIGKILL.
const GRACE: Duration = Duration::from_secs(5);

/// Runs a task whose turn it is.
pub async fn run(agent: Arc<Agent>, entry: Arc<Entry>, request: CreateTask) {
    entry.started((agent.clock)());
    let (state, exit) = match start(&agent, &request) {
        Ok(process) => follow(process, &entry, request.timeout_ms).await,
        Err((code, line)) => {
            entry.output(STDERR, line.into());
            (TaskState::Failed, Exit { code, signal: None })
        }
    };
    entry.finished((agent.clock)(), state, Some(exit));
    agent.tasks.ended(&agent, &entry);
}

/// The process, or an exit code and the line that says why there is none.
fn start(agent: &Agent, request: &CreateTask) -> Result<Process, (i32, String)> {
    let refused = |e: crate::api::ApiError| (126, format!("{e}\n"));
    let launch = launch(agent, &request.command, request.cwd.as_deref(), &request.env).map_err(refused)?;
    let name = program(&launch);
    Process::start(&agent.reaper, launch, Bytes::new()).map_err(|e| not_started(&name, &e).unwrap_or_else(refused))
}

async fn follow(mut process: Process, entry: &Entry, timeout_ms: Option<u64>) -> (TaskState, Exit) {
    let mut carries = [Carry::default(), Carry::default()];
    let timeout = timeout_ms.and_then(|t| Instant::now().checked_add(Duration::from_millis(t)));
    // Why it is being ended, and when it is killed.
    let mut ending: Option<(TaskState, Instant)> = None;
    let mut killed = false;
    let exit = loop {
        let why = tokio::select! {
            step = process.next() => match step {
                Step::Output(OutputStream::Stdout, bytes) => {
                    entry.output(STDOUT, carries[0].push(&bytes));
                    continue;
                }
                Step::Output(OutputStream::Stderr, bytes) => {
                    entry.output(STDERR, carries[1].push(&bytes));
                    continue;
                }
                Step::Ended(exit) => break exit,
            },
            () = entry.cancelled(), if ending.is_none() => TaskState::Cancelled,
            () = at(timeout), if ending.is_none() => TaskState::TimedOut,
            () = at(ending.map(|(_, at)| at)), if !killed => {
                killed = true;
                process.signal(libc::SIGKILL);
                continue;
            }
        };
        ending = Some((why, Instant::now() + GRACE));
        process.signal(libc::SIGTERM);
    };
    entry.output(STDOUT, carries[0].rest());
    entry.output(STDERR, carries[1].rest());
    match ending {
        Some((why, kill_at)) => {
            end_group(process.group(), kill_at).await;
            (why, exit)
        }
        None if exit.code == 0 => (TaskState::Succeeded, exit),
        None => (TaskState::Failed, exit),
    }
}

/// Waits until what the leader left behind has ended, too, by force at the deadline. The group's id is not used
/// again while a process is in it.
async fn end_group(group: i32, kill_at: Instant) {
    while group_exists(group) {
        if Instant::now() >= kill_at {
            kill_group(group, libc::SIGKILL);
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => pending().await,
    }
}
