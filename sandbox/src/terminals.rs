//! `/terminals`: login shells on pseudo terminals that outlive their clients. It must not know how clients attach.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use bytes::Bytes;
use choir_api::sandbox::{CreateTerminal, Terminal};
use choir_api::workspaces::Page;
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{oneshot, watch};

use crate::agent::Agent;
use crate::api::{ApiError, Json, Status};
use crate::command::{become_user, directory, not_started};
use crate::process::PIECE;
use crate::reaper::{Exit, group_exists, kill_group};
use crate::spawn::{Launch, spawn};
use crate::user::User;

/// Open at once.
const OPEN: usize = 32;
/// Ended ones that are remembered, so that a client that comes back learns how it ended.
const ENDED: usize = 8;
/// Bytes of output kept for replay, each.
const REPLAY: usize = 1 << 20;
/// From SIGHUP to SIGKILL.
const GRACE: Duration = Duration::from_secs(2);
/// How long output is waited for after the shell has ended.
const LINGER: Duration = Duration::from_millis(100);

/// All terminals of this generation, oldest first.
#[derive(Default)]
pub struct Terminals {
    all: Mutex<Vec<Arc<Entry>>>,
}

/// One terminal.
pub struct Entry {
    pub id: String,
    shell: String,
    created_at: jiff::Timestamp,
    group: i32,
    master: AsyncFd<OwnedFd>,
    replay: Mutex<Replay>,
    /// Bytes written so far.
    seq: watch::Sender<u64>,
    exit: watch::Sender<Option<i32>>,
    clients: AtomicU32,
}

/// The newest output.
#[derive(Default)]
struct Replay {
    bytes: VecDeque<u8>,
    end: u64,
}

impl Replay {
    fn push(&mut self, piece: &[u8]) {
        self.bytes.extend(piece);
        self.end += piece.len() as u64;
        let excess = self.bytes.len().saturating_sub(REPLAY);
        self.bytes.drain(..excess);
    }

    fn start(&self) -> u64 {
        self.end - self.bytes.len() as u64
    }

    /// Up to `most` bytes from number `from` on, which must not be below the start.
    fn read(&self, from: u64, most: usize) -> Bytes {
        let skip = usize::try_from(from - self.start()).unwrap_or(usize::MAX);
        self.bytes.iter().skip(skip).take(most).copied().collect()
    }
}

/// What there is from a place in the output on.
pub enum Piece {
    Bytes(Bytes),
    /// Nothing yet.
    Nothing,
    /// What was there is gone.
    Dropped,
}

impl Entry {
    fn terminal(&self) -> Terminal {
        let size = rustix::termios::tcgetwinsize(self.master.get_ref()).ok();
        Terminal {
            id: self.id.clone(),
            shell: self.shell.clone(),
            cols: size.map_or(0, |s| s.ws_col),
            rows: size.map_or(0, |s| s.ws_row),
            created_at: self.created_at,
            exit_code: *self.exit.borrow(),
            clients: self.clients.load(Ordering::Relaxed),
            seq: *self.seq.borrow(),
        }
    }

    /// Number of the oldest byte left.
    pub fn start(&self) -> u64 {
        self.replay().start()
    }

    pub fn read(&self, from: u64, most: usize) -> Piece {
        let replay = self.replay();
        if from < replay.start() {
            Piece::Dropped
        } else if from >= replay.end {
            Piece::Nothing
        } else {
            Piece::Bytes(replay.read(from, most))
        }
    }

