//! Asking a slot to be something and waiting until it is. It must not know which verb asks.

use std::time::{Duration, Instant};

use choir_api::client::{Client, SlotVerb};
use choir_api::workspaces::SlotView;
use choir_core::{Name, Slot};

use crate::context::Context;
use crate::failure::Failure;
use crate::progress;

/// How long one call lets the server wait; shorter than what proxies on the way put up with.
const CALL: Duration = Duration::from_secs(25);

/// How long a slot may take before we stop waiting (it goes on without us).
const PATIENCE: Duration = Duration::from_secs(180);

/// Runs one of `start`, `stop`, `restart` and `pause`, and shows the slot as it then is.
pub async fn verb(ctx: &Context, slot: Slot, verb: SlotVerb) -> Result<(), Failure> {
    let client = ctx.client()?;
    let what = format!("{} {slot}", verb.as_str());
    let view = progress::watch(&what, ctx.json, until(&client, &ctx.workspace, slot, verb)).await?;
    ctx.show(&view, || format!("{slot} is {}", view.state))
}

/// Asks, then waits. An answer in another final state than the wanted one is a failure that says why.
pub async fn until(client: &Client, workspace: &Name, slot: Slot, verb: SlotVerb) -> Result<SlotView, Failure> {
    let wanted = match verb {
        SlotVerb::Start | SlotVerb::Restart => "ready",
        SlotVerb::Stop => "stopped",
        SlotVerb::Pause => "paused",
    };
    let begun = Instant::now();
    let mut view = client.ask_slot(workspace, slot, verb, CALL).await?;
    // A second restart would be another restart; a second start only waits for the first.
    let again = if verb == SlotVerb::Restart {
        SlotVerb::Start
    } else {
        verb
    };
    while view.state != wanted {
        if view.state == "failed" || begun.elapsed() >= PATIENCE {
            let reason = view.reason.unwrap_or_else(|| "no reason was given".to_owned());
            return Err(Failure::Failed(format!(
                "{slot} is {} and not {wanted}: {reason}; see `choir logs {slot}`",
                view.state
            )));
        }
        let asked = Instant::now();
        view = client.ask_slot(workspace, slot, again, CALL).await?;
        // A server that answers at once must not be asked in a tight loop.
        if view.state != wanted && asked.elapsed() < Duration::from_millis(200) {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
    Ok(view)
}
