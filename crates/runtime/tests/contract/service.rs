//! A Podman of the tests' own, and what is the host's network for it. It must not know what runs in it.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use crate::root::busybox;

/// A Podman service with its own storage.
pub struct Service {
    pub socket: PathBuf,
    dir: PathBuf,
    /// The network namespace that is the host's for this service; it ends with whoever is in it.
    network: Option<OwnedFd>,
    child: Mutex<Child>,
}

impl Service {
    pub fn new(dir: &Path, network: Option<OwnedFd>) -> Self {
        let child = within(network.as_ref(), || serve(dir));
        Self {
            socket: dir.join("podman.sock"),
            dir: dir.to_owned(),
            network,
            child: Mutex::new(child),
        }
    }

    /// Runs it in the network that is the host's for this service.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        within(self.network.as_ref(), work)
    }

    /// Podman's command line over the same storage.
    pub fn command(&self) -> Command {
        command(&self.dir)
    }

    /// A process that was told the directory: a Podman, or the monitor of a container.
    fn any_user(&self) -> Option<OwnedFd> {
        let directory = self.dir.to_str().unwrap().as_bytes();
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let is_user = |process: &fs::DirEntry| {
            let command = fs::read(process.path().join("cmdline")).unwrap_or_default();
            command.windows(directory.len()).any(|part| part == directory)
        };
        processes.filter(is_user).find_map(|process| {
            let id = Pid::from_raw(process.file_name().to_str()?.parse().ok()?)?;
            rustix::process::pidfd_open(id, PidfdFlags::empty()).ok()
        })
    }

    /// Ends the service; its containers run on.
    pub fn go_away(&self) {
        let mut child = self.child.lock().unwrap();
        let _ = child.kill();
        let _ = child.wait();
    }

    pub fn come_back(&self) {
        *self.child.lock().unwrap() = self.within(|| serve(&self.dir));
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.go_away();
        let _ = self.within(|| self.command().args(["rm", "--all", "--force", "--time", "0"]).output());
        // After the end of each container one more Podman cleans up, and mounts what is unmounted here.
        while let Some(user) = self.any_user() {
            let patience = Timespec { tv_sec: 10, tv_nsec: 0 };
            let ended = poll(&mut [PollFd::new(&user, PollFlags::IN)], Some(&patience));
            if !ended.is_ok_and(|n| n > 0) {
                break;
            }
        }
        // What Podman keeps mounted for as long as it has containers.
        let overlay = self.dir.join("p/overlay");
        let _ = Command::new("umount").arg(overlay).stderr(Stdio::null()).status();
    }
}

/// Runs it on a thread that is in the network namespace, where one is given.
fn within<T: Send>(network: Option<&OwnedFd>, work: impl FnOnce() -> T + Send) -> T {
    let enter = || {
        if let Some(network) = network {
            let kind = Some(LinkNameSpaceType::Network);
            rustix::thread::move_into_link_name_space(network.as_fd(), kind).unwrap();
        }
        work()
    };
    std::thread::scope(|scope| scope.spawn(enter).join().unwrap())
}

/// A network namespace with nothing but a loopback interface, which is up.
pub fn new_network() -> OwnedFd {
    let unshare = || {
        // SAFETY: a network namespace holds neither memory nor descriptors, and the thread ends here.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
        assert!(
            Command::new(busybox().unwrap())
                .args(["ip", "link", "set", "lo", "up"])
                .status()
                .unwrap()
                .success()
        );
        fs::File::open("/proc/thread-self/ns/net").unwrap().into()
    };
    std::thread::scope(|scope| scope.spawn(unshare).join().unwrap())
}

pub fn oci_runtime() -> String {
    std::env::var("CHOIR_OCI_RUNTIME").unwrap_or_else(|_| "runc".to_owned())
}

fn command(dir: &Path) -> Command {
    let mut podman = Command::new("podman");
    for (flag, name) in [("--root", "p"), ("--runroot", "q"), ("--tmpdir", "t")] {
        podman.arg(flag).arg(dir.join(name));
    }
    podman
        .args(["--cgroup-manager", "cgroupfs", "--events-backend", "file"])
        .args(["--runtime", &oci_runtime()])
        .env("CONTAINERS_CONF", dir.join("containers.conf"));
    podman
}

fn serve(dir: &Path) -> Child {
    fs::write(dir.join("containers.conf"), "").unwrap();
    let socket = format!("unix://{}", dir.join("podman.sock").display());
    command(dir)
        .args(["system", "service", "--time=0", &socket])
        // Must not arrive inside.
        .env("https_proxy", "http://user:CANARY@proxy.example:1")
        .env("CANARY", "CANARY")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}
