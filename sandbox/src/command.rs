//! From a request's command, directory and environment to something that can be started. It must not start it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;

use choir_api::sandbox::Command;

use crate::agent::Agent;
use crate::api::{ApiError, Status};
use crate::spawn::{Become, Directory, Launch};
use crate::user::User;

/// MAX_ARG_STRLEN of the kernel, its NUL included: execve(2).
const MAX_ARGUMENT: usize = 128 << 10;
/// A third of what the kernel takes for arguments and environment together.
const MAX_TOTAL: usize = 2 << 20;

/// Checks a request and completes it with the user and their environment.
pub fn launch(
    agent: &Agent,
    command: &Command,
    cwd: Option<&str>,
    env: &BTreeMap<String, String>,
) -> Result<Launch, ApiError> {
    if agent.is_stopping() {
        return Err(ApiError::new(
            Status::UNAVAILABLE,
            "stopping",
            "The sandbox is stopping; start it again.",
        ));
    }
    let user = agent.user();
    let argv: Vec<OsString> = match command {
        Command::Line(line) => vec![user.shell.clone().into(), "-lc".into(), line.into()],
        Command::Argv(argv) => argv.iter().map(Into::into).collect(),
    };
    check(&argv, env)?;
    Ok(Launch {
        argv,
        name: None,
        directory: directory(&user, cwd)?,
        env: agent.environment(&user, env),
        become_who: become_user(agent, user),
        terminal: false,
    })
}

/// The user, or in development mode whoever the agent is.
pub fn become_user(agent: &Agent, user: User) -> Become {
    if agent.place.is_dev() {
        Become::Same
    } else {
        Become::User(user)
    }
}

/// A directory of a request, relative to HOME.
pub fn directory(user: &User, cwd: Option<&str>) -> Result<Directory, ApiError> {
    let path = user.home.join(cwd.unwrap_or_default());
    // A path with a NUL is not found either.
    if path.is_dir() {
        Ok(Directory::Path(path))
    } else {
        let message = format!("There is no directory {}; create it or choose another.", path.display());
        Err(ApiError::new(Status::BAD_REQUEST, "no_such_directory", message))
    }
}

/// What a command that could not be started looks like: exit code 127 or 126 as in a shell, and a line for stderr.
/// `Err` where the sandbox has no room for another process.
pub fn not_started(program: &str, error: &io::Error) -> Result<(i32, String), ApiError> {
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::ENOMEM | libc::EMFILE | libc::ENFILE) => {
            let message = "The sandbox has too many processes or too little memory; end some and try again.";
            Err(ApiError::new(Status::UNAVAILABLE, "no_room", message))
        }
        Some(libc::ENOENT) => Ok((127, format!("{program}: command not found\n"))),
        _ => Ok((126, format!("{program}: cannot be started: {error}\n"))),
    }
}

/// The program's name, for messages.
pub fn program(launch: &Launch) -> String {
    launch.argv[0].to_string_lossy().into_owned()
}

fn check(argv: &[OsString], env: &BTreeMap<String, String>) -> Result<(), ApiError> {
    let bad = |message: &str| Err(ApiError::new(Status::BAD_REQUEST, "bad_command", message));
    if argv.first().is_none_or(|program| program.is_empty()) {
        return bad("The command is empty; give a shell line or a program with its arguments.");
    }
    let words = argv.iter().map(|w| w.as_encoded_bytes());
    let values = env.iter().flat_map(|(name, value)| [name.as_bytes(), value.as_bytes()]);
    let mut total = 0;
    for word in words.chain(values) {
        total += word.len() + 1;
        if word.contains(&0) {
            return bad("The command or its environment contains a NUL byte; remove it.");
        }
        if word.len() >= MAX_ARGUMENT || total > MAX_TOTAL {
            return bad("The command or its environment is too long; pass long data on stdin or in a file.");
        }
    }
    if env.keys().any(|name| name.is_empty() || name.contains('=')) {
        return bad("A name in the environment is empty or contains `=`; rename it.");
    }
    Ok(())
}