    /// Changes whenever there is more output.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.seq.subscribe()
    }

    /// Set once the shell has ended and all its output is there.
    pub fn exit(&self) -> watch::Receiver<Option<i32>> {
        self.exit.subscribe()
    }

    /// Writes some of the input; how much.
    pub async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let write = |fd: &OwnedFd| Ok(rustix::io::write(fd, bytes)?);
        self.master.async_io(Interest::WRITABLE, write).await
    }

    pub fn resize(&self, cols: u16, rows: u16) {
        // A terminal that has ended has no size to change.
        let _ = rustix::termios::tcsetwinsize(self.master.get_ref(), winsize(cols, rows));
    }

    pub fn client_came(&self) {
        self.clients.fetch_add(1, Ordering::Relaxed);
    }

    pub fn client_went(&self) {
        self.clients.fetch_sub(1, Ordering::Relaxed);
    }

    fn replay(&self) -> MutexGuard<'_, Replay> {
        self.replay.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads until the terminal hangs up or the shell has ended.
    async fn pump(&self, mut waiting: oneshot::Receiver<Exit>) -> Option<Exit> {
        let mut exit = None;
        loop {
            let read = self.master.async_io(Interest::READABLE, take_piece);
            tokio::select! {
                biased;
                piece = read => match piece {
                    Ok(bytes) if !bytes.is_empty() => {
                        let mut replay = self.replay();
                        replay.push(&bytes);
                        self.seq.send_replace(replay.end);
                    }
                    // EIO: nobody has the other side open any more.
                    _ if exit.is_some() => return exit,
                    _ => return waiting.await.ok(),
                },
                end = &mut waiting, if exit.is_none() => exit = end.ok(),
                () = tokio::time::sleep(LINGER), if exit.is_some() => return exit,
            }
        }
    }
}

/// Not async, so that the buffer is on the stack and not in every waiting future.
fn take_piece(fd: &OwnedFd) -> io::Result<Bytes> {
    let mut buffer = [0; PIECE];
    let length = rustix::io::read(fd, &mut buffer)?;
    Ok(Bytes::copy_from_slice(&buffer[..length]))
}

/// A pair of a new pseudo terminal: the master, and the slave, which belongs to `owner` where we may say so.
pub fn open_pty(cols: u16, rows: u16, owner: Option<&User>) -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags)?;
    rustix::pty::grantpt(&master)?;
    rustix::pty::unlockpt(&master)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    rustix::termios::tcsetwinsize(&master, winsize(cols, rows))?;
    if let Some(user) = owner {
        let (uid, gid) = (rustix::fs::Uid::from_raw(user.uid), rustix::fs::Gid::from_raw(user.gid));
        // Programs that open their terminal by name need this; the others work without.
        let _ = rustix::fs::fchown(&slave, Some(uid), Some(gid));
        let _ = rustix::fs::fchmod(&slave, rustix::fs::Mode::from_raw_mode(0o620));
    }
    Ok((master, slave))
}

