//! Calls that search for secrets. It must not know how a report is shown.

use reqwest::Method;

use super::{Client, ClientError, Events, Request};
use crate::error::ErrorDetail;
use crate::prove::{Progress, PublicKey, Scope, Signed, event};

/// A search that is under way.
#[derive(Debug)]
pub struct Search {
    events: Events,
}

/// What a search says next.
#[derive(Debug)]
pub enum Step {
    Progress(Progress),
    Report(Box<Signed>),
}

impl Client {
    /// Searches for the caller's secrets, or, for admins, for all in the whole box.
    ///
    /// # Errors
    /// Any; 409 while another search is under way, 429 too soon after one's last.
    pub async fn prove(&self, scope: Scope) -> Result<Search, ClientError> {
        let path = match scope {
            Scope::Own => "/me/prove",
            Scope::Box => "/admin/prove",
        };
        let request = Request::new(Method::POST, path).header("accept", "text/event-stream")?;
        Ok(Search {
            events: Events::new(self.send(request).await?),
        })
    }

    /// The key that this box signs reports with.
    ///
    /// # Errors
    /// Any.
    pub async fn prove_key(&self) -> Result<PublicKey, ClientError> {
        self.get("/api/prove/key").await
    }
}

impl Search {
    /// The next step; `None` where the search ended without a report.
    ///
    /// # Errors
    /// The connection broke, or the search failed.
    pub async fn next(&mut self) -> Result<Option<Step>, ClientError> {
        let unexpected = |e: serde_json::Error| ClientError::Unexpected(e.to_string());
        while let Some(told) = self.events.next().await? {
            match told.name.as_str() {
                event::PROGRESS => {
                    return serde_json::from_str(&told.data)
                        .map(|progress| Some(Step::Progress(progress)))
                        .map_err(unexpected);
                }
                event::REPORT => {
                    return serde_json::from_str(&told.data)
                        .map(|signed| Some(Step::Report(Box::new(signed))))
                        .map_err(unexpected);
                }
                event::FAILED => {
                    let detail: ErrorDetail = serde_json::from_str(&told.data).map_err(unexpected)?;
                    return Err(ClientError::Refused {
                        status: 500,
                        detail: Box::new(detail),
                    });
                }
                _ => {}
            }
        }
        Ok(None)
    }
}
