//! Lines on the container's log, the agent's standard output. The agent is one thread: a log that nobody reads must
//! never stop it, so a line is written only where there is room.

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};

/// A pipe that polls as writable has room for this much (PIPE_BUF), so a write up to it never blocks.
pub const MAX_LINE: usize = 4096;

/// Writes one line of the agent's own, or drops it where the log is full.
pub fn say(line: &str) {
    if writable() {
        write(&format!("choir-sandbox: {line}"));
    }
}

/// Writes one line of a service; waits while the log is full, which holds that service up and nobody else.
pub async fn service(name: &str, line: &str) {
    while !writable() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    write(&format!("[{name}] {line}"));
}

fn writable() -> bool {
    let stdout = std::io::stdout();
    let mut poll = [PollFd::from_borrowed_fd(stdout.as_fd(), PollFlags::OUT)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    // A log that is gone counts as writable: the write then fails at once.
    !matches!(rustix::event::poll(&mut poll, Some(&now)), Ok(0))
}

fn write(line: &str) {
    let mut end = line.len().min(MAX_LINE - 1);
    while !line.is_char_boundary(end) {
        end -= 1;
    }
    let text = format!("{}\n", &line[..end]);
    // There is nowhere to report a failing log to.
    let _ = rustix::io::write(std::io::stdout().as_fd(), text.as_bytes());
}
