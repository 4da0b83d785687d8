//! A virtual machine: QEMU with or without KVM, root's shell in it by SSH, its reset button. Knows nothing of ChoirOS.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::disk::Disk;

/// Without KVM a boot takes 40 s where nothing else runs.
const BOOTS_WITHIN: Duration = Duration::from_secs(300);
/// Where /dev/kvm exists and does not work the kernel never says a word.
const KVM_SPEAKS_WITHIN: Duration = Duration::from_secs(15);
/// From one try to log in to the next.
const TRY: Duration = Duration::from_millis(500);
/// The first words of every boot.
const BOOTS: &str = "Linux version";
/// In MiB; a box with two sandboxes needs most of it.
const MEMORY: &str = "3072";

pub struct Machine {
    qemu: Child,
    directory: PathBuf,
    key: PathBuf,
    ssh_port: u16,
    /// What the console says, piece by piece; `console.log` has it, too.
    console: Receiver<Vec<u8>>,
    pub accelerator: &'static str,
}

impl Machine {
    /// Switches it on.
    pub fn start(disk: &Disk, directory: &Path) -> Result<Self> {
        let kvm = fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
        if kvm {
            let mut machine = Self::with("kvm", disk, directory)?;
            // Where it does not work QEMU may also end at once.
            if let Ok(true) = machine.says(BOOTS, KVM_SPEAKS_WITHIN) {
                return Ok(machine);
            }
            println!("    /dev/kvm is there and does not work: the machine is emulated");
        }
        Self::with("tcg", disk, directory)
    }

