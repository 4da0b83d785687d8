//! A sandbox for a test: the agent's process, the runtime's end of its link, and clients of its API.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use choir_api::sandbox::ExecResult;
use choir_link::{AgentConfig, Channel, FromAgent, Listener, ListenerKind, SelfReport, ToAgent};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio_tungstenite::WebSocketStream;

pub const BINARY: &str = env!("CARGO_BIN_EXE_choir-sandbox");
pub const NONCE: &str = "0123456789abcdef";

/// Fails a test that waits for what never comes.
pub async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), what)
        .await
        .expect("it happens soon")
}

/// Waits until a condition holds.
pub async fn until(mut condition: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    soon(wait).await;
}

/// The runtime's end of one link, after the handshake.
pub struct Link {
    pub channel: Channel,
    pub report: Box<SelfReport>,
    pub broker: std::net::TcpListener,
    pub egress: std::net::TcpListener,
}

impl Link {
    pub async fn next(&self) -> (FromAgent, Option<OwnedFd>) {
        soon(self.channel.receive()).await.unwrap().expect("the link is open")
    }

    pub async fn dial(&self, id: u64, port: u16) -> Result<OwnedFd, String> {
        self.channel.send(&ToAgent::Dial { id, port }, None).await.unwrap();
        loop {
            match self.next().await {
                (FromAgent::Dialled { id: got }, fd) if got == id => return Ok(fd.unwrap()),
                (FromAgent::DialFailed { id: got, reason }, _) if got == id => return Err(reason),
                _ => {}
            }
        }
    }
}

pub struct Sandbox {
    pub directory: tempfile::TempDir,
    pub agent: Child,
    pub log: Lines<BufReader<pipe::Receiver>>,
    door: Listener,
    apis: u32,
    /// The signal that takes everything with it.
    end_with: i32,
}

impl Sandbox {
    /// A running agent that has not been welcomed yet.
    pub fn start() -> Self {
        Self::start_in(|_| {})
    }

    /// One whose home was prepared before.
    pub fn start_in(prepare: impl FnOnce(&Path)) -> Self {
        Self::start_with(libc::SIGTERM, |dir| {
            prepare(&dir.join("home"));
            let mut command = Command::new(BINARY);
            command.arg("agent").env_clear().env("PATH", "/usr/bin:/bin");
            command.env("CHOIR_RUN_DIR", dir.join("run"));
            command.env("CHOIR_AGENT_DIR", dir.join("agent"));
            command.env("CHOIR_HOME", dir.join("home"));
            command
        })
    }

    pub fn start_with(end_with: i32, command: impl FnOnce(&Path) -> Command) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("run")).unwrap();
        std::fs::create_dir(directory.path().join("home")).unwrap();
        std::fs::write(directory.path().join("run/nonce"), NONCE).unwrap();
        let door = Listener::bind(&directory.path().join("run/hypervisor.sock")).unwrap();
        let mut agent = command(directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let log = pipe::Receiver::from_owned_fd(agent.stdout.take().unwrap().into()).unwrap();
        Self {
            directory,
            agent,
            log: BufReader::new(log).lines(),
            door,
            apis: 0,
            end_with,
        }
    }

    /// An agent that was welcomed with an empty configuration.
    pub async fn ready() -> (Self, Link) {
        let mut sandbox = Self::start();
        let link = sandbox.welcome(config()).await;
        (sandbox, link)
    }

    /// Accepts the agent's next link.
    pub async fn accept(&self) -> (Channel, FromAgent) {
        let channel = soon(self.door.accept()).await.unwrap();
        let (hello, _) = soon(channel.receive()).await.unwrap().unwrap();
        (channel, hello)
    }

    /// Accepts the agent's next link and welcomes it with a new listener.
    pub async fn welcome(&mut self, config: AgentConfig) -> Link {
        let (channel, hello) = self.accept().await;
        let FromAgent::Hello { nonce, report, .. } = hello else {
            panic!("the first message is {hello:?}");
        };
        assert_eq!(nonce, NONCE);
        self.apis += 1;
        let api = std::os::unix::net::UnixListener::bind(self.api()).unwrap();
        let welcome = ToAgent::Welcome {
            config: Box::new(config),
        };
        channel.send(&welcome, Some(api.as_fd())).await.unwrap();
        let take = async |wanted| match soon(channel.receive()).await.unwrap().unwrap() {
            (FromAgent::Listener { kind }, Some(fd)) if kind == wanted => {
                choir_link::channel::check_socket(fd.as_fd(), rustix::net::AddressFamily::INET, true).unwrap();
                std::net::TcpListener::from(fd)
            }
            other => panic!("instead of a listener came {other:?}"),
        };
        let (broker, egress) = (take(ListenerKind::Broker).await, take(ListenerKind::Egress).await);
        Link {
            channel,
            report: report.clone(),
            broker,
            egress,
        }
    }

    /// Where the API of the last welcome is.
    pub fn api(&self) -> PathBuf {
        self.directory.path().join(format!("api-{}.sock", self.apis))
    }

    pub fn home(&self) -> PathBuf {
        self.directory.path().join("home")
    }

    pub async fn client(&self) -> Client {
        Client::connect(&self.api()).await
    }

    pub async fn request(&self, method: &str, path: &str, body: Value) -> (StatusCode, Value) {
        self.client().await.json(method, path, body).await
    }

    pub async fn get(&self, path: &str) -> Value {
        let (status, body) = self.request("GET", path, Value::Null).await;
        assert_eq!(status, 200, "{body}");
        body
    }

    /// A plain exec that must be answered.
    pub async fn exec(&self, body: Value) -> ExecResult {
        let (status, body) = self.request("POST", "/exec", body).await;
        assert_eq!(status, 200, "{body}");
        serde_json::from_value(body).unwrap()
    }

    pub async fn websocket(&self, path: &str) -> WebSocketStream<UnixStream> {
        let stream = UnixStream::connect(self.api()).await.unwrap();
        let (socket, _) = soon(tokio_tungstenite::client_async(format!("ws://sandbox{path}"), stream))
            .await
            .unwrap();
        socket
    }

    /// Reads the log until a line contains `text`.
    pub async fn logged(&mut self, text: &str) -> String {
        loop {
            let line = soon(self.log.next_line()).await.unwrap().expect("the log goes on");
            if line.contains(text) {
                return line;
            }
        }
    }

    /// Sends SIGTERM and waits for the end.
    pub async fn stop(&mut self) -> std::process::ExitStatus {
        signal(self.agent.id(), libc::SIGTERM);
        let mut status = None;
        until(async || {
            status = self.agent.try_wait().unwrap();
            status.is_some()
        })
        .await;
        status.unwrap()
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if let Ok(None) = self.agent.try_wait() {
            signal(self.agent.id(), self.end_with);
            let _ = self.agent.wait();
        }
    }
}

