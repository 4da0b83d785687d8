//! The SSH agent's socket: what comes in goes to the broker and back, and `ssh` learns which hosts are known.

use std::process::Stdio;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};

use crate::sandbox::{BINARY, Link, Sandbox, soon};

/// The broker's next connection, and the head of what it is asked.
async fn asked(link: &Link) -> (TcpStream, String) {
    let listener = link.broker.try_clone().unwrap();
    listener.set_nonblocking(true).unwrap();
    let (mut stream, _) = soon(TcpListener::from_std(listener).unwrap().accept()).await.unwrap();
    let head = head(&mut stream).await;
    (stream, head)
}

async fn head(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(soon(stream.read_u8()).await.unwrap());
    }
    String::from_utf8(head).unwrap().to_ascii_lowercase()
}

async fn client(sandbox: &Sandbox) -> UnixStream {
    soon(UnixStream::connect(sandbox.directory.path().join("agent/ssh.sock")))
        .await
        .unwrap()
}

#[tokio::test]
async fn bytes_pass_both_ways_once_the_broker_has_agreed() {
    let (sandbox, link) = Sandbox::ready().await;
    let mut client = client(&sandbox).await;
    client.write_all(b"sent before the answer").await.unwrap();
    let (mut broker, head) = asked(&link).await;
    assert!(head.starts_with("get /v1/ssh-agent http/1.1\r\n"), "{head}");
    assert!(
        head.contains("\r\nconnection: upgrade\r\n") && head.contains("\r\nupgrade: ssh-agent\r\n"),
        "{head}"
    );
    let agreed = "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: ssh-agent\r\n\r\nto the client";
    broker.write_all(agreed.as_bytes()).await.unwrap();
    let mut got = [0; 22];
    soon(broker.read_exact(&mut got)).await.unwrap();
    assert_eq!(&got, b"sent before the answer");
    let mut got = [0; 13];
    soon(client.read_exact(&mut got)).await.unwrap();
    assert_eq!(&got, b"to the client");
    drop(client);
    assert_eq!(soon(broker.read(&mut got)).await.unwrap(), 0, "the end is passed on");
}

#[tokio::test]
async fn a_broker_that_refuses_ends_the_clients_connection() {
    let (sandbox, link) = Sandbox::ready().await;
    let mut client = client(&sandbox).await;
    let (mut broker, _) = asked(&link).await;
    let refused = "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n";
    broker.write_all(refused.as_bytes()).await.unwrap();
    assert_eq!(soon(client.read(&mut [0; 8])).await.unwrap(), 0);
}

#[tokio::test]
async fn known_hosts_are_what_the_broker_says_and_nothing_where_it_is_away() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let run = || {
        let mut command = std::process::Command::new(BINARY);
        command.arg("ssh-known-hosts").env_clear().env("CHOIR_BROKER_URL", &url);
        command.stdin(Stdio::null());
        tokio::task::spawn_blocking(move || command.output().unwrap())
    };
    let answer = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let head = head(&mut stream).await;
        assert!(head.starts_with("get /v1/ssh-known-hosts http/1.1\r\n"), "{head}");
        let answer = "HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\na.example ssh-rsa";
        stream.write_all(answer.as_bytes()).await.unwrap();
    };
    let (output, ()) = soon(async { tokio::join!(run(), answer) }).await;
    let output = output.unwrap();
    assert_eq!(
        (output.stdout.as_slice(), output.status.code()),
        (&b"a.example ssh-rsa"[..], Some(0))
    );
    drop(listener);
    let output = soon(run()).await.unwrap();
    assert_eq!((output.stdout.as_slice(), output.status.code()), (&b""[..], Some(0)));
}
