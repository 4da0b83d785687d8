//! A running command with pipes: its output in pieces as it comes, then how it ended. It must not know who reads.

use std::io;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::time::Duration;

use bytes::Bytes;
use choir_api::sandbox::OutputStream;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::reaper::{Exit, Reaper, kill_group};
use crate::spawn::{Launch, spawn};

/// The longest piece of output.
pub const PIECE: usize = 16 << 10;

/// How long output of something left in the background is waited for after the command itself has ended.
const LINGER: Duration = Duration::from_millis(50);

/// What a process did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Output(OutputStream, Bytes),
    /// The last step: it comes again if asked again.
    Ended(Exit),
}

/// A process, the leader of its group. Dropped before it ended, it takes the group with it.
#[derive(Debug)]
pub struct Process {
    group: i32,
    stdout: Option<pipe::Receiver>,
    stderr: Option<pipe::Receiver>,
    /// What is still to be written, and where.
    stdin: Option<(pipe::Sender, Bytes)>,
    waiting: oneshot::Receiver<Exit>,
    exit: Option<Exit>,
    /// When reading stops although somebody still holds the pipes.
    read_until: Instant,
}

impl Process {
    pub fn start(reaper: &Reaper, launch: Launch, stdin: Bytes) -> io::Result<Self> {
        let input = if stdin.is_empty() {
            Stdio::null()
        } else {
            Stdio::piped()
        };
        let (mut child, waiting) = spawn(reaper, launch, [input, Stdio::piped(), Stdio::piped()])?;
        // Made first, so that a failure below kills what was started.
        let mut process = Self {
            group: child.id().cast_signed(),
            stdout: None,
            stderr: None,
            stdin: None,
            waiting,
            exit: None,
            read_until: Instant::now(),
        };
        let receiver = |fd: Option<OwnedFd>| fd.map(pipe::Receiver::from_owned_fd).transpose();
        process.stdout = receiver(child.stdout.take().map(OwnedFd::from))?;
        process.stderr = receiver(child.stderr.take().map(OwnedFd::from))?;
        if let Some(fd) = child.stdin.take() {
            process.stdin = Some((pipe::Sender::from_owned_fd(fd.into())?, stdin));
        }
        Ok(process)
    }

    /// The process group, which is also the leader's id.
    pub fn group(&self) -> i32 {
        self.group
    }

    /// Signals the group, unless the leader has ended: then the id may belong to somebody else.
    pub fn signal(&self, signal: i32) {
        if self.exit.is_none() {
            kill_group(self.group, signal);
        }
    }

    /// The next step. May be dropped while it waits without losing anything.
    pub async fn next(&mut self) -> Step {
        loop {
            if let Some(exit) = self.exit
                && self.stdout.is_none()
                && self.stderr.is_none()
            {
                return Step::Ended(exit);
            }
            let exited = self.exit.is_some();
            tokio::select! {
                // Output first: a command that has ended has nothing to add to what is in the pipes.
                biased;
                piece = read(&mut self.stdout) => {
                    if let Some(bytes) = piece {
                        return Step::Output(OutputStream::Stdout, bytes);
                    }
                }
                piece = read(&mut self.stderr) => {
                    if let Some(bytes) = piece {
                        return Step::Output(OutputStream::Stderr, bytes);
                    }
                }
                exit = &mut self.waiting, if !exited => {
                    // The reaper outlives every process.
                    self.exit = Some(exit.unwrap_or(Exit { code: 255, signal: None }));
                    self.stdin = None;
                    self.read_until = Instant::now() + LINGER;
                }
                () = feed(&mut self.stdin) => {}
                () = tokio::time::sleep_until(self.read_until), if exited => {
                    self.stdout = None;
                    self.stderr = None;
                }
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(libc::SIGKILL);
    }
}

/// One piece, or `None` at the end, when the pipe is closed. Waits for ever on a closed pipe.
async fn read(pipe: &mut Option<pipe::Receiver>) -> Option<Bytes> {
    let Some(open) = pipe.as_ref() else {
        return std::future::pending().await;
    };
    loop {
        if open.readable().await.is_err() {
            break;
        }
        match take_piece(open) {
            Ok(bytes) if !bytes.is_empty() => return Some(bytes),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            _ => break,
        }
    }
    *pipe = None;
    None
}

/// Not async, so that the buffer is on the stack and not in every waiting future.
fn take_piece(pipe: &pipe::Receiver) -> io::Result<Bytes> {
    let mut buffer = [0; PIECE];
    let length = pipe.try_read(&mut buffer)?;
    Ok(Bytes::copy_from_slice(&buffer[..length]))
}

/// Writes some of the input; closes when all is written or nobody reads. Waits for ever once closed.
async fn feed(stdin: &mut Option<(pipe::Sender, Bytes)>) {
    let Some((pipe, left)) = stdin.as_mut() else {
        return std::future::pending().await;
    };
    let open = pipe.writable().await.is_ok();
    match pipe.try_write(left) {
        Ok(written) => {
            let _ = left.split_to(written);
        }
        Err(e) if open && e.kind() == io::ErrorKind::WouldBlock => return,
        Err(_) => left.clear(),
    }
    if left.is_empty() {
        *stdin = None;
    }
}

/// Keeps pieces of text whole: bytes of a character that is not complete yet wait for the next piece.
#[derive(Debug, Default)]
pub struct Carry(Vec<u8>);

impl Carry {
    /// What can be passed on now. Empty where there is only the beginning of a character.
    pub fn push(&mut self, piece: &Bytes) -> Bytes {
        let whole = if self.0.is_empty() {
            piece.clone()
        } else {
            let mut bytes = std::mem::take(&mut self.0);
            bytes.extend_from_slice(piece);
            bytes.into()
        };
        match std::str::from_utf8(&whole) {
            // No length: the input ended within a character, of which at most three bytes are there.
            Err(e) if e.error_len().is_none() => {
                self.0 = whole[e.valid_up_to()..].to_vec();
                whole.slice(..e.valid_up_to())
            }
            _ => whole,
        }
    }

    /// What is left when nothing more comes.
    pub fn rest(&mut self) -> Bytes {
        std::mem::take(&mut self.0).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_character_cut_by_a_read_stays_whole() {
        let mut carry = Carry::default();
        assert_eq!(carry.push(&Bytes::from_static(b"a\xe2\x82")), "a");
        assert_eq!(carry.push(&Bytes::from_static(b"\xac!")), "\u{20ac}!");
        assert_eq!(carry.push(&Bytes::from_static(b"\xe2")), "");
        assert_eq!(carry.rest(), &b"\xe2"[..]);
    }

    #[test]
    fn bytes_that_are_no_text_pass_unchanged() {
        let mut carry = Carry::default();
        assert_eq!(carry.push(&Bytes::from_static(b"\xff\xfe\xe2")), &b"\xff\xfe\xe2"[..]);
        assert!(carry.rest().is_empty());
    }
}
