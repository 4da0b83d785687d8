//! Connections from inside on their way to the gateway. Must not know what is asked on them.

use std::sync::Arc;

use choir_core::Generation;
use choir_proxy::{Activity, Io};
use choir_runtime::{ListenerKind, Stream};
use tokio::sync::mpsc;
use tokio_util::io::{InspectReader, InspectWriter};

/// What a generation's broker and egress listeners are handed to. Without a bound of its own: a runtime lets in only so many
/// from each sandbox at once, and one that is flooded must not take the others' room here.
pub type Inside = mpsc::UnboundedSender<(Generation, ListenerKind, Box<dyn Io>)>;

/// What passes on it counts as use of the sandbox.
pub fn used(stream: Stream, activity: &Arc<Activity>) -> Box<dyn Io> {
    let note = || {
        let activity = activity.clone();
        move |bytes: &[u8]| {
            if !bytes.is_empty() {
                activity.touch();
            }
        }
    };
    Box::new(InspectReader::new(InspectWriter::new(stream, note()), note()))
}
