//! What somebody sends or fetches while others wait: how slowly that may go, and how the end of what is sent is told from its
//! breaking off. It must not know what it is of.

use std::fmt::Display;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use tokio::time::Instant;

use crate::error::{ApiError, ApiResult};

/// How long one is waited for at most, all pauses together, before something comes that makes up for it.
const GRACE: Duration = Duration::from_secs(60);
/// Bytes that make up for a second.
const SLOWEST: u64 = 64 << 10;

/// How long whoever is at the other end may still keep others waiting. Waiting takes of it, and bytes that pass give back.
pub struct Patience(Duration);

impl Default for Patience {
    fn default() -> Self {
        Self(GRACE)
    }
}

impl Patience {
    /// What they do, unless it takes too long.
    pub async fn wait<T>(&mut self, theirs: impl Future<Output = T>) -> Option<T> {
        let begun = Instant::now();
        let done = tokio::time::timeout(self.0, theirs).await.ok()?;
        self.0 = self.0.saturating_sub(begun.elapsed());
        Some(done)
    }

    pub fn passed(&mut self, bytes: usize) {
        let earned = Duration::from_millis(bytes as u64 * 1000 / SLOWEST);
        self.0 = (self.0 + earned).min(GRACE);
    }
}

/// An archive that is being sent.
pub struct Upload<S> {
    parts: Pin<Box<S>>,
    patience: Patience,
}

impl<S, E> Upload<S>
where
    S: Stream<Item = Result<Bytes, E>>,
    E: Display,
{
    pub fn new(parts: S) -> Self {
        Self {
            parts: Box::pin(parts),
            patience: Patience::default(),
        }
    }

    /// The next bytes; `None` at its end.
    pub async fn next(&mut self) -> ApiResult<Option<Bytes>> {
        let Some(next) = self.patience.wait(self.parts.next()).await else {
            let message = "The archive comes too slowly, and others wait; send it again.";
            return Err(ApiError::new(http::StatusCode::REQUEST_TIMEOUT, "too_slow", message));
        };
        let broke = |error| ApiError::bad_request("broke_off", format!("The upload broke off: {error}."));
        let part = next.transpose().map_err(broke)?;
        self.patience.passed(part.as_ref().map_or(0, Bytes::len));
        Ok(part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_pauses_is_waited_for_a_minute_in_all_and_bytes_make_up_for_it() {
        let pause = |seconds| tokio::time::sleep(Duration::from_secs(seconds));
        let mut patience = Patience::default();
        assert!(patience.wait(pause(40)).await.is_some());
        assert!(patience.wait(pause(30)).await.is_none(), "70 s for nothing");
        let mut patience = Patience::default();
        // However much came before, no more than a minute is ahead.
        patience.passed(1 << 30);
        for _ in 0..10 {
            assert!(patience.wait(pause(50)).await.is_some());
            patience.passed(50 * SLOWEST as usize);
        }
        assert!(patience.wait(pause(61)).await.is_none());
    }
}
