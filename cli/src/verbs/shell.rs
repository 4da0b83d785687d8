//! `choir shell`: a terminal in a slot. The local terminal is put back whatever happens, and a connection that
//! breaks is made again without losing or repeating a byte. It must not interpret what either side types.

use std::io::{self, IsTerminal as _, Read as _, Write as _};
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use choir_api::client::{Client, ClientError, Frame, Socket};
use choir_api::sandbox::{CreateTerminal, TerminalControl, TerminalInput};
use choir_core::Slot;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use crate::context::Context;
use crate::failure::Failure;

/// How often a lost connection is made again before giving up, one second apart.
const RETRIES: u32 = 60;

/// What was shown is acknowledged this often, well under what the agent sends ahead.
const ACK_EVERY: u64 = 64 << 10;

/// Ctrl-C, which while there is no connection means: give up.
const INTERRUPT: u8 = 3;

/// Open a terminal in a slot
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  choir shell dev\n  choir shell dev --terminal ID    (back to one that was left)")]
pub struct Args {
    /// `live` or `dev`
    pub slot: Slot,
    /// Attach to this terminal instead of opening one
    #[arg(long, value_name = "ID")]
    pub terminal: Option<String>,
    /// Program to run [default: the login shell]
    #[arg(long, value_name = "PROGRAM")]
    pub shell: Option<String>,
}

pub async fn run(ctx: &Context, args: Args) -> Result<(), Failure> {
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        let text = "`choir shell` needs a terminal; for a script use `choir exec`";
        return Err(Failure::Usage(text.to_owned()));
    }
    let client = ctx.client()?;
    let id = match args.terminal {
        Some(id) => id,
        None => {
            let (cols, rows) = size();
            let wanted = CreateTerminal {
                shell: args.shell,
                cwd: None,
                cols,
                rows,
            };
            ctx.sandbox(&client, args.slot).create_terminal(&wanted).await?.id
        }
    };
    let mut session = Session {
        ctx,
        client: &client,
        slot: args.slot,
        seen: 0,
        acknowledged: 0,
        resized: signal(SignalKind::window_change())?,
        keys: keys(),
        id,
    };
    let socket = session.attach(args.slot).await?;
    let mut term = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let raw = Raw::enter()?;
    let ended = tokio::select! {
        ended = session.talk(socket) => ended,
        _ = term.recv() => Ok(End::Left),
        _ = hangup.recv() => Ok(End::Left),
        _ = interrupt.recv() => Ok(End::Left),
    };
    drop(raw);
    match ended? {
        End::Exit(0) => Ok(()),
        End::Exit(code) => Err(Failure::Exit(code)),
        End::Left => Err(Failure::Failed(format!(
            "the connection is gone and the terminal goes on; come back with `choir shell {} --terminal {}`",
            session.slot, session.id
        ))),
    }
}

/// How a session ends.
enum End {
    /// The shell ended.
    Exit(i32),
    /// We did.
    Left,
}

struct Session<'a> {
    ctx: &'a Context,
    client: &'a Client,
    /// The one that the terminal is in.
    slot: Slot,
    id: String,
    /// Bytes of the terminal shown so far.
    seen: u64,
    acknowledged: u64,
    resized: Signal,
    keys: mpsc::Receiver<Bytes>,
}