fn winsize(cols: u16, rows: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

impl Terminals {
    /// How many have a living shell.
    pub fn open(&self) -> u32 {
        let open = self.lock().iter().filter(|t| t.exit.borrow().is_none()).count();
        u32::try_from(open).unwrap_or(u32::MAX)
    }

    pub fn find(&self, id: &str) -> Result<Arc<Entry>, ApiError> {
        self.lock().iter().find(|t| t.id == id).cloned().ok_or_else(|| {
            let message = "There is no such terminal; list them with GET /terminals.";
            ApiError::new(Status::NOT_FOUND, "no_such_terminal", message)
        })
    }

    /// Tells every shell that its terminal is gone.
    pub fn hang_up(&self) {
        for terminal in self.lock().iter().filter(|t| t.exit.borrow().is_none()) {
            kill_group(terminal.group, libc::SIGHUP);
        }
    }

    fn forget_ended(&self) {
        let mut all = self.lock();
        let ended = all.iter().filter(|t| t.exit.borrow().is_some()).count();
        let mut excess = ended.saturating_sub(ENDED);
        all.retain(|t| {
            let forget = excess > 0 && t.exit.borrow().is_some();
            excess -= usize::from(forget);
            !forget
        });
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Entry>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `GET /terminals`.
pub async fn list(State(agent): State<Arc<Agent>>) -> axum::Json<Page<Terminal>> {
    axum::Json(Page {
        items: agent.terminals.lock().iter().map(|t| t.terminal()).collect(),
        next_cursor: None,
    })
}

/// `GET /terminals/{id}`.
pub async fn get(State(agent): State<Arc<Agent>>, Path(id): Path<String>) -> Result<axum::Json<Terminal>, ApiError> {
    Ok(axum::Json(agent.terminals.find(&id)?.terminal()))
}

/// `POST /terminals`.
pub async fn create(
    State(agent): State<Arc<Agent>>,
    Json(request): Json<CreateTerminal>,
) -> Result<(StatusCode, axum::Json<Terminal>), ApiError> {
    if agent.is_stopping() {
        return Err(ApiError::new(
            Status::UNAVAILABLE,
            "stopping",
            "The sandbox is stopping; start it again.",
        ));
    }
    if agent.terminals.open() as usize >= OPEN {
        let message = "Too many terminals are open; close some.";
        return Err(ApiError::new(
            StatusCode::TOO_MANY_REQUESTS,
            "too_many_terminals",
            message,
        ));
    }
    let (entry, waiting) = start(&agent, request)?;
    agent.terminals.lock().push(Arc::clone(&entry));
    agent.count();
    let terminal = entry.terminal();
    tokio::spawn(async move {
        let exit = entry.pump(waiting).await;
        entry.exit.send_replace(Some(exit.map_or(255, |e| e.code)));
        agent.terminals.forget_ended();
        agent.count();
    });
    Ok((StatusCode::CREATED, axum::Json(terminal)))
}

fn start(agent: &Agent, request: CreateTerminal) -> Result<(Arc<Entry>, oneshot::Receiver<Exit>), ApiError> {
    let user = agent.user();
    let shell = request.shell.map_or_else(|| user.shell.clone(), Into::into);
    let mut env = agent.environment(&user, &BTreeMap::new());
    env.insert("TERM".into(), "xterm-256color".into());
    let shown = shell.display().to_string();
    let failed = |e: io::Error| match not_started(&shown, &e) {
        Ok((_, line)) => ApiError::new(Status::BAD_REQUEST, "bad_shell", line.trim_end()),
        Err(e) => e,
    };
    let (master, slave) = open_pty(request.cols, request.rows, Some(&user)).map_err(failed)?;
    let launch = Launch {
        name: Some(User::login_name(&shell)),
        argv: vec![shell.into()],
        env,
        directory: directory(&user, request.cwd.as_deref())?,
        become_who: become_user(agent, user),
        terminal: true,
    };
    let ends = || slave.try_clone().map(Stdio::from);
    let stdio = [
        ends().map_err(failed)?,
        ends().map_err(failed)?,
        ends().map_err(failed)?,
    ];
    rustix::io::ioctl_fionbio(&master, true).map_err(|e| failed(e.into()))?;
    // SAFETY: an `OwnedFd` names the same open descriptor from here until the `AsyncFd`, its owner, drops it.
    let master = unsafe { AsyncFd::register(master) }.map_err(|e| failed(e.into()))?;
    let (child, waiting) = spawn(&agent.reaper, launch, stdio).map_err(failed)?;
    let entry = Entry {
        id: agent.id("tty-"),
        shell: shown.clone(),
        created_at: (agent.clock)(),
        group: child.id().cast_signed(),
        master,
        replay: Mutex::default(),
        seq: watch::Sender::new(0),
        exit: watch::Sender::new(None),
        clients: AtomicU32::new(0),
    };
    Ok((Arc::new(entry), waiting))
}

/// `DELETE /terminals/{id}`: hangs up, and kills after a while. Attached clients see the exit.
pub async fn close(State(agent): State<Arc<Agent>>, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let entry = agent.terminals.find(&id)?;
    agent.terminals.lock().retain(|t| t.id != id);
    agent.count();
    if entry.exit.borrow().is_none() {
        kill_group(entry.group, libc::SIGHUP);
        tokio::spawn(async move {
            let ended = async { entry.exit().wait_for(Option::is_some).await.is_ok() };
            if tokio::time::timeout(GRACE, ended).await.is_err() && group_exists(entry.group) {
                kill_group(entry.group, libc::SIGKILL);
            }
        });
    }
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replay_keeps_the_newest_bytes_and_their_numbers() {
        let mut replay = Replay::default();
        for n in 0..300u32 {
            replay.push(&vec![n as u8; 10_000]);
        }
        assert_eq!(replay.end, 3_000_000);
        assert_eq!(replay.bytes.len(), REPLAY);
        assert_eq!(replay.read(2_999_998, 100), &[43, 43][..]);
        assert_eq!(replay.read(2_990_000 - 1, 2), &[42, 43][..]);
    }
}
