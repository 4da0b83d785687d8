//! What there is of one sandbox: what its container service tells, its log, and all that its agent shows. It must not know
//! what is looked for.

use std::time::Duration;

use bytes::Bytes;
use choir_api::prove::Owner;
use choir_core::{Door, Generation};
use choir_runtime::Runtime;
use choir_runtime::sweep::{Decoder, Frame, HEADER, Part, ROUTE};
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::TokioIo;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::tally::{Ended, Feed, PlaceId};
use crate::reconcile::Handle;

/// How long an agent may take to answer, and to say the next thing.
const SILENCE: Duration = Duration::from_secs(60);
/// How long it may take in all: one that never ends would keep others from searching.
const LONGEST: Duration = Duration::from_secs(3600);

/// Searches what can be seen of a generation from outside.
pub async fn outside(
    runtime: &dyn Runtime,
    generation: &Generation,
    owner: &Owner,
    feed: &mut Feed,
) -> Result<(), Ended> {
    let place = feed.open(owner, "description").await?;
    match runtime.description(generation).await {
        Ok(told) => {
            feed.item(place, "description").await?;
            feed.bytes(told).await?;
            feed.complete(place).await?;
        }
        Err(error) => feed.incomplete(place, error.to_string()).await?,
    }
    let place = feed.open(owner, "log").await?;
    match runtime.logs(generation, usize::MAX, false).await {
        Ok(mut lines) => {
            feed.item(place, "log").await?;
            while let Some(line) = lines.recv().await {
                feed.bytes(line.line.into_bytes()).await?;
                feed.bytes(&b"\n"[..]).await?;
            }
            feed.complete(place).await
        }
        Err(error) => feed.incomplete(place, error.to_string()).await,
    }
}

/// Searches what the agent of a running generation shows.
pub async fn inside(
    runtime: &dyn Runtime,
    generation: &Generation,
    handle: &Handle,
    owner: &Owner,
    feed: &mut Feed,
) -> Result<(), Ended> {
    let mut places = Vec::new();
    for part in Part::ALL {
        places.push((part, feed.open(owner, part.as_str()).await?));
    }
    let swept = timeout(LONGEST, sweep(runtime, generation, handle, &places, feed)).await;
    let why = match swept {
        Ok(Ok(())) => None,
        Ok(Err(Failure::Ended)) => return Err(Ended),
        Ok(Err(Failure::Said(why))) => Some(why),
        Err(_) => Some("its agent did not come to an end within an hour".to_owned()),
    };
    for (_, place) in places {
        match &why {
            None => feed.complete(place).await?,
            Some(why) => feed.incomplete(place, why.as_str()).await?,
        }
    }
    Ok(())
}

/// Why a sweep did not come to its end.
enum Failure {
    Ended,
    Said(String),
}

impl From<Ended> for Failure {
    fn from(Ended: Ended) -> Self {
        Self::Ended
    }
}

fn said(why: &str) -> Failure {
    Failure::Said(why.to_owned())
}

/// Ends a connection with whoever reads from it.
struct Connection(JoinHandle<hyper::Result<()>>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn sweep(
    runtime: &dyn Runtime,
    generation: &Generation,
    handle: &Handle,
    places: &[(Part, PlaceId)],
    feed: &Feed,
) -> Result<(), Failure> {
    let silent = |_| said("its agent does not answer any more");
    let broke = |_: hyper::Error| said("its agent broke off: it was stopped, or is being stopped");
    let stream = timeout(SILENCE, runtime.open(generation, Door::Agent))
        .await
        .map_err(silent)?
        .map_err(|error| Failure::Said(error.to_string()))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(broke)?;
    let _connection = Connection(tokio::spawn(connection));
    let request = Request::get(ROUTE)
        .header(http::header::HOST, "sandbox")
        .header(HEADER, "1")
        .body(Empty::<Bytes>::new())
        .expect("a constant request");
    let answer = timeout(SILENCE, sender.send_request(request))
        .await
        .map_err(silent)?
        .map_err(broke)?;
    match answer.status() {
        StatusCode::OK => {}
        StatusCode::NOT_FOUND => {
            return Err(said(
                "its agent is of an earlier version, which cannot show it; restart the sandbox",
            ));
        }
        other => return Err(Failure::Said(format!("its agent answered {other}"))),
    }
    let (mut body, mut decoder) = (answer.into_body(), Decoder::default());
    while let Some(frame) = timeout(SILENCE, body.frame()).await.map_err(silent)? {
        // A sandbox that is looked through is in use.
        handle.activity.touch();
        let Ok(bytes) = frame.map_err(broke)?.into_data() else {
            continue;
        };
        decoder.push(&bytes);
        while let Some(frame) = decoder.frame().map_err(|garbled| Failure::Said(garbled.to_string()))? {
            match frame {
                Frame::Item { part, name } => {
                    let place = places.iter().find(|(known, _)| *known == part).map(|(_, place)| *place);
                    feed.item(place.ok_or_else(|| said("its agent shows what it should not"))?, name)
                        .await?;
                }
                Frame::Bytes(bytes) => feed.bytes(bytes).await?,
                Frame::Hole(zeroes) => feed.hole(zeroes).await?,
                Frame::Unread(why) => feed.unread(why).await?,
                Frame::Done => return Ok(()),
            }
        }
    }
    Err(said("its agent broke off before the end"))
}
