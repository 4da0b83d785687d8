//! What `sudo` and the agent say to each other: frames of a length and JSON over a stream socket, descriptors with
//! the length. It must not know who is asked to run what.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use choir_api::sandbox::Chunk;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use serde::{Deserialize, Serialize};

/// The agent's socket, below its directory.
pub const SOCKET: &str = "sudo.sock";
/// The longest frame: more than the kernel takes as arguments.
pub const MAX_FRAME: usize = 8 << 20;
/// Bytes of the length, little endian.
pub const HEADER: usize = 4;
/// What comes with a request: the three standard descriptors and the working directory.
pub const DESCRIPTORS: usize = 4;

/// The first frame from the client.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// Empty for a login shell.
    pub argv: Vec<Chunk>,
    /// What the command gets on top of what its user has anyway.
    pub env: Vec<(Chunk, Chunk)>,
    pub user: String,
    pub login: bool,
    /// Columns and rows, where the client wants a terminal of its own for the command.
    pub terminal: Option<(u16, u16)>,
}

/// Further frames from the client.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FromClient {
    Signal { number: i32 },
}

/// Frames from the agent.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToClient {
    /// With the master of the command's terminal.
    Terminal,
    /// The command has ended.
    Exit { code: i32 },
    /// Nothing was started, and why.
    Refused { message: String },
}

/// A frame as bytes.
pub fn frame(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let json = serde_json::to_vec(message)?;
    if json.len() > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the command line is too long",
        ));
    }
    let length = u32::try_from(json.len()).map_err(io::Error::other)?;
    Ok([&length.to_le_bytes()[..], &json].concat())
}

/// Sends some bytes, the descriptors with the first; how many bytes.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    let flags = SendFlags::NOSIGNAL;
    Ok(rustix::net::sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        flags,
    )?)
}

/// Receives some bytes and what descriptors came with them; no bytes at the end.
pub fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buffers = [IoSliceMut::new(buffer)];
    let got = rustix::net::recvmsg(socket, &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            descriptors.extend(fds);
        }
    }
    Ok((got.bytes, descriptors))
}

/// The length in a header; an error where it is not one.
pub fn length(header: [u8; HEADER]) -> io::Result<usize> {
    let length = u32::from_le_bytes(header) as usize;
    if length > MAX_FRAME {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame is too long"));
    }
    Ok(length)
}
