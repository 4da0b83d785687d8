//! The program as a process that dies at one write: the kernel kills it where a file would grow beyond what it may. It must
//! not know what the program does.

use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::Command;

/// What a limit counts in.
pub const BLOCK: u64 = 512;
/// SIGXFSZ.
const FILE_TOO_LONG: i32 = 25;

/// Whether it lived, with files of at most this many blocks and `hypervisor.toml` of the directory as its configuration.
pub fn survives(directory: &Path, blocks: u64, arguments: &[&str]) -> bool {
    let limited = format!("ulimit -c 0 && ulimit -f {blocks} && exec \"$@\"");
    let output = Command::new("sh")
        .args(["-c", &limited, "sh", env!("CARGO_BIN_EXE_choir-hypervisor")])
        .args(["--config", "hypervisor.toml"])
        .args(arguments)
        .current_dir(directory)
        .output()
        .unwrap();
    let lived = output.status.success();
    assert!(lived || output.status.signal() == Some(FILE_TOO_LONG), "{output:?}");
    lived
}
