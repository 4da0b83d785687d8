//! `sudo`, under its own name, against a running agent. The identities themselves are in `confinement`.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use rustix::pty::OpenptFlags;

use crate::sandbox::{BINARY, Sandbox, is_alive, signal, until};

fn sudo(sandbox: &Sandbox) -> Command {
    let link: PathBuf = sandbox.directory.path().join("sudo");
    if !link.exists() {
        std::os::unix::fs::symlink(BINARY, &link).unwrap();
    }
    let mut command = Command::new(link);
    command
        .env_clear()
        .env("CHOIR_AGENT_DIR", sandbox.directory.path().join("agent"));
    command.current_dir(sandbox.home());
    command
}

/// Runs it to its end beside the test's own reactor.
async fn output(mut command: Command) -> (i32, String, String) {
    let output = tokio::task::spawn_blocking(move || command.output().unwrap())
        .await
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[tokio::test]
async fn the_exit_code_the_directory_and_the_descriptors_are_the_commands() {
    let (sandbox, _link) = Sandbox::ready().await;
    let mut command = sudo(&sandbox);
    command.args(["-n", "sh", "-c", "cat; pwd; id -u; echo err >&2; exit 7"]);
    command.stdin(std::fs::File::open("/etc/hostname").unwrap());
    let hostname = std::fs::read_to_string("/etc/hostname").unwrap();
    let me = rustix::process::geteuid().as_raw();
    let (code, stdout, stderr) = output(command).await;
    assert_eq!(stdout, format!("{hostname}{}\n{me}\n", sandbox.home().display()));
    assert_eq!((code, stderr.as_str()), (7, "err\n"));
}

#[tokio::test]
async fn a_signal_becomes_128_and_more() {
    let (sandbox, _link) = Sandbox::ready().await;
    let mut command = sudo(&sandbox);
    command.args(["sh", "-c", "kill -KILL $$"]);
    assert_eq!(output(command).await.0, 137);
}

#[tokio::test]
async fn the_environment_is_chosen_unless_all_of_it_is_asked_for() {
    let (sandbox, _link) = Sandbox::ready().await;
    let script = "echo $HTTPS_PROXY,$LC_ALL,$SECRET,$MINE,$SUDO_UID,$USER";
    let run = async |flags: &[&str]| {
        let mut command = sudo(&sandbox);
        command.envs([("HTTPS_PROXY", "p"), ("LC_ALL", "C"), ("SECRET", "s"), ("USER", "me")]);
        output({
            command.args(flags).args(["MINE=a=b", "sh", "-c", script]);
            command
        })
        .await
        .1
    };
    let me = rustix::process::geteuid().as_raw();
    assert_eq!(run(&[]).await, format!("p,C,,a=b,{me},root\n"));
    assert_eq!(run(&["-E"]).await, format!("p,C,s,a=b,{me},root\n"));
}

#[tokio::test]
async fn a_login_shell_runs_words_as_they_are() {
    let (sandbox, _link) = Sandbox::ready().await;
    let mut command = sudo(&sandbox);
    command.args(["-i", "printf", "%s|", "a b", "$HOME"]);
    assert_eq!(output(command).await.1, "a b|$HOME|");
}

#[tokio::test]
async fn what_cannot_be_done_is_said_in_one_sentence() {
    let (sandbox, _link) = Sandbox::ready().await;
    for (args, text) in [
        (
            &["-S", "ls"][..],
            "sudo: -S is not supported in a sandbox; see sudo --help\n",
        ),
        (&[], "sudo: say what to run, or -i for a shell; see sudo --help\n"),
        (&["-u", "nobody-here", "ls"], "sudo: there is no user nobody-here\n"),
        (&["no-such-program"], "sudo: no-such-program: command not found\n"),
    ] {
        let mut command = sudo(&sandbox);
        command.args(args);
        let (code, _, stderr) = output(command).await;
        assert_eq!((code, stderr.as_str()), (1, text));
    }
    let mut command = sudo(&sandbox);
    command.env("CHOIR_AGENT_DIR", "/no/agent").arg("ls");
    let (code, _, stderr) = output(command).await;
    assert_eq!(code, 1);
    assert!(stderr.starts_with("sudo: the sandbox's agent does not answer"));
}

#[tokio::test]
async fn signals_are_handed_on() {
    let (sandbox, _link) = Sandbox::ready().await;
    let mut command = sudo(&sandbox);
    command.args([
        "sh",
        "-c",
        "trap 'exit 9' TERM; touch ready; while :; do sleep 0.02; done",
    ]);
    let mut child = command.spawn().unwrap();
    until(async || sandbox.home().join("ready").exists()).await;
    signal(child.id(), libc::SIGTERM);
    let mut code = None;
    until(async || {
        code = child.try_wait().unwrap().map(|s| s.code());
        code.is_some()
    })
    .await;
    assert_eq!(code, Some(Some(9)));
}

#[tokio::test]
async fn the_command_does_not_outlive_its_client() {
    let (sandbox, _link) = Sandbox::ready().await;
    let mut command = sudo(&sandbox);
    command.args(["sh", "-c", "trap '' HUP; echo $$ > pid; exec sleep 1000"]);
    let mut child = command.spawn().unwrap();
    let read = || {
        std::fs::read_to_string(sandbox.home().join("pid"))
            .ok()?
            .trim()
            .parse::<i32>()
            .ok()
    };
    until(async || read().is_some()).await;
    let pid = read().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    until(async || !is_alive(pid)).await;
}

/// A client on a terminal of its own.
struct OnTerminal {
    master: OwnedFd,
    child: std::process::Child,
    seen: String,
}

impl OnTerminal {
    fn start(mut command: Command) -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = rustix::pty::openpt(flags).unwrap();
        rustix::pty::unlockpt(&master).unwrap();
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags).unwrap();
        resize(&master, 100, 30);
        let end = || Stdio::from(slave.try_clone().unwrap());
        command.stdin(end()).stdout(end()).stderr(end());
        // SAFETY: two system calls between fork and exec.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                libc::ioctl(0, libc::TIOCSCTTY, 0);
                Ok(())
            });
        }
        rustix::io::ioctl_fionbio(&master, true).unwrap();
        Self {
            child: command.spawn().unwrap(),
            master,
            seen: String::new(),
        }
    }

    fn take(&mut self) {
        let mut file = std::fs::File::from(self.master.try_clone().unwrap());
        let mut buffer = [0; 4096];
        while let Ok(count) = file.read(&mut buffer) {
            self.seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
    }

    async fn sees(&mut self, text: &str) {
        until(async || {
            self.take();
            self.seen.contains(text)
        })
        .await;
    }

    fn types(&self, text: &str) {
        std::fs::File::from(self.master.try_clone().unwrap())
            .write_all(text.as_bytes())
            .unwrap();
    }

    fn is_raw(&self) -> bool {
        let modes = rustix::termios::tcgetattr(&self.master).unwrap();
        !modes.local_modes.contains(rustix::termios::LocalModes::ICANON)
    }

    async fn code(&mut self) -> Option<i32> {
        let mut status = None;
        until(async || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        })
        .await;
        self.take();
        status.unwrap().code()
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the terminal shows {:?}", self.seen);
        }
    }
}

