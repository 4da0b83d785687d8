//! The runbook for rollbacks, as it is printed: each of its commands is run and must succeed.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use choir_e2e::instance::Instance;
use choir_e2e::skip;
use choir_e2e::waiting::step;

use crate::Scene;

const RUNBOOK: &str = include_str!("../../../../docs/runbook/rollback.md");

#[tokio::test(flavor = "multi_thread")]
async fn the_commands_of_the_rollback_runbook_do_what_they_say() -> Result<()> {
    if skip::cannot_run("runbook") {
        return Ok(());
    }
    let scene = step("set up", Scene::new(Instance::up(&[])?)).await?;
    let commands = commands(RUNBOOK);
    ensure!(commands.len() >= 10, "the runbook has only {commands:?}");
    for line in commands {
        let done = step(line, scene.types(line)).await?;
        eprintln!("{done}");
    }
    scene.serves("good").await
}

/// The lines of the fenced blocks for a shell.
fn commands(text: &str) -> Vec<&str> {
    let blocks = text.split("```sh\n").skip(1);
    let bodies = blocks.filter_map(|block| block.split("```").next());
    bodies.flat_map(str::lines).collect()
}

impl Scene {
    /// Runs a line as a person types it; what it says.
    async fn types(&self, line: &str) -> Result<String> {
        let (program, arguments) = line.split_once(' ').context("a command has arguments")?;
        let arguments: Vec<&str> = arguments.split(' ').collect();
        if program == "choir-hypervisor" {
            return self.instance.operate(&arguments);
        }
        ensure!(program == "choir", "what is {program}?");
        let mut choir: Command = self.instance.choir(&self.token)?;
        let output = choir.args(arguments).output()?;
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "`{line}` failed: {told}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(told)
    }
}
