//! The agent's end of `sudo`: runs what is asked as root or another user. There is no password, by design: root
//! inside a sandbox is not a boundary. It must not give more than the sandbox as a whole was given.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use choir_api::sandbox::Chunk;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;

use crate::agent::Agent;
use crate::reaper::{Exit, kill_group};
use crate::spawn::{Become, Directory, Launch, spawn};
use crate::sudo::{self, DESCRIPTORS, FromClient, HEADER, Request, ToClient};
use crate::terminals::open_pty;
use crate::user::User;

/// From SIGHUP to SIGKILL when the client is gone.
const GRACE: Duration = Duration::from_secs(2);
/// How long a client may take to say what it wants.
const ASK_WITHIN: Duration = Duration::from_secs(10);
/// What a client may send to its command.
const SIGNALS: [i32; 8] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGSTOP,
    libc::SIGCONT,
];

/// Answers for ever.
pub async fn serve(agent: Arc<Agent>, listener: UnixListener) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let agent = Arc::clone(&agent);
                tokio::spawn(async move {
                    // A client that breaks off has nobody to tell.
                    let _ = client(&agent, stream).await;
                });
            }
            // Out of descriptors, most likely: trying again at once would only spin.
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

async fn client(agent: &Agent, mut stream: UnixStream) -> io::Result<()> {
    let asked = tokio::time::timeout(ASK_WITHIN, request(&mut stream)).await;
    let (request, descriptors) = asked.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    let caller = User::by_uid(stream.peer_cred()?.uid());
    match start(agent, &caller, request, descriptors) {
        Ok(started) => {
            if let Some(master) = &started.master {
                send(&mut stream, &ToClient::Terminal, Some(master.as_fd())).await?;
            }
            // The client's copy is then the only one: when it dies, the terminal hangs up.
            drop(started.master);
            follow(stream, started.group, started.exit).await
        }
        Err(message) => send(&mut stream, &ToClient::Refused { message }, None).await,
    }
}

struct Started {
    group: i32,
    exit: oneshot::Receiver<Exit>,
    master: Option<OwnedFd>,
}

/// Starts it; the error is a sentence for the caller.
fn start(agent: &Agent, caller: &User, request: Request, descriptors: [OwnedFd; 4]) -> Result<Started, String> {
    if agent.is_stopping() {
        return Err("the sandbox is stopping".to_owned());
    }
    let target = User::named(&request.user).ok_or_else(|| format!("there is no user {}", request.user))?;
    let [stdin, stdout, stderr, directory] = descriptors;
    let launch = launch(caller, &target, &request, directory).ok_or("the request makes no sense")?;
    let program = launch.argv[0].to_string_lossy().into_owned();
    let failed = |e: io::Error| match e.kind() {
        io::ErrorKind::NotFound => format!("{program}: command not found"),
        _ => format!("{program} cannot be started: {e}"),
    };
    let (stdio, master) = match request.terminal {
        None => ([stdin, stdout, stderr].map(Stdio::from), None),
        Some((cols, rows)) => {
            let (master, slave) = open_pty(cols, rows, Some(&target)).map_err(failed)?;
            let end = || slave.try_clone().map(Stdio::from);
            let stderr = if rustix::termios::isatty(&stderr) {
                end().map_err(failed)?
            } else {
                stderr.into()
            };
            ([end().map_err(failed)?, end().map_err(failed)?, stderr], Some(master))
        }
    };
    let (child, exit) = spawn(&agent.reaper, launch, stdio).map_err(failed)?;
    Ok(Started {
        group: child.id().cast_signed(),
        exit,
        master,
    })
}

fn launch(caller: &User, target: &User, request: &Request, directory: OwnedFd) -> Option<Launch> {
    let words: Option<Vec<OsString>> = request.argv.iter().map(os).collect();
    let words = words?;
    let (argv, name) = if request.login {
        let mut argv: Vec<OsString> = vec![target.shell.clone().into()];
        if !words.is_empty() {
            argv.push("-c".into());
            argv.push(quoted(&words));
        }
        (argv, Some(User::login_name(&target.shell)))
    } else {
        (words.clone(), None)
    };
    let directory = match request.login {
        true if target.home.is_dir() => Directory::Path(target.home.clone()),
        _ => Directory::Open(directory),
    };
    let is_root = rustix::process::geteuid().is_root();
    (!argv.is_empty()).then_some(Launch {
        argv,
        name,
        env: environment(caller, target, request, &words)?,
        directory,
        // An agent that is not root, in development, can only run things as itself.
        become_who: if is_root {
            Become::Sudo(target.clone())
        } else {
            Become::Same
        },
        terminal: request.terminal.is_some(),
    })
}

