//! One packet, one JSON message, at most one descriptor. It must not know what the messages mean.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The longest message, in bytes. A longer one is an error, never cut.
pub const MAX_MESSAGE: usize = 64 << 10;

/// A connected end of a control link.
#[derive(Debug)]
pub struct Channel {
    socket: AsyncFd<OwnedFd>,
}

impl Channel {
    /// Takes over a connected `SOCK_SEQPACKET` socket. Needs a tokio reactor.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self { socket: watch(socket)? })
    }

    /// Connects to the listener at `path`.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = seqpacket()?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        Self::new(socket)
    }

    /// A connected pair, for tests and in-process ends.
    pub fn pair() -> io::Result<(Self, Self)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (a, b) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok((Self::new(a)?, Self::new(b)?))
    }

    /// Sends one message, with a descriptor if given. Waits while the peer's queue is full.
    pub async fn send<T: Serialize>(&self, message: &T, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        if bytes.len() > MAX_MESSAGE {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the message is over 64 KiB",
            ));
        }
        self.socket
            .async_io(Interest::WRITABLE, |fd| send_packet(fd.as_fd(), &bytes, descriptor))
            .await
    }

    /// Receives one message. `None` when the peer closed. Anything malformed is an error that should end the link.
    pub async fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Option<OwnedFd>)>> {
        let mut buffer = vec![0; MAX_MESSAGE];
        let (length, descriptor) = self
            .socket
            .async_io(Interest::READABLE, |fd| receive_packet(fd.as_fd(), &mut buffer))
            .await?;
        if length == 0 {
            return Ok(None);
        }
        let message = serde_json::from_slice(&buffer[..length])?;
        Ok(Some((message, descriptor)))
    }

    /// Process and user ids of the peer as the kernel recorded them at connect.
    pub fn peer(&self) -> io::Result<rustix::net::UCred> {
        Ok(rustix::net::sockopt::socket_peercred(self.socket.get_ref())?)
    }
}

/// Accepts control links at a path.
#[derive(Debug)]
pub struct Listener {
    socket: AsyncFd<OwnedFd>,
}

impl Listener {
    /// Binds `path`, replacing a socket a dead process left there, and lets everybody who can see it connect: the
    /// nonce, not the file mode, is what proves the peer.
    pub fn bind(path: &Path) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let socket = seqpacket()?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
        rustix::net::listen(&socket, 16)?;
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self { socket: watch(socket)? })
    }

    pub async fn accept(&self) -> io::Result<Channel> {
        let fd = self
            .socket
            .async_io(Interest::READABLE, |fd| {
                Ok(rustix::net::accept_with(fd, SocketFlags::CLOEXEC)?)
            })
            .await?;
        Channel::new(fd)
    }
}

fn watch(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` names the same open descriptor from here until it is dropped, and the `AsyncFd` owns it.
    Ok(unsafe { AsyncFd::register(socket) }?)
}

fn seqpacket() -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

fn send_packet(fd: BorrowedFd<'_>, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = descriptor.map(|d| [d]);
    if let Some(descriptors) = &descriptors {
        control.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    rustix::net::sendmsg(fd, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive_packet(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = rustix::net::recvmsg(
        fd,
        &mut [IoSliceMut::new(buffer)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            descriptors.extend(fds);
        }
    }
    // Alignment leaves room for a second descriptor, so truncation alone does not tell.
    if descriptors.len() > 1 || got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        let why = "a message was longer than 64 KiB or carried two descriptors";
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    Ok((got.bytes, descriptors.pop()))
}

/// Whether a received descriptor is a stream socket of the wanted family that is, or is not, listening.
pub fn check_socket(fd: BorrowedFd<'_>, family: AddressFamily, listening: bool) -> io::Result<()> {
    use rustix::net::sockopt;
    let ok = sockopt::socket_type(fd)? == SocketType::STREAM
        && sockopt::socket_domain(fd)? == family
        && sockopt::socket_acceptconn(fd)? == listening;
    if ok {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the descriptor is not the socket that was asked for",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[tokio::test]
    async fn a_message_and_its_descriptor_arrive_together() {
        let (a, b) = Channel::pair().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        a.send(&"hello", Some(listener.as_fd())).await.unwrap();
        let (text, fd): (String, _) = b.receive().await.unwrap().unwrap();
        assert_eq!(text, "hello");
        let fd = fd.unwrap();
        check_socket(fd.as_fd(), AddressFamily::INET, true).unwrap();
        assert!(check_socket(fd.as_fd(), AddressFamily::INET, false).is_err());
        assert!(check_socket(fd.as_fd(), AddressFamily::UNIX, true).is_err());
    }

    #[tokio::test]
    async fn a_file_is_not_taken_for_a_socket() {
        let (a, b) = Channel::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        a.send(&1, Some(file.as_fd())).await.unwrap();
        let (_, fd): (u32, _) = b.receive().await.unwrap().unwrap();
        assert!(check_socket(fd.unwrap().as_fd(), AddressFamily::INET, true).is_err());
    }

    #[tokio::test]
    async fn two_descriptors_in_one_message_are_refused() {
        let (a, b) = Channel::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let two = [file.as_fd(), file.as_fd()];
        control.push(SendAncillaryMessage::ScmRights(&two));
        rustix::net::sendmsg(
            a.socket.get_ref(),
            &[IoSlice::new(b"1")],
            &mut control,
            SendFlags::empty(),
        )
        .unwrap();
        assert!(b.receive::<u32>().await.is_err());
    }

    #[tokio::test]
    async fn a_message_over_the_limit_is_refused_by_the_sender_and_by_the_receiver() {
        let (a, b) = Channel::pair().unwrap();
        let long = "x".repeat(MAX_MESSAGE);
        assert!(a.send(&long, None).await.is_err());
        rustix::net::send(a.socket.get_ref(), format!("\"{long}\"").as_bytes(), SendFlags::empty()).unwrap();
        assert!(b.receive::<String>().await.is_err());
    }

    #[tokio::test]
    async fn a_closed_peer_ends_the_link() {
        let (a, b) = Channel::pair().unwrap();
        drop(a);
        assert!(b.receive::<String>().await.unwrap().is_none());
    }
}
