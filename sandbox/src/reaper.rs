//! The only caller of waitpid: every child, ours or an orphan that fell to PID 1, is reaped here exactly once.
//! It must not know what the children are.

use std::collections::HashMap;
use std::io;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::signal::unix::Signal;
use tokio::sync::{oneshot, watch};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// The process's own code, or 128 + the signal.
    pub code: i32,
    pub signal: Option<i32>,
}

impl Exit {
    /// The signal's name, such as `SIGTERM`.
    pub fn signal_name(&self) -> Option<String> {
        self.signal.map(signal_name)
    }
}

/// Children waited for, by process id.
#[derive(Debug, Clone)]
pub struct Reaper {
    waiting: Arc<Mutex<HashMap<i32, oneshot::Sender<Exit>>>>,
    /// Whether there was any child at the last look.
    children: watch::Sender<bool>,
    ended: watch::Sender<()>,
}

impl Default for Reaper {
    fn default() -> Self {
        Self {
            waiting: Arc::default(),
            children: watch::Sender::new(false),
            ended: watch::Sender::new(()),
        }
    }
}

impl Reaper {
    /// Starts a child and registers it under one lock, so that its status cannot be reaped before somebody waits.
    pub fn spawn(&self, command: &mut Command) -> io::Result<(Child, oneshot::Receiver<Exit>)> {
        let mut waiting = self.lock();
        let child = command.spawn()?;
        let (sender, receiver) = oneshot::channel();
        waiting.insert(child.id().cast_signed(), sender);
        self.children.send_replace(true);
        Ok((child, receiver))
    }

    /// Reaps for ever. `sigchld` must have been made before the first child.
    pub async fn run(self, mut sigchld: Signal) {
        loop {
            let left = self.reap();
            self.children
                .send_if_modified(|old| std::mem::replace(old, left) != left);
            sigchld.recv().await;
        }
    }

    /// Resolves once no child is left.
    pub async fn alone(&self) {
        // The sender is ours, so it cannot be gone.
        let _ = self.children.subscribe().wait_for(|any| !any).await;
    }

    /// Changes whenever children have ended.
    pub fn ended(&self) -> watch::Receiver<()> {
        self.ended.subscribe()
    }

    /// The process groups of the registered children; each leads its own.
    pub fn groups(&self) -> Vec<i32> {
        self.lock().keys().copied().collect()
    }

    /// Takes every status there is; whether children are left.
    fn reap(&self) -> bool {
        let mut waiting = self.lock();
        loop {
            let mut status = 0;
            // SAFETY: waitpid writes one int.
            let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
            match pid {
                0 => return true,
                -1 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
                -1 => return false,
                pid => {
                    self.ended.send_replace(());
                    if let Some(sender) = waiting.remove(&pid) {
                        // Nobody may be waiting any more.
                        let _ = sender.send(exit(status));
                    }
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<i32, oneshot::Sender<Exit>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn exit(status: i32) -> Exit {
    if libc::WIFSIGNALED(status) {
        let signal = libc::WTERMSIG(status);
        Exit {
            code: 128 + signal,
            signal: Some(signal),
        }
    } else {
        Exit {
            code: libc::WEXITSTATUS(status),
            signal: None,
        }
    }
}

/// Sends a signal to a process group. A group that is gone already is fine.
pub fn kill_group(group: i32, signal: i32) {
    // SAFETY: kill takes two integers; a group id of ours is greater than 1.
    unsafe { libc::kill(-group, signal) };
}

/// Whether any process is left in the group.
pub fn group_exists(group: i32) -> bool {
    // SAFETY: as above; signal 0 only asks.
    unsafe { libc::kill(-group, 0) == 0 }
}

/// signal(7), x86 and ARM numbers.
const SIGNALS: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM", "TERM",
    "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO",
    "PWR", "SYS",
];

fn signal_name(number: i32) -> String {
    let known = usize::try_from(number - 1).ok().and_then(|i| SIGNALS.get(i));
    known.map_or_else(|| format!("SIG{number}"), |name| format!("SIG{name}"))
}
