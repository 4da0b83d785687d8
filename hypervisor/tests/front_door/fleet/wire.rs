//! The hypervisor on a loopback port as `serve` runs it, clients that write bytes, and sandboxes whose programs speak
//! websockets.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use choir_core::sandbox::Exit;
use choir_core::{Door, Generation, Limits, Slot};
use choir_hypervisor::clock::MockClock;
use choir_hypervisor::config::Config;
use choir_hypervisor::egress::Outside;
use choir_hypervisor::gate::Gatekeeper;
use choir_hypervisor::random::OsRandom;
use choir_hypervisor::router::{ControlHost, router};
use choir_hypervisor::serve::{Parts, compose, take_over};
use choir_proxy::{Bounds, Server};
use choir_runtime::sim::World;
use choir_runtime::{Found, LogLine, Notice, Result as Done, Runtime, Seen, Sim, SimVolumes, Spec, Stats, Stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::Box as Start;
use crate::support::{Browser, SESSION};

pub const CONTROL: &str = "localhost:9090";
/// What the simulated programs answer to whatever they are sent: a pong.
pub const PONG: [u8; 2] = [0x8a, 0];
/// A masked ping without payload, as browsers send it.
const PING: [u8; 6] = [0x89, 0x80, 1, 2, 3, 4];

/// A hypervisor whose clock is moved by hand, over a runtime made of the simulated one.
pub async fn start_at(clock: &Arc<MockClock>, runtime: impl FnOnce(Arc<Sim>) -> Arc<dyn Runtime>) -> Start {
    start_outside(clock, runtime, Outside::system()).await
}

/// The same, in a world outside that the test makes.
pub async fn start_outside(
    clock: &Arc<MockClock>,
    runtime: impl FnOnce(Arc<Sim>) -> Arc<dyn Runtime>,
    outside: Outside,
) -> Start {
    start_configured(tempfile::tempdir().unwrap(), clock, runtime, outside, |_| {}).await
}

/// The same, in a directory that the test chose and with another configuration than the default one.
pub async fn start_configured(
    directory: tempfile::TempDir,
    clock: &Arc<MockClock>,
    runtime: impl FnOnce(Arc<Sim>) -> Arc<dyn Runtime>,
    outside: Outside,
    change: impl FnOnce(&mut Config),
) -> Start {
    let directory = Arc::new(directory);
    let mut config = Config::default();
    config.store.path = directory.path().join("choir.db");
    change(&mut config);
    let (world, volumes) = (World::new(), SimVolumes::default());
    let sim = Arc::new(Sim::new(world.clone()));
    let parts = Parts {
        runtime: runtime(sim.clone()),
        volumes: Arc::new(volumes.clone()),
        clock: clock.clone(),
        random: Arc::new(OsRandom),
        outside,
    };
    let app = compose(Arc::new(config), parts).await.unwrap();
    take_over(&app).await.unwrap();
    app.releases.ensure_default(std::path::Path::new("default-1.tar")).await;
    let router = router(&app);
    Start {
        directory,
        world,
        volumes,
        sim,
        app,
        router,
    }
}

/// A clock for [`start_at`].
pub fn clock() -> Arc<MockClock> {
    Arc::new(MockClock::new("2026-01-02T03:04:05Z".parse().unwrap()))
}

/// A running server; it ends with this.
pub struct Served {
    addr: SocketAddr,
    stop: CancellationToken,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Served {
    pub async fn over(start: &Start) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let app = &start.app;
        let server = Arc::new(Server {
            bounds: Bounds::default(),
            hosts: app.hosts.clone(),
            trusted_proxies: Vec::new(),
            control: ControlHost(start.router.clone()),
            gate: Gatekeeper::new(app.clone()),
            forwarder: app.forwarder.clone(),
            answers: app.answers.clone(),
            pulse: Arc::default(),
        });
        let stop = CancellationToken::new();
        tokio::spawn(server.serve(vec![listener], stop.clone()));
        Self { addr, stop }
    }

    /// Sends these bytes, then reads until the connection closes.
    pub async fn raw(&self, bytes: impl AsRef<[u8]>) -> String {
        let mut client = TcpStream::connect(self.addr).await.unwrap();
        client.write_all(bytes.as_ref()).await.unwrap();
        let mut answer = Vec::new();
        let closed = tokio::time::timeout(Duration::from_secs(20), client.read_to_end(&mut answer)).await;
        // A reset after the answer is a close, too.
        _ = closed.expect("the connection was left open");
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// Opens a websocket on a host with this cookie.
    pub async fn websocket(&self, host: &str, path: &str, cookie: &str) -> Result<Socket, String> {
        let mut client = TcpStream::connect(self.addr).await.unwrap();
        let head = format!(
            "GET {path} HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\nCookie: {cookie}\r\n\
             Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        );
        client.write_all(head.as_bytes()).await.unwrap();
        let answer = head_of(&mut client).await.expect("an answer to the handshake");
        if answer.starts_with("HTTP/1.1 101 ") {
            Ok(Socket(client))
        } else {
            Err(answer)
        }
    }
}

pub fn status(answer: &str) -> u16 {
    answer.get(9..12).and_then(|s| s.parse().ok()).unwrap_or(0)
}

/// The cookie line of a browser that is signed in at the control host.
pub fn control_cookie(browser: &Browser) -> String {
    format!("{SESSION}={}", browser.session())
}

/// A client's end of a websocket.
pub struct Socket(TcpStream);

impl Socket {
    /// Whether a ping is answered by the program at the other end.
    pub async fn is_open(&mut self) -> bool {
        let mut answer = [0; 2];
        let exchange = async {
            self.0.write_all(&PING).await?;
            self.0.read_exact(&mut answer).await
        };
        exchange.await.is_ok() && answer == PONG
    }

    /// All that comes until the connection ends; `None` when it has not ended in time.
    pub async fn end(mut self, within: Duration) -> Option<Vec<u8>> {
        let mut rest = Vec::new();
        let read = tokio::time::timeout(within, self.0.read_to_end(&mut rest)).await;
        read.ok().map(|_| rest)
    }
}

/// Reads up to the empty line; `None` when the other side closes before.
async fn head_of(stream: &mut (impl AsyncReadExt + Unpin)) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    String::from_utf8(head).ok()
}

/// The simulated runtime with programs, and an agent, that take every handshake.
pub struct Sockets(pub Arc<Sim>);

/// Takes a handshake, and answers each message that comes with a pong.
async fn converse(mut stream: DuplexStream) -> io::Result<()> {
    if head_of(&mut stream).await.is_none() {
        return Ok(());
    }
    let accept = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                  Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
    stream.write_all(accept.as_bytes()).await?;
    let mut message = [0; 64];
    while stream.read(&mut message).await? > 0 {
        stream.write_all(&PONG).await?;
    }
    Ok(())
}

#[async_trait]
impl Runtime for Sockets {
    async fn open(&self, generation: &Generation, door: Door) -> Done<Stream> {
        // Refused where the simulated sandbox refuses.
        self.0.open(generation, door).await?;
        let (near, far) = tokio::io::duplex(64 << 10);
        tokio::spawn(converse(far));
        Ok(Stream::Memory(near))
    }

    async fn describe(&self) -> Done<BTreeMap<String, String>> {
        self.0.describe().await
    }

    async fn list(&self) -> Done<Vec<Found>> {
        self.0.list().await
    }

    async fn create(&self, spec: &Spec) -> Done<()> {
        self.0.create(spec).await
    }

    async fn adopt(&self, spec: &Spec) -> Done<()> {
        self.0.adopt(spec).await
    }

    async fn start(&self, generation: &Generation) -> Done<()> {
        self.0.start(generation).await
    }

    async fn stop(&self, generation: &Generation, grace: Duration) -> Done<Exit> {
        self.0.stop(generation, grace).await
    }

    async fn pause(&self, generation: &Generation) -> Done<()> {
        self.0.pause(generation).await
    }

    async fn unpause(&self, generation: &Generation) -> Done<()> {
        self.0.unpause(generation).await
    }

    async fn remove(&self, generation: &Generation) -> Done<()> {
        self.0.remove(generation).await
    }

    async fn inspect(&self, generation: &Generation) -> Done<Seen> {
        self.0.inspect(generation).await
    }

    async fn description(&self, generation: &Generation) -> Done<Vec<u8>> {
        self.0.description(generation).await
    }

    async fn limit(&self, generation: &Generation, limits: &Limits, slot: Slot) -> Done<()> {
        self.0.limit(generation, limits, slot).await
    }

    async fn stats(&self, generation: &Generation) -> Done<Stats> {
        self.0.stats(generation).await
    }

    async fn logs(&self, generation: &Generation, tail: usize, follow: bool) -> Done<mpsc::Receiver<LogLine>> {
        self.0.logs(generation, tail, follow).await
    }

    fn notices(&self) -> Option<mpsc::Receiver<Notice>> {
        self.0.notices()
    }
}
