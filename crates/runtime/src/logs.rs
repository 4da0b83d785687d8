//! Splits a container's log, in Docker's framing, into lines. It must not know whose log it is.

use bytes::{Buf, BytesMut};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::sync::mpsc;

use crate::LogLine;

/// Lines that may wait for their reader.
const LINES: usize = 256;
/// Longer lines, and longer frames, are cut into pieces of this many bytes.
const MAX_LINE: usize = 16 << 10;

/// Lines of a log until it ends or the receiver is dropped.
pub(crate) fn lines(mut body: Incoming) -> mpsc::Receiver<LogLine> {
    let (sender, receiver) = mpsc::channel(LINES);
    tokio::spawn(async move {
        let mut splitter = Splitter::default();
        loop {
            let frame = tokio::select! {
                frame = body.frame() => frame,
                () = sender.closed() => return,
            };
            let Some(Ok(frame)) = frame else { break };
            for line in splitter.feed(&frame.into_data().unwrap_or_default()) {
                if sender.send(line).await.is_err() {
                    return;
                }
            }
        }
        for line in splitter.rest() {
            if sender.send(line).await.is_err() {
                return;
            }
        }
    });
    receiver
}

/// Bytes in, whole lines out. Holds at most one line of each stream and one frame's head.
#[derive(Default)]
struct Splitter {
    head: BytesMut,
    /// Bytes of the present frame still to come, and its stream.
    left: usize,
    stream: usize,
    partial: [Vec<u8>; 2],
}

impl Splitter {
    fn feed(&mut self, mut data: &[u8]) -> Vec<LogLine> {
        let mut lines = Vec::new();
        while data.has_remaining() {
            if self.left == 0 {
                let need = 8 - self.head.len();
                let take = need.min(data.len());
                self.head.extend_from_slice(&data[..take]);
                data.advance(take);
                if self.head.len() == 8 {
                    self.stream = usize::from(self.head[0] == 2);
                    self.head.advance(4);
                    self.left = self.head.get_u32() as usize;
                }
                continue;
            }
            let take = self.left.min(data.len());
            for &byte in &data[..take] {
                let partial = &mut self.partial[self.stream];
                if byte != b'\n' {
                    partial.push(byte);
                }
                if byte == b'\n' || partial.len() >= MAX_LINE {
                    lines.push(line(self.stream, std::mem::take(partial)));
                }
            }
            data.advance(take);
            self.left -= take;
        }
        lines
    }

    fn rest(&mut self) -> Vec<LogLine> {
        let streams = [0, 1].into_iter();
        streams
            .filter(|&s| !self.partial[s].is_empty())
            .map(|s| line(s, self.partial[s].clone()))
            .collect()
    }
}

fn line(stream: usize, bytes: Vec<u8>) -> LogLine {
    LogLine {
        stream: ["stdout", "stderr"][stream].to_owned(),
        line: String::from_utf8_lossy(&bytes).into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(stream: u8, text: &str) -> Vec<u8> {
        let mut frame = vec![stream, 0, 0, 0];
        frame.extend((text.len() as u32).to_be_bytes());
        frame.extend(text.as_bytes());
        frame
    }

    #[test]
    fn lines_come_out_whole_however_the_bytes_are_cut() {
        let bytes = [frame(1, "a\nb"), frame(2, "err\n"), frame(1, "c\n"), frame(1, "end")].concat();
        for size in 1..bytes.len() {
            let mut splitter = Splitter::default();
            let mut lines: Vec<LogLine> = bytes.chunks(size).flat_map(|c| splitter.feed(c)).collect();
            lines.extend(splitter.rest());
            let got: Vec<_> = lines.iter().map(|l| (l.stream.as_str(), l.line.as_str())).collect();
            let want = [("stdout", "a"), ("stderr", "err"), ("stdout", "bc"), ("stdout", "end")];
            assert_eq!(got, want, "pieces of {size}");
        }
    }

    #[test]
    fn a_line_without_end_is_cut_instead_of_kept() {
        let mut splitter = Splitter::default();
        let lines = splitter.feed(&frame(1, &"x".repeat(10 * MAX_LINE)));
        assert_eq!(lines.len(), 10);
        assert!(splitter.rest().is_empty());
    }
}