fn resize(master: &OwnedFd, cols: u16, rows: u16) {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the kernel reads one winsize.
    assert_eq!(
        unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) },
        0
    );
}

#[tokio::test]
async fn on_a_terminal_the_command_has_one_of_its_own() {
    let (sandbox, _link) = Sandbox::ready().await;
    let mut command = sudo(&sandbox);
    let script = "tty; stty size; echo rea''dy; read line; echo got $line; stty size; exit 5";
    command.args(["sh", "-c", script]);
    let mut terminal = OnTerminal::start(command);
    terminal.sees("30 100").await;
    terminal.sees("ready").await;
    assert!(terminal.is_raw());
    resize(&terminal.master, 90, 20);
    terminal.types("words\r");
    terminal.sees("got words").await;
    assert_eq!(terminal.code().await, Some(5));
    assert!(terminal.seen.contains("20 90"), "{:?}", terminal.seen);
    assert!(!terminal.is_raw());
}

#[tokio::test]
async fn ctrl_c_on_the_terminal_interrupts_the_command_only() {
    let (sandbox, _link) = Sandbox::ready().await;
    let mut command = sudo(&sandbox);
    command.args(["sh", "-c", "echo rea''dy; exec sleep 1000"]);
    let mut terminal = OnTerminal::start(command);
    terminal.sees("ready").await;
    terminal.types("\x03");
    assert_eq!(terminal.code().await, Some(130));
    assert!(!terminal.is_raw());
}

#[tokio::test]
async fn a_root_shell_has_job_control() {
    let (sandbox, _link) = Sandbox::ready().await;
    let mut command = sudo(&sandbox);
    command.args(["bash", "--norc", "-i"]);
    let mut terminal = OnTerminal::start(command);
    terminal.sees("bash-").await;
    terminal.types("echo go''ing; sleep 1000\r");
    terminal.sees("going").await;
    until(async || {
        terminal.types("\x1a");
        terminal.take();
        terminal.seen.contains("Stopped")
    })
    .await;
    terminal.types("kill %1; exit 3\r");
    terminal.types("exit 3\r");
    assert_eq!(terminal.code().await, Some(3));
}