pub fn signal(pid: u32, signal: i32) {
    // SAFETY: integers; the process is a child of this test and not reaped yet.
    unsafe { libc::kill(pid.cast_signed(), signal) };
}

/// Whether a process is there and not merely waiting to be reaped.
pub fn is_alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

pub fn config() -> AgentConfig {
    AgentConfig {
        sandbox_id: "s-test".to_owned(),
        generation: 3,
        nonce: NONCE.to_owned(),
        env: [
            ("PATH", "/usr/local/bin:/usr/bin:/bin"),
            ("FROM_CONFIG", "yes"),
            ("CHOIR_BROKER_URL", "http://127.0.0.1:9091"),
        ]
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .into(),
        services: Default::default(),
        authority: None,
        unheeded: None,
    }
}

/// One connection to the API.
pub struct Client(hyper::client::conn::http1::SendRequest<Full<Bytes>>);

impl Client {
    pub async fn connect(path: &Path) -> Self {
        let stream = soon(UnixStream::connect(path)).await.unwrap();
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .unwrap();
        tokio::spawn(connection);
        Self(sender)
    }

    pub async fn send(&mut self, request: Request<Full<Bytes>>) -> Response<Incoming> {
        soon(self.0.send_request(request)).await.unwrap()
    }

    pub async fn json(&mut self, method: &str, path: &str, body: Value) -> (StatusCode, Value) {
        let response = self.send(request(method, path, &[], body)).await;
        let status = response.status();
        let bytes = soon(response.into_body().collect()).await.unwrap().to_bytes();
        (status, serde_json::from_slice(&bytes).unwrap_or_default())
    }

    /// Server-sent events.
    pub async fn events(mut self, method: &str, path: &str, headers: &[(&str, &str)], body: Value) -> Events {
        let headers = [headers, &[("accept", "text/event-stream")]].concat();
        let response = self.send(request(method, path, &headers, body)).await;
        assert_eq!(response.status(), 200);
        Events {
            body: response.into_body(),
            buffer: String::new(),
            _client: self,
        }
    }
}

pub fn request(method: &str, path: &str, headers: &[(&str, &str)], body: Value) -> Request<Full<Bytes>> {
    let bytes = if body.is_null() {
        Vec::new()
    } else {
        serde_json::to_vec(&body).unwrap()
    };
    let mut builder = Request::builder().method(method).uri(path).header("host", "sandbox");
    if !bytes.is_empty() {
        builder = builder.header("content-type", "application/json");
    }
    for (name, value) in headers {
        builder = builder.header(*name, *value);
    }
    builder.body(Full::new(bytes.into())).unwrap()
}

/// One server-sent event.
#[derive(Debug, Clone)]
pub struct Event {
    pub name: String,
    pub id: String,
    pub data: Value,
}

pub struct Events {
    body: Incoming,
    buffer: String,
    _client: Client,
}

impl Events {
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some((event, rest)) = self.buffer.split_once("\n\n") {
                let field = |name: &str| {
                    event
                        .lines()
                        .find_map(|l| l.strip_prefix(name))
                        .unwrap_or_default()
                        .to_owned()
                };
                let event = Event {
                    name: field("event: "),
                    id: field("id: "),
                    data: serde_json::from_str(&field("data: ")).unwrap_or_default(),
                };
                self.buffer = rest.to_owned();
                if !event.name.is_empty() {
                    return Some(event);
                }
                continue;
            }
            let frame = soon(self.body.frame()).await?.unwrap();
            self.buffer
                .push_str(std::str::from_utf8(frame.data_ref().unwrap()).unwrap());
        }
    }
}
