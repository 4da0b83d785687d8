//! `cargo xtask`: what people run on this repository, one file per verb. It drives the shipped
//! programs from outside and must not link any of our crates.

mod bench;
mod binaries;
mod command;
mod data;
mod deploy;
mod down;
mod image;
mod package;
mod packages;
mod process;
mod test;
mod tidy;
mod units;
mod up;
mod vm;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

fn main() -> ExitCode {
    let result = match Cli::parse().verb {
        Verb::Up(options) => up::run(&options),
        Verb::Down(options) => down::run(&options),
        Verb::Test(options) => test::run(&options),
        Verb::Bench(options) => bench::run(&options),
        Verb::Image(options) => image::run(&options),
        Verb::Units(options) => units::run(&options),
        Verb::Package(options) => package::run(&options),
        Verb::Deploy(options) => deploy::run(&options),
        Verb::VmTest(options) => vm::run(&options),
        Verb::InstallTest(options) => vm::run_install(&options),
        Verb::Tidy => tidy::run(),
        Verb::Launch(options) => up::launch::run(&options),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Runs, tests and builds ChoirOS from a checkout")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Install what is missing, build, and run the hypervisor on this machine
    Up(up::Options),
    /// Stop everything that `up` started for a data directory
    Down(down::Options),
    /// Run everything that CI runs
    Test(test::Options),
    /// Measure speed and memory beside others' programs
    Bench(bench::Options),
    /// Build the default release: the root file system a sandbox starts from
    Image(image::Options),
    /// Write the systemd units as Debian gets them
    Units(units::Options),
    /// Build a Debian package of static programs and their units
    Package(package::Options),
    /// Bring a package to a Debian host over SSH, and go back if people cannot use it
    Deploy(deploy::Options),
    /// Try the Debian package in a virtual machine: boot, kill, reboot, upgrade, restore, purge
    VmTest(vm::Options),
    /// Try the Debian package in a clean Debian 13: from nothing to a claim link, and purge it
    InstallTest(vm::InstallOptions),
    /// Check the house rules that a compiler does not know
    Tidy,
    /// Become a program that finds listening sockets at descriptor 3 and up
    #[command(hide = true)]
    Launch(up::launch::Options),
}
