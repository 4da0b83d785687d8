//! One running ChoirOS: the built programs, started by `xtask up` on a data directory of their own and stopped again
//! whatever happens. It must not reach into it other than by what `up` and the runbook promise.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use tokio::net::UnixStream;
use url::Url;

use crate::database::Dump;
use crate::http;
use crate::upstream::Upstream;

const PROGRAMS: [&str; 4] = ["choir-hypervisor", "choir-volumes", "choir", "choir-sandbox"];

/// A running hypervisor with Podman; dropping it stops everything and removes its data.
pub struct Instance {
    data: TempDir,
    origin: Url,
    may_crash: bool,
}

impl Instance {
    /// Starts one on a free port; sandboxes may reach these networks although they are private.
    pub fn up(egress_allow: &[String]) -> Result<Self> {
        let mut instance = Self::installed(Self::data()?)?;
        instance.start(egress_allow)?;
        Ok(instance)
    }

    /// Starts one whose hypervisor finds these services of the outside and believes their authorities. It is the same
    /// program; what it is told by the system is not.
    pub fn up_beside(upstreams: &[&Upstream], egress_allow: &[String]) -> Result<Self> {
        let data = Self::data()?;
        let mut instance = Self::installed(data)?;
        Upstream::write(upstreams, instance.data.path())?;
        instance.surround_hypervisor()?;
        instance.start(egress_allow)?;
        Ok(instance)
    }

    /// Starts one whose hypervisor sees these lines of `/etc/hosts`, too.
    pub fn up_knowing(egress_allow: &[String], hosts: &str) -> Result<Self> {
        let mut instance = Self::installed(Self::data()?)?;
        Upstream::write(&[], instance.data.path())?;
        let own = instance.path("hosts");
        fs::write(&own, fs::read_to_string(&own)? + hosts)?;
        instance.surround_hypervisor()?;
        instance.start(egress_allow)?;
        Ok(instance)
    }

    /// Starts one whose hypervisor dies, fails or hangs where the file `fail` says, once; see its `fail.rs`.
    pub fn up_faulty() -> Result<Self> {
        let mut instance = Self::installed(Self::data()?)?;
        let (program, real) = (
            instance.path("bin/choir-hypervisor"),
            instance.path("bin/real-choir-hypervisor"),
        );
        let built = built("faulty-choir-hypervisor");
        fs::copy(&built, &real).with_context(|| format!("{} is not there: run `cargo xtask test`", built.display()))?;
        fs::remove_file(&program)?;
        let script = format!(
            "#!/bin/sh\nCHOIR_FAIL=@{} exec {} \"$@\"\n",
            instance.path("fail").display(),
            real.display()
        );
        fs::write(&program, script)?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        instance.may_crash = true;
        instance.start(&[])?;
        Ok(instance)
    }

    /// Stops everything and starts it again at the same address, with other exceptions for sandboxes.
    pub fn restart(&mut self, egress_allow: &[String]) -> Result<()> {
        self.stop()?;
        self.start(egress_allow)
    }

    /// Stops everything; `restart` goes on.
    pub fn stop(&self) -> Result<()> {
        run(&mut self.xtask("down")).map(drop)
    }

    /// What an operator runs beside the hypervisor, which must succeed; what it says.
    pub fn operate(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(self.path("bin/choir-hypervisor"));
        command.arg("--config").arg(self.path("hypervisor.toml"));
        run(command.args(arguments))
    }

    /// Has another build of the hypervisor go on.
    pub fn replace_hypervisor(&self, program: &str) -> Result<()> {
        let (built, next) = (built(program), self.path("bin/next"));
        fs::copy(&built, &next).with_context(|| format!("{} is not there: run `cargo xtask test`", built.display()))?;
        fs::rename(next, self.path("bin/real-choir-hypervisor"))?;
        self.end_hypervisor()
    }

    /// Changes the configuration and has the hypervisor start again with it. What runs in sandboxes goes on.
    pub fn reconfigure(&self, change: impl FnOnce(&mut toml::Table)) -> Result<()> {
        let file = self.path("hypervisor.toml");
        let mut config: toml::Table = fs::read_to_string(&file)?.parse()?;
        change(&mut config);
        fs::write(&file, toml::to_string(&config)?)?;
        self.end_hypervisor()
    }

