//! HTTP/1.1 and websocket bytes over one blocking connection, so that as little as can be is measured but the other
//! side. It must not know whom it talks to.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// Longer than anything that is measured may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to a port of this machine.
pub struct Wire {
    stream: TcpStream,
    /// `Host`, and `Cookie` where there is one, as head lines.
    lines: String,
}

impl Wire {
    pub fn connect(port: u16, host: &str, cookie: Option<&str>) -> Result<Self> {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).context("cannot connect")?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let cookie = cookie.map(|cookie| format!("Cookie: {cookie}\r\n")).unwrap_or_default();
        Ok(Self {
            stream,
            lines: format!("Host: {host}\r\n{cookie}"),
        })
    }

    /// Asks for `/`; the status, and how long its first byte took.
    pub fn get(&mut self) -> Result<(u16, Duration)> {
        let request = format!("GET / HTTP/1.1\r\n{}\r\n", self.lines);
        let begun = Instant::now();
        self.stream.write_all(request.as_bytes())?;
        let (head, first) = self.head(begun)?;
        let length = head.lines().filter_map(|line| line.split_once(':'));
        let length = length.filter(|(name, _)| name.eq_ignore_ascii_case("content-length"));
        let length: u64 = length
            .map(|(_, value)| value.trim().parse())
            .next()
            .transpose()?
            .unwrap_or(0);
        std::io::copy(&mut (&self.stream).take(length), &mut std::io::sink())?;
        Ok((status(&head)?, first))
    }

    /// Becomes a websocket.
    pub fn upgrade(&mut self) -> Result<()> {
        let origin = self.lines.lines().find_map(|line| line.strip_prefix("Host: "));
        let request = format!(
            "GET / HTTP/1.1\r\n{}Origin: http://{}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
            self.lines,
            origin.unwrap_or_default()
        );
        self.stream.write_all(request.as_bytes())?;
        let (head, _) = self.head(Instant::now())?;
        ensure!(
            status(&head)? == 101,
            "no websocket but {}",
            head.lines().next().unwrap_or_default()
        );
        Ok(())
    }

    /// Sends 32 bytes as a websocket's binary frame and waits for them to come back.
    pub fn echo(&mut self) -> Result<Duration> {
        // FIN and binary; masked, with a mask of zeros.
        let mut frame = vec![0x82, 0x80 | 32, 0, 0, 0, 0];
        frame.extend([0x5a; 32]);
        let mut answer = [0; 34];
        let begun = Instant::now();
        self.stream.write_all(&frame)?;
        self.stream.read_exact(&mut answer)?;
        let took = begun.elapsed();
        ensure!(
            answer[..2] == [0x82, 32] && answer[2..] == frame[6..],
            "another frame came back"
        );
        Ok(took)
    }

    /// Byte by byte, so that nothing behind the head is read; the kernel has them all at once.
    fn head(&mut self, begun: Instant) -> Result<(String, Duration)> {
        let (mut head, mut byte, mut first) = (Vec::new(), [0], Duration::ZERO);
        while !head.ends_with(b"\r\n\r\n") {
            self.stream.read_exact(&mut byte).context("the answer broke off")?;
            if head.is_empty() {
                first = begun.elapsed();
            }
            head.push(byte[0]);
        }
        Ok((String::from_utf8(head)?, first))
    }
}

fn status(head: &str) -> Result<u16> {
    let word = head.split(' ').nth(1).context("the answer has no status")?;
    Ok(word.parse()?)
}
