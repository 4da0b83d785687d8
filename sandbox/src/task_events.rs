//! `/tasks/{id}/events`: a task's events as server-sent events or over a websocket, from any number on. Each client
//! reads the log at its own pace, so a slow one costs nothing. It must not know how tasks run.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;

use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, Uri};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use choir_api::sandbox::{Chunk, OutputStream, TaskEvent, TaskEventKind};
use serde::Deserialize;
use tokio::sync::watch;

use crate::agent::Agent;
use crate::api::{ApiError, Status, query};
use crate::task_log::Record;
use crate::tasks::{Entry, STATE, STDERR};

#[derive(Deserialize)]
pub struct Since {
    since: Option<u64>,
}

/// The route. `Last-Event-ID` wins over `since`: a browser that reconnects sends the first address again.
pub async fn follow(
    State(agent): State<Arc<Agent>>,
    Path(id): Path<String>,
    uri: Uri,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let entry = agent.tasks.find(&id)?;
    let Since { since } = query(&uri)?;
    let last = match headers.get("last-event-id") {
        None => None,
        Some(value) => Some(value.to_str().ok().and_then(|v| v.parse().ok()).ok_or_else(|| {
            let message = "Last-Event-ID is not a number of an event; leave it out to start at the first.";
            ApiError::new(Status::BAD_REQUEST, "bad_event_id", message)
        })?),
    };
    let cursor = Cursor::new(entry, last.or(since).unwrap_or(0));
    Ok(match upgrade {
        Ok(upgrade) => upgrade.on_upgrade(|socket| send(socket, cursor)),
        Err(_) => {
            let events = futures_util::stream::unfold(cursor, |mut cursor| async move {
                let event = cursor.next().await?;
                let sse = Event::default().event(event.what.name()).id(event.seq.to_string());
                Some((Ok::<_, Infallible>(sse.data(json(&event))), cursor))
            });
            Sse::new(events).keep_alive(KeepAlive::new()).into_response()
        }
    })
}

/// A client's place in a task's events.
struct Cursor {
    entry: Arc<Entry>,
    changes: watch::Receiver<u64>,
    /// The last number sent or buffered.
    after: u64,
    buffer: VecDeque<TaskEvent>,
}

impl Cursor {
    fn new(entry: Arc<Entry>, after: u64) -> Self {
        Self {
            changes: entry.changes(),
            entry,
            after,
            buffer: VecDeque::new(),
        }
    }

    /// The next event, or `None` after the last. May be dropped while it waits without losing anything.
    async fn next(&mut self) -> Option<TaskEvent> {
        loop {
            if let Some(event) = self.buffer.pop_front() {
                return Some(event);
            }
            // Looked at before reading: an ended task adds nothing.
            let ended = self.entry.state().is_final();
            self.changes.borrow_and_update();
            let (records, first) = self.entry.read(self.after);
            if first > self.after + 1 {
                self.buffer.push_back(TaskEvent {
                    seq: first - 1,
                    what: TaskEventKind::Gap { from: self.after + 1 },
                });
                self.after = first - 1;
            }
            if let Some(last) = records.last() {
                self.after = last.seq;
            }
            self.buffer.extend(records.into_iter().filter_map(event));
            if self.buffer.is_empty() && (ended || self.changes.changed().await.is_err()) {
                return None;
            }
        }
    }
}

/// A record as it goes over the wire. The log holds only what tasks put there, so none is left out.
fn event(record: Record) -> Option<TaskEvent> {
    let what = match record.kind {
        STATE => serde_json::from_slice(&record.data).ok()?,
        kind => TaskEventKind::Output {
            stream: if kind == STDERR {
                OutputStream::Stderr
            } else {
                OutputStream::Stdout
            },
            chunk: Chunk::new(&record.data),
        },
    };
    Some(TaskEvent { seq: record.seq, what })
}

async fn send(mut socket: WebSocket, mut cursor: Cursor) {
    loop {
        tokio::select! {
            event = cursor.next() => {
                let Some(event) = event else { break };
                if socket.send(Message::Text(json(&event).into())).await.is_err() {
                    return;
                }
            }
            message = socket.recv() => match message {
                // Nothing is expected from the client; pings are answered below us.
                Some(Ok(Message::Close(_)) | Err(_)) | None => return,
                Some(Ok(_)) => {}
            },
        }
    }
    let close = CloseFrame {
        code: close_code::NORMAL,
        reason: "the task has ended".into(),
    };
    // The client may be gone.
    let _ = socket.send(Message::Close(Some(close))).await;
}

fn json(event: &TaskEvent) -> String {
    serde_json::to_string(event).expect("wire types have no maps with odd keys")
}
