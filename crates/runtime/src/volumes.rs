//! The client of `choir-volumes`: one line out, one line back, over its socket. It must not know how a disk does it.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use choir_core::snapshot::Diff;
use choir_core::{IdRange, SandboxId};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::template::HOME;
use crate::{Error, Result, Space, Usage, Volumes};

/// What only changes names and numbers.
const QUICK: Duration = Duration::from_secs(60);
/// What walks all files of a volume, where the disk cannot share them.
const SLOW: Duration = Duration::from_secs(1800);
/// What compares two volumes for 20 s at most, one after the other.
const COMPARING: Duration = Duration::from_secs(120);
/// What passes a volume on as fast as somebody takes or brings it. Whoever holds the other end of the pipe ends it sooner.
const CARRYING: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long a volume is waited for that something else has.
const BUSY_FOR: Duration = Duration::from_secs(30);
/// The longest answer: the list of all volumes.
const MAX_ANSWER: u64 = 4 << 20;

/// Calls at the same time, the others wait: the helper refuses more than 64, and the operator's tools ask it, too.
const AT_ONCE: usize = 32;

/// The helper behind a Unix socket. A connection a call.
#[derive(Debug, Clone)]
pub struct VolumesClient {
    socket: PathBuf,
    turns: Arc<Semaphore>,
}

#[derive(Deserialize)]
struct Refusal {
    code: String,
    message: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Answer<T> {
    Error { error: Refusal },
    Done(T),
}

/// Why a call failed, with the helper's code kept apart so that a caller can take `exists` for done.
enum Failure {
    Refused(Refusal),
    Other(Error),
}

#[derive(Deserialize)]
struct Nothing {}

impl VolumesClient {
    /// A client of the helper that listens at `socket`. Nothing is connected before the first call.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            turns: Arc::new(Semaphore::new(AT_ONCE)),
        }
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        request: Value,
        archive: Option<BorrowedFd<'_>>,
        by: Duration,
    ) -> Result<T> {
        self.try_ask(request, archive, by).await.map_err(Error::from)
    }

    /// As `ask`, for requests that may find their work already done.
    async fn ensure(&self, request: Value, by: Duration) -> Result<()> {
        match self.try_ask::<Nothing>(request, None, by).await {
            Err(Failure::Refused(refusal)) if refusal.code == "exists" => Ok(()),
            done => done.map(|_| ()).map_err(Error::from),
        }
    }

    /// A volume that another request is changing is asked for again: what holds it mostly takes milliseconds.
    async fn try_ask<T: DeserializeOwned>(
        &self,
        request: Value,
        archive: Option<BorrowedFd<'_>>,
        by: Duration,
    ) -> Result<T, Failure> {
        let given_up = Instant::now() + BUSY_FOR;
        let mut wait = Duration::from_millis(5);
        loop {
            match self.ask_once(&request, archive, by).await {
                Err(Failure::Refused(refusal)) if refusal.code == "busy" && Instant::now() + wait < given_up => {
                    tokio::time::sleep(wait).await;
                    wait = (wait * 2).min(Duration::from_millis(500));
                }
                answered => return answered,
            }
        }
    }

    async fn ask_once<T: DeserializeOwned>(
        &self,
        request: &Value,
        archive: Option<BorrowedFd<'_>>,
        by: Duration,
    ) -> Result<T, Failure> {
        let line = tokio::time::timeout(by, self.exchange(request, archive))
            .await
            .map_err(|_| silent(&self.socket, &format!("no answer within {} s", by.as_secs())))?
            .map_err(|e| silent(&self.socket, &e.to_string()))?;
        match serde_json::from_str(&line) {
            Ok(Answer::Done(answer)) => Ok(answer),
            Ok(Answer::Error { error }) => Err(Failure::Refused(error)),
            Err(_) => Err(Failure::Other(Error::Protocol(format!(
                "choir-volumes at {} sent a line that is no answer; is it of this version?",
                self.socket.display()
            )))),
        }
    }

    async fn import_from(&self, request: Value, archive: &Path) -> Result<String> {
        let file = std::fs::File::open(archive)
            .map_err(|e| Error::Refused(format!("the archive {} cannot be read: {e}", archive.display())))?;
        let unpacked: Unpacked = self.ask(request, Some(file.as_fd()), SLOW).await?;
        Ok(unpacked.sha256)
    }

    async fn exchange(&self, request: &Value, archive: Option<BorrowedFd<'_>>) -> io::Result<String> {
        let _turn = self.turns.acquire().await.map_err(io::Error::other)?;
        let mut stream = UnixStream::connect(&self.socket).await?;
        let line = format!("{request}\n");
        let sent = match archive {
            Some(fd) => send_with(&stream, line.as_bytes(), fd).await?,
            None => 0,
        };
        stream.write_all(&line.as_bytes()[sent..]).await?;
        let mut answer = String::new();
        BufReader::new(stream.take(MAX_ANSWER)).read_line(&mut answer).await?;
        if answer.ends_with('\n') {
            Ok(answer)
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }
}

/// Sends the beginning of a line together with a descriptor; returns how many bytes went.
async fn send_with(stream: &UnixStream, bytes: &[u8], descriptor: BorrowedFd<'_>) -> io::Result<usize> {
    stream
        .async_io(Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let descriptors = [descriptor];
            control.push(SendAncillaryMessage::ScmRights(&descriptors));
            let bytes = [IoSlice::new(bytes)];
            Ok(rustix::net::sendmsg(
                stream.as_fd(),
                &bytes,
                &mut control,
                SendFlags::NOSIGNAL,
            )?)
        })
        .await
}