    /// `up` starts it again.
    fn end_hypervisor(&self) -> Result<()> {
        let process = Pid::from_raw(self.hypervisor_pid()?).context("no process")?;
        kill_process(process, Signal::TERM).context("cannot stop the hypervisor")
    }

    fn data() -> Result<TempDir> {
        let mut builder = tempfile::Builder::new();
        builder
            .prefix("choir-e2e-")
            .permissions(fs::Permissions::from_mode(0o711));
        Ok(builder.tempdir()?)
    }

    fn installed(data: TempDir) -> Result<Self> {
        let instance = Self {
            data,
            origin: Url::parse("http://localhost")?,
            may_crash: false,
        };
        instance.install_programs()?;
        Ok(instance)
    }

    /// Puts a script in the hypervisor's place that becomes the hypervisor, in a mount namespace with other hosts.
    fn surround_hypervisor(&self) -> Result<()> {
        let (program, real) = (
            self.path("bin/choir-hypervisor"),
            self.path("bin/real-choir-hypervisor"),
        );
        fs::rename(&program, &real)?;
        let directory = self.data.path().display();
        let script = format!(
            "#!/bin/sh\nexport SSL_CERT_FILE={directory}/trusted.pem\n\
             exec unshare --mount --propagation slave sh -c \
             'mount --bind {directory}/hosts /etc/hosts && exec {real} \"$@\"' sh \"$@\"\n",
            real = real.display()
        );
        fs::write(&program, script)?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    fn start(&mut self, egress_allow: &[String]) -> Result<()> {
        let port = self.origin.port().unwrap_or(0);
        let mut up = self.xtask("up");
        up.args(["--prepared", "--detach", "--port", &port.to_string()]);
        if self.may_crash {
            up.arg("--may-crash");
        }
        for network in egress_allow {
            up.args(["--egress-allow", network]);
        }
        run(&mut up)?;
        let address = fs::read_to_string(self.path("run/address"))?;
        self.origin = Url::parse(address.trim()).context("`up` wrote no address")?;
        Ok(())
    }

    /// The control host's address.
    pub fn origin(&self) -> &Url {
        &self.origin
    }

    pub fn port(&self) -> u16 {
        self.origin.port_or_known_default().unwrap_or_default()
    }

    /// Where an app on the slot's app port is served.
    pub fn app(&self, slot: &str, workspace: &str, user: &str) -> Url {
        let mut url = self.origin.clone();
        let host = format!("{slot}--{workspace}--{user}.localhost");
        url.set_host(Some(&host)).expect("a sandbox host is a host");
        url
    }

    /// The link for the first user.
    pub fn claim_link(&self) -> Result<String> {
        let link = fs::read_to_string(self.path("claim-link")).context("there is no claim link")?;
        Ok(link.trim().to_owned())
    }

    /// The running hypervisor's process id.
    pub fn hypervisor_pid(&self) -> Result<i32> {
        let text = fs::read_to_string(self.path("run/choir-hypervisor.pid"))?;
        let first = text.lines().next().context("the pid file is empty")?;
        Ok(first.parse()?)
    }

    /// A call to the Podman service that runs the sandboxes.
    pub async fn podman(&self, method: &str, path: &str) -> Result<http::Answer> {
        let stream = UnixStream::connect(self.path("run/podman.sock")).await?;
        http::send_over(stream, method, "podman", &format!("/v4.0.0/libpod{path}"), &[], "").await
    }

    /// The ids of all containers, running or not.
    pub async fn containers(&self) -> Result<BTreeSet<String>> {
        let answer = self.podman("GET", "/containers/json?all=true").await?;
        let containers: Value = serde_json::from_str(&answer.body)?;
        let ids = containers.as_array().into_iter().flatten();
        Ok(ids.filter_map(|it| Some(it["Id"].as_str()?.to_owned())).collect())
    }

    /// The running container of a sandbox.
    pub async fn container(&self, sandbox: &str) -> Result<String> {
        let answer = self.podman("GET", "/containers/json").await?;
        let containers: Value = serde_json::from_str(&answer.body)?;
        let of_sandbox = |it: &&Value| {
            it["Labels"]
                .as_object()
                .is_some_and(|l| l.values().any(|v| v == sandbox))
        };
        let found = containers.as_array().into_iter().flatten().find(of_sandbox);
        let id = found.and_then(|it| it["Id"].as_str());
        Ok(id
            .with_context(|| format!("{sandbox} has no running container"))?
            .to_owned())
    }

    /// Which process a running container is, and since when.
    pub async fn process(&self, container: &str) -> Result<String> {
        let told = self.state(container).await?;
        let pid = told["Pid"].as_i64().filter(|pid| *pid > 0);
        let pid = pid.with_context(|| format!("{container} does not run: {told}"))?;
        Ok(format!("{pid} since {}", told["StartedAt"]))
    }

    /// What Podman says of how a container is.
    pub async fn state(&self, container: &str) -> Result<Value> {
        let answer = self.podman("GET", &format!("/containers/{container}/json")).await?;
        let told: Value = serde_json::from_str(&answer.body)?;
        Ok(told["State"].clone())
    }

    /// The command line, as whoever has this token.
    pub fn choir(&self, token: &str) -> Result<Command> {
        let file = self.path("token");
        fs::write(&file, token)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600))?;
        let mut command = Command::new(self.path("bin/choir"));
        command
            .env("CHOIR_URL", self.origin.as_str())
            .env("CHOIR_TOKEN_FILE", file)
            .env("HOME", self.path(""));
        Ok(command)
    }

    /// Everything in the database now.
    pub fn database(&self) -> Result<Dump> {
        Dump::of(&self.path("choir.db"))
    }

    /// Something below the data directory.
    pub fn path(&self, below: &str) -> PathBuf {
        self.data.path().join(below)
    }

    fn install_programs(&self) -> Result<()> {
        let bin = self.path("bin");
        fs::create_dir(&bin)?;
        for program in PROGRAMS {
            let built = built(program);
            let installed = bin.join(program);
            if fs::hard_link(&built, &installed).is_err() {
                fs::copy(&built, &installed)
                    .with_context(|| format!("{} is not there: run `cargo xtask test`", built.display()))?;
            }
        }
        Ok(())
    }

    fn xtask(&self, verb: &str) -> Command {
        let mut command = Command::new(target().join("xtask"));
        command.arg(verb).arg("--data").arg(self.data.path());
        command
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // Shown for a test that fails; the output of one that passes is not.
        if let Ok(log) = fs::read_to_string(self.path("up.log")) {
            let lines: Vec<_> = log.lines().collect();
            eprintln!(
                "the end of up.log:\n{}",
                lines[lines.len().saturating_sub(40)..].join("\n")
            );
        }
        if let Err(error) = self.stop() {
            eprintln!("the instance could not be stopped: {error:#}");
        }
    }
}

/// What a program that must succeed wrote to its output.
fn run(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("{:?} is not there: run `cargo xtask test`", command.get_program()))?;
    if !output.status.success() {
        let told = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        bail!("{command:?} failed: {told}");
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Where the program under test is: in `CHOIR_BIN`, or where Cargo builds it.
fn built(program: &str) -> PathBuf {
    if let Some(directory) = std::env::var_os("CHOIR_BIN") {
        return Path::new(&directory).join(program);
    }
    if program == "choir-sandbox" {
        let target = target();
        let (root, profile) = (target.parent(), target.file_name());
        let triple = format!("{}-unknown-linux-musl", std::env::consts::ARCH);
        return root
            .unwrap_or(&target)
            .join(triple)
            .join(profile.unwrap_or_default())
            .join(program);
    }
    target().join(program)
}

/// The directory of Cargo's profile: programs are there, and tests in its `deps`.
fn target() -> PathBuf {
    let program = std::env::current_exe().expect("a program has a path");
    let directory = program.parent().expect("a program lies in a directory");
    let profile = directory.parent().filter(|_| directory.ends_with("deps"));
    profile.unwrap_or(directory).to_owned()
}
