//! One connection of a program that knows of no proxy, through the egress port: CONNECT, then bytes both ways. It must
//! not know what is allowed; whoever took over that port decides, dials and records under the name.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::log;

/// From connecting to the gateway's answer, which tries each address of the name in turn.
const OPEN: Duration = Duration::from_secs(60);
/// The longest head of an answer, in bytes.
const MAX_HEAD: usize = 8 << 10;
/// Headers an answer may have; the gateway sends a handful.
const MAX_HEADERS: usize = 32;
/// Bytes that are on their way in each direction of each connection.
const BUFFER: usize = 16 << 10;
/// How much of a reason goes into the log.
const MAX_REASON: usize = 400;

/// Carries `inside` to `name` until both directions have ended. What fails is reset, as a network would.
pub async fn carry(mut inside: TcpStream, gateway: SocketAddr, name: &str, port: u16) {
    let opened = tokio::time::timeout(OPEN, open(gateway, name, port)).await;
    let (mut outside, early) = match opened.unwrap_or_else(|_| Err("the gateway does not answer".to_owned())) {
        Ok(opened) => opened,
        Err(reason) => {
            log::say(&format!("no connection to {name}:{port}: {}", bounded(&reason)));
            reset(&inside);
            return;
        }
    };
    let carried = async {
        inside.set_nodelay(true)?;
        inside.write_all(&early).await?;
        tokio::io::copy_bidirectional_with_sizes(&mut inside, &mut outside, BUFFER, BUFFER).await
    };
    if carried.await.is_err() {
        reset(&inside);
        reset(&outside);
    }
}

/// The way out, and what the other side has said already.
async fn open(gateway: SocketAddr, name: &str, port: u16) -> Result<(TcpStream, Vec<u8>), String> {
    let failed = |e: io::Error| format!("the gateway is lost: {e}");
    let mut stream = TcpStream::connect(gateway).await.map_err(failed)?;
    stream.set_nodelay(true).map_err(failed)?;
    let request = format!("CONNECT {name}:{port} HTTP/1.1\r\nHost: {name}:{port}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.map_err(failed)?;
    let mut head = Vec::with_capacity(512);
    while head.len() < MAX_HEAD {
        if stream.read_buf(&mut head).await.map_err(failed)? == 0 {
            return Err("the gateway takes no more connections of this sandbox".to_owned());
        }
        if let Some(length) = judged(&head)? {
            return Ok((stream, head.split_off(length)));
        }
    }
    Err("the gateway's answer is too long".to_owned())
}

/// The length of a head that lets us through; nothing while it is not whole. An error is the reason of a refusal.
fn judged(head: &[u8]) -> Result<Option<usize>, String> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    match response.parse(head) {
        Ok(httparse::Status::Partial) => Ok(None),
        Ok(httparse::Status::Complete(length)) if response.code == Some(200) => Ok(Some(length)),
        Ok(httparse::Status::Complete(_)) => {
            let reason = response
                .headers
                .iter()
                .find(|h| h.name.eq_ignore_ascii_case("x-choir-refusal"));
            Err(reason.map_or_else(
                || format!("the gateway answers {}", response.code.unwrap_or_default()),
                |reason| String::from_utf8_lossy(reason.value).into_owned(),
            ))
        }
        Err(e) => Err(format!("the gateway's answer is no HTTP: {e}")),
    }
}

fn bounded(reason: &str) -> String {
    let printable = reason.chars().filter(|c| !c.is_control());
    printable.take(MAX_REASON).collect()
}

/// Closing it then ends it with a reset instead of an orderly end.
fn reset(stream: &TcpStream) {
    // A stream that is gone has nobody to tell.
    let _ = rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_counts_when_its_head_is_whole() {
        let head = b"HTTP/1.1 200 OK\r\nDate: today\r\n\r\nSSH-2.0-";
        for cut in 0..head.len() - 8 {
            assert_eq!(judged(&head[..cut]), Ok(None), "{cut}");
        }
        assert_eq!(judged(head), Ok(Some(head.len() - 8)));
    }

    #[test]
    fn a_refusal_tells_the_gateways_reason() {
        let head = b"HTTP/1.1 403 Forbidden\r\nx-choir-refusal: a.example is not allowed\r\n\r\n";
        assert_eq!(judged(head), Err("a.example is not allowed".to_owned()));
        assert_eq!(
            judged(b"HTTP/1.1 502 Bad Gateway\r\n\r\n"),
            Err("the gateway answers 502".to_owned())
        );
        assert!(judged(b"SSH-2.0-OpenSSH\r\n").is_err());
    }

    #[test]
    fn a_reason_cannot_fill_the_log_or_begin_a_line_of_its_own() {
        assert_eq!(bounded(&"x".repeat(10_000)).len(), MAX_REASON);
        assert_eq!(bounded("a\nchoir-sandbox: b\u{1b}[1m"), "achoir-sandbox: b[1m");
    }
}
