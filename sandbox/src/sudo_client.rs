//! `sudo`: asks the agent to run a command as root or another user, and behaves as if it were that command. It must
//! not decide whether it may.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;

use choir_api::sandbox::Chunk;
use choir_link::message::AGENT_DIR;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize};

use crate::sudo::{self, FromClient, HEADER, Request, ToClient};
use crate::sudo_args::{Options, Parsed, parse};

/// What of the environment a command gets without `-E`.
const KEPT: [&str; 20] = [
    "TERM",
    "COLORTERM",
    "LANG",
    "LANGUAGE",
    "TZ",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "no_proxy",
    "DEBIAN_FRONTEND",
    "SSL_CERT_FILE",
    "CURL_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",
    "NODE_EXTRA_CA_CERTS",
    "PIP_CERT",
    "GIT_SSL_CAINFO",
];

/// What it does not get even with `-E`: who it is changes, and root does not search in a user's directories.
const DROPPED: [&str; 4] = ["PATH", "USER", "LOGNAME", "SHELL"];

/// Signals handed on to the command.
const FORWARDED: [i32; 6] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
];

/// The whole program; `args` without its own name.
pub fn main(args: Vec<OsString>) -> ExitCode {
    let options = match parse(args) {
        Ok(Parsed::Run(options)) => options,
        Ok(Parsed::Say(text)) => {
            println!("{text}");
            return ExitCode::SUCCESS;
        }
        Err(message) => return fail(&message),
    };
    match run(options) {
        Ok(Ok(code)) => ExitCode::from(u8::try_from(code).unwrap_or(255)),
        Ok(Err(message)) => fail(&message),
        Err(e) => fail(&format!("the sandbox's agent does not answer: {e}")),
    }
}

fn fail(message: &str) -> ExitCode {
    eprintln!("sudo: {message}");
    ExitCode::FAILURE
}

/// Asks, then stands in for the command. The inner error is a sentence for the caller.
fn run(options: Options) -> io::Result<Result<i32, String>> {
    let directory = std::env::var_os("CHOIR_AGENT_DIR").map_or_else(|| AGENT_DIR.into(), PathBuf::from);
    let socket = UnixStream::connect(directory.join(sudo::SOCKET))?;
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    // In a pipeline the other programs use the terminal themselves, so it is passed on as it is.
    let size = if isatty(&stdin) {
        tcgetwinsize(&stdout).ok()
    } else {
        None
    };
    let request = Request {
        argv: options.command.iter().map(|w| Chunk::new(w.as_bytes())).collect(),
        env: environment(&options),
        user: options.user,
        login: options.login,
        terminal: size.map(|s| (s.ws_col, s.ws_row)),
    };
    let here = File::open(".").or_else(|_| File::open("/"))?;
    // Before the command starts, so that none is missed.
    let signals = signal_descriptor()?;
    let frame = sudo::frame(&request)?;
    let descriptors = [stdin.as_fd(), stdout.as_fd(), stderr.as_fd(), here.as_fd()];
    let sent = sudo::send(socket.as_fd(), &frame[..HEADER], &descriptors)?;
    (&socket).write_all(&frame[sent..])?;
    Session {
        socket,
        signals,
        terminal: None,
    }
    .follow()
}

fn environment(options: &Options) -> Vec<(Chunk, Chunk)> {
    let kept = |name: &OsStr| {
        let named = KEPT.iter().any(|kept| name == *kept) || name.as_bytes().starts_with(b"LC_");
        let identity = DROPPED.iter().any(|dropped| name == *dropped) || (options.login && name == "HOME");
        named || (options.keep_env && !identity)
    };
    let own = std::env::vars_os().filter(|(name, _)| kept(name));
    let all = own.chain(options.env.iter().cloned());
    all.map(|(n, v)| (Chunk::new(n.as_bytes()), Chunk::new(v.as_bytes())))
        .collect()
}

/// A command that was asked for.
struct Session {
    socket: UnixStream,
    signals: OwnedFd,
    /// Where the command has a terminal of its own.
    terminal: Option<Terminal>,
}

impl Session {
    fn follow(mut self) -> io::Result<Result<i32, String>> {
        loop {
            let ready = self.wait()?;
            if ready.signals {
                self.forward_signal()?;
            }
            if let Some(terminal) = &mut self.terminal {
                terminal.relay(ready.input, ready.output)?;
            }
            if ready.socket {
                let (message, descriptor) = self.receive()?;
                match message {
                    ToClient::Terminal => self.terminal = descriptor.map(Terminal::new).transpose()?,
                    ToClient::Refused { message } => return Ok(Err(message)),
                    ToClient::Exit { code } => {
                        if let Some(terminal) = &mut self.terminal {
                            terminal.drain();
                        }
                        return Ok(Ok(code));
                    }
                }
            }
        }
    }

