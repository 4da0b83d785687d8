//! As much of RFC 6455 as an echo needs: the handshake's answer, and small unfragmented frames. It must not do I/O.

use data_encoding::BASE64;
use sha1::{Digest, Sha1};

/// RFC 6455, 1.3.
const GUID: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// The answer to a websocket handshake; none where the head is an ordinary request's.
pub fn accept(head: &[u8]) -> Option<String> {
    let head = std::str::from_utf8(head).ok()?;
    let key = header(head, "sec-websocket-key")?;
    let accept = BASE64.encode(&Sha1::digest(format!("{key}{GUID}")));
    Some(format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Accept: {accept}\r\n\r\n"
    ))
}

/// A header's value, by its name in lower case.
pub fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let mut lines = head.lines().filter_map(|line| line.split_once(':'));
    lines
        .find(|(n, _)| n.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.trim())
}

/// A frame to send back.
pub struct Echo {
    pub bytes: Vec<u8>,
    /// It was a close.
    pub last: bool,
}

/// Takes a client's frame, if it is whole, and makes the server's of it.
pub fn next(unread: &mut Vec<u8>) -> Option<Echo> {
    let (first, second) = (*unread.first()?, *unread.get(1)?);
    let (length, at) = match second & 0x7f {
        126 => (usize::from(u16::from_be_bytes([*unread.get(2)?, *unread.get(3)?])), 4),
        length => (usize::from(length), 2),
    };
    if unread.len() < at + 4 + length {
        return None;
    }
    let frame: Vec<u8> = unread.drain(..at + 4 + length).collect();
    let mask = &frame[at..at + 4];
    let mut bytes = vec![first, second & 0x7f];
    bytes.extend_from_slice(&frame[2..at]);
    bytes.extend(
        frame[at + 4..]
            .iter()
            .zip(mask.iter().cycle())
            .map(|(byte, mask)| byte ^ mask),
    );
    Some(Echo {
        bytes,
        last: first & 0x0f == 8,
    })
}

#[cfg(test)]
mod tests {
    use super::{accept, next};

    #[test]
    fn the_handshake_is_that_of_the_rfc() {
        let head = b"GET / HTTP/1.1\r\nHost: x\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
        assert!(
            accept(head)
                .unwrap()
                .contains("Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n")
        );
        assert!(accept(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").is_none());
    }

    #[test]
    fn a_masked_frame_comes_back_plain_and_half_a_frame_waits() {
        // RFC 6455, 5.7: a masked "Hello".
        let masked = [0x81, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58];
        let mut unread = masked[..8].to_vec();
        assert!(next(&mut unread).is_none());
        unread = masked.to_vec();
        assert_eq!(next(&mut unread).unwrap().bytes, b"\x81\x05Hello");
        assert!(unread.is_empty());
    }
}
