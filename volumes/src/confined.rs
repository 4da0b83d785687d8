//! The child that takes in hand what a stranger made: chrooted into one directory, of few privileges, bounded in memory
//! and time. How it is started, and how it tells how it ended: on standard error, with its answer or with why there is
//! none. Must not know what it does.

use std::io::{self, Read};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};

use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::CapabilitySet;

use crate::privileges;
use crate::wire::{Code, Failure};

/// Memory of the child, bytes: a long name or header cannot take more.
const MEMORY: u64 = 512 << 20;
/// Seconds of the child's work: less than its caller waits.
const CPU: u64 = 1500;
/// Longest message that the child sends, characters.
const MAX_TOLD: usize = 900;
/// Longest message taken from the child, bytes.
const MAX_MESSAGE: u64 = 4096;
const EXIT_REFUSED: u8 = 2;
const EXIT_NO_SPACE: u8 = 3;

/// This program again, to do `arguments` in `directory`.
pub fn command(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command
        .args(arguments)
        .env_clear()
        .current_dir(directory)
        .stderr(Stdio::piped());
    command
}

/// Awaits the end of a child, and returns its answer.
pub fn outcome(mut child: Child) -> Result<String, Failure> {
    // By value: a child that says more than is listened to must not wait for ever.
    let message = child.stderr.take().map(said).transpose();
    let status = child.wait().map_err(|e| Failure::io("await the child", e))?;
    let message = message?.unwrap_or_default();
    match status.code().map(u8::try_from) {
        Some(Ok(0)) => Ok(message),
        Some(Ok(EXIT_REFUSED)) => Err(Failure::new(Code::Refused, message)),
        Some(Ok(EXIT_NO_SPACE)) => Err(Failure::new(Code::NoSpace, message)),
        _ if message.is_empty() => Err(Failure::new(Code::Refused, format!("The child died: {status}."))),
        _ => Err(Failure::new(Code::Internal, message)),
    }
}

/// In the child: keeps it in its directory, with at most these privileges.
pub fn confine(kept: CapabilitySet) -> io::Result<()> {
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")?;
    privileges::keep_only(kept)?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    for (resource, most) in [(Resource::As, MEMORY), (Resource::Cpu, CPU)] {
        let limit = Rlimit {
            current: Some(most),
            maximum: Some(most),
        };
        setrlimit(resource, limit)?;
    }
    Ok(())
}

/// In the child: tells how it ended; `doing` completes "Could not ...".
pub fn end(doing: &str, outcome: io::Result<String>) -> ExitCode {
    let error = match outcome {
        Ok(answer) => {
            eprint!("{answer}");
            return ExitCode::SUCCESS;
        }
        Err(error) => error,
    };
    // Shorter than what the parent reads, whatever name is in it.
    let told: String = error.to_string().chars().take(MAX_TOLD).collect();
    eprint!("Could not {doing}: {}.", told.replace(char::is_control, " "));
    ExitCode::from(match cause(&error) {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => EXIT_NO_SPACE,
        _ => EXIT_REFUSED,
    })
}

fn said(pipe: impl Read) -> Result<String, Failure> {
    let mut bytes = Vec::new();
    let read = pipe.take(MAX_MESSAGE).read_to_end(&mut bytes);
    read.map_err(|e| Failure::io("hear the child", e))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The kind of the innermost error: the tar crate wraps what the kernel said.
fn cause(error: &io::Error) -> io::ErrorKind {
    let mut kind = error.kind();
    let mut inner: Option<&(dyn std::error::Error + 'static)> = error.get_ref().map(|e| e as _);
    while let Some(error) = inner {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            kind = io.kind();
        }
        inner = error.source();
    }
    kind
}
