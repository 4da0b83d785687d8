//! How long a client may keep us waiting for the bytes of a body, or for room to write. Time in which we do not wait
//! for the client never counts, so a quiet event stream or a busy sandbox harms nobody.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use crate::body::BoxError;

/// Waiting time that each [`PORTION`] of bytes buys: 136 bytes a second is the slowest client served.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes that buy another [`PATIENCE`].
pub(crate) const PORTION: usize = 4096;

/// Counts the time spent waiting since the last portion.
#[derive(Default)]
pub(crate) struct Patience {
    spent: Duration,
    bytes: usize,
    since: Option<Instant>,
    alarm: Option<Pin<Box<Sleep>>>,
}

impl Patience {
    /// We wait for the client; ready when it took too long.
    fn wait(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.since.is_none() {
            let now = Instant::now();
            self.since = Some(now);
            let deadline = now + (PATIENCE - self.spent);
            match &mut self.alarm {
                Some(alarm) => alarm.as_mut().reset(deadline),
                None => self.alarm = Some(Box::pin(tokio::time::sleep_until(deadline))),
            }
        }
        match &mut self.alarm {
            Some(alarm) => alarm.as_mut().poll(cx),
            None => Poll::Pending,
        }
    }

    /// The client did its part, with this many bytes.
    fn progress(&mut self, bytes: usize) {
        let Some(since) = self.since.take() else { return };
        self.bytes += bytes;
        if self.bytes >= PORTION {
            self.bytes = 0;
            self.spent = Duration::ZERO;
        } else {
            self.spent = (self.spent + since.elapsed()).min(PATIENCE);
        }
    }
}

fn too_slow() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the client was too slow")
}

/// A client's request body.
pub(crate) struct PacedBody {
    body: Incoming,
    patience: Patience,
}

impl PacedBody {
    pub(crate) fn new(body: Incoming) -> Self {
        Self {
            body,
            patience: Patience::default(),
        }
    }
}

impl HttpBody for PacedBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Pending => {
                ready!(self.patience.wait(cx));
                Poll::Ready(Some(Err(too_slow().into())))
            }
            Poll::Ready(frame) => {
                if let Some(Ok(frame)) = &frame {
                    self.patience.progress(frame.data_ref().map_or(0, Bytes::len));
                }
                Poll::Ready(frame.map(|f| f.map_err(Into::into)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A client's connection; `H` is held while it lives.
pub(crate) struct PacedIo<S, H> {
    io: S,
    patience: Patience,
    _held: H,
}

impl<S, H> PacedIo<S, H> {
    pub(crate) fn new(io: S, held: H) -> Self {
        Self {
            io,
            patience: Patience::default(),
            _held: held,
        }
    }

    fn paced(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match &written {
            Poll::Pending => {
                ready!(self.patience.wait(cx));
                Poll::Ready(Err(too_slow()))
            }
            Poll::Ready(result) => {
                self.patience.progress(*result.as_ref().unwrap_or(&0));
                written
            }
        }
    }
}

impl<S: AsyncRead + Unpin, H: Unpin> AsyncRead for PacedIo<S, H> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin, H: Unpin> AsyncWrite for PacedIo<S, H> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, buf);
        self.paced(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        self.paced(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test(start_paused = true)]
    async fn a_client_that_reads_nothing_is_given_up_after_thirty_seconds() {
        let (_client, server) = tokio::io::duplex(1024);
        let mut io = PacedIo::new(server, ());
        let started = Instant::now();
        let error = io.write_all(&[0; 4096]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(started.elapsed().as_secs(), 30);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_trickles_is_given_up_and_a_steady_one_is_not() {
        for (bytes_per_second, survives) in [(100, false), (2000, true)] {
            let (mut client, server) = tokio::io::duplex(1024);
            let mut io = PacedIo::new(server, ());
            let reader = tokio::spawn(async move {
                let mut buf = vec![0; bytes_per_second];
                loop {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    if client.read_exact(&mut buf).await.is_err() {
                        break;
                    }
                }
            });
            assert_eq!(
                io.write_all(&[0; 200_000]).await.is_ok(),
                survives,
                "{bytes_per_second}"
            );
            drop(io);
            reader.await.unwrap();
        }
    }
}
