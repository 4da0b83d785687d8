//! Hands listening sockets to a program the way systemd does (sd_listen_fds(3)): they are
//! descriptors 3 and up, LISTEN_FDS is their number and LISTEN_PID the program's own pid, which
//! only the process that becomes the program can know. They reach it as standard input and output.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::up::listen::Listeners;

#[derive(Args)]
pub struct Options {
    /// 1: standard input is a listening socket; 2: standard output too
    listeners: u8,
    #[arg(trailing_var_arg = true, required = true)]
    program: Vec<OsString>,
}

/// A command that becomes the program whose name and arguments are added to it.
pub fn command(listeners: &Listeners) -> Result<Command> {
    let mut command = Command::new("/proc/self/exe");
    let sockets = listeners.duplicate()?;
    command.arg("launch").arg(sockets.len().to_string()).arg("--");
    let mut sockets = sockets.into_iter();
    command.stdin(sockets.next().map_or_else(Stdio::null, Stdio::from));
    command.stdout(sockets.next().map_or_else(Stdio::null, Stdio::from));
    Ok(command)
}

pub fn run(options: &Options) -> Result<ExitCode> {
    let sockets = match options.listeners {
        1 => vec![rustix::io::dup(std::io::stdin())?],
        _ => vec![rustix::io::dup(std::io::stdin())?, rustix::io::dup(std::io::stdout())?],
    };
    for (socket, number) in sockets.iter().zip(3..) {
        ensure!(socket.as_raw_fd() == number, "descriptor {number} is not free");
    }
    let nothing = File::open("/dev/null").context("cannot open /dev/null")?;
    rustix::stdio::dup2_stdin(&nothing)?;
    rustix::stdio::dup2_stdout(std::io::stderr())?;
    let (program, arguments) = options.program.split_first().context("no program was named")?;
    let mut command = Command::new(program);
    command.args(arguments);
    command.env("LISTEN_FDS", sockets.len().to_string());
    command.env("LISTEN_PID", std::process::id().to_string());
    for socket in sockets {
        let _inherited = socket.into_raw_fd();
    }
    let error = command.exec();
    Err(error).with_context(|| format!("cannot start {}", program.to_string_lossy()))
}
