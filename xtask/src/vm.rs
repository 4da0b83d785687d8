//! `cargo xtask vm-test`: our Debian package on a machine of its own: systemd as its first process, control groups of the
//! second version, rootless Podman, a kernel that boots. `cargo xtask install-test`: the same package where nothing that it
//! needs is there yet. Everything is done as its owner would, by the shell of root.

mod container;
mod debian;
mod disk;
mod load;
mod machine;
mod runbook;
mod story;
mod tree;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;

use crate::package::{self, Contents};
use crate::packages::{self, Purpose};
use crate::workspace::Workspace;
use crate::{binaries, image};

use self::machine::Machine;
use self::story::Story;

/// What the default release is made of there: what `choir smoke` needs, since under emulation a whole one takes minutes.
const SMALL: &str = "bash\nca-certificates\nprocps\npython3\n";

/// Every file but what a system writes of itself and for itself.
const LIST: &str = r"list() {
    find / -xdev \( -path /proc -o -path /sys -o -path /tmp -o -path /root -o -path /var/log -o -path /var/lib/dpkg \
        -o -path /var/cache/apt -o -path /var/lib/apt -o -path '/var/tmp/systemd-private-*-systemd-*' \) -prune -o -print | sort
}";

/// In place of the one that is made in the background, which takes minutes, and under emulation an hour.
const SMALL_RELEASE: &str = "mkdir -p /var/lib/choir/image; ln -s /media/release.tar /var/lib/choir/image/default.tar";

#[derive(Args)]
pub struct Options {
    /// The package to try [default: one of programs that are built now, without optimisation]
    #[arg(long, value_name = "FILE")]
    package: Option<PathBuf>,
    /// The package to upgrade from, and to go back to [default: the same programs under an earlier version]
    #[arg(long, value_name = "FILE")]
    previous: Option<PathBuf>,
    /// Which Debian runs there, by its code name [default: this machine's]
    #[arg(long, value_name = "NAME")]
    suite: Option<String>,
    /// Stop after the first reboot, as `cargo xtask test` without `--slow` does
    #[arg(long)]
    quick: bool,
    /// Leave the machine running at the end, and say how to enter it
    #[arg(long)]
    keep: bool,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    packages::ensure(&[Purpose::Build, Purpose::Podman, Purpose::Image, Purpose::Test])?;
    let workspace = Workspace::load()?;
    let programs = workspace.target_directory.join("test-bin");
    if options.package.is_none() || options.previous.is_none() {
        binaries::build(&workspace, false, &programs)?;
    }
    tell(&workspace, &programs, options)?;
    Ok(ExitCode::SUCCESS)
}

/// Why it cannot run here, if it cannot.
pub fn obstacle() -> Option<&'static str> {
    if std::env::consts::ARCH != "x86_64" {
        return Some("the virtual machine is an x86_64 one, for programs of this machine");
    }
    no_root()
}

/// Why no disk of another machine can be made here, if none can.
pub fn no_root() -> Option<&'static str> {
    let is_root = rustix::process::geteuid().is_root();
    (!is_root).then_some("another machine's disk is made by root: run it with sudo")
}

/// The story with programs that were built already.
pub fn test(workspace: &Workspace, programs: &Path, whole: bool) -> Result<()> {
    let options = Options {
        package: None,
        previous: None,
        suite: None,
        quick: !whole,
        keep: false,
    };
    tell(workspace, programs, &options)
}

/// In a clean Debian.
#[derive(Args)]
pub struct InstallOptions {
    /// The package that is deployed over the programs built now, which are installed first [default: those again, as a
    /// later version]
    #[arg(long, value_name = "FILE")]
    package: Option<PathBuf>,
}

pub fn run_install(options: &InstallOptions) -> Result<ExitCode> {
    packages::ensure(&[Purpose::Build, Purpose::Image, Purpose::Test])?;
    let workspace = Workspace::load()?;
    let programs = workspace.target_directory.join("test-bin");
    if let Some(reason) = no_root() {
        bail!("{reason}");
    }
    binaries::build(&workspace, false, &programs)?;
    install(&workspace, &programs, options)?;
    Ok(ExitCode::SUCCESS)
}

/// The same with programs that were built already.
pub fn test_install(workspace: &Workspace, programs: &Path) -> Result<()> {
    install(workspace, programs, &InstallOptions { package: None })
}

fn install(workspace: &Workspace, programs: &Path, options: &InstallOptions) -> Result<()> {
    let directory = directory(workspace)?;
    let version = env!("CARGO_PKG_VERSION");
    let packages = tree::Packages {
        first: pack(workspace, programs, &directory, &format!("{version}~previous"))?,
        next: match &options.package {
            Some(file) => std::path::absolute(file)?,
            None => pack(workspace, programs, &directory, version)?,
        },
        broken: pack_broken(workspace, &directory)?,
        release: image::build_of(workspace, SMALL, &directory)?,
    };
    tree::tell(&directory, &workspace.workspace_root, packages)
}

fn directory(workspace: &Workspace) -> Result<PathBuf> {
    let directory = workspace.target_directory.join("vm");
    fs::create_dir_all(&directory)?;
    Ok(directory)
}

/// A package of programs as they are, without what only a debugger reads.
fn pack(workspace: &Workspace, programs: &Path, directory: &Path, version: &str) -> Result<PathBuf> {
    let stripped = directory.join("programs");
    binaries::strip(programs, &stripped)?;
    let from = Contents {
        repository: &workspace.workspace_root,
        programs: &stripped,
        downloads: None,
        version,
    };
    package::pack(&from, &directory.join("packed"))
}

/// The programs that were packed last, but for a hypervisor that ends at once.
fn pack_broken(workspace: &Workspace, directory: &Path) -> Result<PathBuf> {
    let programs = directory.join("programs");
    fs::write(programs.join("choir-hypervisor"), "#!/bin/sh\nexit 1\n")?;
    let from = Contents {
        repository: &workspace.workspace_root,
        programs: &programs,
        downloads: None,
        version: concat!(env!("CARGO_PKG_VERSION"), "+broken"),
    };
    package::pack(&from, &directory.join("packed"))
}

fn tell(workspace: &Workspace, programs: &Path, options: &Options) -> Result<()> {
    if let Some(reason) = obstacle() {
        bail!("{reason}");
    }
    let directory = directory(workspace)?;
    let packed = |given: &Option<PathBuf>, version: &str| match given {
        Some(file) => Ok(file.clone()),
        None => pack(workspace, programs, &directory, version),
    };
    let version = env!("CARGO_PKG_VERSION");
    let package = packed(&options.package, version)?;
    let previous = packed(&options.previous, &format!("{version}~previous"))?;
    let release = image::build_of(workspace, SMALL, &directory)?;
    let carried = [
        ("choir.deb", package.as_path()),
        ("previous.deb", previous.as_path()),
        ("release.tar", release.as_path()),
    ];
    let disk = disk::make(&directory, options.suite.as_deref(), &carried)?;
    let begun = Instant::now();
    let machine = Machine::start(&disk, &directory)?;
    let accelerator = machine.accelerator;
    let mut story = Story::new(machine, &workspace.workspace_root)?;
    let told = story.tell(!options.quick);
    if told.is_err() {
        println!("{}", story.evidence());
    }
    println!(
        "    the virtual machine ({accelerator}) was in use for {:.0} s",
        begun.elapsed().as_secs_f64()
    );
    if options.keep {
        println!("    enter it: {}", story.machine.entrance());
        let mut line = String::new();
        println!("    press Enter to switch it off");
        std::io::stdin().read_line(&mut line)?;
    }
    told
}
