//! A Debian that boots as a container of this machine: files, processes and users of its own, systemd first, with this
//! machine's kernel, processors and network. Knows nothing of ChoirOS.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};

const BOOTS_WITHIN: Duration = Duration::from_secs(120);

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
    nspawn: Child,
    first: Pid,
}

impl Container {
    /// Boots from a disk image, on these processors, with files of this machine's in it.
    pub fn start(disk: &Path, processors: &str, files: &[(&Path, &str)], directory: &Path) -> Result<Self> {
        let socket = directory.join("notify.sock");
        let _former = fs::remove_file(&socket);
        let notified = UnixDatagram::bind(&socket).with_context(|| format!("cannot bind {}", socket.display()))?;
        notified.set_read_timeout(Some(BOOTS_WITHIN))?;
        let root = directory.join("container");
        fs::create_dir_all(&root)?;
        let log = directory.join("container.log");
        let output = fs::File::create(&log)?;
        let mut command = Command::new("unshare");
        command.args(["--mount", "taskset", "--cpu-list", processors]);
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
            .spawn();
        let mut nspawn = nspawn.context("cannot start systemd-nspawn")?;
        match first_process(&notified) {
            Ok(first) => Ok(Self { nspawn, first }),
            Err(error) => {
                let _ended = nspawn.kill();
                nspawn.wait()?;
                Err(error).with_context(|| format!("it does not boot; {} says why", log.display()))
            }
        }
    }

    /// The words before a command that is to run in it, as root.
    pub fn enter(&self) -> Vec<String> {
        let target = self.first.as_raw_nonzero().to_string();
        let words = [
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

    /// What a script of root's says, which is run by `bash -euo pipefail`.
    pub fn run(&self, script: &str) -> Result<String> {
        let words = self.enter();
        let mut enter = Command::new(&words[0]);
        enter.args(&words[1..]);
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

/// Its first process, once all that it starts of itself has started.
fn first_process(notified: &UnixDatagram) -> Result<Pid> {
    let mut first = None;
    let mut buffer = [0; 4096];
    loop {
        let length = notified.recv(&mut buffer).context("it said nothing for too long")?;
        let said = String::from_utf8_lossy(&buffer[..length]);
        for line in said.lines() {
            if let Some(pid) = line.strip_prefix("X_NSPAWN_LEADER_PID=") {
                first = Pid::from_raw(pid.parse()?);
            }
            if line == "READY=1" {
                return first.context("systemd-nspawn did not say which process is the first");
            }
        }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // All others end with it.
        let _ended = kill_process(self.first, Signal::KILL);
        let _status = self.nspawn.wait();
    }
}