/// Who it is now, what the client chose, and who asked, as sudo(8) does.
fn environment(
    caller: &User,
    target: &User,
    request: &Request,
    command: &[OsString],
) -> Option<BTreeMap<OsString, OsString>> {
    let mut env = target.environment();
    let sent: Option<Vec<_>> = request.env.iter().map(|(n, v)| Some((os(n)?, os(v)?))).collect();
    env.extend(sent?);
    env.insert("SUDO_USER".into(), caller.name.clone().into());
    env.insert("SUDO_UID".into(), caller.uid.to_string().into());
    env.insert("SUDO_GID".into(), caller.gid.to_string().into());
    env.insert("SUDO_COMMAND".into(), command.join(OsStr::new(" ")));
    Some(env)
}

/// The words as one shell line.
fn quoted(words: &[OsString]) -> OsString {
    let quote = |word: &OsString| {
        let mut quoted = vec![b'\''];
        for byte in word.as_encoded_bytes() {
            match byte {
                b'\'' => quoted.extend_from_slice(b"'\\''"),
                byte => quoted.push(*byte),
            }
        }
        quoted.push(b'\'');
        quoted
    };
    OsString::from_vec(words.iter().map(quote).collect::<Vec<_>>().join(&b' '))
}

/// A word without a NUL.
fn os(chunk: &Chunk) -> Option<OsString> {
    let bytes = chunk.clone().into_bytes().filter(|b| !b.contains(&0))?;
    Some(OsString::from_vec(bytes))
}

/// Passes signals on until the command ends. Without its client it is hung up, then killed.
async fn follow(mut stream: UnixStream, group: i32, mut exit: oneshot::Receiver<Exit>) -> io::Result<()> {
    // The half that reads runs apart, because a frame must not be dropped half read.
    let (sender, mut signals) = tokio::sync::mpsc::channel(8);
    let (mut reader, mut writer) = stream.split();
    let read = async {
        while let Ok(FromClient::Signal { number }) = read_frame(&mut reader).await {
            if sender.send(number).await.is_err() {
                break;
            }
        }
        drop(sender);
        std::future::pending::<()>().await;
    };
    tokio::pin!(read);
    loop {
        tokio::select! {
            end = &mut exit => {
                let code = end.map_or(255, |e| e.code);
                return writer.write_all(&sudo::frame(&ToClient::Exit { code })?).await;
            }
            () = &mut read => {}
            signal = signals.recv() => match signal {
                Some(number) if SIGNALS.contains(&number) => kill_group(group, number),
                Some(_) => {}
                None => break,
            },
        }
    }
    kill_group(group, libc::SIGHUP);
    kill_group(group, libc::SIGCONT);
    if tokio::time::timeout(GRACE, &mut exit).await.is_err() {
        kill_group(group, libc::SIGKILL);
    }
    Ok(())
}

/// The first frame, with its descriptors.
async fn request(stream: &mut UnixStream) -> io::Result<(Request, [OwnedFd; DESCRIPTORS])> {
    let mut header = [0; HEADER];
    let socket = stream.as_fd().try_clone_to_owned()?;
    let receive = || sudo::receive(&socket, &mut header);
    let (count, descriptors) = stream.async_io(Interest::READABLE, receive).await?;
    let descriptors = descriptors
        .try_into()
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    stream.read_exact(&mut header[count..]).await?;
    Ok((read_body(stream, header).await?, descriptors))
}

async fn read_frame<T: DeserializeOwned>(stream: &mut (impl AsyncReadExt + Unpin)) -> io::Result<T> {
    let mut header = [0; HEADER];
    stream.read_exact(&mut header).await?;
    read_body(stream, header).await
}

async fn read_body<T: DeserializeOwned>(
    stream: &mut (impl AsyncReadExt + Unpin),
    header: [u8; HEADER],
) -> io::Result<T> {
    let length = sudo::length(header)? as u64;
    // Grows with what really comes: a length alone costs nothing.
    let mut body = Vec::new();
    stream.take(length).read_to_end(&mut body).await?;
    Ok(serde_json::from_slice(&body)?)
}

/// Sends one frame, the descriptor with its first byte.
async fn send(stream: &mut UnixStream, message: &ToClient, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let frame = sudo::frame(message)?;
    let socket = stream.as_fd().try_clone_to_owned()?;
    let descriptors: Vec<_> = descriptor.into_iter().collect();
    let send = || sudo::send(socket.as_fd(), &frame, &descriptors);
    let sent = stream.async_io(Interest::WRITABLE, send).await?;
    stream.write_all(&frame[sent..]).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_a_shell() {
        let words = [
            "printf".into(),
            "%s|".into(),
            "a b".into(),
            "it's".into(),
            "$HOME\n*".into(),
        ];
        let output = std::process::Command::new("/bin/sh")
            .arg("-c")
            .arg(quoted(&words))
            .output()
            .unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "a b|it's|$HOME\n*|");
    }
}
