//! The way out for programs that know of no proxy, from a program's side and from the gateway's. The test is both: its
//! sockets are made in the sandbox's own network. Needs what `confinement` needs.

use std::fs::File;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::json;
use simple_dns::rdata::RData;
use simple_dns::{CLASS, Name, Packet, QTYPE, Question, RCODE, TYPE};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

use crate::confinement::{agent, sandbox, sh};
use crate::sandbox::{Link, Sandbox, soon, until};

const RESOLVER: (Ipv4Addr, u16) = (Ipv4Addr::new(127, 0, 0, 53), 53);
const NAME: &str = "db.example.com";

/// The sandbox's network, in which sockets can be made.
struct Net(File);

impl Net {
    fn of(sandbox: &Sandbox) -> Self {
        Self(File::open(format!("/proc/{}/ns/net", agent(sandbox))).unwrap())
    }

    /// Runs it on a thread that is in the sandbox's network.
    fn within<T: Send>(&self, make: impl FnOnce() -> T + Send) -> T {
        let enter = || {
            move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            make()
        };
        std::thread::scope(|scope| scope.spawn(enter).join().unwrap())
    }

    fn try_connect(&self, to: impl Into<SocketAddr> + Send) -> std::io::Result<TcpStream> {
        let stream = self.within(|| std::net::TcpStream::connect(to.into()))?;
        stream.set_nonblocking(true)?;
        TcpStream::from_std(stream)
    }

    fn connect(&self, to: (Ipv4Addr, u16)) -> TcpStream {
        self.try_connect(to).unwrap()
    }

    fn listen(&self, at: (Ipv4Addr, u16)) -> TcpListener {
        let listener = self.within(|| std::net::TcpListener::bind(at)).unwrap();
        listener.set_nonblocking(true).unwrap();
        TcpListener::from_std(listener).unwrap()
    }

    /// Asks over UDP.
    async fn ask(&self, name: &str, kind: QTYPE) -> (RCODE, Vec<Ipv4Addr>) {
        let socket = self.within(|| std::net::UdpSocket::bind("127.0.0.1:0")).unwrap();
        socket.set_nonblocking(true).unwrap();
        let socket = UdpSocket::from_std(socket).unwrap();
        socket.send_to(&question(name, kind), RESOLVER).await.unwrap();
        let mut reply = [0; 4096];
        let length = soon(socket.recv(&mut reply)).await.unwrap();
        told(&reply[..length])
    }

    async fn address(&self, name: &str) -> Ipv4Addr {
        let (code, addresses) = self.ask(name, TYPE::A.into()).await;
        assert_eq!((code, addresses.len()), (RCODE::NoError, 1));
        assert_eq!(addresses[0].octets()[..2], [127, 77]);
        addresses[0]
    }
}

fn question(name: &str, kind: QTYPE) -> Vec<u8> {
    let mut packet = Packet::new_query(77);
    let question = Question::new(Name::new(name).unwrap(), kind, CLASS::IN.into(), false);
    packet.questions.push(question);
    packet.build_bytes_vec().unwrap()
}

fn told(reply: &[u8]) -> (RCODE, Vec<Ipv4Addr>) {
    let reply = Packet::parse(reply).unwrap();
    assert_eq!(reply.id(), 77);
    let address = |data: &RData| match data {
        RData::A(a) => Ipv4Addr::from(a.address),
        other => panic!("{other:?}"),
    };
    let addresses = reply.answers.iter().map(|record| address(&record.rdata));
    (reply.rcode(), addresses.collect())
}

/// The gateway's end: what came to the egress port.
struct Gateway(TcpListener);

impl Gateway {
    fn of(link: Link) -> (Self, choir_link::Channel) {
        link.egress.set_nonblocking(true).unwrap();
        (Self(TcpListener::from_std(link.egress).unwrap()), link.channel)
    }

    /// The next connection, and what it asked for.
    async fn next(&self) -> (TcpStream, String) {
        let (mut stream, _) = soon(self.0.accept()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(soon(stream.read_u8()).await.unwrap());
        }
        (stream, String::from_utf8(head).unwrap())
    }

    /// The next connection, let through.
    async fn accept(&self) -> TcpStream {
        let (mut stream, _) = self.next().await;
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
        stream
    }

