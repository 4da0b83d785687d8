//! The sandbox agent. As `choir-sandbox agent` it is PID 1 of a sandbox; under the name `sudo` it is the client that
//! asks the agent to run something as root, and for `ssh` it tells which hosts are known. It must not know users, secrets or routes of the hypervisor.

use std::ffi::OsStr;
use std::path::Path;
use std::process::ExitCode;

mod agent;
mod api;
mod attach;
mod command;
mod dial;
mod exec;
mod init;
mod link;
mod log;
mod outward;
mod own;
mod process;
mod reaper;
mod report;
mod services;
mod spawn;
mod ssh_agent;
mod sudo;
mod sudo_args;
mod sudo_client;
mod sudo_server;
mod sweep;
mod sweep_look;
mod task_events;
mod task_log;
mod task_run;
mod tasks;
mod terminals;
mod trust;
mod user;

#[expect(clippy::disallowed_methods, reason = "the one place where the clock comes in")]
fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let name = args.next().unwrap_or_default();
    if Path::new(&name).file_name() == Some(OsStr::new("sudo")) {
        return sudo_client::main(args.collect());
    }
    match args.next().as_deref().and_then(OsStr::to_str) {
        Some("agent") => init::run(jiff::Timestamp::now, random),
        Some("look") => sweep_look::main(&args.collect::<Vec<_>>()),
        Some(ssh_agent::KNOWN_HOSTS) => ssh_agent::known_hosts(std::env::var("CHOIR_BROKER_URL").ok()),
        Some("--version" | "-V") => {
            println!("choir-sandbox {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("choir-sandbox runs inside a sandbox: start it as `choir-sandbox agent`.");
            ExitCode::from(2)
        }
    }
}

/// # Panics
/// Where the kernel has no randomness to give, which ends a process that could not name anything.
fn random() -> [u8; 16] {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
    bytes
}
