//! What a network would reach: the host's services under all its addresses, and a cloud's metadata service. Each
//! probe is shown to arrive from a container that has a network.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{inside, quoted, unguarded};
use crate::rig::Rig;

/// One listener a family on every address, whose connections wait to be counted.
struct Doors {
    v4: TcpListener,
    v6: TcpListener,
}

impl Doors {
    fn open() -> Self {
        let bind = |address: SocketAddr| {
            let listener = TcpListener::bind(address).unwrap();
            listener.set_nonblocking(true).unwrap();
            listener
        };
        Self {
            v4: bind((Ipv4Addr::UNSPECIFIED, 0).into()),
            v6: bind((Ipv6Addr::UNSPECIFIED, 0).into()),
        }
    }

    /// How many came since the last time.
    fn arrivals(&self) -> usize {
        let count = |listener: &TcpListener| std::iter::from_fn(|| listener.accept().ok()).count();
        count(&self.v4) + count(&self.v6)
    }

    /// A shell line that says of each address whether it is reached.
    fn probe<'a>(&self, addresses: impl IntoIterator<Item = &'a str>) -> String {
        let one = |address: &str| {
            let listener = if address.contains(':') { &self.v6 } else { &self.v4 };
            let port = listener.local_addr().unwrap().port();
            format!(
                "if busybox timeout 3 busybox nc -w 2 {address} {port} -e /bin/true; \
                 then echo reached {address}; else echo missed {address}; fi"
            )
        };
        addresses.into_iter().map(one).collect::<Vec<_>>().join("; ")
    }
}

fn told<'a>(output: &'a str, verdict: &str) -> Vec<&'a str> {
    let tell = |line: &'a str| line.strip_prefix(verdict)?.strip_prefix(' ');
    output.lines().filter_map(tell).collect()
}

