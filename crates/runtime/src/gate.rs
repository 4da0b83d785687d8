//! Where a generation's agent knocks: its directory, its sockets, the handshake, and the link that results.
//! Shared by the real runtimes. It must not know what a container is: whether a report may pass is asked of an
//! `Examiner`.
//!
//! ```text
//! <run>/<sandbox>-<number>/            0711
//!     choir/                           0711, mounted read-only at /run/choir
//!         hypervisor.sock              0666, SOCK_SEQPACKET
//!         nonce
//!     agent.sock                       bound by us, served by the agent; outside the sandbox's reach
//!     hosts, resolv.conf, hostname
//! ```

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use choir_core::{Door, Generation, Own};
use choir_link::message::{MAX_CONFIG, NONCE, PROTOCOL, SOCKET};
use choir_link::{AgentConfig, Channel, FromAgent, Listener, SelfReport, ToAgent};
use subtle::ConstantTimeEq;
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinHandle, JoinSet};

use crate::link::{Context, Link};
use crate::template::{self, FILES};
use crate::{Error, Notice, Result, Spec, Stream};

/// Notices that may wait for the reconciler.
const NOTICES: usize = 1024;
/// From connecting to a complete hello.
const HELLO: Duration = Duration::from_secs(5);
/// From hello to welcome: as long as the container service may need to say what it started.
const EXAMINE: Duration = Duration::from_secs(25);
/// Handshakes of one generation at once.
const HANDSHAKES: usize = 8;
/// How long the agent's own socket may take.
const OPEN: Duration = Duration::from_secs(5);
/// The kernel's limit for the path of a Unix socket, without the final NUL.
const SUN_PATH: usize = 107;

/// Decides whether a container is what its template says.
#[async_trait]
pub(crate) trait Examiner: Send + Sync {
    /// An error is a sentence for the log; whoever refuses has dealt with the container.
    async fn examine(&self, generation: &Generation, report: &SelfReport) -> Result<(), String>;
}

/// All open gates of a runtime, and the channel its notices go to.
pub(crate) struct Gates {
    run: PathBuf,
    fixed_ports: bool,
    examiner: Arc<dyn Examiner>,
    open: Mutex<HashMap<Generation, Arc<Gate>>>,
    notices: mpsc::Sender<Notice>,
}

/// The sending and the receiving end of a runtime's notices.
pub(crate) fn notices() -> (mpsc::Sender<Notice>, Mutex<Option<mpsc::Receiver<Notice>>>) {
    let (sender, receiver) = mpsc::channel(NOTICES);
    (sender, Mutex::new(Some(receiver)))
}

struct Gate {
    agent: PathBuf,
    link: Arc<Mutex<Option<Arc<Link>>>>,
    task: JoinHandle<()>,
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What a handshake is measured against.
struct Lock {
    spec: Spec,
    context: Context,
    listener: UnixListener,
    examiner: Arc<dyn Examiner>,
    link: Arc<Mutex<Option<Arc<Link>>>>,
}

impl Gates {
    pub fn new(run: &Path, fixed_ports: bool, examiner: Arc<dyn Examiner>, notices: mpsc::Sender<Notice>) -> Self {
        Self {
            run: run.to_owned(),
            fixed_ports,
            examiner,
            open: Mutex::default(),
            notices,
        }
    }

    /// The directory of a generation.
    pub fn directory(&self, generation: &Generation) -> PathBuf {
        self.run.join(format!("{}-{}", generation.sandbox, generation.number))
    }

    /// Makes the directory and begins to listen. Open already, it is opened afresh: the agent comes back.
    pub fn open(&self, spec: &Spec) -> Result<()> {
        let directory = self.directory(&spec.generation);
        prepare(&directory, spec).map_err(|e| {
            Error::Refused(format!(
                "{} cannot be made ready: {e}; check that its directory exists and belongs to this user",
                directory.display()
            ))
        })?;
        let agent = directory.join("agent.sock");
        let knock = Listener::bind(&directory.join("choir").join(SOCKET))?;
        let lock = Arc::new(Lock {
            spec: spec.clone(),
            context: Context {
                generation: spec.generation.clone(),
                notices: self.notices.clone(),
                fixed_ports: self.fixed_ports,
            },
            listener: bind(&agent)?,
            examiner: Arc::clone(&self.examiner),
            link: Arc::default(),
        });
        let gate = Gate {
            agent,
            link: Arc::clone(&lock.link),
            task: tokio::spawn(listen(knock, lock)),
        };
        self.gates().insert(spec.generation.clone(), Arc::new(gate));
        Ok(())
    }

