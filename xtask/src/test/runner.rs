//! Runs tests with cargo-nextest where it is installed and with `cargo test` elsewhere, and counts
//! what they report.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::command;
use crate::workspace::cargo;

/// What ran; `failures` names what failed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub passed: usize,
    pub failed: usize,
    pub skipped: usize,
    pub failures: Vec<String>,
}

impl Counts {
    pub fn add(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.failures.extend_from_slice(&other.failures);
    }

    fn read_nextest(&mut self, line: &str) {
        let line = line.trim_start();
        if let Some((_, summary)) = line.strip_prefix("Summary [").and_then(|it| it.split_once("run:")) {
            for part in summary.split(", ") {
                let mut words = part.split_whitespace();
                let number = words.next().and_then(|word| word.parse::<usize>().ok()).unwrap_or(0);
                match words.collect::<Vec<_>>().as_slice() {
                    ["passed", ..] => self.passed += number,
                    ["skipped", ..] | [] => {}
                    _ => self.failed += number,
                }
            }
        } else if let Some(name) = failed_in_nextest(line)
            && !self.failures.iter().any(|known| known == name)
        {
            self.failures.push(name.to_owned());
        }
    }

    fn read_libtest(&mut self, line: &str) {
        if let Some((_, summary)) = line
            .trim_start()
            .split_once("test result: ")
            .and_then(|(_, it)| it.split_once(". "))
        {
            for part in summary.split("; ") {
                match part.trim().split_once(' ') {
                    Some((number, "passed")) => self.passed += number.parse().unwrap_or(0),
                    Some((number, "failed")) => self.failed += number.parse().unwrap_or(0),
                    _ => {}
                }
            }
        } else if let Some(name) = line.strip_prefix("test ").and_then(|it| it.strip_suffix(" ... FAILED")) {
            self.failures.push(name.to_owned());
        }
    }
}

/// `FAIL [   0.010s] (3/12) crate::target name`; the count is not always there.
fn failed_in_nextest(line: &str) -> Option<&str> {
    let (kind, rest) = line.split_once('[')?;
    let ways = ["FAIL", "ABORT", "TIMEOUT", "LEAK-FAIL", "SIGSEGV", "SIGABRT", "SIGKILL"];
    let name = rest.split_once(']')?.1.trim();
    let name = match name.strip_prefix('(') {
        Some(counted) => counted.split_once(')')?.1.trim(),
        None => name,
    };
    ways.contains(&kind.trim()).then_some(name)
}

/// Which packages' tests to run.
#[derive(Debug, Clone, Copy)]
pub enum Selection<'a> {
    AllBut(&'a str),
    Only(&'a str),
}

impl Selection<'_> {
    /// Always the whole workspace, of which the tests are chosen: a package built alone would resolve other features
    /// and be compiled anew, with everything it needs.
    fn nextest(self) -> [String; 3] {
        let filter = match self {
            Self::AllBut(package) => format!("not package(={package})"),
            Self::Only(package) => format!("package(={package})"),
        };
        ["--workspace".into(), "--filterset".into(), filter]
    }

    fn cargo_test(self) -> Vec<String> {
        match self {
            Self::AllBut(package) => vec!["--workspace".into(), "--exclude".into(), package.into()],
            Self::Only(package) => vec!["--package".into(), package.into()],
        }
    }
}

pub struct Runner {
    nextest: bool,
    slow: bool,
    environment: Vec<(&'static str, OsString)>,
}

impl Runner {
    /// `slow` also runs what is marked `#[ignore]`.
    pub fn new(environment: Vec<(&'static str, OsString)>, slow: bool) -> Self {
        Self {
            nextest: command::find("cargo-nextest").is_some(),
            slow,
            environment,
        }
    }

    /// Runs the selected tests; a failing test is no error here.
    pub fn run(&self, selection: Selection<'_>) -> Result<Counts> {
        let mut command = cargo();
        if self.nextest {
            command
                .args(["nextest", "run", "--no-fail-fast", "--no-tests=pass"])
                .args(selection.nextest());
            if self.slow {
                command.args(["--run-ignored", "all"]);
            }
        } else {
            command.args(["test", "--no-fail-fast"]).args(selection.cargo_test());
            if self.slow {
                command.args(["--", "--include-ignored"]);
            }
        }
        let mut counts = Counts::default();
        let success = self.read_lines(&mut command, |line| {
            println!("{line}");
            if self.nextest {
                counts.read_nextest(line)
            } else {
                counts.read_libtest(line)
            }
        })?;
        if !success && counts.failed == 0 {
            // It did not compile, or the runner itself broke.
            counts.failed = 1;
            counts.failures.push(format!("tests of {selection:?}: see above"));
        }
        Ok(counts)
    }

    /// The names of the tests marked `#[ignore]`.
    pub fn ignored(&self) -> Result<Vec<String>> {
        let mut command = cargo();
        if self.nextest {
            command.args([
                "nextest",
                "list",
                "--workspace",
                "--run-ignored",
                "only",
                "-T",
                "oneline",
            ]);
        } else {
            command.args(["test", "--workspace", "--quiet", "--", "--list", "--ignored"]);
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        let listed = command::capture(&mut command)?;
        let names = listed.lines().filter_map(|line| {
            if self.nextest {
                Some(line)
            } else {
                line.strip_suffix(": test")
            }
        });
        Ok(names.map(str::to_owned).collect())
    }

    /// Calls `read` with each line of both outputs; true when the command ended with 0.
    fn read_lines(&self, command: &mut Command, mut read: impl FnMut(&str)) -> Result<bool> {
        let (reader, writer) = std::io::pipe().context("cannot make a pipe")?;
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
        let mut child = command.spawn().context("cannot start `cargo`")?;
        // Ours would keep the pipe open.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        for line in BufReader::new(reader).split(b'\n') {
            read(&String::from_utf8_lossy(&line?));
        }
        Ok(child.wait()?.success())
    }
}

#[cfg(test)]
mod tests {
    use super::Counts;

    #[test]
    fn nextests_summary_is_counted_and_failures_are_named_once() {
        let mut counts = Counts::default();
        for line in [
            "        PASS [   0.004s] choir-core name::tests::a",
            "        FAIL [   0.010s] (2/12) choir-core name::tests::b",
            "     Summary [   0.016s] 12 tests run: 9 passed (1 slow), 2 failed, 1 timed out, 3 skipped",
            "        FAIL [   0.010s] (2/12) choir-core name::tests::b",
        ] {
            counts.read_nextest(line);
        }
        assert_eq!((counts.passed, counts.failed, counts.skipped), (9, 3, 0));
        assert_eq!(counts.failures, ["choir-core name::tests::b"]);
    }

    #[test]
    fn one_test_in_the_summary_is_counted() {
        let mut counts = Counts::default();
        counts.read_nextest("     Summary [   0.001s] 1 test run: 1 passed, 0 skipped");
        assert_eq!((counts.passed, counts.failed), (1, 0));
    }

    #[test]
    fn cargo_tests_results_are_added_up() {
        let mut counts = Counts::default();
        for line in [
            "test a::b ... ok",
            "test a::c ... FAILED",
            "test result: FAILED. 3 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.01s",
            "test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s",
        ] {
            counts.read_libtest(line);
        }
        assert_eq!((counts.passed, counts.failed), (5, 1));
        assert_eq!(counts.failures, ["a::c"]);
    }
}