fn silent(socket: &Path, why: &str) -> Failure {
    Failure::Other(Error::Unavailable(format!(
        "choir-volumes at {} ({why}); start it, or correct its socket in the configuration",
        socket.display()
    )))
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Other(error) => error,
            Failure::Refused(refusal) => match refusal.code.as_str() {
                "not_found" => Error::NotFound,
                "busy" => Error::Busy(refusal.message),
                "no_space" => Error::NoSpace(refusal.message),
                _ => Error::Refused(refusal.message),
            },
        }
    }
}

/// Where a sandbox has what is at a path of its volume.
fn inside(path: &str) -> String {
    match path.split_once('/') {
        Some(("home", below)) => format!("{HOME}/{below}"),
        Some((_, below)) => format!("/{below}"),
        None if path == "home" => HOME.to_owned(),
        None => "/".to_owned(),
    }
}

#[derive(Deserialize)]
struct Hello {
    backend: String,
}

#[derive(Deserialize)]
struct Pool {
    total: u64,
    free: u64,
    volumes: Vec<String>,
}

#[derive(Deserialize)]
struct Unpacked {
    sha256: String,
}

#[async_trait]
impl Volumes for VolumesClient {
    async fn backend(&self) -> Result<String> {
        let hello: Hello = self.ask(json!({"verb": "hello"}), None, QUICK).await?;
        Ok(hello.backend)
    }

    async fn list(&self) -> Result<Vec<String>> {
        let pool: Pool = self.ask(json!({"verb": "usage"}), None, QUICK).await?;
        Ok(pool.volumes)
    }

    async fn space(&self) -> Result<Space> {
        let Pool { total, free, .. } = self.ask(json!({"verb": "usage"}), None, QUICK).await?;
        Ok(Space { total, free })
    }

    async fn import(&self, release: &str, archive: &Path) -> Result<String> {
        let request = json!({"verb": "create", "volume": release, "from": "tar"});
        self.import_from(request, archive).await
    }

    async fn import_image(&self, release: &str, archive: &Path, most: u64) -> Result<String> {
        let request = json!({"verb": "create", "volume": release, "from": "image", "most": most});
        self.import_from(request, archive).await
    }

    async fn shift(&self, volume: &str, ids: IdRange) -> Result<()> {
        let request = json!({"verb": "shift", "volume": volume, "base": ids.base, "size": IdRange::SIZE});
        self.ask::<Nothing>(request, None, SLOW).await.map(|_| ())
    }

    async fn seal(&self, volume: &str) -> Result<()> {
        let request = json!({"verb": "seal", "volume": volume});
        self.ask::<Nothing>(request, None, QUICK).await.map(|_| ())
    }

    async fn derive(&self, source: &str, target: &str) -> Result<()> {
        let request = json!({"verb": "snapshot", "source": source, "volume": target, "only": "root"});
        self.ensure(request, SLOW).await
    }

    async fn replace_root(&self, release: &str, sandbox: &SandboxId) -> Result<()> {
        let request = json!({"verb": "snapshot", "source": release, "volume": sandbox.as_str(), "replace": "root"});
        self.ask::<Nothing>(request, None, SLOW).await.map(|_| ())
    }

    async fn snapshot(&self, source: &str, target: &str, readonly: bool) -> Result<()> {
        let request = json!({"verb": "snapshot", "source": source, "volume": target, "readonly": readonly});
        self.ensure(request, SLOW).await
    }

    async fn delete(&self, volume: &str) -> Result<()> {
        self.ask::<Nothing>(json!({"verb": "delete", "volume": volume}), None, SLOW)
            .await
            .map(|_| ())
    }

    async fn limit(&self, volume: &str, bytes: u64) -> Result<()> {
        let request = json!({"verb": "limit", "volume": volume, "bytes": bytes});
        self.ask::<Nothing>(request, None, QUICK).await.map(|_| ())
    }

    async fn usage(&self, volume: &str) -> Result<Usage> {
        self.ask(json!({"verb": "usage", "volume": volume}), None, QUICK).await
    }

    async fn diff(&self, from: &str, to: &str, most: usize) -> Result<Diff> {
        let request = json!({"verb": "diff", "from": from, "to": to, "most": most});
        let mut diff: Diff = self.ask(request, None, COMPARING).await?;
        for entry in &mut diff.entries {
            entry.path = inside(&entry.path);
        }
        Ok(diff)
    }

    async fn pack(&self, snapshot: &str, into: OwnedFd) -> Result<()> {
        let request = json!({"verb": "pack", "volume": snapshot});
        let packed = self.ask::<Nothing>(request, Some(into.as_fd()), CARRYING).await;
        packed.map(|_| ())
    }

    async fn unpack(&self, snapshot: &str, from: OwnedFd, ids: IdRange, most: u64) -> Result<()> {
        let request = json!({
            "verb": "create", "volume": snapshot, "from": "volume", "most": most,
            "base": ids.base, "size": IdRange::SIZE,
        });
        let unpacked = self.ask::<Nothing>(request, Some(from.as_fd()), CARRYING).await;
        unpacked.map(|_| ())
    }
}