impl Session<'_> {
    async fn attach(&self, slot: Slot) -> Result<Socket, ClientError> {
        let sandbox = self.ctx.sandbox(self.client, slot);
        let mut socket = sandbox.attach(&self.id, self.seen).await?;
        resize(&mut socket).await?;
        Ok(socket)
    }

    async fn talk(&mut self, socket: Socket) -> Result<End, Failure> {
        let mut socket = socket;
        loop {
            if let Some(code) = self.pump(&mut socket).await? {
                return Ok(End::Exit(code));
            }
            match self.reattach().await? {
                Some(again) => socket = again,
                None => return Ok(End::Left),
            }
        }
    }

    /// Carries bytes until the shell ends (its exit code) or the connection does (nothing).
    async fn pump(&mut self, socket: &mut Socket) -> Result<Option<i32>, Failure> {
        loop {
            let sent = tokio::select! {
                frame = socket.next() => match frame {
                    Ok(Frame::Binary(bytes)) => {
                        show(&bytes)?;
                        self.seen += bytes.len() as u64;
                        self.acknowledge(socket).await
                    }
                    Ok(Frame::Text(text)) => match serde_json::from_str(&text) {
                        Ok(TerminalControl::Exit { code }) => return Ok(Some(code)),
                        Ok(TerminalControl::Hello { seq }) => {
                            self.seen = seq;
                            Ok(())
                        }
                        Err(_) => Ok(()),
                    },
                    Ok(Frame::Closed(_)) | Err(_) => return Ok(None),
                },
                key = self.keys.recv() => match key {
                    Some(bytes) => socket.send_binary(bytes).await,
                    None => return Ok(None),
                },
                _ = self.resized.recv() => resize(socket).await,
            };
            if sent.is_err() {
                return Ok(None);
            }
        }
    }

    async fn acknowledge(&mut self, socket: &mut Socket) -> Result<(), ClientError> {
        if self.seen - self.acknowledged.min(self.seen) < ACK_EVERY {
            return Ok(());
        }
        self.acknowledged = self.seen;
        control(socket, &TerminalInput::Ack { seq: self.seen }).await
    }

    /// Nothing where the terminal is gone for good or the person gave up.
    async fn reattach(&mut self) -> Result<Option<Socket>, Failure> {
        eprint!("\r\n[connection lost; trying again, Ctrl-C to give up]\r\n");
        for _ in 0..RETRIES {
            match self.attach(self.slot).await {
                Ok(socket) => return Ok(Some(socket)),
                Err(error) if error.status() == Some(404) => {
                    let other = self.slot.other();
                    let socket = self.attach(other).await.map_err(|_| error)?;
                    self.slot = other;
                    eprint!("\r\n[a swap has brought this terminal to {other}]\r\n");
                    return Ok(Some(socket));
                }
                Err(error) if matches!(error.status(), Some(401 | 403)) => return Err(error.into()),
                Err(_) => {}
            }
            tokio::select! {
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
                key = self.keys.recv() => match key {
                    Some(bytes) if !bytes.contains(&INTERRUPT) => {}
                    _ => return Ok(None),
                },
            }
        }
        Ok(None)
    }
}

async fn resize(socket: &mut Socket) -> Result<(), ClientError> {
    let (cols, rows) = size();
    control(socket, &TerminalInput::Resize { cols, rows }).await
}

async fn control(socket: &mut Socket, message: &TerminalInput) -> Result<(), ClientError> {
    let text = serde_json::to_string(message).map_err(|e| ClientError::Unexpected(e.to_string()))?;
    socket.send_text(text).await
}

fn show(bytes: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()
}

fn size() -> (u16, u16) {
    match tcgetwinsize(io::stdout()) {
        Ok(size) if size.ws_col > 0 && size.ws_row > 0 => (size.ws_col, size.ws_row),
        _ => (80, 24),
    }
}

/// What is typed, from a thread of its own: a read of a terminal cannot be given up.
fn keys() -> mpsc::Receiver<Bytes> {
    let (sender, receiver) = mpsc::channel(16);
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = io::stdin().read(&mut buffer) {
            if sender.blocking_send(Bytes::copy_from_slice(&buffer[..length])).is_err() {
                break;
            }
        }
    });
    receiver
}

/// The terminal hands over each key as it is until this is dropped.
struct Raw {
    before: Termios,
}

impl Raw {
    fn enter() -> Result<Self, Failure> {
        let wrong = |e: rustix::io::Errno| Failure::Failed(format!("cannot set the terminal up: {e}"));
        let before = tcgetattr(io::stdin()).map_err(wrong)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw).map_err(wrong)?;
        Ok(Self { before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing back.
        let _gone = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}
