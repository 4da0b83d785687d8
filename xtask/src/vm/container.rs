//! A Debian that boots as a container of this machine: files, processes and users of its own, systemd first, with this
//! machine's kernel, processors and network. Knows nothing of ChoirOS.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

const BOOTS_WITHIN: Duration = Duration::from_secs(120);
/// From one look at whether it still runs to the next.
const LOOK: Duration = Duration::from_secs(1);
/// In seconds, of a script: longer than anything may take.
const DONE_WITHIN: &str = "600";

/// The disk is mounted where nobody else sees it, and is gone with the container.
const START: &str = r#"
mount -o loop "$1" "$2"
shift
directory=$1
shift
exec systemd-nspawn --quiet --boot --directory="$directory" --machine=choir-tree --notify-ready=yes --console=pipe \
    --resolv-conf=copy-host --link-journal=no "$@"
"#;

pub struct Container {
    first: Pid,
    processors: String,
    _running: Running,
}

/// It ends with this, and, where xtask is killed, with xtask.
struct Running {
    nspawn: Child,
    /// Its first process, once that is known; all others end with it.
    first: Option<Pid>,
}

impl Container {
    /// Boots from a disk image, on these processors, with files of this machine's in it.
    pub fn start(disk: &Path, processors: &str, files: &[(&Path, &str)], directory: &Path) -> Result<Self> {
        let socket = directory.join("notify.sock");
        let _former = fs::remove_file(&socket);
        let notified = UnixDatagram::bind(&socket).with_context(|| format!("cannot bind {}", socket.display()))?;
        let root = directory.join("container");
        fs::create_dir_all(&root)?;
        let log = directory.join("container.log");
        let output = fs::File::create(&log)?;
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "TERM", "unshare", "--mount"]);
        command.args(["taskset", "--cpu-list", processors]);
        command.args(["sh", "-euc", START, "container"]).arg(disk).arg(&root);
        for (here, there) in files {
            command.arg(format!("--bind-ro={}:{there}", here.display()));
        }
        if Path::new("/run/systemd/system").exists() {
            command.args([
                "--property=DeviceAllow=/dev/loop-control rwm",
                "--property=DeviceAllow=block-loop rwm",
            ]);
        } else {
            // There is nobody to tell of it, and nobody but it has control groups.
            command.args(["--register=no", "--keep-unit"]);
        }
        command.env("SYSTEMD_NSPAWN_UNIFIED_HIERARCHY", "1");
        command.env("NOTIFY_SOCKET", &socket);
        let nspawn = command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .context("cannot start systemd-nspawn")?;
        let mut running = Running { nspawn, first: None };
        let first = running
            .boots(&notified)
            .with_context(|| format!("it does not boot; {} says why", log.display()))?;
        Ok(Self {
            first,
            processors: processors.to_owned(),
            _running: running,
        })
    }

    /// The words before a command that is to run in it, as root.
    pub fn enter(&self) -> Vec<String> {
        let target = self.first.as_raw_nonzero().to_string();
        let words = [
            "taskset",
            "--cpu-list",
            &self.processors,
            "nsenter",
            "--target",
            &target,
            "--all",
            "env",
            "--ignore-environment",
            "HOME=/root",
            "LANG=C.UTF-8",
            "DEBIAN_FRONTEND=noninteractive",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin",
        ];
        words.map(str::to_owned).into()
    }

    /// What a script of root's says, which is run by `bash -euo pipefail` and may take so long.
    pub fn run(&self, script: &str) -> Result<String> {
        let mut enter = Command::new("timeout");
        enter.arg(DONE_WITHIN).args(self.enter());
        enter
            .args(["bash", "--norc", "-euo", "pipefail", "-c"])
            .arg(format!("exec 2>&1\ncd /root\n{script}"));
        let output = enter.stdin(Stdio::null()).output().context("cannot start nsenter")?;
        let said = String::from_utf8_lossy(&output.stdout).trim_end().to_owned();
        ensure!(
            output.status.success(),
            "in the container `{}` failed ({}):\n{said}",
            script.trim(),
            output.status
        );
        Ok(said)
    }
}

impl Running {
    /// Returns its first process, once all that it starts of itself has started.
    fn boots(&mut self, notified: &UnixDatagram) -> Result<Pid> {
        notified.set_read_timeout(Some(LOOK))?;
        let by = Instant::now() + BOOTS_WITHIN;
        let mut buffer = [0; 4096];
        while Instant::now() < by {
            if let Some(status) = self.nspawn.try_wait()? {
                bail!("systemd-nspawn ended ({status})");
            }
            let Ok(length) = notified.recv(&mut buffer) else {
                continue;
            };
            let said = String::from_utf8_lossy(&buffer[..length]);
            for line in said.lines() {
                if let Some(pid) = line.strip_prefix("X_NSPAWN_LEADER_PID=") {
                    self.first = Pid::from_raw(pid.parse()?);
                }
                if line == "READY=1" {
                    return self
                        .first
                        .context("systemd-nspawn did not say which process is the first");
                }
            }
        }
        bail!("it is not up after {} s", BOOTS_WITHIN.as_secs())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ended = match self.first {
            Some(first) => kill_process(first, Signal::KILL).map_err(Into::into),
            None => self.nspawn.kill(),
        };
        let _status = self.nspawn.wait();
    }
}
