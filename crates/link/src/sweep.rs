//! What an agent sends when it shows everything in its sandbox: items, one after the other, each with a name and bytes.
//! It must not know what is looked for.
//!
//! A frame is `kind (1) | length (4, big-endian) | payload`. The agent's side is hostile: a frame is small, and a stream
//! that does not end with [`Frame::Done`] is one that broke off.

use serde::{Deserialize, Serialize};

mod walk;

pub use walk::Show;

/// Where the agent serves it, on the hypervisor's own socket only.
pub const ROUTE: &str = "/sweep";
/// The header that asks for it. What is forwarded for people never has headers of this kind.
pub const HEADER: &str = "x-choir-sweep";
/// The most a frame may hold. Bytes.
pub const MOST: usize = 64 << 10;

const ITEM: u8 = 1;
const BYTES: u8 = 2;
const HOLE: u8 = 3;
const UNREAD: u8 = 4;
const DONE: u8 = 5;
const HEAD: usize = 5;

/// What part of a sandbox an item belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// The environment of a process.
    Environment,
    /// The command line of a process.
    CommandLines,
    /// The tables of open sockets.
    Sockets,
    /// A file, a link's target, or the name alone of what has no bytes.
    Files,
}

impl Part {
    pub const ALL: [Self; 4] = [Self::Environment, Self::CommandLines, Self::Sockets, Self::Files];

    /// The part's name for people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Environment => "environment",
            Self::CommandLines => "command lines",
            Self::Sockets => "sockets",
            Self::Files => "files",
        }
    }
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// A new item begins: a path, or a process.
    Item { part: Part, name: String },
    /// More bytes of the item.
    Bytes(Vec<u8>),
    /// So many zeroes that nobody wrote.
    Hole(u64),
    /// The item, or what is left of it, could not be read, and why.
    Unread(String),
    /// All was shown.
    Done,
}

#[derive(Serialize, Deserialize)]
struct Item {
    part: Part,
    name: String,
}

impl Frame {
    /// Appends the frame. Bytes go as several frames where they are more than one holds.
    pub fn write(&self, out: &mut Vec<u8>) {
        match self {
            Self::Item { part, name } => {
                let item = Item {
                    part: *part,
                    name: shortened(name).to_owned(),
                };
                frame(out, ITEM, &serde_json::to_vec(&item).expect("an item is plain JSON"));
            }
            Self::Bytes(bytes) => bytes.chunks(MOST).for_each(|chunk| frame(out, BYTES, chunk)),
            Self::Hole(zeroes) => frame(out, HOLE, &zeroes.to_be_bytes()),
            Self::Unread(why) => frame(out, UNREAD, shortened(why).as_bytes()),
            Self::Done => frame(out, DONE, &[]),
        }
    }
}

fn frame(out: &mut Vec<u8>, kind: u8, payload: &[u8]) {
    out.push(kind);
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    out.extend_from_slice(payload);
}

/// PATH_MAX is 4096 bytes, and JSON makes at most six of one.
fn shortened(text: &str) -> &str {
    &text[..text.floor_char_boundary(8192)]
}

/// The stream is none that an agent of ours sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the stream of a sweep is garbled")]
pub struct Garbled;

/// Bytes in, frames out.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    used: usize,
}

impl Decoder {
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..std::mem::take(&mut self.used));
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole frame; `None` until more bytes are there.
    pub fn frame(&mut self) -> Result<Option<Frame>, Garbled> {
        let rest = &self.bytes[self.used..];
        let Some((head, rest)) = rest.split_at_checked(HEAD) else {
            return Ok(None);
        };
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if length > MOST {
            return Err(Garbled);
        }
        let Some(payload) = rest.get(..length) else {
            return Ok(None);
        };
        let frame = match head[0] {
            ITEM => {
                let item: Item = serde_json::from_slice(payload).map_err(|_| Garbled)?;
                Frame::Item {
                    part: item.part,
                    name: item.name,
                }
            }
            BYTES => Frame::Bytes(payload.to_vec()),
            HOLE => Frame::Hole(u64::from_be_bytes(payload.try_into().map_err(|_| Garbled)?)),
            UNREAD => Frame::Unread(String::from_utf8_lossy(payload).into_owned()),
            DONE => Frame::Done,
            _ => return Err(Garbled),
        };
        self.used += HEAD + length;
        Ok(Some(frame))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames() -> Vec<Frame> {
        vec![
            Frame::Item {
                part: Part::Files,
                name: "/home/choir/\u{e4}\n".to_owned(),
            },
            Frame::Bytes(b"some".to_vec()),
            Frame::Hole(1 << 40),
            Frame::Unread("permission denied".to_owned()),
            Frame::Done,
        ]
    }

    #[test]
    fn frames_come_back_however_their_bytes_arrive() {
        let mut bytes = Vec::new();
        frames().iter().for_each(|frame| frame.write(&mut bytes));
        for size in [1, 3, 7, bytes.len()] {
            let (mut decoder, mut back) = (Decoder::default(), Vec::new());
            for chunk in bytes.chunks(size) {
                decoder.push(chunk);
                while let Some(frame) = decoder.frame().unwrap() {
                    back.push(frame);
                }
            }
            assert_eq!(back, frames());
        }
    }

    #[test]
    fn many_bytes_are_several_frames() {
        let mut bytes = Vec::new();
        Frame::Bytes(vec![7; 3 * MOST + 1]).write(&mut bytes);
        let mut decoder = Decoder::default();
        decoder.push(&bytes);
        let mut sizes = Vec::new();
        while let Some(Frame::Bytes(part)) = decoder.frame().unwrap() {
            sizes.push(part.len());
        }
        assert_eq!(sizes, [MOST, MOST, MOST, 1]);
    }

    #[test]
    fn what_no_agent_sends_is_refused() {
        for bad in [
            &[9, 0, 0, 0, 0][..],
            &[BYTES, 0xff, 0, 0, 0],
            &[ITEM, 0, 0, 0, 2, b'{', b'}'],
            &[HOLE, 0, 0, 0, 1, 0],
        ] {
            let mut decoder = Decoder::default();
            decoder.push(bad);
            assert_eq!(decoder.frame(), Err(Garbled), "{bad:?}");
        }
    }
}
