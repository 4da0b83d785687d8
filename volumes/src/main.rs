//! choir-volumes: the one small program that runs as root. It does nine things to volumes, named by
//! id, below one directory; `wire.rs` says how to ask. It must not know sandboxes, users or releases.

#![deny(unsafe_code)]

mod backend;
mod confined;
mod diff;
mod image;
mod kernel;
mod level;
mod pack;
mod privileges;
mod serve;
mod shift;
mod unpack;
mod volumes;
mod walk;
mod wire;

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;

use rustix::fs::Mode;

const HELP: &str = "\
choir-volumes: creates, copies, compares, limits, packs and deletes the disks of sandboxes

usage: choir-volumes serve --dir DIR [--socket PATH] [--allow-uid N]... [--plain]

  --dir DIR       where the volumes are: on btrfs with quotas on, best mounted nosuid,nodev
  --socket PATH   listen there (mode 0600); without it the socket comes from systemd
  --allow-uid N   who may connect; without it only the user choir-volumes runs as
  --plain         use copies instead of snapshots, on any file system; enforces no limits

example: choir-volumes serve --dir /var/lib/choir/volumes --socket /run/choir/volumes.sock
";

struct Options {
    dir: PathBuf,
    socket: Option<PathBuf>,
    uids: Vec<u32>,
    plain: bool,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("unpack") => {
            if let Some((from, most)) = what_to_unpack(&arguments[1..]) {
                return unpack::child(from, most);
            }
        }
        Some("pack") => {
            if let Some(bases) = what_to_pack(&arguments[1..]) {
                return pack::child(bases);
            }
        }
        _ if arguments.iter().any(|a| a == "--help" || a == "-h") => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    let options = match parse(&arguments) {
        Ok(options) => options,
        Err(problem) => {
            eprintln!("choir-volumes: {problem}; see --help");
            return ExitCode::from(2);
        }
    };
    let Err(problem) = start(options);
    eprintln!("choir-volumes: {problem}");
    ExitCode::FAILURE
}

/// As the server tells the child that it starts for this.
fn what_to_unpack(arguments: &[String]) -> Option<(wire::Source, u64)> {
    let [from, most] = arguments else { return None };
    let from = wire::Source::ALL.into_iter().find(|source| source.name() == from)?;
    Some((from, most.parse().ok()?))
}

/// As above: where the ids of both trees begin.
fn what_to_pack(arguments: &[String]) -> Option<[u32; 2]> {
    let [root, home] = arguments else { return None };
    Some([root.parse().ok()?, home.parse().ok()?])
}

fn parse(arguments: &[String]) -> Result<Options, String> {
    let mut rest = arguments.iter();
    if rest.next().map(String::as_str) != Some("serve") {
        return Err("the first argument must be `serve`".into());
    }
    let (mut dir, mut socket, mut uids, mut plain) = (None, None, Vec::new(), false);
    while let Some(flag) = rest.next() {
        let mut value = || rest.next().ok_or_else(|| format!("{flag} needs a value"));
        match flag.as_str() {
            "--dir" => dir = Some(PathBuf::from(value()?)),
            "--socket" => socket = Some(PathBuf::from(value()?)),
            "--allow-uid" => {
                let uid = value()?;
                uids.push(uid.parse().map_err(|_| format!("`{uid}` is not a user id"))?);
            }
            "--plain" => plain = true,
            _ => return Err(format!("`{flag}` is not an option")),
        }
    }
    if uids.is_empty() {
        uids.push(rustix::process::geteuid().as_raw());
    }
    Ok(Options {
        dir: dir.ok_or("--dir is missing")?,
        socket,
        uids,
        plain,
    })
}

fn start(options: Options) -> Result<std::convert::Infallible, String> {
    let inherited = kernel::inherited_listener().map_err(|e| format!("cannot take the socket: {e}"))?;
    privileges::keep_only(privileges::SERVE).map_err(|e| format!("cannot drop privileges: {e}"))?;
    let volumes = volumes::Volumes::open(&options.dir, options.plain)?;
    let listener = match (inherited, options.socket) {
        (_, Some(path)) => bind(&path).map_err(|e| format!("cannot listen on {}: {e}", path.display()))?,
        (Some(socket), None) => UnixListener::from(socket),
        (None, None) => return Err("no socket came from systemd; give --socket PATH".into()),
    };
    serve::serve(&listener, volumes, options.uids).map_err(|e| format!("cannot serve: {e}"))
}

/// Binds with mode 0600 from the first moment; a socket left by a predecessor is replaced, which is
/// safe because the directory's lock is held.
fn bind(path: &std::path::Path) -> std::io::Result<UnixListener> {
    use std::os::unix::fs::FileTypeExt;
    if std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket()) {
        std::fs::remove_file(path)?;
    }
    let before = rustix::process::umask(Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path);
    rustix::process::umask(before);
    listener
}