    /// Whether nothing has come.
    fn is_quiet(&self) -> bool {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        self.0.poll_accept(&mut context).is_pending()
    }
}

async fn read(stream: &mut TcpStream, length: usize) -> String {
    let mut bytes = vec![0; length];
    soon(stream.read_exact(&mut bytes)).await.unwrap();
    String::from_utf8(bytes).unwrap()
}

async fn read_to_end(stream: &mut TcpStream) -> std::io::Result<String> {
    let mut text = String::new();
    soon(stream.read_to_string(&mut text)).await.map(|_| text)
}

#[tokio::test]
async fn a_program_that_knows_of_no_proxy_reaches_the_gateway_under_the_name() {
    let Some((sandbox, link)) = sandbox().await else { return };
    let (net, (gateway, _channel)) = (Net::of(&sandbox), Gateway::of(link));
    let address = net.address(NAME).await;
    assert_eq!(net.address("DB.Example.com").await, address, "a name has one address");
    let mut program = net.connect((address, 5432));
    program.write_all(b"hello").await.unwrap();
    let (mut outside, head) = gateway.next().await;
    assert_eq!(
        head,
        "CONNECT db.example.com:5432 HTTP/1.1\r\nHost: db.example.com:5432\r\n\r\n"
    );
    // Some servers speak first, and what they say may come together with the gateway's answer.
    outside
        .write_all(b"HTTP/1.1 200 OK\r\ndate: now\r\n\r\ngreeting")
        .await
        .unwrap();
    assert_eq!(read(&mut program, 8).await, "greeting");
    assert_eq!(read(&mut outside, 5).await, "hello");
    // Each direction ends by itself.
    program.shutdown().await.unwrap();
    assert_eq!(read_to_end(&mut outside).await.unwrap(), "");
    outside.write_all(b"the rest").await.unwrap();
    assert_eq!(read(&mut program, 8).await, "the rest");
    drop(outside);
    assert_eq!(read_to_end(&mut program).await.unwrap(), "");

    // The other direction first.
    let mut program = net.connect((address, 22));
    let mut outside = gateway.accept().await;
    outside.shutdown().await.unwrap();
    assert_eq!(read_to_end(&mut program).await.unwrap(), "");
    program.write_all(b"still there").await.unwrap();
    assert_eq!(read(&mut outside, 11).await, "still there");
    drop(program);
    assert_eq!(read_to_end(&mut outside).await.unwrap(), "");
}

#[tokio::test]
async fn a_refusal_is_a_reset_and_a_line_in_the_log() {
    let Some((mut sandbox, link)) = sandbox().await else {
        return;
    };
    let (net, (gateway, _channel)) = (Net::of(&sandbox), Gateway::of(link));
    let address = net.address(NAME).await;
    let mut program = net.connect((address, 443));
    let (mut outside, _) = gateway.next().await;
    let refusal = "HTTP/1.1 403 Forbidden\r\nx-choir-refusal: it is not allowed by the rule egress.locked\r\n\r\n";
    outside.write_all(refusal.as_bytes()).await.unwrap();
    assert_eq!(
        read_to_end(&mut program).await.unwrap_err().kind(),
        ErrorKind::ConnectionReset
    );
    let line = sandbox.logged(NAME).await;
    assert!(
        line.ends_with("no connection to db.example.com:443: it is not allowed by the rule egress.locked"),
        "{line}"
    );
    // A gateway that hangs up without a word, as it does beyond its bound.
    let mut program = net.connect((address, 443));
    drop(gateway.next().await);
    assert_eq!(
        read_to_end(&mut program).await.unwrap_err().kind(),
        ErrorKind::ConnectionReset
    );
    let mut program = net.connect((address, 443));
    let mut outside = gateway.accept().await;
    outside.write_all(b"let through").await.unwrap();
    assert_eq!(read(&mut program, 11).await, "let through");
}