    /// Stops listening and removes the directory.
    pub fn close(&self, generation: &Generation) -> Result<()> {
        self.gates().remove(generation);
        match fs::remove_dir_all(self.directory(generation)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e.into()),
            _ => Ok(()),
        }
    }

    /// A fresh connection through the generation's link.
    pub async fn enter(&self, generation: &Generation, door: Door) -> Result<Stream> {
        let gate = self.gates().get(generation).cloned().ok_or(Error::NotFound)?;
        let link = present(&gate.link).ok_or_else(|| Error::Unavailable("its agent is not connected".into()))?;
        match door {
            Door::Port(port) => link.dial(port).await,
            Door::Agent => {
                let connecting = tokio::time::timeout(OPEN, UnixStream::connect(&gate.agent));
                match connecting.await {
                    Ok(Ok(stream)) => Ok(Stream::Unix(stream)),
                    Ok(Err(e)) if e.kind() == io::ErrorKind::WouldBlock => {
                        Err(Error::Busy("its agent does not keep up with connections".into()))
                    }
                    Ok(Err(e)) => Err(Error::Unavailable(format!("its agent's socket: {e}"))),
                    Err(_) => Err(Error::Unavailable("its agent does not accept".into())),
                }
            }
        }
    }

    fn gates(&self) -> std::sync::MutexGuard<'_, HashMap<Generation, Arc<Gate>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn present(link: &Mutex<Option<Arc<Link>>>) -> Option<Arc<Link>> {
    link.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Whether a socket of ours for this generation has a path the kernel takes.
fn check_length(path: &Path) -> io::Result<()> {
    let length = path.as_os_str().len();
    if length > SUN_PATH {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "{} has {length} characters and a socket's path may have {SUN_PATH}: choose a shorter data directory",
                path.display()
            ),
        ));
    }
    Ok(())
}

/// Makes directory and files. Where they exist they keep their inodes, because a container may have them mounted.
fn prepare(directory: &Path, spec: &Spec) -> io::Result<()> {
    let inner = directory.join("choir");
    check_length(&inner.join(SOCKET))?;
    fs::create_dir_all(&inner)?;
    // Passable, for the container's mapped ids, and not listable.
    fs::set_permissions(directory, fs::Permissions::from_mode(0o711))?;
    fs::set_permissions(&inner, fs::Permissions::from_mode(0o711))?;
    write(&inner.join(NONCE), &spec.nonce)?;
    for path in FILES {
        write(
            &template::own_file(directory, path),
            &template::file(path, &spec.hostname),
        )?;
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644))
}

