//! The SSH agent's socket in a sandbox. The keys are not here: each connection is handed on to the hypervisor by the
//! broker's port, so that whose keys they are follows from where it comes out. It must not read what passes.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use choir_link::ListenerKind;
use hyper::header::{CONNECTION, HOST, UPGRADE};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, UnixListener, UnixStream};

use crate::agent::Agent;

/// The socket's name in the agent's directory; `SSH_AUTH_SOCK` has the whole path.
pub const SOCKET: &str = "ssh.sock";
/// The verb by which `ssh` asks for the keys of granted hosts.
pub const KNOWN_HOSTS: &str = "ssh-known-hosts";

/// Read by OpenSSH's own configuration on most distributions.
const CONFIG: &str = "/etc/ssh/ssh_config.d/choir.conf";
/// `ssh` older than 8.5 does not know the command, and would refuse the file.
const CONFIGURED: &str = "\
# Written by the sandbox's agent at each start: hosts that are granted with a key are known.
IgnoreUnknown KnownHostsCommand
KnownHostsCommand /usr/libexec/choir/choir-sandbox ssh-known-hosts
";
/// How long the hypervisor, which may be restarting, may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);

/// Hands connections on for ever.
pub async fn serve(agent: Arc<Agent>, listener: UnixListener) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let agent = Arc::clone(&agent);
                // A client that breaks off has nobody to tell; one that is not served sees its connection end.
                tokio::spawn(async move { hand_on(&agent, stream).await });
            }
            // Out of descriptors, most likely: trying again at once would only spin.
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

async fn hand_on(agent: &Agent, mut client: UnixStream) -> io::Result<()> {
    let broker = agent.ports.broker.local_addr()?;
    let request = Request::get("/v1/ssh-agent")
        .header(CONNECTION, "Upgrade")
        .header(UPGRADE, "ssh-agent");
    let answer = within(ask(broker, request)).await?;
    if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Err(io::Error::other(format!("the broker answered {}", answer.status())));
    }
    let hypervisor = hyper::upgrade::on(answer).await.map_err(io::Error::other)?;
    tokio::io::copy_bidirectional(&mut client, &mut TokioIo::new(hypervisor)).await?;
    Ok(())
}

/// Makes `ssh` ask us which hosts are known. An image without OpenSSH gets the file as well, for when it is installed.
pub fn configure() -> io::Result<()> {
    let file = Path::new(CONFIG);
    if std::fs::read(file).is_ok_and(|is| is == CONFIGURED.as_bytes()) {
        return Ok(());
    }
    std::fs::create_dir_all(file.parent().unwrap_or(file))?;
    std::fs::write(file, CONFIGURED)
}

/// Prints the lines of granted hosts. It never fails: `ssh` would, although other files may know the host.
pub fn known_hosts(broker: Option<String>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let lines = runtime.and_then(|runtime| runtime.block_on(ask_known_hosts(broker)));
    if let Ok(lines) = lines {
        print!("{lines}");
    }
    ExitCode::SUCCESS
}

async fn ask_known_hosts(broker: Option<String>) -> io::Result<String> {
    let named = broker.as_deref().and_then(|url| url.strip_prefix("http://"));
    let address = named.and_then(|rest| rest.parse().ok());
    let address = address.unwrap_or_else(|| ([127, 0, 0, 1], ListenerKind::Broker.port()).into());
    within(async {
        let answer = ask(address, Request::get("/v1/ssh-known-hosts")).await?;
        let ok = answer.status() == StatusCode::OK;
        let body = axum::body::to_bytes(Body::new(answer.into_body()), 1 << 20).await;
        let body = body.map_err(io::Error::other)?;
        let text = if ok {
            String::from_utf8_lossy(&body).into_owned()
        } else {
            String::new()
        };
        Ok(text)
    })
    .await
}

async fn ask(
    broker: SocketAddr,
    request: hyper::http::request::Builder,
) -> io::Result<Response<hyper::body::Incoming>> {
    let stream = TcpStream::connect(broker).await?;
    let (mut send, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(io::Error::other)?;
    tokio::spawn(connection.with_upgrades());
    let request = request.header(HOST, broker.to_string()).body(Body::empty());
    let request = request.map_err(io::Error::other)?;
    send.send_request(request).await.map_err(io::Error::other)
}

async fn within<T>(what: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(ANSWER_WITHIN, what).await?
}
