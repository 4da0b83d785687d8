//! `choir run`: a command as a task that outlives this connection; its output is followed. It must not end the task
//! because somebody stopped watching.

use std::cell::Cell;
use std::time::Duration;

use choir_api::client::{Client, ClientError, Sandbox};
use choir_api::sandbox::{CreateTask, TaskEventKind, TaskState};
use choir_core::Slot;

use crate::context::Context;
use crate::failure::Failure;
use crate::verbs::exec::{self, command, variable};

/// How often a lost connection is made again before giving up, one second apart.
const RETRIES: u32 = 60;

/// Run a command as a task and follow its output; Ctrl-C leaves it running
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  choir run dev -- cargo build --release\nAfter Ctrl-C: choir tasks follow dev ID")]
pub struct Args {
    /// `live` or `dev`
    pub slot: Slot,
    /// Where to run it [default: the home directory]
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<String>,
    /// Set a variable; may be repeated
    #[arg(long, short, value_name = "NAME=VALUE", value_parser = variable)]
    pub env: Vec<(String, String)>,
    /// End it after so many seconds
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
    /// Do not follow its output
    #[arg(long, short)]
    pub detach: bool,
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<String>,
}

pub async fn run(ctx: &Context, args: Args) -> Result<(), Failure> {
    let client = ctx.client()?;
    let sandbox = ctx.sandbox(&client, args.slot);
    let task = CreateTask {
        command: command(args.command),
        cwd: args.cwd,
        env: args.env.into_iter().collect(),
        timeout_ms: args.timeout.map(|s| s.saturating_mul(1000)),
    };
    let task = sandbox.create_task(&task).await?;
    if args.detach {
        return ctx.show(&task, || task.id.clone());
    }
    watch(ctx, &client, args.slot, &task.id).await
}

/// Follows a task until it ends or Ctrl-C is pressed.
pub async fn watch(ctx: &Context, client: &Client, slot: Slot, id: &str) -> Result<(), Failure> {
    let slot = Cell::new(slot);
    tokio::select! {
        done = follow(ctx, client, &slot, id) => done,
        _ = tokio::signal::ctrl_c() => {
            let slot = slot.get();
            eprintln!("\nThe task goes on; follow it again with `choir tasks follow {slot} {id}{}`.", flags(ctx));
            Err(Failure::Exit(130))
        }
    }
}

fn flags(ctx: &Context) -> String {
    let workspace = ctx.workspace.as_str();
    if workspace == "main" {
        String::new()
    } else {
        format!(" -w {workspace}")
    }
}

/// Writes everything the task writes; a connection that breaks is made again where it stopped, in the slot to which a swap
/// has brought the task.
async fn follow(ctx: &Context, client: &Client, slot: &Cell<Slot>, id: &str) -> Result<(), Failure> {
    let mut seen = 0;
    let mut failures = 0;
    loop {
        let sandbox = ctx.sandbox(client, slot.get());
        match follow_once(ctx, &sandbox, id, &mut seen, &mut failures).await {
            Ok(Some(code)) => return exec::finish(code),
            Ok(None) | Err(Broken::Connection(_)) if failures < RETRIES => {
                failures += 1;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            Ok(None) => {
                return Err(Failure::Failed(format!(
                    "the task's output ended early each time; see `choir tasks show` with {id}"
                )));
            }
            Err(Broken::Absent(error)) => {
                let other = slot.get().other();
                ctx.sandbox(client, other).task(id).await.map_err(|_| error)?;
                slot.set(other);
                eprintln!("choir: a swap has brought the task to {other}");
            }
            Err(Broken::Connection(error)) => return Err(error.into()),
            Err(Broken::Ours(failure)) => return Err(failure),
        }
    }
}

enum Broken {
    /// May be better in a second.
    Connection(ClientError),
    /// It is not in the slot.
    Absent(ClientError),
    Ours(Failure),
}

impl From<ClientError> for Broken {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Unreachable { .. } | ClientError::Silent { .. } => Self::Connection(error),
            _ if matches!(error.status(), Some(502..=504)) => Self::Connection(error),
            _ if error.status() == Some(404) => Self::Absent(error),
            _ => Self::Ours(error.into()),
        }
    }
}

/// The exit code, or nothing where the stream ended before the task.
async fn follow_once(
    ctx: &Context,
    sandbox: &Sandbox<'_>,
    id: &str,
    seen: &mut u64,
    failures: &mut u32,
) -> Result<Option<i32>, Broken> {
    let mut events = sandbox.task_events(id, *seen).await?;
    while let Some(event) = events.next().await? {
        (*seen, *failures) = (event.seq, 0);
        if ctx.json {
            let text = serde_json::to_string(&event).map_err(|e| Broken::Ours(Failure::Failed(e.to_string())))?;
            crate::output::line(&text).map_err(Broken::Ours)?;
        }
        match event.what {
            TaskEventKind::Output { stream, chunk } if !ctx.json => {
                let bytes = chunk.into_bytes().unwrap_or_default();
                exec::write(stream, &bytes).map_err(Broken::Ours)?;
            }
            TaskEventKind::Gap { from } if !ctx.json => {
                eprintln!("choir: output was dropped here (events {from} to {})", event.seq);
            }
            TaskEventKind::State { state, exit_code, .. } if state.is_final() => {
                return Ok(Some(exit_code.unwrap_or_else(|| code(state))));
            }
            _ => {}
        }
    }
    Ok(None)
}

/// For a task that ended without an exit code of its own.
fn code(state: TaskState) -> i32 {
    match state {
        TaskState::Succeeded => 0,
        TaskState::TimedOut => 124,
        TaskState::Cancelled => 130,
        TaskState::Queued | TaskState::Running | TaskState::Failed => 1,
    }
}
