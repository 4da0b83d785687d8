//! What others on the host get of the program's memory (D04, D05): no core dump, no look into it, no key in swap.

use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, getuid, kill_process, setrlimit};

use crate::program::{Place, free_port, wait_for};
use crate::support::skip;

/// Users of nobody in particular: the service's, and another one's.
const SERVICE: u32 = 65_533;
const OTHER: u32 = 65_532;

/// A process that ends with this, so that a failed test leaves none behind.
struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A hypervisor that serves as the service's user, in a place of its own; and what is started like it.
struct Host {
    place: Place,
    /// Where the service's user can run it.
    program: std::path::PathBuf,
}

impl Host {
    /// `None` where nobody can change users or dump core, which is told to the test run.
    fn new() -> Option<Self> {
        if !getuid().is_root() || getrlimit(Resource::Core).maximum.is_some() {
            skip("who holds secrets leaves no core dump: needs root and an unlimited RLIMIT_CORE");
            return None;
        }
        let place = Place::serving(free_port());
        let program = place.path("choir-hypervisor");
        std::fs::copy(env!("CARGO_BIN_EXE_choir-hypervisor"), &program).unwrap();
        for path in [place.0.path(), &place.path("hypervisor.toml"), &program] {
            chown(path, Some(SERVICE), Some(SERVICE)).unwrap();
        }
        std::fs::set_permissions(place.0.path(), PermissionsExt::from_mode(0o755)).unwrap();
        Some(Self { place, program })
    }

    /// Runs a command as the service's user, allowed to dump core and to lock so much memory.
    fn start(&self, mut command: Command, locked: Option<u64>) -> Started {
        let raise = move || -> io::Result<()> {
            let all = Rlimit {
                current: None,
                maximum: None,
            };
            setrlimit(Resource::Core, all)?;
            if locked.is_some() {
                setrlimit(
                    Resource::Memlock,
                    Rlimit {
                        current: locked,
                        maximum: locked,
                    },
                )?;
            }
            rustix::thread::set_thread_gid(rustix::thread::Gid::from_raw(SERVICE))?;
            rustix::thread::set_thread_uid(rustix::thread::Uid::from_raw(SERVICE))?;
            Ok(())
        };
        // SAFETY: system calls only, between fork and exec.
        unsafe { command.pre_exec(raise) };
        let log = std::fs::File::create(self.place.path("log")).unwrap();
        command
            .current_dir(self.place.0.path())
            .stdin(Stdio::null())
            .stderr(log);
        Started(command.spawn().unwrap())
    }

    /// The hypervisor, once it has its keys.
    async fn hypervisor(&self, locked: Option<u64>) -> Started {
        let mut command = Command::new(&self.program);
        command.args(["--config", "hypervisor.toml", "serve"]);
        let child = self.start(command, locked);
        wait_for(&self.place.path("claim-link"), true).await;
        child
    }

    /// A program that does nothing for its memory.
    fn plain(&self) -> Started {
        let mut command = Command::new("sleep");
        command.arg("60");
        self.start(command, None)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.place.path("log")).unwrap()
    }
}

/// Ends it with the signal of a bad memory access; whether it left a core dump.
fn dumps_core(mut started: Started) -> bool {
    let child = &mut started.0;
    // Rust's own handler takes the first for a fault that comes again; nothing faults here, so another one is sent.
    let status = loop {
        kill_process(Pid::from_child(child), Signal::SEGV).unwrap();
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        std::thread::yield_now();
    };
    assert_eq!(status.signal(), Some(libc::SIGSEGV));
    status.core_dumped()
}

/// What a debugger does first, as a user: why it is refused, or 0.
fn attach(user: u32, started: &Started) -> i32 {
    let pid = libc::pid_t::try_from(started.0.id()).unwrap();
    let attach = move || -> io::Result<()> {
        rustix::thread::set_thread_gid(rustix::thread::Gid::from_raw(user))?;
        rustix::thread::set_thread_uid(rustix::thread::Uid::from_raw(user))?;
        // SAFETY: attaching touches no memory of this process.
        match unsafe { libc::ptrace(libc::PTRACE_ATTACH, pid, 0, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    let mut command = Command::new("true");
    // SAFETY: system calls only, between fork and exec.
    unsafe { command.pre_exec(attach) };
    match command.status() {
        Ok(_) => 0,
        Err(error) => error.raw_os_error().unwrap(),
    }
}

/// Whether a user gets the maps of a process, without which its memory cannot be read.
fn look(user: u32, started: &Started) -> bool {
    let mut command = Command::new("head");
    command.args(["-c", "1", &format!("/proc/{}/maps", started.0.id())]);
    command.uid(user).gid(user).stderr(Stdio::null());
    let output = command.output().unwrap();
    output.status.success() && !output.stdout.is_empty()
}

fn locked_kb(started: &Started) -> u64 {
    let status = std::fs::read_to_string(Path::new("/proc").join(started.0.id().to_string()).join("status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[tokio::test]
async fn a_hypervisor_that_crashes_leaves_no_core_dump() {
    let Some(host) = Host::new() else { return };
    assert!(!dumps_core(host.hypervisor(None).await));
    let left: Vec<_> = std::fs::read_dir(host.place.0.path()).unwrap().collect();
    assert!(!left.iter().any(|entry| {
        let name = entry.as_ref().unwrap().file_name();
        name.to_string_lossy().starts_with("core")
    }));
    // The control: started the same way, a program that does not forbid it dumps.
    assert!(dumps_core(host.plain()), "see /proc/sys/kernel/core_pattern");
}

#[tokio::test]
async fn nobody_but_root_looks_into_a_hypervisor_not_even_its_own_user() {
    let Some(host) = Host::new() else { return };
    let hypervisor = host.hypervisor(None).await;
    for user in [SERVICE, OTHER] {
        assert_eq!(attach(user, &hypervisor), libc::EPERM, "{user}");
        assert!(!look(user, &hypervisor), "{user}");
    }
    // The controls: root looks, and a program that does not forbid it is looked into by its own user.
    assert!(look(0, &hypervisor));
    let plain = host.plain();
    assert!(look(SERVICE, &plain));
    let attached = attach(SERVICE, &plain);
    assert!([0, libc::EPERM].contains(&attached));
    if attached != 0 {
        skip("a plain process is traced by its own user: this kernel forbids that to everybody");
    }
    assert_eq!(attach(OTHER, &plain), libc::EPERM);
}

#[tokio::test]
async fn the_pages_of_keys_are_locked_in_the_memory_of_the_program() {
    let Some(host) = Host::new() else { return };
    // The master key has a page of its own; the box's own key is let go once others are derived from it.
    let pages = rustix::param::page_size() as u64 / 1024;
    let hypervisor = host.hypervisor(None).await;
    assert!(locked_kb(&hypervisor) >= pages, "{}", locked_kb(&hypervisor));
    assert!(!host.log().contains("LimitMEMLOCK"), "{}", host.log());
    drop(hypervisor);
    // The controls: a plain program locks nothing, and where nothing may be locked the hypervisor says so.
    let plain = host.plain();
    assert_eq!(locked_kb(&plain), 0);
    std::fs::remove_file(host.place.path("claim-link")).unwrap();
    let unlocked = host.hypervisor(Some(0)).await;
    assert_eq!(locked_kb(&unlocked), 0);
    assert!(host.log().contains("LimitMEMLOCK"), "{}", host.log());
}
