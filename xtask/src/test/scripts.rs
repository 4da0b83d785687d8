//! Has shellcheck read every shell script of the repository, whatever its name. Knows none of them.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::command;

pub fn check(root: &Path) -> Result<()> {
    let mut grep = Command::new("grep");
    grep.current_dir(root).args(["-rlIE", "--exclude-dir=.git"]);
    // Builds and downloads, which hold other people's scripts.
    grep.args([
        "--exclude-dir=target",
        "--exclude-dir=data",
        "--exclude-dir=node_modules",
    ]);
    let scripts = command::capture(grep.args(["^#!.*(/sh|bash)$", "."]))?;
    command::run(Command::new("shellcheck").current_dir(root).args(scripts.lines()))
}