    fn wait(&self) -> io::Result<Ready> {
        let stdin = io::stdin();
        let mut polled = vec![
            PollFd::new(&self.socket, PollFlags::IN),
            PollFd::new(&self.signals, PollFlags::IN),
        ];
        if let Some(terminal) = &self.terminal {
            let blocked = !terminal.pending.is_empty();
            let output = if terminal.hung_up {
                PollFlags::empty()
            } else {
                PollFlags::IN
            };
            let write = if blocked { PollFlags::OUT } else { PollFlags::empty() };
            polled.push(PollFd::new(&terminal.master, output | write));
            if !blocked && !terminal.input_ended {
                polled.push(PollFd::new(&stdin, PollFlags::IN));
            }
            // A terminal that hung up always polls as ready.
            if terminal.hung_up {
                polled.truncate(2);
            }
        }
        while let Err(e) = poll(&mut polled, None) {
            if e != rustix::io::Errno::INTR {
                return Err(e.into());
            }
        }
        let ready = |n: usize| polled.get(n).is_some_and(|p| !p.revents().is_empty());
        Ok(Ready {
            socket: ready(0),
            signals: ready(1),
            output: ready(2),
            input: ready(3),
        })
    }

    fn forward_signal(&mut self) -> io::Result<()> {
        // SAFETY: all zeroes is a valid signalfd_siginfo, and the kernel writes one.
        let mut info: libc::signalfd_siginfo = unsafe { std::mem::zeroed() };
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: the buffer is one siginfo, which outlives the slice.
        let buffer = unsafe { std::slice::from_raw_parts_mut((&raw mut info).cast::<u8>(), size) };
        rustix::io::read(&self.signals, buffer)?;
        match (info.ssi_signo.cast_signed(), &self.terminal) {
            (libc::SIGWINCH, Some(terminal)) => terminal.resize(),
            (libc::SIGWINCH, None) => {}
            (libc::SIGTSTP, _) => {
                self.send(libc::SIGSTOP)?;
                rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::STOP)?;
                self.send(libc::SIGCONT)?;
            }
            (number, _) => self.send(number)?,
        }
        Ok(())
    }

    fn send(&mut self, number: i32) -> io::Result<()> {
        self.socket.write_all(&sudo::frame(&FromClient::Signal { number })?)
    }

    fn receive(&mut self) -> io::Result<(ToClient, Option<OwnedFd>)> {
        let mut header = [0; HEADER];
        let (count, mut descriptors) = sudo::receive(&self.socket, &mut header)?;
        if count == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it ended"));
        }
        self.socket.read_exact(&mut header[count..])?;
        let mut body = vec![0; sudo::length(header)?];
        self.socket.read_exact(&mut body)?;
        Ok((serde_json::from_slice(&body)?, descriptors.pop()))
    }
}

struct Ready {
    socket: bool,
    signals: bool,
    output: bool,
    input: bool,
}

/// The command's terminal behind the caller's, which is raw meanwhile and restored when this is dropped.
struct Terminal {
    master: OwnedFd,
    before: Option<Termios>,
    /// Typed, and not taken yet.
    pending: Vec<u8>,
    input_ended: bool,
    hung_up: bool,
}

impl Terminal {
    fn new(master: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&master, true)?;
        let stdin = io::stdin();
        let before = tcgetattr(&stdin).ok();
        if let Some(before) = &before {
            let mut raw = before.clone();
            raw.make_raw();
            tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        }
        let terminal = Self {
            master,
            before,
            pending: Vec::new(),
            input_ended: false,
            hung_up: false,
        };
        // It may have changed since the request.
        terminal.resize();
        Ok(terminal)
    }

    fn resize(&self) {
        if let Ok(size) = tcgetwinsize(io::stdout()) {
            // A terminal that hung up has no size.
            let _ = tcsetwinsize(&self.master, size);
        }
    }

    fn relay(&mut self, input: bool, output: bool) -> io::Result<()> {
        let mut buffer = [0; 16 << 10];
        if input {
            match rustix::io::read(io::stdin(), &mut buffer) {
                Ok(0) | Err(_) => self.input_ended = true,
                Ok(count) => self.pending.extend_from_slice(&buffer[..count]),
            }
        }
        if !self.pending.is_empty() {
            match rustix::io::write(&self.master, &self.pending) {
                Ok(count) => drop(self.pending.drain(..count)),
                Err(rustix::io::Errno::AGAIN) => {}
                Err(_) => self.pending.clear(),
            }
        }
        if output {
            match rustix::io::read(&self.master, &mut buffer) {
                Ok(count) if count > 0 => write_all(io::stdout().as_fd(), &buffer[..count])?,
                Err(rustix::io::Errno::AGAIN) => {}
                // EIO: the command and all it started have closed it.
                _ => self.hung_up = true,
            }
        }
        Ok(())
    }

    /// What the command wrote before it ended.
    fn drain(&mut self) {
        let mut buffer = [0; 16 << 10];
        while let Ok(count) = rustix::io::read(&self.master, &mut buffer) {
            if count == 0 || write_all(io::stdout().as_fd(), &buffer[..count]).is_err() {
                return;
            }
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // A terminal that is gone needs no restoring.
            let _ = tcsetattr(io::stdin(), OptionalActions::Drain, before);
        }
    }
}

/// Unbuffered: `Stdout` would hold a prompt back until the end of its line.
fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => {
                poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::OUT)], None)?;
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Blocks the signals we hand on, and gives a descriptor to read them from.
fn signal_descriptor() -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset; the descriptor is new and nobody else's.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in FORWARDED.into_iter().chain([libc::SIGWINCH, libc::SIGTSTP]) {
            libc::sigaddset(&raw mut set, signal);
        }
        if libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        match libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC) {
            -1 => Err(io::Error::last_os_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}
