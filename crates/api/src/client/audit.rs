//! Calls that read the audit trail. It must not know where an export is written.

use reqwest::Method;

use super::{Client, ClientError, Download, Request};
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
    pub async fn export_audit(&self, query: &AuditQuery) -> Result<Download, ClientError> {
        let request = Request::new(Method::GET, query.path()).header("accept", "application/x-ndjson")?;
        Ok(Download::new(self.send(request).await?))
    }
}