/// What this machine's interfaces are called on the network, loopback included.
fn own_addresses() -> Vec<String> {
    let output = Command::new("busybox").args(["ip", "-o", "addr"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    // `2: eth0    inet6 fe80::1/64 scope link ...`
    let address = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let interface = words.get(1)?.split('@').next()?;
        let address = words
            .get(3)
            .filter(|_| words[2].starts_with("inet"))?
            .split('/')
            .next()?;
        let zone = if address.starts_with("fe80:") {
            format!("%{interface}")
        } else {
            String::new()
        };
        Some(format!("{address}{zone}"))
    };
    text.lines().filter_map(address).collect()
}

/// E01: no address of the host leads to the host, as a user or as root.
pub async fn no_address_of_the_host_is_reachable(rig: &Rig) {
    let doors = Doors::open();
    let candidates = own_addresses();
    let own = Command::new("busybox")
        .args(["sh", "-c", &doors.probe(candidates.iter().map(String::as_str))])
        .output()
        .unwrap();
    let own = String::from_utf8(own.stdout).unwrap();
    // An address on an interface that is down is nobody's.
    let addresses = told(&own, "reached");
    assert!(addresses.contains(&"127.0.0.1"), "{candidates:?}: {own}");
    assert!(addresses.iter().any(|a| !a.starts_with("127.") && *a != "::1"), "{own}");
    assert_eq!(doors.arrivals(), addresses.len());
    let probe = doors.probe(addresses.iter().copied());

    let inside = inside(rig).await;
    for probe in [probe.clone(), format!("sudo -n {}", quoted(&probe))] {
        assert_eq!(told(&inside.ok(&probe).await, "missed"), addresses);
    }
    assert_eq!(doors.arrivals(), 0);
    inside
        .ok("busybox timeout 3 busybox nc -w 2 127.0.0.1 9091 -e /bin/true")
        .await;
    assert_eq!(inside.ok("cat /proc/net/route | wc -l").await.trim(), "1");
    let scan = inside.ok("ip -o addr | awk '{print $2, $4}'").await;
    assert!(
        scan.lines().all(|l| ["lo 127.0.0.1/8", "lo ::1/128"].contains(&l)),
        "{scan}"
    );
    inside.end().await;

    let host_network = |c: &mut serde_json::Value| c["netns"] = json!({"nsmode": "host"});
    let control = unguarded(rig, &rig.spec(), host_network, &probe).await;
    assert_eq!(
        told(&control, "reached"),
        addresses,
        "with the host's network each is reached"
    );
    assert_eq!(doors.arrivals(), addresses.len());
}

/// One more for the loopback interface of the thread's network.
pub fn add_address(address: &str) {
    let add = ["ip", "addr", "add", address, "dev", "lo"];
    assert!(
        Command::new("busybox").args(add).status().unwrap().success(),
        "{address}"
    );
}

/// E01: nor do the ways that Podman's default network opens, the gateway and the name it gives to the host.
pub async fn the_host_of_the_default_network_is_unreachable(rig: &Rig) {
    let doors = rig.service().within(|| {
        // Without an address of the host, Podman names none.
        add_address("192.0.2.1");
        Doors::open()
    });
    // Where there is no route, the address that Podman's own network gives to the host.
    let gateway = "$(ip route | awk '/^default/ {print $3}' | grep . || echo 10.88.0.1)";
    let probe = doors.probe([gateway, "host.containers.internal"]);
    let addresses = ["10.88.0.1", "host.containers.internal"];
    let inside = inside(rig).await;
    for probe in [probe.clone(), format!("sudo -n {}", quoted(&probe))] {
        assert_eq!(told(&inside.ok(&probe).await, "missed"), addresses);
    }
    assert_eq!(doors.arrivals(), 0);
    inside.end().await;

    let bridge = |c: &mut serde_json::Value| {
        c["netns"] = json!({"nsmode": "bridge"});
        // Podman's own file, which names the host.
        c["use_image_hosts"] = json!(false);
    };
    let control = unguarded(rig, &rig.spec(), bridge, &probe).await;
    assert_eq!(told(&control, "reached"), addresses, "{control}");
    assert_eq!(doors.arrivals(), 2);
}

const METADATA: [&str; 2] = ["169.254.169.254", "fd00:ec2::254"];
const TOKEN: &str = "a-token-of-the-metadata-service";
const TREASURE: &str = "the-credentials-of-the-machine";

/// Version 2 of the protocol: a token by PUT, then what is wanted by GET.
const ASK: &str = r#"for at in 169.254.169.254 fd00:ec2::254; do
    ask() { busybox timeout 3 busybox nc -w 2 $at 80; }
    token=$(printf 'PUT /latest/api/token HTTP/1.1\r\nHost: m\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n' |
        ask | busybox tail -n 1)
    printf 'GET /latest/meta-data/iam/ HTTP/1.1\r\nHost: m\r\nX-aws-ec2-metadata-token: %s\r\n\r\n' $token | ask
    echo
done; echo asked"#;

/// A stand-in that knows one token and one answer, and counts who comes.
async fn serve_metadata(listener: TcpListener, arrivals: Arc<AtomicUsize>) {
    listener.set_nonblocking(true).unwrap();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    while let Ok((mut stream, _)) = listener.accept().await {
        arrivals.fetch_add(1, Ordering::SeqCst);
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            match stream.read_u8().await {
                Ok(byte) => request.push(byte),
                Err(_) => break,
            }
        }
        let request = String::from_utf8_lossy(&request);
        let (status, body) = match request.split(' ').next() {
            Some("PUT") if request.contains("metadata-token-ttl-seconds: 60\r\n") => ("200 OK", TOKEN),
            Some("GET") if request.contains(&format!("metadata-token: {TOKEN}\r\n")) => ("200 OK", TREASURE),
            _ => ("401 Unauthorized", ""),
        };
        let length = body.len();
        let answer = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}");
        // Who asked may have gone.
        let _ = stream.write_all(answer.as_bytes()).await;
    }
}

/// Packets that arrived on the loopback interface of the thread's network.
pub fn packets() -> u64 {
    let devices = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let received = devices.lines().find_map(|l| l.trim().strip_prefix("lo:")).unwrap();
    received.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// E03: both addresses of the metadata service answer on the host, and not a packet of the sandbox gets there.
pub async fn the_metadata_service_is_unreachable(rig: &Rig) {
    let listen = || {
        for address in METADATA {
            add_address(address);
        }
        TcpListener::bind((Ipv6Addr::UNSPECIFIED, 80)).unwrap()
    };
    let arrivals = Arc::new(AtomicUsize::new(0));
    tokio::spawn(serve_metadata(rig.service().within(listen), Arc::clone(&arrivals)));
    let before = rig.service().within(packets);
    let inside = inside(rig).await;
    for ask in [ASK.to_owned(), format!("sudo -n {}", quoted(ASK))] {
        let output = inside.ok(&ask).await;
        assert!(output.contains("asked"), "{output}");
        assert!(!output.contains(TOKEN) && !output.contains(TREASURE), "{output}");
    }
    inside.end().await;
    assert_eq!(arrivals.load(Ordering::SeqCst), 0);
    assert_eq!(rig.service().within(packets), before);

    let host_network = |c: &mut serde_json::Value| c["netns"] = json!({"nsmode": "host"});
    let control = unguarded(rig, &rig.spec(), host_network, ASK).await;
    assert_eq!(
        control.matches(TREASURE).count(),
        2,
        "with the host's network both answer: {control}"
    );
    assert_eq!(arrivals.load(Ordering::SeqCst), 4);
    assert!(rig.service().within(packets) > before);
}
