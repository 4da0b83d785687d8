//! Long answers, taken as they come. It must not know what they hold.

use bytes::Bytes;

use super::ClientError;

/// An answer that is being read.
#[derive(Debug)]
pub struct Download {
    answer: reqwest::Response,
}

impl Download {
    pub(crate) fn new(answer: reqwest::Response) -> Self {
        Self { answer }
    }

    /// The next bytes; `None` at the end.
    ///
    /// # Errors
    /// [`ClientError::Unreachable`] where the connection broke, so that what came is not complete.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        let url = self.answer.url().origin().ascii_serialization();
        self.answer
            .chunk()
            .await
            .map_err(|e| ClientError::unreachable(&url, &e))
    }
}
