//! `cargo xtask tidy`: the house rules that neither the compiler nor clippy knows. Each violation is
//! one line: file, line, sentence.

mod actions;
mod claims;
mod edges;
mod scan;

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::workspace::Workspace;

/// Extensions of what people write; the other rules are for Rust alone.
const SOURCES: &[&str] = &["rs", "sh", "nix", "sql", "js", "ts", "css", "py"];
/// Directories of builds and downloads.
const SKIPPED: &[&str] = &["target", "data", "node_modules"];

/// One broken rule.
#[derive(Debug, PartialEq, Eq)]
pub struct Violation {
    file: PathBuf,
    line: usize,
    sentence: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}: {}", self.file.display(), self.line, self.sentence)
    }
}

pub fn run() -> Result<ExitCode> {
    let violations = check(&Workspace::load()?)?;
    for violation in &violations {
        println!("{violation}");
    }
    match violations.len() {
        0 => println!("tidy"),
        1 => println!("1 house rule is broken"),
        number => println!("{number} house rules are broken"),
    }
    Ok(if violations.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn check(workspace: &Workspace) -> Result<Vec<Violation>> {
    let root = &workspace.workspace_root;
    let mut violations = edges::check(workspace);
    let mut files = Vec::new();
    collect(root, &mut files)?;
    files.sort();
    let mut functions = HashSet::new();
    for file in files {
        let name = file.strip_prefix(root).unwrap_or(&file);
        let text = fs::read_to_string(&file).with_context(|| format!("{} is not UTF-8 text", file.display()))?;
        let found = scan::check(name, &text);
        violations.extend(found);
        functions.extend(claims::functions(&text).map(str::to_owned));
    }
    for page in claims::PAGES {
        let text = fs::read_to_string(root.join(page)).with_context(|| format!("there is no {page}"))?;
        violations.extend(claims::check(Path::new(page), &text, &functions));
    }
    let workflows = root.join(actions::DIRECTORY);
    for entry in fs::read_dir(&workflows).with_context(|| format!("cannot read {}", workflows.display()))? {
        let path = entry?.path();
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        violations.extend(actions::check(&path, &text));
    }
    for violation in &mut violations {
        if let Ok(name) = violation.file.strip_prefix(root) {
            violation.file = name.to_owned();
        }
    }
    Ok(violations)
}

fn collect(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries = fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    for entry in entries {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        let kind = entry.file_type()?;
        if kind.is_dir() {
            if !name.starts_with('.') && !SKIPPED.contains(&name.as_ref()) {
                collect(&path, files)?;
            }
        } else if kind.is_file()
            && path
                .extension()
                .and_then(|it| it.to_str())
                .is_some_and(|it| SOURCES.contains(&it))
        {
            files.push(path);
        }
    }
    Ok(())
}