/// The agent's listening socket. Only this user can connect to its path.
fn bind(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

async fn listen(knock: Listener, lock: Arc<Lock>) {
    let slots = Arc::new(Semaphore::new(HANDSHAKES));
    let mut tasks = JoinSet::new();
    loop {
        while tasks.try_join_next().is_some() {}
        match knock.accept().await {
            Ok(channel) => {
                // Over the limit the connection is dropped: an agent tries again.
                if let Ok(slot) = Arc::clone(&slots).try_acquire_owned() {
                    let lock = Arc::clone(&lock);
                    tasks.spawn(async move {
                        let shaken = handshake(channel, &lock).await;
                        drop(slot);
                        match shaken {
                            Ok((link, own)) => serve(link, own, &lock).await,
                            Err(why) => {
                                tracing::warn!(generation = %lock.context.generation, why, "a handshake was refused");
                            }
                        }
                    });
                }
            }
            Err(e) => {
                tracing::warn!(generation = %lock.context.generation, error = %e, "accepting a control link failed");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn handshake(channel: Channel, lock: &Lock) -> Result<(Arc<Link>, Arc<Own>), String> {
    let hello = tokio::time::timeout(HELLO, channel.receive::<FromAgent>()).await;
    let (report, own) = match hello {
        Ok(Ok(Some((message, None)))) => admit(message, &lock.spec)?,
        Ok(Ok(None)) => return Err("it closed before saying hello".into()),
        Ok(Ok(Some((_, Some(_))))) => return Err("its hello carried a descriptor".into()),
        Ok(Err(e)) => return Err(e.to_string()),
        Err(_) => return Err("no hello within 5 s".into()),
    };
    tokio::time::timeout(EXAMINE, lock.examiner.examine(&lock.spec.generation, &report))
        .await
        .map_err(|_| "the container could not be examined in time".to_owned())??;
    let link = Arc::new(Link::new(channel));
    let (config, own) = with_own(&lock.spec.agent, Own::of(own));
    let welcome = ToAgent::Welcome {
        config: Box::new(config),
    };
    tokio::time::timeout(HELLO, link.welcome(&welcome, lock.listener.as_fd()))
        .await
        .map_err(|_| "it did not take its welcome".to_owned())?
        .map_err(|e| format!("it did not take its welcome: {e}"))?;
    Ok((link, Arc::new(own)))
}

/// What the agent is told, with what its home says on top, and how much of that is in effect.
fn with_own(made: &AgentConfig, own: Own) -> (AgentConfig, Own) {
    let mut config = made.clone();
    own.apply(&mut config.env, &mut config.services);
    let length = serde_json::to_vec(&config).map_or(usize::MAX, |text| text.len());
    let own = match own {
        Own::Says(_) if length > MAX_CONFIG => {
            config = made.clone();
            Own::Refused("environment and services are too long with it; make them shorter".to_owned())
        }
        own => own,
    };
    config.unheeded = own.refusal().map(str::to_owned);
    (config, own)
}

/// The report of a hello that proves its generation, and what the home says.
fn admit(hello: FromAgent, spec: &Spec) -> Result<(SelfReport, Option<Result<String, String>>), String> {
    let FromAgent::Hello {
        protocol,
        generation,
        nonce,
        report,
        own,
        ..
    } = hello
    else {
        return Err("its first message was no hello".into());
    };
    if !(PROTOCOL.saturating_sub(1).max(1)..=PROTOCOL).contains(&protocol) {
        return Err(format!("it speaks protocol {protocol} and we speak {PROTOCOL}"));
    }
    // An agent learns its number with its first welcome; until then it says 0.
    if generation != 0 && generation != spec.generation.number {
        return Err(format!("it says it is generation {generation}"));
    }
    if !bool::from(nonce.as_bytes().ct_eq(spec.nonce.as_bytes())) {
        return Err("its nonce is wrong".into());
    }
    Ok((*report, own))
}

/// Serves a link in place of the one before, until it ends.
async fn serve(link: Arc<Link>, own: Arc<Own>, lock: &Lock) {
    let generation = &lock.context.generation;
    let ready = Notice::Ready {
        generation: generation.clone(),
        own,
    };
    let before = lock
        .link
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .replace(Arc::clone(&link));
    if let Some(before) = before {
        before.replace();
    }
    let _ = lock.context.notices.send(ready).await;
    let why = link.serve(&lock.context).await;
    tracing::info!(%generation, why, "a control link ended");
    let ours = {
        let mut present = lock.link.lock().unwrap_or_else(PoisonError::into_inner);
        let ours = present.as_ref().is_some_and(|l| Arc::ptr_eq(l, &link));
        if ours {
            *present = None;
        }
        ours
    };
    if ours {
        let _ = lock
            .context
            .notices
            .send(Notice::Lost {
                generation: generation.clone(),
            })
            .await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made() -> AgentConfig {
        AgentConfig {
            env: [("A".to_owned(), "1".to_owned())].into(),
            services: [("start".to_owned(), "old".to_owned())].into(),
            ..Default::default()
        }
    }

    #[test]
    fn what_a_home_says_is_on_top_of_what_the_generation_was_made_with() {
        let says = Own::of(Some(Ok("start = \"new\"\n[env]\nB = \"2\"\n".to_owned())));
        let (config, own) = with_own(&made(), says.clone());
        assert_eq!((config.env.len(), config.services["start"].as_str()), (2, "new"));
        assert_eq!((own, config.unheeded), (says, None));
    }

    #[test]
    fn what_is_refused_or_does_not_fit_the_message_leaves_all_as_it_was_and_says_why() {
        let wrong = Own::of(Some(Ok("strat = 1".to_owned())));
        let (config, own) = with_own(&made(), wrong);
        assert!(own.refusal().is_some_and(|why| why.contains("strat")));
        assert_eq!(config.unheeded.as_deref(), own.refusal());
        assert_eq!((config.env, config.services), (made().env, made().services));

        let mut long = made();
        long.env.insert("LONG".to_owned(), "x".repeat(MAX_CONFIG - 8 * 1024));
        let says = Own::of(Some(Ok(format!("[env]\nB = \"{}\"\n", "y".repeat(12 * 1024)))));
        let (config, own) = with_own(&long, says);
        assert!(own.refusal().is_some_and(|why| why.contains("too long")), "{own:?}");
        assert_eq!(config.env, long.env);
    }
}
