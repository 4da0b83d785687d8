//! The socket: who may talk, lines in, lines out, and the descriptor that may come with a line.
//! A thread per connection. Must not know what the verbs do.

use std::convert::Infallible;
use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use rustix::net::sockopt::socket_peercred;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

use crate::volumes::Volumes;
use crate::wire::{Code, Failure, MAX_REQUEST, Request, Response};

const MAX_CONNECTIONS: usize = 64;
/// Counts change when the file system commits, every 30 s or sooner.
const REBALANCE_EVERY: Duration = Duration::from_secs(5);

/// Answers for ever; only peers with one of `uids` are heard.
pub fn serve(listener: &UnixListener, volumes: Volumes, uids: Vec<u32>) -> io::Result<Infallible> {
    let volumes = Arc::new(volumes);
    let uids = Arc::new(uids);
    let open = Arc::new(AtomicUsize::new(0));
    let balanced = Arc::clone(&volumes);
    // Held for as long as this function serves; the other thread ends with it.
    let (_serving, ended) = mpsc::channel::<Infallible>();
    thread::Builder::new().spawn(move || {
        while ended.recv_timeout(REBALANCE_EVERY) == Err(RecvTimeoutError::Timeout) {
            if let Err(error) = balanced.rebalance() {
                eprintln!("choir-volumes: limits could not be brought up to date: {error}");
            }
        }
    })?;
    loop {
        let (stream, _) = listener.accept()?;
        let (volumes, uids, count) = (Arc::clone(&volumes), Arc::clone(&uids), Arc::clone(&open));
        let crowded = count.fetch_add(1, Ordering::SeqCst) >= MAX_CONNECTIONS;
        thread::Builder::new().spawn(move || {
            let mut connection = Connection::new(stream);
            let outcome = if crowded {
                connection.refuse(Code::Busy, "Too many connections; close some.")
            } else {
                connection.converse(&volumes, &uids)
            };
            if let Err(error) = outcome {
                eprintln!("choir-volumes: a connection broke: {error}");
            }
            count.fetch_sub(1, Ordering::SeqCst);
        })?;
    }
}

struct Connection {
    stream: UnixStream,
    bytes: Vec<u8>,
    descriptor: Option<OwnedFd>,
}

impl Connection {
    fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            bytes: Vec::new(),
            descriptor: None,
        }
    }

    fn converse(&mut self, volumes: &Volumes, uids: &[u32]) -> io::Result<()> {
        let peer = socket_peercred(&self.stream)?.uid.as_raw();
        if !uids.contains(&peer) {
            let message = format!("User {peer} may not talk to choir-volumes; add --allow-uid {peer}.");
            return self.refuse(Code::Refused, &message);
        }
        loop {
            while let Some(end) = self.bytes.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.bytes.drain(..=end).collect();
                let descriptor = self.descriptor.take();
                let answer = match serde_json::from_slice::<Request>(&line) {
                    Ok(request) => volumes.answer(request, descriptor),
                    Err(error) => failed(Code::Invalid, &format!("Not a request: {error}.")),
                };
                self.send(&answer)?;
            }
            if self.bytes.len() > MAX_REQUEST {
                return self.refuse(Code::Refused, "The request is longer than 64 KiB.");
            }
            if self.receive()? == 0 {
                return Ok(());
            }
        }
    }

    /// Reads what has come, bytes and at most one descriptor. Zero at the end.
    fn receive(&mut self) -> io::Result<usize> {
        let mut chunk = [0; 8192];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let mut chunks = [IoSliceMut::new(&mut chunk)];
        let received = recvmsg(&self.stream, &mut chunks, &mut ancillary, flags)?;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                for descriptor in descriptors {
                    self.descriptor = Some(descriptor);
                }
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(io::Error::other("more than one descriptor came with a request"));
        }
        self.bytes.extend_from_slice(&chunk[..received.bytes]);
        Ok(received.bytes)
    }

    fn send(&mut self, answer: &Response) -> io::Result<()> {
        if let Response::Error { error } = answer
            && error.code == Code::Internal
        {
            eprintln!("choir-volumes: {error}");
        }
        let mut line = serde_json::to_vec(answer)?;
        line.push(b'\n');
        self.stream.write_all(&line)
    }

    fn refuse(&mut self, code: Code, message: &str) -> io::Result<()> {
        self.send(&failed(code, message))
    }
}

fn failed(code: Code, message: &str) -> Response {
    Response::Error {
        error: Failure::new(code, message),
    }
}
