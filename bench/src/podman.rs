//! The peer that sandboxes are measured against: the `podman` command on the same storage. It must not touch
//! containers that are not the benchmark's, other than looking at them.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::setup::Program;

/// Runs a subcommand to its end; how long that took, and what it wrote.
pub fn run(podman: &Program, arguments: &[&str]) -> Result<(Duration, String)> {
    timed(
        Command::new(&podman.program)
            .args(&podman.arguments)
            .args(arguments)
            .envs(&podman.environment),
    )
}

/// Runs a command to its end; how long that took, and what it wrote.
pub fn timed(command: &mut Command) -> Result<(Duration, String)> {
    let begun = Instant::now();
    let output = command.stdin(Stdio::null()).output();
    let took = begun.elapsed();
    let name = command.get_program().to_string_lossy().into_owned();
    let output = output.with_context(|| format!("cannot start {name}"))?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`{name}` failed: {}", error.trim());
    Ok((took, String::from_utf8_lossy(&output.stdout).trim().to_owned()))
}

/// One value of an inspected container, by Go template.
pub fn inspect(podman: &Program, container: &str, field: &str) -> Result<String> {
    let format = format!("{{{{{field}}}}}");
    Ok(run(podman, &["container", "inspect", "--format", &format, container])?.1)
}

/// The process that is the container's first, as this machine counts.
pub fn pid(podman: &Program, container: &str) -> Result<u32> {
    let pid = inspect(podman, container, ".State.Pid")?.parse()?;
    ensure!(pid > 0, "{container} does not run");
    Ok(pid)
}
