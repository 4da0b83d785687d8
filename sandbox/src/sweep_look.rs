//! `choir-sandbox look`: writes what there is to see to the standard output, as frames. It must not know who asked, nor what
//! is looked for. What vanishes meanwhile is nothing; what cannot be read is said.

use std::ffi::OsStr;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use choir_link::sweep::{Frame, MOST, Part, Show};
use rustix::fs::{FileType, Mode, OFlags};

/// In a container, as root: sockets, command lines, and the environments of root's processes.
pub const PROCESSES: &str = "processes";
/// In a container, as root: all files.
pub const FILES: &str = "files";
/// In a container, as a user: the environments of their processes.
pub const OWN: &str = "own";
/// Without a container: what is below the agent, and its directories.
pub const DEVELOPMENT: &str = "development";

/// Runs one look. The exit code is 0 only where all was written.
pub fn main(args: &[std::ffi::OsString]) -> ExitCode {
    // Whoever works in the sandbox goes first. A refusal changes nothing that matters.
    let _ = rustix::process::setpriority_process(None, 19);
    let args: Vec<&OsStr> = args.iter().map(AsRef::as_ref).collect();
    let look = args.first().and_then(|look| look.to_str());
    let mut gathered = Vec::new();
    let mut to = |frame: Frame| {
        frame.write(&mut gathered);
        if gathered.len() < MOST {
            return Ok(());
        }
        let written = io::stdout().lock().write_all(&gathered);
        gathered.clear();
        written
    };
    let mut out = Show::new(&mut to);
    let done = match (look, &args[..]) {
        (Some(PROCESSES), [_]) => all_processes(&mut out),
        (Some(FILES), [_]) => out.tree(Path::new("/")),
        (Some(OWN), [_]) => own(&mut out, &processes().collect::<Vec<_>>()),
        (Some(DEVELOPMENT), [_]) => development(&mut out),
        _ => {
            eprintln!("choir-sandbox look is for the agent: it takes what to look at.");
            return ExitCode::from(2);
        }
    };
    match done.and_then(|()| io::stdout().lock().write_all(&gathered)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("choir-sandbox look: {e}");
            ExitCode::FAILURE
        }
    }
}

/// Every process there is but this one.
pub fn processes() -> impl Iterator<Item = i32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let own = rustix::process::getpid().as_raw_nonzero().get();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(move |pid| *pid != own)
}

/// The user and group of a process, where it has one of each: only a process of exactly these may read what it has.
pub fn identity(pid: i32) -> Option<(u32, u32)> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let one = |field: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(field))?;
        let ids: Vec<u32> = line.split_whitespace().filter_map(|id| id.parse().ok()).collect();
        ids.iter().all(|id| *id == ids[0]).then_some(*ids.first()?)
    };
    Some((one("Uid:")?, one("Gid:")?))
}

fn all_processes(out: &mut Show<'_>) -> io::Result<()> {
    sockets(out)?;
    let all: Vec<i32> = processes().collect();
    command_lines(out, &all)?;
    for pid in &all {
        if identity(*pid).is_none() && is_there(*pid) {
            out.item(Part::Environment, &format!("process {pid}"))?;
            out.unread("it runs under two identities at once")?;
        }
    }
    own(out, &all)
}

/// Without a container every process of the host is to be seen: only the agent's own are of this sandbox.
fn development(out: &mut Show<'_>) -> io::Result<()> {
    let agent = rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get());
    let below: Vec<i32> = processes().filter(|pid| is_below(*pid, agent)).collect();
    command_lines(out, &below)?;
    own(out, &below)?;
    for name in ["CHOIR_HOME", "CHOIR_AGENT_DIR", "CHOIR_RUN_DIR"] {
        if let Some(directory) = std::env::var_os(name) {
            out.tree(Path::new(&directory))?;
        }
    }
    Ok(())
}

fn is_below(mut pid: i32, ancestor: i32) -> bool {
    while pid > 1 {
        if pid == ancestor {
            return true;
        }
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
        pid = parent.and_then(|parent| parent.trim().parse().ok()).unwrap_or(0);
    }
    false
}

fn is_there(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

fn sockets(out: &mut Show<'_>) -> io::Result<()> {
    for table in ["tcp", "tcp6", "udp", "udp6", "raw", "raw6", "unix", "packet"] {
        out.small(Part::Sockets, table, &PathBuf::from(format!("/proc/net/{table}")))?;
    }
    Ok(())
}

fn command_lines(out: &mut Show<'_>, pids: &[i32]) -> io::Result<()> {
    for pid in pids {
        let path = PathBuf::from(format!("/proc/{pid}/cmdline"));
        out.small(Part::CommandLines, &format!("process {pid}"), &path)?;
    }
    Ok(())
}

/// The environments of the processes that are of this one's user, and files that only they still have.
fn own(out: &mut Show<'_>, pids: &[i32]) -> io::Result<()> {
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    for pid in pids.iter().filter(|pid| identity(**pid) == Some((uid, gid))) {
        let path = PathBuf::from(format!("/proc/{pid}/environ"));
        out.small(Part::Environment, &format!("process {pid}"), &path)?;
        deleted_files(out, *pid)?;
    }
    Ok(())
}

/// Files without a name that a process holds open.
fn deleted_files(out: &mut Show<'_>, pid: i32) -> io::Result<()> {
    let Ok(descriptors) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
        // Its environment could not be read either, which was said.
        return Ok(());
    };
    for descriptor in descriptors.flatten() {
        let path = descriptor.path();
        let Ok(stat) = rustix::fs::stat(&path) else { continue };
        if stat.st_nlink == 0 && FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
            let name = format!("process {pid}, deleted file {}", descriptor.file_name().display());
            out.item(Part::Files, &name)?;
            match rustix::fs::open(
                &path,
                OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK,
                Mode::empty(),
            ) {
                Ok(file) => out.contents(file.into())?,
                Err(e) => out.failed(e.into())?,
            }
        }
    }
    Ok(())
}
