//! The agent's end of the control link: says who it is, serves what it is handed, hands over what is asked. It comes
//! back for ever when the link is lost. It must not know what the requests are.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use choir_link::channel::check_socket;
use choir_link::{AgentConfig, Channel, FromAgent, ListenerKind, ToAgent, message};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::net::{TcpListener, UnixListener};
use tokio::task::JoinHandle;

use crate::agent::Agent;
use crate::api::{Callers, Listener, router, serve};
use crate::{dial, log, report, services, ssh_agent, sudo_server, sweep, trust};

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_millis(500);

/// Keeps a link for ever.
pub async fn run(agent: Arc<Agent>) {
    let mut link = Link {
        agent,
        api: None,
        welcomed: false,
    };
    let mut pause = FIRST_PAUSE;
    let mut said = String::new();
    loop {
        link.welcomed = false;
        let why = match link.session().await {
            Ok(()) => "it was closed".to_owned(),
            Err(e) => e.to_string(),
        };
        if link.welcomed {
            pause = FIRST_PAUSE;
            said.clear();
        }
        // Once per reason, not once per try.
        if said != why {
            log::say(&format!("no link to the hypervisor, trying again: {why}"));
            said = why;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

struct Link {
    agent: Arc<Agent>,
    /// Accepts on the socket of the last welcome. Set from the first welcome on.
    api: Option<JoinHandle<()>>,
    /// Whether this session got its welcome.
    welcomed: bool,
}

impl Link {
    async fn session(&mut self) -> io::Result<()> {
        let agent = Arc::clone(&self.agent);
        let run = &agent.place.run;
        let nonce = std::fs::read_to_string(run.join(message::NONCE))?.trim().to_owned();
        let channel = Arc::new(connect(&run.join(message::SOCKET))?);
        let hello = FromAgent::Hello {
            protocol: message::PROTOCOL,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            generation: agent.config().generation,
            report: Box::new(report::gather(&agent.place, &nonce)?),
            nonce,
            own: agent.own.clone(),
        };
        channel.send(&hello, None).await?;
        let (mut activity, mut ended) = (agent.activity(), agent.reaper.ended());
        activity.mark_changed();
        loop {
            tokio::select! {
                received = channel.receive() => match received? {
                    Some((ToAgent::Welcome { config }, socket)) => self.welcome(&channel, *config, socket).await?,
                    Some((ToAgent::Dial { id, port }, _)) => {
                        tokio::spawn(answer(Arc::clone(&agent), Arc::clone(&channel), id, port));
                    }
                    None => return Ok(()),
                },
                Ok(()) = activity.changed(), if self.welcomed => {
                    let now = *activity.borrow_and_update();
                    let message = FromAgent::Activity {
                        tasks: now.tasks,
                        terminals: now.terminals,
                        oom_kills: now.oom_kills,
                    };
                    channel.send(&message, None).await?;
                }
                // What the kernel killed shows soon: whoever started it ends, or it comes to us as an orphan.
                Ok(()) = ended.changed() => agent.count(),
            }
        }
    }

    async fn welcome(&mut self, channel: &Channel, config: AgentConfig, socket: Option<OwnedFd>) -> io::Result<()> {
        let socket = socket.ok_or_else(|| io::Error::other("the welcome came without a socket"))?;
        check_socket(socket.as_fd(), AddressFamily::UNIX, true)?;
        if let Err(e) = trust::write(&self.agent.place.agent, config.authority.as_deref()) {
            log::say(&format!("the certificates cannot be written: {e}"));
        }
        self.agent.set_config(config);
        let listener = Listener::Unix(unix_listener(socket.into())?);
        let api = tokio::spawn(serve(listener, sweep::router(Arc::clone(&self.agent)), Callers::All));
        match self.api.replace(api) {
            Some(old) => old.abort(),
            None => begin(&self.agent)?,
        }
        self.welcomed = true;
        let ports = &self.agent.ports;
        for (kind, listener) in [
            (ListenerKind::Broker, &ports.broker),
            (ListenerKind::Egress, &ports.egress),
        ] {
            channel
                .send(&FromAgent::Listener { kind }, Some(listener.as_fd()))
                .await?;
        }
        Ok(())
    }
}

/// The first welcome of this generation: opens the doors inside the sandbox and starts what should run.
fn begin(agent: &Arc<Agent>) -> io::Result<()> {
    if !agent.place.is_dev()
        && let Err(e) = agent.user().prepare_home()
    {
        log::say(&format!("HOME cannot be prepared: {e}"));
    }
    let api = Listener::Unix(bind(&agent.place.agent.join("api.sock"))?);
    tokio::spawn(serve(api, router(Arc::clone(agent)), Callers::All));
    match &agent.ports.api {
        Some(listener) => {
            listener.set_nonblocking(true)?;
            let listener = Listener::Tcp(TcpListener::from_std(listener.try_clone()?)?);
            tokio::spawn(serve(listener, router(Arc::clone(agent)), Callers::NotBrowsers));
        }
        None if agent.place.is_dev() => {}
        None => log::say("port 8080 is taken: the API is on its socket only"),
    }
    let sudo = bind(&agent.place.agent.join("sudo.sock"))?;
    tokio::spawn(sudo_server::serve(Arc::clone(agent), sudo));
    let keys = bind(&agent.place.agent.join(ssh_agent::SOCKET))?;
    tokio::spawn(ssh_agent::serve(Arc::clone(agent), keys));
    if !agent.place.is_dev()
        && let Err(e) = ssh_agent::configure()
    {
        log::say(&format!("ssh will not know granted hosts: {e}"));
    }
    if let Some(reason) = &agent.config().unheeded {
        log::say(&format!("choir.toml is not in effect: {reason}"));
    }
    services::start(agent);
    Ok(())
}

/// A socket that everybody in the sandbox may open, in place of what an earlier generation left.
fn bind(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
    Ok(listener)
}

fn unix_listener(socket: std::os::unix::net::UnixListener) -> io::Result<UnixListener> {
    socket.set_nonblocking(true)?;
    UnixListener::from_std(socket)
}

/// Connects without waiting: whoever is in the sandbox can fill the queue of a hypervisor that is away.
fn connect(path: &Path) -> io::Result<Channel> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Channel::new(socket)
}

async fn answer(agent: Arc<Agent>, channel: Arc<Channel>, id: u64, port: u16) {
    // A link that broke meanwhile has nobody to tell.
    let _ = match dial::dial(&agent.ports, port).await {
        Ok(socket) => channel.send(&FromAgent::Dialled { id }, Some(socket.as_fd())).await,
        Err(reason) => channel.send(&FromAgent::DialFailed { id, reason }, None).await,
    };
}
