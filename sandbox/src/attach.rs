//! `/terminals/{id}/attach`: one client's websocket on a terminal. Output is sent at the client's pace out of the
//! terminal's replay; a client that falls behind it is told to come again. It must not know how the shell runs.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::extract::{Path, State};
use axum::http::{StatusCode, Uri};
use axum::response::Response;
use choir_api::sandbox::{TerminalControl, TerminalInput};
use serde::Deserialize;

use crate::agent::Agent;
use crate::api::{ApiError, query};
use crate::terminals::{Entry, Piece};

/// The longest binary frame sent.
const FRAME: usize = 32 << 10;
/// How far a client that acknowledges may be behind.
const WINDOW: u64 = 256 << 10;
/// Input that waits for the shell; while there is more, nothing is read from the client.
const PENDING: usize = 64 << 10;
/// A client that takes nothing for so long is gone.
const SEND_WITHIN: Duration = Duration::from_secs(30);

#[derive(Deserialize)]
pub struct Since {
    since: Option<u64>,
}

/// The route.
pub async fn attach(
    State(agent): State<Arc<Agent>>,
    Path(id): Path<String>,
    uri: Uri,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let entry = agent.terminals.find(&id)?;
    let Since { since } = query(&uri)?;
    let upgrade = upgrade.map_err(|_| {
        let message = "Attach with a websocket.";
        ApiError::new(StatusCode::UPGRADE_REQUIRED, "websocket_expected", message)
    })?;
    Ok(upgrade.on_upgrade(move |socket| async move {
        entry.client_came();
        let client = Client {
            seq: since.unwrap_or(0).max(entry.start()).min(*entry.changes().borrow()),
            socket,
            entry: Arc::clone(&entry),
            acked: None,
            pending: Vec::new(),
        };
        client.run().await;
        entry.client_went();
    }))
}

struct Client {
    socket: WebSocket,
    entry: Arc<Entry>,
    /// Number of the next byte to send.
    seq: u64,
    acked: Option<u64>,
    /// Input that the shell has not taken yet.
    pending: Vec<u8>,
}

/// Why a client is not served on.
struct Gone;

impl Client {
    async fn run(mut self) {
        if let Ok((code, reason)) = self.serve().await {
            let reason = reason.into();
            // The client may be gone.
            let _ = self.send(Message::Close(Some(CloseFrame { code, reason }))).await;
        }
    }

    async fn serve(&mut self) -> Result<(u16, &'static str), Gone> {
        let mut changes = self.entry.changes();
        let mut exit = self.entry.exit();
        let entry = Arc::clone(&self.entry);
        self.control(&TerminalControl::Hello { seq: self.seq }).await?;
        loop {
            // Looked at before reading: a shell that has ended adds nothing.
            let ended = *exit.borrow_and_update();
            changes.borrow_and_update();
            let open = self.acked.is_none_or(|a| self.seq < a + WINDOW);
            match entry.read(self.seq, FRAME) {
                Piece::Dropped => return Ok((close_code::AGAIN, "too slow: attach again")),
                Piece::Bytes(bytes) if open => {
                    self.seq += bytes.len() as u64;
                    self.send(Message::Binary(bytes)).await?;
                    // Input is taken between any two frames, below.
                }
                Piece::Nothing if ended.is_some() => {
                    self.control(&TerminalControl::Exit {
                        code: ended.unwrap_or_default(),
                    })
                    .await?;
                    return Ok((close_code::NORMAL, "the shell has ended"));
                }
                _ => {}
            }
            let more = open && *changes.borrow() > self.seq;
            tokio::select! {
                biased;
                message = self.socket.recv(), if self.pending.len() < PENDING => self.take(message)?,
                written = entry.write(&self.pending), if !self.pending.is_empty() => match written {
                    Ok(count) => drop(self.pending.drain(..count)),
                    // Nobody reads any more; the exit follows.
                    Err(_) => self.pending.clear(),
                },
                () = std::future::ready(()), if more => {}
                _ = changes.changed(), if open => {}
                _ = exit.changed() => {}
            }
        }
    }

    fn take(&mut self, message: Option<Result<Message, axum::Error>>) -> Result<(), Gone> {
        match message {
            Some(Ok(Message::Binary(bytes))) => self.pending.extend_from_slice(&bytes),
            Some(Ok(Message::Text(text))) => match serde_json::from_str(&text) {
                Ok(TerminalInput::Resize { cols, rows }) => self.entry.resize(cols, rows),
                Ok(TerminalInput::Ack { seq }) => self.acked = Some(seq.min(self.seq)),
                // A newer client may say more than we know.
                Err(_) => {}
            },
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            Some(Ok(Message::Close(_)) | Err(_)) | None => return Err(Gone),
        }
        Ok(())
    }

    async fn control(&mut self, control: &TerminalControl) -> Result<(), Gone> {
        let json = serde_json::to_string(control).expect("wire types have no maps with odd keys");
        self.send(Message::Text(json.into())).await
    }

    async fn send(&mut self, message: Message) -> Result<(), Gone> {
        match tokio::time::timeout(SEND_WITHIN, self.socket.send(message)).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(Gone),
        }
    }
}
