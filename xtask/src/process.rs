//! Processes that outlive the call that started them: a pid file that cannot name a stranger, and
//! stopping without a race. Knows nothing of what the processes do.

use std::fs;
use std::num::NonZeroI32;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};

/// A process pinned by a pidfd: a recycled pid is never signalled.
pub struct Handle {
    descriptor: OwnedFd,
    pub pid: Pid,
}

impl Handle {
    /// Pins a child of ours, which cannot be recycled before we have waited for it.
    pub fn of_child(child: &std::process::Child) -> Result<Self> {
        let pid = Pid::from_child(child);
        let descriptor = pidfd_open(pid, PidfdFlags::empty()).with_context(|| format!("cannot watch process {pid}"))?;
        Ok(Self { descriptor, pid })
    }

    /// The living process that a pid file names, or none: the pid and the start time must agree.
    pub fn from_file(path: &Path) -> Option<Self> {
        let text = fs::read_to_string(path).ok()?;
        let mut lines = text.lines();
        let pid = Pid::from_raw(lines.next()?.parse().ok()?)?;
        let started: u64 = lines.next()?.parse().ok()?;
        let descriptor = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        let handle = Self { descriptor, pid };
        (start_time(pid)? == started && !handle.wait(Duration::ZERO)).then_some(handle)
    }

    /// The living processes, other than ourselves, with this path as an argument.
    pub fn with_argument(path: &Path) -> Vec<Self> {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?));
        pids.filter(|pid| *pid != rustix::process::getpid())
            .filter_map(|pid| {
                // Pinned first: the arguments read then are those of what is pinned.
                let descriptor = pidfd_open(pid, PidfdFlags::empty()).ok()?;
                let line = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).ok()?;
                let mut arguments = line.split(|byte| *byte == 0);
                arguments
                    .any(|argument| argument == path.as_os_str().as_encoded_bytes())
                    .then_some(Self { descriptor, pid })
            })
            .collect()
    }

    /// Writes pid and start time (clock ticks since boot), one a line.
    pub fn write_file(&self, path: &Path) -> Result<()> {
        let started = start_time(self.pid).with_context(|| format!("process {} ended at once", self.pid))?;
        write_pid(path, self.pid, started)
    }

    /// Sends a signal; a process that is gone needs none.
    pub fn signal(&self, signal: Signal) {
        let _gone = pidfd_send_signal(&self.descriptor, signal);
    }

    /// Waits until the process has ended; false when `limit` passed first.
    pub fn wait(&self, limit: Duration) -> bool {
        let timeout = Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(limit.subsec_nanos()),
        };
        let mut descriptors = [PollFd::new(&self.descriptor, PollFlags::IN)];
        matches!(poll(&mut descriptors, Some(&timeout)), Ok(1..))
    }

    /// Kills what it started as the first process of a container.
    pub fn kill_containers(&self) {
        let pid = self.pid.as_raw_nonzero();
        let space = |pid: NonZeroI32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        let children = text.split_whitespace().filter_map(|id| Pid::from_raw(id.parse().ok()?));
        let is_first = |child: &Pid| space(child.as_raw_nonzero()).is_some_and(|its| Some(its) != space(pid));
        for child in children.filter(is_first) {
            let _gone = kill_process(child, Signal::KILL);
        }
    }

    /// SIGTERM, then SIGKILL when `grace` was not enough.
    pub fn stop(&self, grace: Duration) {
        self.signal(Signal::TERM);
        if !self.wait(grace) {
            self.signal(Signal::KILL);
            self.wait(Duration::from_secs(5));
        }
    }
}

/// Writes a pid file for the calling process.
pub fn write_own_file(path: &Path) -> Result<()> {
    let pid = rustix::process::getpid();
    write_pid(path, pid, start_time(pid).context("cannot read /proc/self/stat")?)
}

fn write_pid(path: &Path, pid: Pid, started: u64) -> Result<()> {
    fs::write(path, format!("{}\n{started}\n", pid.as_raw_nonzero()))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn start_time(pid: Pid) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    parse_start_time(&stat)
}

/// Field 22 of proc_pid_stat(5); the command name in field 2 may itself hold spaces and brackets.
fn parse_start_time(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Duration;

    use super::{Handle, parse_start_time, write_own_file};

    #[test]
    fn a_command_name_with_brackets_does_not_shift_the_fields() {
        let stat = "7 (a) b) c) S 1 7 7 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 4242 0 0";
        assert_eq!(parse_start_time(stat), Some(4242));
    }

    #[test]
    fn a_pid_file_with_another_start_time_names_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.pid");
        write_own_file(&path).unwrap();
        assert!(Handle::from_file(&path).is_some());
        std::fs::write(&path, format!("{}\n1\n", std::process::id())).unwrap();
        assert!(Handle::from_file(&path).is_none());
    }

    #[test]
    fn a_process_that_ignores_sigterm_is_killed() {
        let mut child = Command::new("sh")
            .args(["-c", "trap '' TERM; echo ready; read x"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 1];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
        let handle = Handle::of_child(&child).unwrap();
        handle.stop(Duration::from_millis(50));
        assert!(!child.wait().unwrap().success());
    }
}
