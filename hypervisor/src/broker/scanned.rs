//! An answer's body, or what a websocket's host says, on its way into a sandbox: searched for the secret, and cut where
//! it is found. It must not know what the secret is, nor whose.

use std::future::poll_fn;
use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use choir_broker::{Reflected, Scanner};
use choir_proxy::Io;
use choir_proxy::body::BoxError;
use choir_store::{AuditId, Store};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::clock::Clock;

/// Bytes of a websocket searched at a time, on the stack.
const CHUNK: usize = 16 * 1024;

/// What is owed to the audit trail for one intent: exactly one outcome, whatever becomes of the call.
pub(crate) struct Receipt {
    store: Store,
    clock: Arc<dyn Clock>,
    intent: AuditId,
    outcome: &'static str,
}

impl Receipt {
    pub(crate) fn new(store: Store, clock: Arc<dyn Clock>, intent: AuditId) -> Self {
        Self {
            store,
            clock,
            intent,
            // What it is when nobody says otherwise: whoever asked went away.
            outcome: "abandoned",
        }
    }

    pub(crate) fn end(mut self, outcome: &'static str) {
        self.outcome = outcome;
    }
}

impl Drop for Receipt {
    fn drop(&mut self) {
        let (store, intent, outcome, at) = (self.store.clone(), self.intent, self.outcome, self.clock.now());
        // Outside a runtime the process is ending; the intent stays without an outcome, as after a crash.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        runtime.spawn(async move {
            if let Err(error) = store.audit_outcome(intent, at, outcome).await {
                tracing::error!(%error, outcome, "the outcome of a use of a secret could not be recorded");
            }
        });
    }
}

/// A body that is searched as it streams.
pub(super) struct Scanned {
    body: Incoming,
    /// `None` once the end was reached.
    search: Option<(Scanner, Receipt)>,
    /// What was taken ahead of the reader.
    first: Option<Bytes>,
}

/// Why not even the beginning of a body can be handed on.
pub(super) enum Failed {
    Reflected,
    Broken,
}

impl Scanned {
    pub(super) fn new(body: Incoming, scanner: Scanner, receipt: Receipt) -> Self {
        let mut scanned = Self {
            body,
            search: Some((scanner, receipt)),
            first: None,
        };
        if scanned.body.is_end_stream() {
            scanned.end("ok");
        }
        scanned
    }

    /// Waits for the first bytes that may go on, so that an answer which has to be cut before them can be explained.
    pub(super) async fn begin(&mut self) -> Result<(), Failed> {
        match poll_fn(|cx| self.poll_search(cx)).await {
            Some(Ok(bytes)) => self.first = Some(bytes),
            Some(Err(error)) if error.is::<Reflected>() => return Err(Failed::Reflected),
            Some(Err(_)) => return Err(Failed::Broken),
            None => {}
        }
        Ok(())
    }

    /// Records how it went; what was held back till the end.
    fn end(&mut self, outcome: &'static str) -> Vec<u8> {
        let Some((mut scanner, receipt)) = self.search.take() else {
            return Vec::new();
        };
        receipt.end(outcome);
        scanner.finish()
    }

    /// What may go on of these bytes.
    fn search(&mut self, bytes: &[u8]) -> Result<Vec<u8>, Reflected> {
        let Some((scanner, _)) = &mut self.search else {
            return Ok(Vec::new());
        };
        let mut pass = match scanner.take(bytes) {
            Ok(pass) => pass,
            Err(reflected) => {
                self.end("reflected");
                return Err(reflected);
            }
        };
        // A body of known length is not asked again after its last byte.
        if self.body.is_end_stream() {
            pass.extend(self.end("ok"));
        }
        Ok(pass)
    }

    fn poll_search(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BoxError>>> {
        while self.search.is_some() {
            let pass = match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                None => self.end("ok"),
                Some(Err(error)) => {
                    self.end("broken");
                    return Poll::Ready(Some(Err(error.into())));
                }
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(bytes) => match self.search(&bytes) {
                        Ok(pass) => pass,
                        Err(reflected) => return Poll::Ready(Some(Err(reflected.into()))),
                    },
                    // Trailers: nobody declared them to the sandbox, and they are not searched.
                    Err(_) => continue,
                },
            };
            if !pass.is_empty() {
                return Poll::Ready(Some(Ok(pass.into())));
            }
        }
        Poll::Ready(None)
    }
}

impl Body for Scanned {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        self.poll_search(cx)
            .map(|next| next.map(|bytes| bytes.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        self.search.is_none() && self.first.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        if self.is_end_stream() {
            SizeHint::with_exact(0)
        } else {
            SizeHint::default()
        }
    }
}

/// A host's end of a websocket: what it says is searched as it comes.
pub(super) struct ScannedIo {
    host: Box<dyn Io>,
    /// `None` once it has ended.
    search: Option<(Scanner, Receipt)>,
    /// Searched, and not yet read.
    ready: Bytes,
}

impl ScannedIo {
    pub(super) fn new(host: Box<dyn Io>, scanner: Scanner, receipt: Receipt) -> Self {
        Self {
            host,
            search: Some((scanner, receipt)),
            ready: Bytes::new(),
        }
    }

    fn end(&mut self, outcome: &'static str) -> Vec<u8> {
        let Some((mut scanner, receipt)) = self.search.take() else {
            return Vec::new();
        };
        receipt.end(outcome);
        scanner.finish()
    }
}

impl AsyncRead for ScannedIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while self.ready.is_empty() {
            let this = &mut *self;
            let Some((scanner, _)) = &mut this.search else {
                return Poll::Ready(Ok(()));
            };
            let mut space = [MaybeUninit::<u8>::uninit(); CHUNK];
            let mut chunk = ReadBuf::uninit(&mut space);
            let read = ready!(Pin::new(&mut this.host).poll_read(cx, &mut chunk));
            let taken = scanner.take(chunk.filled());
            this.ready = match (read, taken) {
                (Err(error), _) => {
                    this.end("broken");
                    return Poll::Ready(Err(error));
                }
                (Ok(()), Err(reflected)) => {
                    this.end("reflected");
                    return Poll::Ready(Err(io::Error::other(reflected)));
                }
                (Ok(()), Ok(_)) if chunk.filled().is_empty() => this.end("ok").into(),
                (Ok(()), Ok(pass)) => pass.into(),
            };
        }
        let length = self.ready.len().min(buf.remaining());
        buf.put_slice(&self.ready.split_to(length));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ScannedIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.host).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.host).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.host).poll_shutdown(cx)
    }
}
