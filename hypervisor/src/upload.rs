//! What somebody sends and others wait for: how slowly it may come, and how its end is told from its breaking off. It must
//! not know what it is of.

use std::fmt::Display;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use tokio::time::Instant;

use crate::error::{ApiError, ApiResult};

/// How long one may be slower than `SLOWEST` at first.
const GRACE: Duration = Duration::from_secs(60);
/// Bytes a second, on the average: an upload holds one of few places.
const SLOWEST: u64 = 64 << 10;

/// An archive that is being sent.
pub struct Upload<S> {
    parts: Pin<Box<S>>,
    begun: Instant,
    /// Bytes.
    received: u64,
}

impl<S, E> Upload<S>
where
    S: Stream<Item = Result<Bytes, E>>,
    E: Display,
{
    pub fn new(parts: S) -> Self {
        Self {
            parts: Box::pin(parts),
            begun: Instant::now(),
            received: 0,
        }
    }

    /// The next bytes; `None` at its end.
    pub async fn next(&mut self) -> ApiResult<Option<Bytes>> {
        let slow = |_| {
            let message = "The archive comes too slowly, and others wait; send it again.";
            ApiError::new(http::StatusCode::REQUEST_TIMEOUT, "too_slow", message)
        };
        // On the average, once it has begun.
        let by = self.begun + GRACE + Duration::from_secs(self.received / SLOWEST);
        let Some(part) = tokio::time::timeout_at(by, self.parts.next()).await.map_err(slow)? else {
            return Ok(None);
        };
        let broke = |error| ApiError::bad_request("broke_off", format!("The upload broke off: {error}."));
        let part = part.map_err(broke)?;
        self.received += part.len() as u64;
        Ok(Some(part))
    }
}
