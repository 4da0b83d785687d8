//! `POST /exec`: one command, its output whole or as a stream. It ends with the request: who hangs up kills it.

use std::convert::Infallible;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use choir_api::sandbox::{Chunk, ExecExit, ExecRequest, ExecResult, OutputStream};
use serde::Serialize;
use tokio::time::Instant;

use crate::agent::Agent;
use crate::api::{ApiError, Json, Status};
use crate::command::{launch, not_started, program};
use crate::process::{Carry, Process, Step};
use crate::reaper::Exit;

const DEFAULT_OUTPUT: u64 = 1 << 20;
const MAX_OUTPUT: u64 = 8 << 20;

/// The route.
pub async fn run(
    State(agent): State<Arc<Agent>>,
    headers: HeaderMap,
    Json(request): Json<ExecRequest>,
) -> Result<Response, ApiError> {
    let stream = wants_events(&headers);
    let limit = request.max_output_bytes;
    let run = Run::start(&agent, request)?;
    Ok(if stream {
        run.stream(limit.unwrap_or(u64::MAX)).into_response()
    } else {
        let limit = limit.unwrap_or(DEFAULT_OUTPUT).min(MAX_OUTPUT);
        axum::Json(run.collect(limit).await).into_response()
    })
}

/// Whether the caller asked for server-sent events.
pub fn wants_events(headers: &HeaderMap) -> bool {
    let accept = headers.get(header::ACCEPT).and_then(|v| v.to_str().ok());
    accept.is_some_and(|a| a.contains("text/event-stream"))
}

/// A command of one request.
struct Run {
    what: What,
    began: Instant,
    deadline: Option<Instant>,
    timed_out: bool,
}

enum What {
    Process(Process),
    /// It could not be started: the line for stderr, then the exit code.
    Failed(Option<String>, i32),
}

impl Run {
    fn start(agent: &Agent, request: ExecRequest) -> Result<Self, ApiError> {
        let launch = launch(agent, &request.command, request.cwd.as_deref(), &request.env)?;
        let stdin = match request.stdin.map(|s| s.into_bytes()) {
            None => Bytes::new(),
            Some(Some(bytes)) => bytes.into(),
            Some(None) => {
                let message = "The data of stdin is not base64; encode it or send text.";
                return Err(ApiError::new(Status::BAD_REQUEST, "bad_stdin", message));
            }
        };
        let name = program(&launch);
        let began = Instant::now();
        let what = match Process::start(&agent.reaper, launch, stdin) {
            Ok(process) => What::Process(process),
            Err(e) => {
                let (code, line) = not_started(&name, &e)?;
                What::Failed(Some(line), code)
            }
        };
        let timeout = request.timeout_ms.map(Duration::from_millis);
        Ok(Self {
            what,
            began,
            deadline: timeout.and_then(|t| began.checked_add(t)),
            timed_out: false,
        })
    }

    async fn next(&mut self) -> Step {
        let process = match &mut self.what {
            What::Process(process) => process,
            What::Failed(line, code) => {
                return match line.take() {
                    Some(line) => Step::Output(OutputStream::Stderr, line.into()),
                    None => Step::Ended(Exit {
                        code: *code,
                        signal: None,
                    }),
                };
            }
        };
        loop {
            tokio::select! {
                step = process.next() => return step,
                () = until(self.deadline), if !self.timed_out => {
                    self.timed_out = true;
                    process.signal(libc::SIGKILL);
                }
            }
        }
    }

    fn exit(&self, exit: Exit, truncated: bool) -> ExecExit {
        ExecExit {
            exit_code: exit.code,
            signal: exit.signal_name(),
            duration_ms: u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX),
            truncated,
            timed_out: self.timed_out,
        }
    }

    /// All of the output, up to `limit` bytes of each stream. What is beyond is read and dropped.
    async fn collect(mut self, limit: u64) -> ExecResult {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let mut truncated = false;
        let exit = loop {
            match self.next().await {
                Step::Output(stream, bytes) => {
                    let kept = match stream {
                        OutputStream::Stdout => &mut stdout,
                        OutputStream::Stderr => &mut stderr,
                    };
                    truncated |= append(kept, &bytes, limit);
                }
                Step::Ended(exit) => break exit,
            }
        };
        let chunk = |bytes: Vec<u8>| {
            // A limit may cut a character, which must not make bytes out of the text before it.
            let bytes = Bytes::from(bytes);
            Chunk::new(&if truncated {
                Carry::default().push(&bytes)
            } else {
                bytes
            })
        };
        let (stdout, stderr) = (chunk(stdout), chunk(stderr));
        ExecResult {
            exit: self.exit(exit, truncated),
            stdout: stdout.data,
            stdout_encoding: stdout.encoding,
            stderr: stderr.data,
            stderr_encoding: stderr.encoding,
        }
    }

    /// Events `stdout` and `stderr` as the output comes, up to `limit` bytes of each, then `exit`.
    fn stream(self, limit: u64) -> impl IntoResponse {
        let start = Streaming {
            run: self,
            carries: Default::default(),
            left: [limit; 2],
            truncated: false,
            ended: None,
            done: false,
        };
        let events = futures_util::stream::unfold(start, |mut state| async move {
            let event = state.next().await?;
            Some((Ok::<_, Infallible>(event), state))
        });
        Sse::new(events).keep_alive(KeepAlive::new())
    }
}

/// A command whose output is sent as it comes.
struct Streaming {
    run: Run,
    /// Of stdout and stderr.
    carries: [Carry; 2],
    left: [u64; 2],
    truncated: bool,
    ended: Option<Exit>,
    done: bool,
}

const NAMES: [&str; 2] = ["stdout", "stderr"];

impl Streaming {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(exit) = self.ended {
                return self.last(exit);
            }
            match self.run.next().await {
                Step::Ended(exit) => self.ended = Some(exit),
                Step::Output(stream, bytes) => {
                    let n = usize::from(stream == OutputStream::Stderr);
                    let mut bytes = self.carries[n].push(&bytes);
                    if bytes.len() as u64 > self.left[n] {
                        self.truncated = true;
                        bytes.truncate(usize::try_from(self.left[n]).unwrap_or(usize::MAX));
                    }
                    self.left[n] -= bytes.len() as u64;
                    if !bytes.is_empty() {
                        return Some(event(NAMES[n], &Chunk::new(&bytes)));
                    }
                }
            }
        }
    }

    /// What was held back, then the exit, then nothing.
    fn last(&mut self, exit: Exit) -> Option<Event> {
        for (n, name) in NAMES.iter().enumerate() {
            let rest = self.carries[n].rest();
            if !rest.is_empty() && self.left[n] >= rest.len() as u64 {
                return Some(event(name, &Chunk::new(&rest)));
            }
        }
        let first = !std::mem::replace(&mut self.done, true);
        first.then(|| event("exit", &self.run.exit(exit, self.truncated)))
    }
}

/// Appends what fits; whether something did not.
fn append(kept: &mut Vec<u8>, bytes: &[u8], limit: u64) -> bool {
    let room = usize::try_from(limit).unwrap_or(usize::MAX).saturating_sub(kept.len());
    kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
    bytes.len() > room
}

fn event(name: &str, data: &impl Serialize) -> Event {
    let json = serde_json::to_string(data).expect("wire types have no maps with odd keys");
    Event::default().event(name).data(json)
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => pending().await,
    }
}
