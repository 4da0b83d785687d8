//! Starting a process as somebody: its session, identity, capabilities and place. It must not know why it runs.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use tokio::sync::oneshot;

use crate::reaper::{Exit, Reaper};
use crate::user::User;

/// The capabilities that `sudo` may give, as bits: CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID,
/// SETPCAP, NET_BIND_SERVICE, SYS_CHROOT, SETFCAP (capabilities(7)).
const ROOT_CAPABILITIES: u64 =
    1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 10 | 1 << 18 | 1 << 31;

/// User processes are killed before the agent when memory runs out.
const OOM_SCORE: &[u8] = b"500";

/// Where a process starts.
#[derive(Debug)]
pub enum Directory {
    Path(PathBuf),
    /// A directory somebody else had open: entered before the identity changes, as across exec.
    Open(OwnedFd),
}

/// Who a process becomes.
#[derive(Debug)]
pub enum Become {
    /// Whoever the agent is: development mode.
    Same,
    /// A user, without any capability.
    User(User),
    /// Somebody through `sudo`: the bounding set stays at what sudo may give.
    Sudo(User),
}

/// One process to start.
#[derive(Debug)]
pub struct Launch {
    /// The program, searched in the PATH of `env`, and its arguments. Never empty.
    pub argv: Vec<OsString>,
    /// What the program sees as its own name, where that differs.
    pub name: Option<OsString>,
    pub env: BTreeMap<OsString, OsString>,
    pub directory: Directory,
    pub become_who: Become,
    /// Standard input is a terminal and becomes the controlling one.
    pub terminal: bool,
}

/// Starts it as the leader of a session of its own. The exit status comes from the reaper.
pub fn spawn(
    reaper: &Reaper,
    launch: Launch,
    [stdin, stdout, stderr]: [Stdio; 3],
) -> io::Result<(Child, oneshot::Receiver<Exit>)> {
    let mut command = Command::new(&launch.argv[0]);
    command.args(&launch.argv[1..]).env_clear().envs(&launch.env);
    if let Some(name) = &launch.name {
        command.arg0(name);
    }
    command.stdin(stdin).stdout(stdout).stderr(stderr);
    let directory = match launch.directory {
        Directory::Path(path) => Entered::Path(
            std::ffi::CString::new(path.as_os_str().as_bytes())
                .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?,
        ),
        Directory::Open(fd) => Entered::Open(fd),
    };
    let plan = Plan {
        directory,
        become_who: launch.become_who,
        terminal: launch.terminal,
    };
    // SAFETY: the agent has one thread, so the child may do what it likes; `enter` makes system calls only.
    unsafe { command.pre_exec(move || plan.enter()) };
    reaper.spawn(&mut command)
}

enum Entered {
    Path(std::ffi::CString),
    Open(OwnedFd),
}

struct Plan {
    directory: Entered,
    become_who: Become,
    terminal: bool,
}

impl Plan {
    /// Runs in the child, between fork and exec.
    fn enter(&self) -> io::Result<()> {
        // SAFETY: plain system calls on integers, and on memory that outlives them.
        unsafe {
            check(libc::setsid())?;
            if self.terminal {
                check(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
            }
            libc::umask(0o022);
        }
        raise_oom_score();
        if let Entered::Open(fd) = &self.directory {
            // SAFETY: the descriptor is open.
            check(unsafe { libc::fchdir(fd.as_raw_fd()) })?;
        }
        match &self.become_who {
            Become::Same => {}
            Become::User(user) => become_user(user, 0)?,
            Become::Sudo(user) => become_user(user, ROOT_CAPABILITIES)?,
        }
        // SAFETY: as above.
        check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
        if let Entered::Path(path) = &self.directory {
            // SAFETY: a NUL-terminated string.
            check(unsafe { libc::chdir(path.as_ptr()) })?;
        }
        Ok(())
    }
}

/// Before the identity changes: afterwards the file belongs to somebody else. Best effort, as /proc may be masked.
fn raise_oom_score() {
    // SAFETY: a NUL-terminated path, a buffer of the given length, a descriptor just opened.
    unsafe {
        let fd = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd >= 0 {
            libc::write(fd, OOM_SCORE.as_ptr().cast(), OOM_SCORE.len());
            libc::close(fd);
        }
    }
}

fn become_user(user: &User, keep: u64) -> io::Result<()> {
    for capability in 0..64 {
        if keep & (1 << capability) == 0 {
            // SAFETY: integers only.
            if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
                match io::Error::last_os_error().raw_os_error() {
                    // Beyond the last capability of this kernel.
                    Some(libc::EINVAL) => break,
                    _ => return Err(io::Error::last_os_error()),
                }
            }
        }
    }
    // SAFETY: integers, and a slice whose length is given.
    unsafe {
        check(libc::prctl(
            libc::PR_CAP_AMBIENT,
            libc::PR_CAP_AMBIENT_CLEAR_ALL,
            0,
            0,
            0,
        ))?;
        check(libc::setgroups(user.groups.len(), user.groups.as_ptr()))?;
        check(libc::setresgid(user.gid, user.gid, user.gid))?;
        check(libc::setresuid(user.uid, user.uid, user.uid))?;
    }
    clear_inheritable()
}

/// The kernel has cleared the other sets of anybody but root; the inheritable one is left as it was.
fn clear_inheritable() -> io::Result<()> {
    use rustix::thread::CapabilitySet;
    let mut sets = rustix::thread::capabilities(None)?;
    sets.inheritable = CapabilitySet::empty();
    Ok(rustix::thread::set_capabilities(None, sets)?)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
