//! An answer's body on its way into a sandbox, read for what it used, which is written down once it ends, however it ends.
//! It must not refuse anything.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use choir_proxy::Body;
use choir_proxy::body::BoxError;
use choir_store::{Store, Tokens, UsePlace};
use http_body::{Body as HttpBody, Frame, SizeHint};

use super::reader::{Reader, Usage};

/// What is owed to the account of one request: its tokens, exactly once.
pub(super) struct Bill {
    pub store: Store,
    pub place: UsePlace,
    /// The length of the request's body, for the estimate.
    pub sent_bytes: u64,
}

/// How many bytes of a request are one token, where nobody says how many there were. Both providers give four characters
/// of English as a rule of thumb.
const BYTES_A_TOKEN: u64 = 4;

impl Bill {
    /// `whole`: the answer came to its end. One that did not, or that says nothing, is counted by what was seen: who
    /// breaks answers off just before their end would use a cap for nothing otherwise.
    fn write(self, usage: &Usage, whole: bool) {
        let said = usage.tokens();
        let tokens = if whole && usage.input().is_some() {
            said
        } else {
            Tokens {
                input: usage.input().unwrap_or(self.sent_bytes / BYTES_A_TOKEN),
                cached: said.cached,
                output: said.output.max(usage.pieces),
            }
        };
        // Outside a runtime the process is ending; the request stays counted, as after a crash.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        if tokens == Tokens::default() {
            return;
        }
        runtime.spawn(async move {
            if let Err(error) = self.store.add_tokens(self.place, tokens).await {
                tracing::error!(%error, "the tokens of an answer could not be counted");
            }
        });
    }
}

/// A body that is counted as it streams.
pub(super) struct Metered {
    body: Body,
    /// `None` once the end was reached.
    reading: Option<(Reader, Bill)>,
}

impl Metered {
    pub(super) fn new(body: Body, reader: Reader, bill: Bill) -> Self {
        Self {
            body,
            reading: Some((reader, bill)),
        }
    }

    fn take(&mut self, bytes: &[u8]) -> Vec<u8> {
        let reading = self.reading.as_mut();
        reading.map_or_else(Vec::new, |(reader, _)| reader.take(bytes))
    }

    /// What was kept back till the end.
    fn end(&mut self, whole: bool) -> Vec<u8> {
        let Some((mut reader, bill)) = self.reading.take() else {
            return Vec::new();
        };
        let rest = reader.finish();
        bill.write(&reader.usage(), whole);
        rest
    }
}

impl Drop for Metered {
    fn drop(&mut self) {
        self.end(false);
    }
}

impl HttpBody for Metered {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        while self.reading.is_some() {
            let pass = match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                None => self.end(true),
                Some(Err(error)) => {
                    self.end(false);
                    return Poll::Ready(Some(Err(error)));
                }
                Some(Ok(frame)) => {
                    let Ok(bytes) = frame.into_data() else { continue };
                    let mut pass = self.take(&bytes);
                    // A body of known length is not asked again after its last byte.
                    if self.body.is_end_stream() {
                        pass.extend(self.end(true));
                    }
                    pass
                }
            };
            if !pass.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(pass.into()))));
            }
        }
        Poll::Ready(None)
    }

    fn is_end_stream(&self) -> bool {
        self.reading.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        if self.is_end_stream() {
            SizeHint::with_exact(0)
        } else {
            SizeHint::default()
        }
    }
}