    fn with(accelerator: &'static str, disk: &Disk, directory: &Path) -> Result<Self> {
        let ssh_port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let monitor = directory.join("monitor.sock");
        let _former = fs::remove_file(&monitor);
        let mut qemu = Command::new("qemu-system-x86_64");
        let threads = if accelerator == "tcg" { ",thread=multi" } else { "" };
        qemu.args(["-machine", "q35", "-accel", &format!("{accelerator}{threads}")]);
        qemu.args(["-cpu", "max", "-smp", "2", "-m", MEMORY, "-display", "none"]);
        qemu.args(["-serial", "stdio"]);
        qemu.arg("-monitor")
            .arg(format!("unix:{},server,nowait", monitor.display()));
        qemu.arg("-kernel").arg(&disk.kernel).arg("-initrd").arg(&disk.initrd);
        qemu.args(["-append", "root=/dev/vda rw console=ttyS0 panic=5"]);
        for image in [&disk.root, &disk.carried] {
            // What the guest has flushed outlives the guest, which is all that ends here.
            qemu.arg("-drive");
            qemu.arg(format!("file={},if=virtio,format=raw,cache=unsafe", image.display()));
        }
        let forward = format!("user,id=net,hostfwd=tcp:127.0.0.1:{ssh_port}-:22");
        qemu.args(["-netdev", &forward, "-device", "virtio-net-pci,netdev=net"]);
        qemu.args(["-device", "virtio-rng-pci"]);
        let log = fs::File::create(directory.join("qemu.log"))?;
        let qemu = qemu.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).spawn();
        let mut qemu = qemu.context("cannot start QEMU")?;
        let mut output = qemu.stdout.take().context("QEMU has no output")?;
        let mut log = fs::File::create(directory.join("console.log"))?;
        let (say, console) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = output.read(&mut buffer) {
                // Nobody may listen any more; the log goes on.
                let _nobody = log.write_all(&buffer[..length]);
                let _nobody = say.send(buffer[..length].to_vec());
            }
        });
        Ok(Self {
            qemu,
            directory: directory.to_owned(),
            key: disk.key.clone(),
            ssh_port,
            console,
            accelerator,
        })
    }

    /// Whether the console says something in time.
    fn says(&mut self, text: &str, within: Duration) -> Result<bool> {
        let begun = Instant::now();
        let mut said = Vec::new();
        while !String::from_utf8_lossy(&said).contains(text) {
            match self.console.recv_timeout(within.saturating_sub(begun.elapsed())) {
                Ok(piece) => said.extend(piece),
                Err(RecvTimeoutError::Timeout) => return Ok(false),
                Err(RecvTimeoutError::Disconnected) => self.fail()?,
            }
        }
        Ok(true)
    }

    fn fail(&mut self) -> Result<()> {
        let status = self.qemu.wait()?;
        let said = fs::read_to_string(self.directory.join("qemu.log")).unwrap_or_default();
        bail!("QEMU ended ({status}): {}", said.trim())
    }

    /// Waits until root can log in, and keeps the connection: under emulation each handshake takes seconds.
    pub fn log_in(&mut self) -> Result<()> {
        let begun = Instant::now();
        loop {
            self.hang_up();
            let mut master = self.ssh();
            // Returns when it is connected, and stays in the background.
            master.args([
                "-f",
                "-M",
                "-N",
                "-o",
                "ConnectTimeout=30",
                "-o",
                "ServerAliveInterval=10",
                "root@vm",
            ]);
            if silent(&mut master) {
                return Ok(());
            }
            ensure!(
                begun.elapsed() < BOOTS_WITHIN,
                "root cannot log in after {} s; the console is in {}",
                BOOTS_WITHIN.as_secs(),
                self.directory.join("console.log").display()
            );
            let next = Instant::now() + TRY;
            while let Some(rest) = next.checked_duration_since(Instant::now()) {
                match self.console.recv_timeout(rest) {
                    Err(RecvTimeoutError::Disconnected) => self.fail()?,
                    Ok(_) | Err(RecvTimeoutError::Timeout) => {}
                }
            }
        }
    }

    fn hang_up(&self) {
        let mut exit = self.ssh();
        let _was_connected = silent(exit.args(["-O", "exit", "root@vm"]));
    }

    fn ssh(&self) -> Command {
        let mut ssh = Command::new("ssh");
        ssh.args(["-F", "/dev/null", "-i"]).arg(&self.key);
        ssh.args(["-p", &self.ssh_port.to_string(), "-o", "HostName=127.0.0.1"]);
        ssh.args(["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]);
        ssh.args(["-o", "LogLevel=ERROR", "-o", "BatchMode=yes"]);
        ssh.arg("-S").arg(self.directory.join("ssh.sock"));
        ssh
    }

    /// What a script of root's says, which is run by `bash -euo pipefail`.
    pub fn run(&self, script: &str) -> Result<String> {
        let mut ssh = self.ssh();
        // Not by its own input: what it starts would read the rest of it.
        let shell = "script=$(cat); exec bash --norc -euo pipefail -c \"$script\" < /dev/null 2>&1";
        ssh.args(["root@vm", shell]);
        let mut ssh = ssh
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start ssh")?;
        let mut input = ssh.stdin.take().context("ssh has no input")?;
        input.write_all(script.as_bytes())?;
        drop(input);
        let output = ssh.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stdout).trim_end().to_owned();
        ensure!(
            output.status.success(),
            "in the virtual machine `{}` failed ({}):\n{said}",
            script.trim(),
            output.status
        );
        Ok(said)
    }

    /// A port of this machine that leads to one of the guest's own.
    pub fn forward(&self, port: u16) -> Result<u16> {
        let own = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut ssh = self.ssh();
        ssh.args([
            "-O",
            "forward",
            "-L",
            &format!("127.0.0.1:{own}:127.0.0.1:{port}"),
            "root@vm",
        ]);
        crate::command::capture(&mut ssh)?;
        Ok(own)
    }

    /// Has it shut down and boot again, until root can log in.
    pub fn reboot(&mut self) -> Result<()> {
        self.run("systemctl reboot")?;
        self.boots_again()
    }

    /// Presses the reset button: what was not flushed is lost.
    pub fn reset(&mut self) -> Result<()> {
        self.monitor("system_reset")?;
        self.boots_again()
    }

    fn boots_again(&mut self) -> Result<()> {
        ensure!(self.says(BOOTS, BOOTS_WITHIN)?, "it does not boot again");
        self.log_in()
    }

    /// How a person gets in.
    pub fn entrance(&self) -> String {
        let ssh = self.ssh();
        let words = ssh.get_args().map(|word| word.to_string_lossy().into_owned());
        format!("ssh {} root@vm", words.collect::<Vec<_>>().join(" "))
    }

    fn monitor(&self, line: &str) -> Result<()> {
        let stream = UnixStream::connect(self.directory.join("monitor.sock")).context("QEMU has no monitor")?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut read = BufReader::new(stream.try_clone()?);
        let mut said = String::new();
        read.read_line(&mut said)?;
        (&stream).write_all(format!("{line}\n").as_bytes())?;
        // It echoes what it was told before it does it.
        read.read_line(&mut said)?;
        Ok(())
    }
}

fn silent(command: &mut Command) -> bool {
    let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.hang_up();
        let _ended = self.qemu.kill();
        let _status = self.qemu.wait();
    }
}
