//! `cargo xtask up`: from a fresh machine to a running hypervisor, and again in seconds. It holds
//! the listening sockets and keeps the programs running; what they do is theirs.

mod config;
pub mod launch;
mod listen;
pub mod mounts;
pub mod podman;
mod ready;
pub mod supervise;
mod volumes;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

use crate::data::DataDir;
use crate::packages::{self, Purpose};
use crate::process;
use crate::up::config::Config;
use crate::up::listen::Listeners;
use crate::up::supervise::{Outcome, Service, Supervisor};
use crate::workspace::Workspace;
use crate::{binaries, image};

/// The first start unpacks the default release; a slow disk needs some minutes for that.
const READY_LIMIT: Duration = Duration::from_secs(300);
const HELPER_LIMIT: Duration = Duration::from_secs(20);

#[derive(Args, Clone)]
pub struct Options {
    /// Where everything is kept
    #[arg(long, value_name = "DIR", default_value = "data")]
    data: PathBuf,
    /// The port on 127.0.0.1 and ::1; 0 takes a free one
    #[arg(long, value_name = "N", default_value_t = 9090)]
    port: u16,
    /// Where sandboxes run; `process` isolates nothing and is for machines without Podman
    #[arg(long, value_enum, default_value_t = Runtime::Podman)]
    runtime: Runtime,
    /// Go on in the background and return when the hypervisor is ready
    #[arg(long)]
    detach: bool,
    /// Build optimised programs
    #[arg(long)]
    release: bool,
    /// A network that sandboxes may reach although it is private; may be given several times
    #[arg(long = "egress-allow", value_name = "CIDR")]
    egress_allow: Vec<String>,
    /// This is the background half of --detach: everything is built
    #[arg(long, hide = true)]
    prepared: bool,
    /// However often a program ends, it is started again at once: for tests that kill
    #[arg(long, hide = true)]
    may_crash: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Runtime {
    Podman,
    Process,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    let workspace = Workspace::load()?;
    let data = DataDir::create(&options.data)?;
    let Some(lock) = data.lock()? else {
        let address = fs::read_to_string(data.address()).unwrap_or_default();
        match address.trim() {
            "" => println!("{} is already being started", data.root().display()),
            address => println!("{} is already up at {address}", data.root().display()),
        }
        return Ok(ExitCode::SUCCESS);
    };
    let image = prepare(options, &workspace, &data)?;
    if options.detach {
        return detach(options, &data, lock);
    }
    let listeners = Listeners::bind(options.port)?;
    let mut supervisor = Supervisor::new(options.may_crash)?;
    let result = serve(options, &data, image.as_deref(), listeners, &mut supervisor);
    supervisor.stop_all();
    for file in [data.up_pid(), data.address()] {
        let _absent = fs::remove_file(file);
    }
    result.map(|()| ExitCode::SUCCESS)
}

/// Packages, programs and the default release. The image's path, where one is used.
fn prepare(options: &Options, workspace: &Workspace, data: &DataDir) -> Result<Option<PathBuf>> {
    let contained = options.runtime == Runtime::Podman;
    if !options.prepared {
        let purposes: &[Purpose] = match options.runtime {
            Runtime::Podman => &[Purpose::Build, Purpose::Podman, Purpose::Image],
            Runtime::Process => &[Purpose::Build],
        };
        packages::ensure(purposes).map_err(|error| match contained {
            true => error.context("sandboxes need Podman (or try `--runtime process`, without isolation)"),
            false => error,
        })?;
        binaries::build(workspace, options.release, &data.bin())?;
    }
    contained.then(|| image::build(workspace, None)).transpose()
}

/// Runs until a signal asks to stop.
fn serve(
    options: &Options,
    data: &DataDir,
    image: Option<&Path>,
    listeners: Listeners,
    supervisor: &mut Supervisor,
) -> Result<()> {
    process::write_own_file(&data.up_pid())?;
    supervise::stop_leftovers(data);
    let disk = volumes::prepare(data, options.runtime)?;
    if let volumes::Disk::Plain { reason } = &disk {
        println!("==> volumes are plain directories without a size limit, because {reason}");
    }
    let open = mounts::open_path(data)?;
    Config::new(data, &open, listeners.port(), image, options).write(data)?;
    if rustix::process::geteuid().is_root() {
        println!("==> development mode: the hypervisor and its sandboxes run under one user, root");
    }
    supervisor.start(volumes::service(data, &disk))?;
    let socket = data.volumes_socket();
    if supervisor.wait_for("choir-volumes", HELPER_LIMIT, || ready::accepts(&socket))? == Outcome::Stop {
        return Ok(());
    }
    if options.runtime == Runtime::Podman {
        supervisor.start(podman::service(data)?)?;
        let socket = data.podman_socket();
        let outcome = supervisor.wait_for("podman", HELPER_LIMIT, || ready::podman(&socket));
        if outcome.context(podman::ADVICE)? == Outcome::Stop {
            return Ok(());
        }
    }
    let (port, address) = (listeners.port(), listeners.address());
    supervisor.start(hypervisor(data, listeners))?;
    let outcome = supervisor.wait_for("choir-hypervisor", READY_LIMIT, || ready::hypervisor(port))?;
    if outcome == Outcome::Stop {
        return Ok(());
    }
    fs::write(data.address(), format!("{address}\n"))?;
    announce(data, port, &address);
    supervisor.run_until_stopped()
}

fn hypervisor(data: &DataDir, listeners: Listeners) -> Service {
    let (program, config) = (data.bin().join("choir-hypervisor"), data.config());
    Service::new("choir-hypervisor", data, None, move || {
        let mut command = launch::command(&listeners)?;
        command.arg(&program).arg("serve").arg("--config").arg(&config);
        Ok(command)
    })
}

/// Starts ourselves in a session of our own, and waits until that says its address.
fn detach(options: &Options, data: &DataDir, lock: File) -> Result<ExitCode> {
    let log = File::create(data.up_log())?;
    let mut command = Command::new("/proc/self/exe");
    command.arg("up").arg("--prepared").arg("--data").arg(data.root());
    command.args(["--port", &options.port.to_string()]);
    if options.runtime == Runtime::Process {
        command.args(["--runtime", "process"]);
    }
    for network in &options.egress_allow {
        command.args(["--egress-allow", network]);
    }
    if options.may_crash {
        command.arg("--may-crash");
    }
    // A process group of its own: Ctrl-C at this terminal is not meant for it.
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let _absent = fs::remove_file(data.address());
    drop(lock);
    let child = command.spawn().context("cannot start the background half of `up`")?;
    let handle = process::Handle::of_child(&child)?;
    let begun = Instant::now();
    while begun.elapsed() < READY_LIMIT + 2 * HELPER_LIMIT {
        if let Ok(address) = fs::read_to_string(data.address())
            && let Some((_, port)) = address.trim().rsplit_once(':')
        {
            announce(data, port.parse()?, address.trim());
            println!("Stop it with: cargo xtask down --data {}", data.root().display());
            return Ok(ExitCode::SUCCESS);
        }
        if handle.wait(Duration::from_millis(100)) {
            let log = supervise::tail(&data.up_log());
            bail!(
                "the hypervisor did not start; the end of {}:\n{log}",
                data.up_log().display()
            );
        }
    }
    bail!("the hypervisor is not ready yet: see {}", data.up_log().display())
}

fn announce(data: &DataDir, port: u16, address: &str) {
    println!("\nChoirOS is up at {address}");
    if let Ok(link) = fs::read_to_string(data.claim_link()) {
        println!("Claim it (one use, for the first user): {}", link.trim());
    }
    let variable = |name| std::env::var(name).unwrap_or_default();
    let user = variable("USER");
    if let Some(line) = tunnel(&variable("SSH_CONNECTION"), &user, port) {
        println!("From your own machine: {line}\nand open the address there.");
    }
    println!();
}

/// The ssh line that brings the port to the machine one came from; `connection` is
/// `$SSH_CONNECTION`: client address and port, server address and port.
fn tunnel(connection: &str, user: &str, port: u16) -> Option<String> {
    let mut words = connection.split_whitespace().skip(2);
    let (server, ssh_port) = (words.next()?, words.next()?);
    let user = if user.is_empty() {
        String::new()
    } else {
        format!("{user}@")
    };
    let option = if ssh_port == "22" {
        String::new()
    } else {
        format!("-p {ssh_port} ")
    };
    Some(format!("ssh -L {port}:localhost:{port} {option}{user}{server}"))
}

#[cfg(test)]
mod tests {
    use super::tunnel;

    #[test]
    fn over_ssh_the_tunnel_names_the_server_one_came_to() {
        assert_eq!(
            tunnel("192.0.2.7 50000 198.51.100.4 22", "ada", 9090).unwrap(),
            "ssh -L 9090:localhost:9090 ada@198.51.100.4"
        );
        assert_eq!(
            tunnel("192.0.2.7 50000 2001:db8::1 2222", "", 9191).unwrap(),
            "ssh -L 9191:localhost:9191 -p 2222 2001:db8::1"
        );
    }

    #[test]
    fn without_ssh_there_is_no_tunnel() {
        assert_eq!(tunnel("", "ada", 9090), None);
    }
}
