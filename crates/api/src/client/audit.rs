//! Calls that read the audit trail. It must not know where an export is written.

use bytes::Bytes;
use reqwest::Method;

use super::{Client, ClientError, Request};
use crate::audit::{AuditEntry, AuditQuery};
use crate::workspaces::Page;

impl Client {
    /// One page, newest first.
    ///
    /// # Errors
    /// Any; 403 where others' rows are asked for by one who is not an admin.
    pub async fn audit(&self, query: &AuditQuery) -> Result<Page<AuditEntry>, ClientError> {
        self.get(&query.path()).await
    }

    /// All that match, one JSON object a line, newest first.
    ///
    /// # Errors
    /// As [`Self::audit`].
    pub async fn export_audit(&self, query: &AuditQuery) -> Result<AuditExport, ClientError> {
        let request = Request::new(Method::GET, query.path()).header("accept", "application/x-ndjson")?;
        let answer = self.send(request).await?;
        Ok(AuditExport { answer })
    }
}

/// An export that is being read.
#[derive(Debug)]
pub struct AuditExport {
    answer: reqwest::Response,
}

impl AuditExport {
    /// The next bytes; `None` at the end.
    ///
    /// # Errors
    /// [`ClientError::Unreachable`] where the connection broke, so that the export is not complete.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        let url = self.answer.url().origin().ascii_serialization();
        self.answer
            .chunk()
            .await
            .map_err(|e| ClientError::unreachable(&url, &e))
    }
}