#[tokio::test]
async fn a_reset_on_either_side_is_one_on_the_other() {
    let Some((sandbox, link)) = sandbox().await else { return };
    let (net, (gateway, _channel)) = (Net::of(&sandbox), Gateway::of(link));
    let address = net.address(NAME).await;
    for from_inside in [true, false] {
        let program = net.connect((address, 443));
        let outside = gateway.accept().await;
        let (near, mut far) = if from_inside {
            (program, outside)
        } else {
            (outside, program)
        };
        rustix::net::sockopt::set_socket_linger(&near, Some(Duration::ZERO)).unwrap();
        drop(near);
        assert_eq!(
            read_to_end(&mut far).await.unwrap_err().kind(),
            ErrorKind::ConnectionReset,
            "from inside: {from_inside}"
        );
    }
}

#[tokio::test]
async fn no_question_leaves_the_sandbox() {
    let Some((sandbox, link)) = sandbox().await else { return };
    let (net, (gateway, _channel)) = (Net::of(&sandbox), Gateway::of(link));
    let secret = "c2VjcmV0.exfiltrate.example.com";
    for kind in [TYPE::A, TYPE::AAAA, TYPE::TXT, TYPE::MX, TYPE::HTTPS] {
        let (code, addresses) = net.ask(secret, kind.into()).await;
        assert_eq!((code, addresses.len()), (RCODE::NoError, usize::from(kind == TYPE::A)));
    }
    for name in [
        "box",
        "localhost",
        "metadata.google.internal",
        "1.0.77.127.in-addr.arpa",
    ] {
        assert_eq!(
            net.ask(name, TYPE::A.into()).await,
            (RCODE::NameError, vec![]),
            "{name}"
        );
    }
    // Over TCP, two on one connection.
    let mut stream = net.connect(RESOLVER);
    for _ in 0..2 {
        let question = question(secret, TYPE::A.into());
        stream.write_u16(question.len() as u16).await.unwrap();
        stream.write_all(&question).await.unwrap();
        let mut reply = vec![0; usize::from(soon(stream.read_u16()).await.unwrap())];
        soon(stream.read_exact(&mut reply)).await.unwrap();
        assert_eq!(told(&reply).1.len(), 1);
    }
    assert!(gateway.is_quiet(), "whatever was asked, nobody outside was");
    let address = net.address(secret).await;
    let _program = net.connect((address, 443));
    assert!(
        gateway.next().await.1.contains(&secret.to_ascii_lowercase()),
        "it is a connection that leaves"
    );
}

#[tokio::test]
async fn what_is_open_for_names_is_not_reachable_from_outside() {
    let Some((sandbox, link)) = sandbox().await else { return };
    let net = Net::of(&sandbox);
    let address = net.address(NAME).await;
    for port in [53, 80, 443, 5432] {
        let refused = link.dial(u64::from(port), port).await.unwrap_err();
        assert!(refused.contains("nothing listens"), "{refused}");
        assert!(port == 53 || net.try_connect((address, port)).is_ok());
    }
    let _own = net.listen((Ipv4Addr::LOCALHOST, 443));
    assert!(link.dial(99, 443).await.is_ok(), "what a user opens there is");
}

#[tokio::test]
async fn a_users_own_servers_are_not_in_the_way() {
    let Some((sandbox, link)) = sandbox().await else { return };
    let (net, (gateway, _channel)) = (Net::of(&sandbox), Gateway::of(link));
    let everywhere = net.listen((Ipv4Addr::UNSPECIFIED, 5432));
    let address = net.address(NAME).await;
    let on_loopback = net.listen((Ipv4Addr::LOCALHOST, 443));
    let other = net.listen((Ipv4Addr::UNSPECIFIED, 3000));
    // The port that was taken on every address is its owner's; all others lead out.
    let _program = net.connect((address, 5432));
    soon(everywhere.accept()).await.unwrap();
    for port in [443, 22] {
        let _program = net.connect((address, port));
        assert!(gateway.next().await.1.starts_with(&format!("CONNECT {NAME}:{port} ")));
    }
    for (listener, port) in [(on_loopback, 443), (other, 3000)] {
        let _program = net.connect((Ipv4Addr::LOCALHOST, port));
        soon(listener.accept()).await.unwrap();
    }
    assert!(gateway.is_quiet());
}

