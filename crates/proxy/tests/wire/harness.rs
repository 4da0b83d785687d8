//! A running proxy, a recorder in place of the sandbox, and a client that writes bytes.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use choir_core::{Door, Generation, Hosts, SandboxHost, SandboxId, Slot};
use choir_proxy::route::BoxFuture;
use choir_proxy::{
    Activity, Admission, Answers, Body, Bounds, Control, Dial, Forwarder, Gate, Io, Peer, Pulse, Route, Server,
    Visitor, cookies,
};
use http::request::Parts;
use http::{HeaderName, HeaderValue, Request, Response, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Live: nothing opted in. Dev: service workers and Authorization opted in.
pub const LIVE: &str = "live--main--ada.localhost:9090";
pub const DEV: &str = "dev--main--ada.localhost:9090";
pub const COOKIE: &str = "Cookie: __Host-choir-sbx=good";

/// What the recorder does with a request's head; it answers 200 with the body `ok` otherwise.
pub type Script = fn(&str) -> Option<&'static [u8]>;

/// The sandbox: keeps every byte that reaches it, one entry per connection.
pub struct Recorder {
    seen: watch::Sender<Vec<Vec<u8>>>,
    script: Script,
    /// Connections close after each answer without saying so.
    pub hang_up: bool,
    pub dials: AtomicUsize,
    /// Ends of the streams of upgraded connections, for tests to speak through.
    upgraded: Mutex<Vec<DuplexStream>>,
}

impl Recorder {
    pub fn new(script: Script, hang_up: bool) -> Arc<Self> {
        Arc::new(Self {
            seen: watch::Sender::default(),
            script,
            hang_up,
            dials: AtomicUsize::new(0),
            upgraded: Mutex::default(),
        })
    }

    /// All bytes so far, connections one after another.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.seen.borrow().concat()).into_owned()
    }

    /// Waits until the bytes satisfy this.
    pub async fn until(&self, wanted: impl Fn(&str) -> bool) {
        let mut seen = self.seen.subscribe();
        seen.wait_for(|all| wanted(&String::from_utf8_lossy(&all.concat())))
            .await
            .unwrap();
    }

    pub fn take_upgraded(&self) -> DuplexStream {
        self.upgraded.lock().unwrap().pop().expect("no upgraded connection")
    }

    async fn serve(self: Arc<Self>, mut stream: DuplexStream) {
        let mut index = 0;
        self.seen.send_modify(|all| {
            index = all.len();
            all.push(Vec::new());
        });
        let mut buf = Vec::new();
        loop {
            let Some(head) = self.head(&mut stream, &mut buf, index).await else {
                return;
            };
            let raw = (self.script)(&head);
            if raw.is_some_and(|r| r.starts_with(b"HTTP/1.1 101")) {
                stream.write_all(raw.unwrap()).await.unwrap();
                self.upgraded.lock().unwrap().push(stream);
                return;
            }
            if self.body(&head, &mut stream, &mut buf, index).await.is_none() {
                return;
            }
            let answer = raw.unwrap_or(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
            if stream.write_all(answer).await.is_err() || self.hang_up {
                return;
            }
        }
    }

    /// An independent, plain reading of a request's head.
    async fn head(&self, stream: &mut DuplexStream, buf: &mut Vec<u8>, index: usize) -> Option<String> {
        loop {
            if let Some(end) = buf.windows(4).position(|w| w == b"\r\n\r\n") {
                let head: Vec<u8> = buf.drain(..end + 4).collect();
                return Some(String::from_utf8_lossy(&head).into_owned());
            }
            self.more(stream, buf, index).await?;
        }
    }

    async fn body(&self, head: &str, stream: &mut DuplexStream, buf: &mut Vec<u8>, index: usize) -> Option<()> {
        let lower = head.to_lowercase();
        let length = |l: &str| l.strip_prefix("content-length: ").and_then(|n| n.parse::<usize>().ok());
        let done = |buf: &[u8]| -> Option<usize> {
            if lower.contains("transfer-encoding: chunked") {
                buf.windows(5).position(|w| w == b"0\r\n\r\n").map(|at| at + 5)
            } else {
                let wanted = lower.lines().find_map(length).unwrap_or(0);
                (buf.len() >= wanted).then_some(wanted)
            }
        };
        loop {
            if let Some(end) = done(buf) {
                buf.drain(..end);
                return Some(());
            }
            self.more(stream, buf, index).await?;
        }
    }

    async fn more(&self, stream: &mut DuplexStream, buf: &mut Vec<u8>, index: usize) -> Option<()> {
        let mut chunk = [0; 4096];
        let n = stream.read(&mut chunk).await.ok()?;
        buf.extend_from_slice(&chunk[..n]);
        self.seen.send_modify(|all| all[index].extend_from_slice(&chunk[..n]));
        (n > 0).then_some(())
    }
}

pub struct ToRecorder(pub Arc<Recorder>);

impl Dial for ToRecorder {
    fn open<'a>(&'a self, _: &'a Generation, _: Door) -> BoxFuture<'a, io::Result<Box<dyn Io>>> {
        Box::pin(async {
            self.0.dials.fetch_add(1, Ordering::SeqCst);
            let (near, far) = tokio::io::duplex(64 * 1024);
            tokio::spawn(self.0.clone().serve(far));
            Ok(Box::new(near) as Box<dyn Io>)
        })
    }
}

/// Lets in who has the cookie.
pub struct TestGate {
    pub live: Arc<Route>,
    pub dev: Arc<Route>,
    pub visitor: Arc<Visitor>,
}

impl Gate for TestGate {
    async fn admit(&self, host: &SandboxHost, head: &Parts, _: &Peer) -> Admission {
        let status = match cookies::ours(&head.headers, cookies::SANDBOX) {
            Ok(Some(b"good")) => {
                let route = if host.slot == Slot::Live { &self.live } else { &self.dev };
                return Admission::Pass(route.clone(), self.visitor.clone());
            }
            Ok(_) => StatusCode::UNAUTHORIZED,
            Err(_) => StatusCode::BAD_REQUEST,
        };
        let mut response = Response::new(Body::empty());
        *response.status_mut() = status;
        Admission::Answer(response)
    }
}

pub struct TestControl;

impl Control for TestControl {
    async fn serve(&self, request: Request<Body>) -> Response<Body> {
        let peer = request.extensions().get::<Peer>().unwrap();
        Response::new(Body::full(format!(
            "control {} {} {}",
            request.uri().path(),
            peer.addr,
            peer.https
        )))
    }
}

pub struct World {
    pub addr: SocketAddr,
    pub sandbox: Arc<Recorder>,
    pub forwarder: Arc<Forwarder>,
    pub gate: GateParts,
    pub clock: Arc<AtomicU64>,
    pub pulse: Arc<Pulse>,
    pub stop: CancellationToken,
    pub served: tokio::task::JoinHandle<()>,
}

pub struct GateParts {
    pub live: Arc<Route>,
    pub visitor: Arc<Visitor>,
}

pub fn generation(number: u64) -> Generation {
    Generation {
        sandbox: SandboxId::from_random([7; 16]),
        number,
    }
}

pub async fn world(script: Script) -> World {
    world_with(Recorder::new(script, false), Bounds::default(), &[]).await
}

pub async fn world_with(sandbox: Arc<Recorder>, bounds: Bounds, trusted: &[&str]) -> World {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let answers = Arc::new(Answers::new("test".into()));
    let forwarder = Arc::new(Forwarder::new(Arc::new(ToRecorder(sandbox.clone())), answers.clone()));
    let clock = Arc::new(AtomicU64::new(1));
    let ticks = clock.clone();
    let activity = Activity::new(Arc::new(move || ticks.load(Ordering::SeqCst)));
    let route = |number, opted: bool| {
        Arc::new(Route {
            generation: generation(number),
            door: Door::Port(3000),
            service_workers: opted,
            forward_authorization: opted,
            listens_by: None,
            judged: true,
            activity: activity.clone(),
        })
    };
    let visitor = Arc::new(Visitor {
        identity: vec![(HeaderName::from_static("x-choir-user"), HeaderValue::from_static("ada"))],
        closed: CancellationToken::new(),
    });
    let gate = TestGate {
        live: route(1, false),
        dev: route(2, true),
        visitor: visitor.clone(),
    };
    let parts = GateParts {
        live: gate.live.clone(),
        visitor,
    };
    let pulse = Arc::new(Pulse::default());
    let server = Arc::new(Server {
        bounds,
        hosts: Hosts::new("localhost", "localhost", Some(9090)),
        trusted_proxies: trusted.iter().map(|net| net.parse().unwrap()).collect(),
        control: TestControl,
        gate,
        forwarder: forwarder.clone(),
        answers,
        pulse: pulse.clone(),
    });
    let stop = CancellationToken::new();
    let served = tokio::spawn(server.serve(vec![listener], stop.clone()));
    World {
        addr,
        sandbox,
        forwarder,
        gate: parts,
        clock,
        pulse,
        stop,
        served,
    }
}

impl World {
    pub async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.addr).await.unwrap()
    }

    /// Sends these bytes, then reads until the connection closes.
    pub async fn raw(&self, bytes: impl AsRef<[u8]>) -> String {
        let mut client = self.connect().await;
        client.write_all(bytes.as_ref()).await.unwrap();
        let mut answer = Vec::new();
        let read = client.read_to_end(&mut answer);
        // A reset after the answer is a close, too.
        _ = tokio::time::timeout(Duration::from_secs(20), read)
            .await
            .expect("left open");
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// One good request with these further header lines, closed after it.
    pub async fn get(&self, host: &str, lines: &[&str]) -> String {
        let lines: String = lines.iter().map(|l| format!("{l}\r\n")).collect();
        self.raw(format!(
            "GET / HTTP/1.1\r\nHost: {host}\r\n{lines}Connection: close\r\n\r\n"
        ))
        .await
    }
}

pub fn status(answer: &str) -> u16 {
    answer.get(9..12).and_then(|s| s.parse().ok()).unwrap_or(0)
}

/// Reads one response with a short body, or just a head.
pub async fn response(client: &mut TcpStream) -> String {
    let mut buf = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&buf).to_lowercase();
        if let Some(end) = text.find("\r\n\r\n") {
            let length = text
                .lines()
                .find_map(|l| l.strip_prefix("content-length: "))
                .map_or(0, |n| n.parse().unwrap());
            if buf.len() >= end + 4 + length {
                return String::from_utf8_lossy(&buf).into_owned();
            }
        }
        let mut byte = [0];
        assert_eq!(client.read(&mut byte).await.unwrap(), 1, "closed after {text:?}");
        buf.push(byte[0]);
    }
}

pub fn plain(_: &str) -> Option<&'static [u8]> {
    None
}
