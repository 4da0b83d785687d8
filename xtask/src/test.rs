//! `cargo xtask test`: everything CI runs, and a summary whose last line counts it. Nothing is left
//! out silently: whatever does not run is named with its reason.

mod aws;
#[cfg(test)]
mod builds;
mod nix;
mod runner;
mod scripts;

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;

use crate::packages::{self, Purpose};
use crate::test::runner::{Counts, Runner, Selection};
use crate::workspace::{Workspace, cargo};
use crate::{binaries, command, image, tidy, vm};

/// Tests that drive the shipped programs, Podman and a browser.
const END_TO_END: &str = "choir-e2e";

/// Where the programs are built for the tests, below the target directory.
const PROGRAMS: &str = "test-bin";

#[derive(Args)]
pub struct Options {
    /// Leave out Podman, browser and VM tests
    #[arg(long, conflicts_with = "slow")]
    fast: bool,
    /// Also run the tests that take minutes
    #[arg(long)]
    slow: bool,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    let workspace = Workspace::load()?;
    let mut report = Report::default();
    let purposes: &[Purpose] = match options.fast {
        true => &[Purpose::Build],
        false => &[Purpose::Build, Purpose::Podman, Purpose::Image, Purpose::Test],
    };
    report.phase("packages", || packages::ensure(purposes))?;
    report.check("formatting", || command::run(cargo().args(["fmt", "--all", "--check"])));
    report.check("tidy", || match tidy::run()? {
        ExitCode::SUCCESS => Ok(()),
        _ => anyhow::bail!("the house rules above are broken"),
    });
    report.check("clippy", || {
        let arguments = [
            "clippy",
            "--workspace",
            "--all-targets",
            "--quiet",
            "--",
            "-D",
            "warnings",
        ];
        command::run(cargo().args(arguments))
    });
    deny(&mut report);
    if options.fast {
        report.skip(
            "shell",
            "--fast installs no shellcheck, so the shell scripts were not read",
        );
        report.skip("aws", "--fast leaves out the tests of the AWS stack, which need PyPI");
    } else {
        report.check("shell", || scripts::check(&workspace.workspace_root));
        report.check("aws", || aws::run(&workspace));
    }
    if let Err(error) = tests(options, &workspace, &mut report) {
        report.failed("tests", &error);
    }
    if options.fast {
        report.skip(
            "nix",
            "--fast installs no Nix, so the module and the flakes were not evaluated",
        );
    } else {
        nix::run(&workspace, &workspace.target_directory.join(PROGRAMS), &mut report);
    }
    report.print();
    Ok(if report.counts.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Licences, sources and duplicate versions; known vulnerabilities need the network.
fn deny(report: &mut Report) {
    if command::find("cargo-deny").is_none() {
        let reason = "cargo-deny is not installed (`cargo install --locked cargo-deny`), so licences, sources and advisories were not checked";
        return report.skip("cargo-deny", reason);
    }
    report.check("cargo-deny", || {
        command::run(cargo().args(["deny", "--offline", "check", "bans", "licenses", "sources"]))
    });
    report.skip(
        "cargo-deny advisories",
        "the database needs the network: `cargo deny check advisories` fetches and reads it",
    );
}

fn tests(options: &Options, workspace: &Workspace, report: &mut Report) -> Result<()> {
    let target = &workspace.target_directory;
    let skip_log = target.join("test-skips.log");
    fs::create_dir_all(target)?;
    fs::write(&skip_log, "").with_context(|| format!("cannot write {}", skip_log.display()))?;
    let binaries = target.join(PROGRAMS);
    report.phase("programs", || {
        binaries::build_faulty(workspace, &binaries)?;
        binaries::build(workspace, false, &binaries)
    })?;

    let mut environment = vec![
        ("CHOIR_BIN", binaries.into_os_string()),
        ("CHOIR_SKIP_LOG", skip_log.clone().into_os_string()),
    ];
    if options.fast {
        environment.push(("CHOIR_FAST", "1".into()));
    } else {
        let tar = report.phase("image", || image::build(workspace, None))?;
        environment.push(("CHOIR_IMAGE", tar.into_os_string()));
    }
    if options.slow {
        environment.push(("CHOIR_SLOW", "1".into()));
    }
    let runner = Runner::new(environment, options.slow);
    let counts = report.phase("crates", || runner.run(Selection::AllBut(END_TO_END)))?;
    report.counts.add(&counts);
    if options.fast {
        report.skip(END_TO_END, "--fast leaves out Podman, browser and VM tests");
    } else {
        let counts = report.phase("end to end", || runner.run(Selection::Only(END_TO_END)))?;
        report.counts.add(&counts);
        match vm::no_root() {
            Some(reason) => report.skip("clean Debian 13", reason),
            None => report.check("clean Debian 13", || {
                vm::test_install(workspace, &target.join(PROGRAMS))
            }),
        }
        match vm::obstacle() {
            Some(reason) => report.skip("virtual machine", reason),
            None => report.check("virtual machine", || {
                vm::test(workspace, &target.join(PROGRAMS), options.slow)
            }),
        }
        if !options.slow {
            report.skip(
                "virtual machine, from its first reboot on",
                "takes ten minutes where it is emulated; `cargo xtask vm-test` runs it, and so does `--slow`",
            );
        }
    }
    if !options.slow {
        for name in runner.ignored()? {
            report.skip(&name, "takes minutes; `cargo xtask test --slow` runs it");
        }
    }
    report.take_skips(&skip_log)
}

/// One part, how long it took, and what the disk had free after it, in bytes.
struct Phase {
    name: String,
    took: Duration,
    free: u64,
}

#[derive(Default)]
struct Report {
    counts: Counts,
    phases: Vec<Phase>,
    failures: Vec<String>,
    skips: Vec<String>,
}

impl Report {
    /// Runs one part and notes how long it took.
    fn phase<T>(&mut self, name: &str, part: impl FnOnce() -> Result<T>) -> Result<T> {
        println!("\n==> {name}");
        let begun = Instant::now();
        let result = part();
        let free = rustix::fs::statvfs(".").map_or(0, |disk| disk.f_bavail * disk.f_frsize);
        self.phases.push(Phase {
            name: name.to_owned(),
            took: begun.elapsed(),
            free,
        });
        result
    }

    /// A part that counts as one test; when it fails the others still run.
    fn check(&mut self, name: &str, part: impl FnOnce() -> Result<()>) {
        match self.phase(name, part) {
            Ok(()) => self.counts.passed += 1,
            Err(error) => self.failed(name, &error),
        }
    }

    fn failed(&mut self, name: &str, error: &anyhow::Error) {
        eprintln!("==> {name} failed: {error:#}");
        self.counts.failed += 1;
        self.failures.push(format!("{name}: {error:#}"));
    }

    fn skip(&mut self, name: &str, reason: &str) {
        self.counts.skipped += 1;
        self.skips.push(format!("{name}: {reason}"));
    }

    /// Tests that find out only while running that they cannot run append `name: reason` there;
    /// their runner counts them as passed.
    fn take_skips(&mut self, log: &Path) -> Result<()> {
        for line in fs::read_to_string(log)?.lines().filter(|line| !line.trim().is_empty()) {
            self.skips.push(line.to_owned());
            self.counts.skipped += 1;
            self.counts.passed = self.counts.passed.saturating_sub(1);
        }
        Ok(())
    }

    fn print(&self) {
        println!("\nTime, and room on the disk");
        for Phase { name, took, free } in &self.phases {
            let (seconds, gigabytes) = (took.as_secs_f64(), *free as f64 / 1e9);
            println!("  {name:<16} {seconds:>7.1} s, then {gigabytes:>5.1} GB free");
        }
        let failed = self.failures.iter().chain(&self.counts.failures).collect();
        for (title, lines) in [("Skipped", self.skips.iter().collect::<Vec<_>>()), ("Failed", failed)] {
            if !lines.is_empty() {
                println!("{title}");
                lines.iter().for_each(|line| println!("  {line}"));
            }
        }
        let Counts {
            passed,
            failed,
            skipped,
            ..
        } = &self.counts;
        println!("\n{passed} passed, {failed} failed, {skipped} skipped");
    }
}
