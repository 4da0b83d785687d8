//! What may be asked of one slot: start, stop, restart, pause, and waiting for it.

use std::time::Duration;

use choir_core::Slot;
use choir_core::sandbox::{Desired, Observed};
use choir_store::WorkspaceView;

use crate::app::App;
use crate::error::{ApiError, ApiResult};

/// A change of a slot that a person can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    Start,
    Stop,
    Restart,
    Pause,
}

impl App {
    /// Records what is asked and, if `wait` is above zero, waits until it is so.
    pub async fn change_slot(&self, view: &WorkspaceView, slot: Slot, change: Change, wait: Duration) -> ApiResult<()> {
        let handle = self.handle(view, slot)?;
        let before = handle.status.borrow().observed.generation();
        match change {
            Change::Start => {
                handle
                    .desire(Desired::Running, self.event(view, "sandbox.start"))
                    .await?
            }
            Change::Stop => {
                handle
                    .desire(Desired::Stopped, self.event(view, "sandbox.stop"))
                    .await?
            }
            Change::Restart => handle.restart(self.event(view, "sandbox.restart")).await?,
            Change::Pause => {
                if before.is_none() {
                    let message = format!("{slot} is not running, so there is nothing to pause.");
                    return Err(ApiError::conflict("not_running", message));
                }
                self.store.audit(self.event(view, "sandbox.pause")).await?;
                handle.pause().await;
            }
        }
        handle
            .settle(wait, |status| match (&status.observed, change) {
                (Observed::Failed { .. } | Observed::Deleted, _) => true,
                (Observed::Ready { .. }, Change::Start) => true,
                (Observed::Ready { generation, .. }, Change::Restart) => Some(*generation) != before,
                (Observed::Stopped { .. }, Change::Stop) => true,
                (Observed::Paused { .. } | Observed::Stopped { .. }, Change::Pause) => true,
                _ => false,
            })
            .await;
        Ok(())
    }
}