#[tokio::test]
async fn connections_beyond_the_bound_wait_for_a_place() {
    const PLACES: usize = 48;
    let Some((sandbox, link)) = sandbox().await else { return };
    let (net, (gateway, _channel)) = (Net::of(&sandbox), Gateway::of(link));
    let address = net.address(NAME).await;
    let mut open = Vec::new();
    for _ in 0..PLACES {
        let program = net.connect((address, 443));
        open.push((program, gateway.accept().await));
    }
    let mut waiting = net.connect((address, 443));
    waiting.write_all(b"last").await.unwrap();
    // The agent does everything else meanwhile.
    assert_eq!(sh(&sandbox, "echo fine").await, "fine\n");
    net.address("another.example.com").await;
    assert!(gateway.is_quiet());
    drop(open.pop());
    let mut outside = gateway.accept().await;
    assert_eq!(read(&mut outside, 4).await, "last");
}

#[tokio::test]
async fn a_flood_of_names_is_bounded_and_keeps_the_agent_from_nothing() {
    let Some((sandbox, _link)) = sandbox().await else {
        return;
    };
    let net = Net::of(&sandbox);
    let own = || {
        std::fs::read_dir(format!("/proc/{}/fd", agent(&sandbox)))
            .unwrap()
            .count()
    };
    let before = own();
    let mut given = 0;
    for n in 0..600 {
        let (code, addresses) = net.ask(&format!("n{n}.example.com"), TYPE::A.into()).await;
        given += addresses.len();
        assert!(matches!(code, RCODE::NoError | RCODE::ServerFailure));
    }
    let taken = own() - before;
    let limit = sh(&sandbox, "ulimit -n")
        .await
        .trim()
        .parse::<usize>()
        .unwrap_or(usize::MAX);
    assert!((1..600).contains(&given), "{given} names have an address");
    assert!(taken <= (limit / 4).min(128 * 16), "{taken} descriptors");
    let begun = Instant::now();
    let (status, _) = sandbox.request("GET", "/health", json!(null)).await;
    assert!(status == 200 && begun.elapsed() < Duration::from_secs(1));
    // Those that are not used give way.
    until(async || !net.ask("late.example.com", TYPE::A.into()).await.1.is_empty()).await;
}

/// Whether a process has a socket on port 53.
fn resolves(pid: u32) -> bool {
    let links = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let links: Vec<_> = links.filter_map(|fd| std::fs::read_link(fd.path()).ok()).collect();
    let sockets = std::fs::read_to_string(format!("/proc/{pid}/net/udp")).unwrap();
    // `sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode …`
    sockets.lines().any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let inode = fields.get(9).map(|inode| format!("socket:[{inode}]"));
        fields.get(1).is_some_and(|at| at.ends_with(":0035"))
            && inode.is_some_and(|inode| links.iter().any(|link| link.as_os_str() == inode.as_str()))
    })
}

#[tokio::test]
async fn in_development_mode_nobody_resolves() {
    let (development, _link) = Sandbox::ready().await;
    assert!(!resolves(development.agent.id()));
    let Some((contained, _link)) = sandbox().await else {
        return;
    };
    assert!(resolves(agent(&contained)), "in a container the agent does");
}

#[tokio::test]
#[ignore = "slow"]
async fn a_name_that_nobody_uses_gives_its_ports_back_within_a_minute() {
    let Some((sandbox, link)) = sandbox().await else { return };
    let (net, (gateway, _channel)) = (Net::of(&sandbox), Gateway::of(link));
    let address = net.address(NAME).await;
    let mut program = net.connect((address, 443));
    let mut outside = gateway.accept().await;
    let take = || net.within(|| std::net::TcpListener::bind("0.0.0.0:443"));
    assert_eq!(take().unwrap_err().kind(), ErrorKind::AddrInUse);
    let (begun, mut taken) = (Instant::now(), take());
    while taken.is_err() && begun.elapsed() < Duration::from_secs(75) {
        tokio::time::sleep(Duration::from_millis(100)).await;
        taken = take();
    }
    drop(taken.expect("the port is free again"));
    assert!(begun.elapsed() > Duration::from_secs(50));
    // The connection goes on, and so its address means the same name.
    program.write_all(b"still").await.unwrap();
    assert_eq!(read(&mut outside, 5).await, "still");
    assert_eq!(net.address(NAME).await, address);
    let _again = net.connect((address, 443));
    assert!(gateway.next().await.1.contains(NAME));
}
