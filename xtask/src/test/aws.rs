//! The tests of `deploy/aws`, which are Python: gives them the packages that they name, and runs them. Knows nothing of
//! what they test.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command;
use crate::workspace::Workspace;

pub fn run(workspace: &Workspace) -> Result<()> {
    let tests = workspace.workspace_root.join("deploy/aws");
    let environment = environment(&tests.join("requirements.txt"), &workspace.target_directory)?;
    let mut python = Command::new(environment.join("bin/python"));
    // Nothing is left beside the tests.
    command::run(python.arg("-B").arg(tests.join("test_stack.py")))
}

/// A virtual environment with exactly these packages: made once, and anew when the list has changed.
fn environment(requirements: &Path, target: &Path) -> Result<PathBuf> {
    let directory = target.join("aws-tests");
    let installed = directory.join("installed.txt");
    let wanted = fs::read_to_string(requirements).with_context(|| format!("there is no {}", requirements.display()))?;
    if fs::read_to_string(&installed).is_ok_and(|text| text == wanted) {
        return Ok(directory);
    }
    let virtualenv = command::find("virtualenv").context("virtualenv is missing: install it, then run this again")?;
    command::run(Command::new(virtualenv).args(["--quiet", "--clear"]).arg(&directory))?;
    let mut pip = Command::new(directory.join("bin/pip"));
    command::run(pip.args(["install", "--quiet", "--requirement"]).arg(requirements))?;
    // Last: an installation that broke off is begun again.
    fs::write(&installed, wanted).with_context(|| format!("cannot write {}", installed.display()))?;
    Ok(directory)
}
