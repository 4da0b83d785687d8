//! Bytes both ways over one upgraded connection, until either side, the session or the generation ends it. Idle
//! tunnels own no buffers. It must not know what the bytes mean, apart from where a websocket frame ends.

use std::future::poll_fn;
use std::io;
use std::mem::MaybeUninit;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::frames::{Frames, close_frame};
use crate::pool::Upstream;
use crate::route::{Io, OpenTunnel};
use crate::server::ClientIo;

/// Bytes read at a time, on the stack.
const CHUNK: usize = 16 * 1024;
/// How long a tunnel that is being closed waits for the end of a frame, and then for the client to hang up.
const PARTING: Duration = Duration::from_millis(1500);
/// RFC 6455, section 7.4: the session no longer allows this connection.
const POLICY: u16 = 1008;

/// A websocket whose 101 is on its way to the client.
pub(crate) struct Open {
    pub(crate) client: OnUpgrade,
    pub(crate) upstream: Box<Upstream>,
    pub(crate) count: OpenTunnel,
    pub(crate) closing: watch::Receiver<u16>,
    pub(crate) ended: CancellationToken,
}

impl Open {
    pub(crate) async fn run(mut self) {
        let Some((mut upstream, early)) = self.upstream.into_stream().await else {
            return;
        };
        let Ok(client) = self.client.await else { return };
        let (mut client, sent) = into_io(client);
        let mut frames = Frames::default();
        let count = &self.count;
        let mut up = Half::new(sent.to_vec());
        let mut down = Half::new(early.to_vec());
        frames.take(&early, false);
        let code = {
            let mut relay = pin!(poll_fn(|cx| {
                let a = up.poll(cx, &mut client, &mut upstream, &mut |_| count.touch());
                let b = down.poll(cx, &mut upstream, &mut client, &mut |bytes| {
                    count.touch();
                    frames.take(bytes, false);
                });
                // A websocket is over once its server is done; a client may be done first.
                if b.is_ready() || matches!(a, Poll::Ready(Err(_))) {
                    Poll::Ready(())
                } else {
                    Poll::Pending
                }
            }));
            tokio::select! {
                biased;
                () = self.ended.cancelled() => POLICY,
                changed = self.closing.changed() => match changed {
                    Ok(()) => *self.closing.borrow_and_update(),
                    Err(_) => return,
                },
                () = &mut relay => return,
            }
        };
        let parting = part(&mut client, &mut upstream, down.rest(), frames, code);
        _ = tokio::time::timeout(PARTING, parting).await;
        hang_up(client).await;
    }
}

/// The client's stream and what it sent ahead, free of hyper's buffers.
fn into_io(upgraded: Upgraded) -> (Box<dyn Io>, bytes::Bytes) {
    match upgraded.downcast::<TokioIo<ClientIo>>() {
        Ok(parts) => (Box::new(parts.io.into_inner()), parts.read_buf),
        Err(upgraded) => (Box::new(TokioIo::new(upgraded)), bytes::Bytes::new()),
    }
}

/// Brings the frame under way to its end and puts a close frame behind it.
async fn part(
    client: &mut Box<dyn Io>,
    upstream: &mut Box<dyn Io>,
    rest: Vec<u8>,
    mut frames: Frames,
    code: u16,
) -> io::Result<()> {
    client.write_all(&rest).await?;
    let mut chunk = [0; 1024];
    while !frames.at_boundary() {
        let n = upstream.read(&mut chunk).await?;
        if n == 0 {
            return Ok(());
        }
        let taken = frames.take(&chunk[..n], true);
        client.write_all(&chunk[..taken]).await?;
    }
    if !frames.closed() {
        client.write_all(&close_frame(code)).await?;
    }
    client.flush().await
}

/// Closing with unread bytes would reset the connection and take the close frame with it.
async fn hang_up(mut client: Box<dyn Io>) {
    let polite = async {
        client.shutdown().await?;
        let mut chunk = [0; 1024];
        while client.read(&mut chunk).await? > 0 {}
        io::Result::Ok(())
    };
    _ = tokio::time::timeout(PARTING, polite).await;
}

/// Relays until both directions have ended, or one has failed.
pub(crate) async fn relay(a: &mut (impl Io + ?Sized), b: &mut (impl Io + ?Sized), early: Vec<u8>) {
    let (mut there, mut back) = (Half::new(early), Half::new(Vec::new()));
    poll_fn(|cx| {
        let one = there.poll(cx, a, b, &mut |_| ());
        let two = back.poll(cx, b, a, &mut |_| ());
        match (one, two) {
            (Poll::Ready(Err(_)), _) | (_, Poll::Ready(Err(_))) | (Poll::Ready(_), Poll::Ready(_)) => Poll::Ready(()),
            _ => Poll::Pending,
        }
    })
    .await;
}

/// One direction.
struct Half {
    /// Read and not yet written.
    pending: Vec<u8>,
    at: usize,
    state: State,
}

#[derive(PartialEq)]
enum State {
    Open,
    /// Bytes were written and may sit in a buffer.
    Unflushed,
    Ended,
    Done,
}

impl Half {
    fn new(pending: Vec<u8>) -> Self {
        Self {
            pending,
            at: 0,
            state: State::Unflushed,
        }
    }

    fn rest(&self) -> Vec<u8> {
        self.pending[self.at..].to_vec()
    }

    fn poll<A, B>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut A,
        to: &mut B,
        saw: &mut dyn FnMut(&[u8]),
    ) -> Poll<io::Result<()>>
    where
        A: AsyncRead + Unpin + ?Sized,
        B: AsyncWrite + Unpin + ?Sized,
    {
        if self.state == State::Done {
            return Poll::Ready(Ok(()));
        }
        loop {
            ready!(self.write_pending(cx, to))?;
            if self.state == State::Ended {
                ready!(Pin::new(&mut *to).poll_shutdown(cx))?;
                self.state = State::Done;
                return Poll::Ready(Ok(()));
            }
            let mut space = [MaybeUninit::<u8>::uninit(); CHUNK];
            let mut buf = ReadBuf::uninit(&mut space);
            match Pin::new(&mut *from).poll_read(cx, &mut buf) {
                Poll::Ready(result) => result?,
                Poll::Pending => {
                    if self.state == State::Unflushed {
                        ready!(Pin::new(&mut *to).poll_flush(cx))?;
                        self.state = State::Open;
                    }
                    return Poll::Pending;
                }
            }
            let bytes = buf.filled();
            if bytes.is_empty() {
                self.state = State::Ended;
                continue;
            }
            saw(bytes);
            self.state = State::Unflushed;
            let written = match Pin::new(&mut *to).poll_write(cx, bytes) {
                Poll::Ready(written) => written?,
                Poll::Pending => 0,
            };
            if written < bytes.len() {
                self.pending = bytes[written..].to_vec();
                self.at = 0;
            }
        }
    }

    fn write_pending<B: AsyncWrite + Unpin + ?Sized>(
        &mut self,
        cx: &mut Context<'_>,
        to: &mut B,
    ) -> Poll<io::Result<()>> {
        while self.at < self.pending.len() {
            match ready!(Pin::new(&mut *to).poll_write(cx, &self.pending[self.at..]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => self.at += n,
            }
        }
        if !self.pending.is_empty() {
            (self.pending, self.at) = (Vec::new(), 0);
        }
        Poll::Ready(Ok(()))
    }
}
