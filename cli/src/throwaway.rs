//! What is made for one run: its name, and its end. It must not make anything.

use std::time::{Duration, Instant};

use choir_api::client::Client;
use choir_core::{Name, ReleaseId};
use data_encoding::BASE32_NOPAD;

use crate::failure::Failure;
use crate::verbs::workspaces::DELETION;

/// Between two tries to delete what is still in use.
const AGAIN: Duration = Duration::from_millis(200);

/// Six letters and digits, so that two runs do not meet.
pub fn letters() -> Result<String, Failure> {
    let mut bytes = [0; 4];
    getrandom::fill(&mut bytes).map_err(|e| Failure::Failed(format!("the system gives no randomness: {e}")))?;
    let text = BASE32_NOPAD.encode(&bytes).to_ascii_lowercase();
    Ok(text.chars().take(6).collect())
}

/// Deletes a workspace with all that is in it, and then the release that was made for it.
pub async fn unmake(client: &Client, workspace: &Name, release: Option<&ReleaseId>) -> Result<(), Failure> {
    match client.delete_workspace(workspace, DELETION).await {
        Err(error) if error.status() == Some(404) => {}
        deleted => deleted?,
    }
    let Some(release) = release else { return Ok(()) };
    // The last of its sandboxes may still be on its way.
    let begun = Instant::now();
    loop {
        match client.delete_release(release).await {
            Err(error) if error.status() == Some(409) && begun.elapsed() < DELETION => {
                tokio::time::sleep(AGAIN).await;
            }
            deleted => return Ok(deleted?),
        }
    }
}
