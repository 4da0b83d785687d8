//! The agent's life: what PID 1 does at the start and at the end. It must not know what happens in between.

use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::signal::unix::{SignalKind, signal};

use crate::agent::{Agent, Place, Ports};
use crate::reaper::kill_group;
use crate::{link, log, outward};

/// From SIGTERM to SIGKILL for everything in the sandbox; the runtime kills the agent itself after 10 s.
const GRACE: Duration = Duration::from_secs(8);

const BETWEEN_KILLS: Duration = Duration::from_millis(50);

/// Runs until SIGTERM.
pub fn run(clock: fn() -> Timestamp, random: fn() -> [u8; 16]) -> ExitCode {
    // SAFETY: nothing has been opened yet; what a container runtime may have left open must not reach the sandbox.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime.and_then(|runtime| runtime.block_on(live(clock, random))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            log::say(&format!("cannot run: {e}"));
            ExitCode::FAILURE
        }
    }
}

async fn live(clock: fn() -> Timestamp, random: fn() -> [u8; 16]) -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let sigchld = signal(SignalKind::child())?;
    let place = Place::from_env();
    if is_first() {
        bring_loopback_up()?;
    } else {
        // Orphans come to us as they do to PID 1.
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    }
    std::fs::create_dir_all(&place.agent)?;
    let ports = Ports::bind(&place)?;
    let agent = Agent::new(place, ports, clock, random);
    if !agent.place.is_dev() {
        outward::start(&agent.ports).await?;
    }
    tokio::spawn(agent.reaper.clone().run(sigchld));
    tokio::spawn(link::run(Arc::clone(&agent)));
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    end(&agent).await;
    Ok(())
}

/// Ends everything in the sandbox, by force after a while.
async fn end(agent: &Agent) {
    agent.stop();
    // An interactive shell ignores SIGTERM.
    agent.terminals.hang_up();
    kill_all(agent, libc::SIGTERM);
    // Stopped processes take the signal only when they go on.
    kill_all(agent, libc::SIGCONT);
    if tokio::time::timeout(GRACE, agent.reaper.alone()).await.is_ok() {
        return;
    }
    log::say("some processes did not end in time and are killed");
    // Again, because outside a namespace of its own the agent sees a process only once its parent has ended.
    for _ in 0..10 {
        kill_all(agent, libc::SIGKILL);
        if tokio::time::timeout(BETWEEN_KILLS, agent.reaper.alone()).await.is_ok() {
            return;
        }
    }
}

fn kill_all(agent: &Agent, signal: i32) {
    if is_first() {
        // SAFETY: integers; for PID 1 this is everything in its namespace except itself.
        unsafe { libc::kill(-1, signal) };
    } else {
        for group in agent.reaper.groups() {
            kill_group(group, signal);
        }
        for orphan in children() {
            // SAFETY: integers; a child that we have not reaped, so the id is still its own.
            unsafe { libc::kill(orphan, signal) };
        }
    }
}

/// Our children, those that fell to us included. The agent is one thread, so this is all of them.
fn children() -> Vec<i32> {
    let text = std::fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
    text.split_whitespace().filter_map(|id| id.parse().ok()).collect()
}

fn is_first() -> bool {
    rustix::process::getpid().is_init()
}

/// The interface `lo`, where the runtime left it down. Without the right to, it stays as it is.
fn bring_loopback_up() -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: all zeroes is a valid ifreq; its name is a NUL-terminated `lo`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(c"lo".to_bytes_with_nul()) {
        *to = from.cast_signed();
    }
    // SAFETY: the kernel reads and writes one ifreq; the flags are what it has written.
    unsafe {
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS as _, &raw mut request) != 0 {
            return Err(io::Error::last_os_error());
        }
        let up = libc::IFF_UP as libc::c_short;
        if request.ifr_ifru.ifru_flags & up == 0 {
            request.ifr_ifru.ifru_flags |= up;
            if libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw mut request) != 0 {
                log::say(&format!(
                    "the loopback interface is down: {}",
                    io::Error::last_os_error()
                ));
            }
        }
    }
    Ok(())
}
