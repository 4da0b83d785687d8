//! The body of a request to a provider: passed on as it comes, or, where the answer would not say what it used, read and
//! amended. It must not know keys or caps.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use choir_proxy::Body;
use choir_proxy::body::BoxError;
use http::HeaderMap;
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH};
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::refusal::No;

/// The most that is read of one body, in bytes: what has pictures in it may be large.
const MOST_BYTES: usize = 16 << 20;
/// The most that is held of one sandbox's bodies at once, in KiB. Further ones wait.
pub(super) const MOST_HELD_KIB: usize = 32 << 10;
/// How long a body may take to come once it is its turn.
const READ_WITHIN: Duration = Duration::from_secs(60);

/// What must be known of a request before it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reads {
    /// Its answer says what it used.
    Nothing,
    /// A streamed answer says so only if asked.
    ChatCompletion,
    /// Work in the background is paid for after its answer.
    Response,
}

/// A body that is ready to go.
pub(super) struct Outgoing {
    pub body: Body,
    /// Its length, as far as it is known.
    pub bytes: u64,
    /// The usage at a stream's end is asked for by us and not by the caller.
    pub uninvited: bool,
}

/// Reads, amends or only passes on. With a key of the box's, what cannot be read is refused: `strict`.
pub(super) async fn prepare(
    headers: &HeaderMap,
    body: Incoming,
    reads: Reads,
    strict: bool,
    held: &Arc<Semaphore>,
) -> Result<Outgoing, No> {
    let length = HttpBody::size_hint(&body).exact();
    if reads == Reads::Nothing {
        return Ok(Outgoing {
            body: Body::wrap(body),
            bytes: length.unwrap_or_default(),
            uninvited: false,
        });
    }
    let encoded = headers.contains_key(CONTENT_ENCODING);
    let declared = headers.contains_key(CONTENT_LENGTH).then_some(length).flatten();
    let most = declared.map_or(MOST_BYTES, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
    if encoded || most > MOST_BYTES {
        if strict {
            return Err(if encoded {
                No::encoded()
            } else {
                No::too_large(MOST_BYTES)
            });
        }
        // With the caller's own key nothing depends on it but the figures.
        return Ok(Outgoing {
            body: Body::wrap(body),
            bytes: length.unwrap_or_default(),
            uninvited: false,
        });
    }
    let share = u32::try_from(most.div_ceil(1 << 10).max(1)).unwrap_or(u32::MAX);
    let place = held
        .clone()
        .acquire_many_owned(share)
        .await
        .map_err(|_| No::unreadable())?;
    let reading = Limited::new(body, MOST_BYTES).collect();
    let bytes = match tokio::time::timeout(READ_WITHIN, reading).await {
        Ok(Ok(read)) => read.to_bytes(),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => return Err(No::too_large(MOST_BYTES)),
        _ => return Err(No::unreadable()),
    };
    let length = bytes.len() as u64;
    let (bytes, uninvited) = match amended(&bytes, reads) {
        Ok(Some(amended)) => (amended.into(), true),
        Ok(None) => (bytes, false),
        Err(no) if strict => return Err(no),
        Err(_) => (bytes, false),
    };
    let held = Held {
        bytes: Some(bytes),
        _place: place,
    };
    Ok(Outgoing {
        body: Body::wrap(held),
        bytes: length,
        uninvited,
    })
}

/// What is read of a request; everything else stays as it was written. A field that is there twice is refused, because
/// readers differ in which one they take.
#[derive(Deserialize)]
struct Asked<'a> {
    #[serde(default)]
    stream: Option<bool>,
    #[serde(default, borrow, deserialize_with = "as_written")]
    stream_options: Option<&'a RawValue>,
    #[serde(default)]
    background: Option<bool>,
}

/// `null` too, so that it can be replaced where it stands.
fn as_written<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

/// The body that asks for its usage, where it does not yet.
fn amended(body: &[u8], reads: Reads) -> Result<Option<Vec<u8>>, No> {
    // A list would be read as the fields in their order.
    if !body.trim_ascii_start().starts_with(b"{") {
        return Err(No::bad_json(&"it must be an object"));
    }
    let asked: Asked<'_> = serde_json::from_slice(body).map_err(|error| No::bad_json(&error))?;
    if reads == Reads::Response {
        return if asked.background == Some(true) {
            Err(No::background())
        } else {
            Ok(None)
        };
    }
    if asked.stream != Some(true) {
        return Ok(None);
    }
    let Some(written) = asked.stream_options else {
        // The first byte that is not space opens the object, and more follows in it: `stream` does.
        let open = body.iter().position(|b| *b == b'{').ok_or_else(No::unreadable)? + 1;
        let option = br#""stream_options":{"include_usage":true},"#;
        return Ok(Some([&body[..open], option, &body[open..]].concat()));
    };
    let mut options: serde_json::Map<String, serde_json::Value> = match written.get() {
        "null" => serde_json::Map::new(),
        text => serde_json::from_str(text).map_err(|error| No::bad_json(&error))?,
    };
    if options.insert("include_usage".to_owned(), true.into()) == Some(true.into()) {
        return Ok(None);
    }
    let new = serde_json::to_vec(&options).map_err(|error| No::bad_json(&error))?;
    let from = written.get().as_ptr() as usize - body.as_ptr() as usize;
    let to = from + written.get().len();
    Ok(Some([&body[..from], &new, &body[to..]].concat()))
}

/// A body in memory that keeps its place until it is sent.
struct Held {
    bytes: Option<Bytes>,
    _place: OwnedSemaphorePermit,
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        Poll::Ready(
            self.bytes
                .take()
                .filter(|bytes| !bytes.is_empty())
                .map(|bytes| Ok(Frame::data(bytes))),
        )
    }

    fn is_end_stream(&self) -> bool {
        self.bytes.as_ref().is_none_or(Bytes::is_empty)
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn chat(text: &str) -> Option<String> {
        let amended = amended(text.as_bytes(), Reads::ChatCompletion).ok().unwrap();
        amended.map(|bytes| String::from_utf8(bytes).unwrap())
    }

    #[test]
    fn a_streamed_completion_asks_for_its_usage_and_is_otherwise_letter_by_letter_as_it_was() {
        for (text, wanted) in [
            (
                r#" { "model": "x", "stream" : true, "n": 1.00 }"#,
                Some(r#" {"stream_options":{"include_usage":true}, "model": "x", "stream" : true, "n": 1.00 }"#),
            ),
            (
                r#"{"stream":true,"stream_options": null ,"seed":18446744073709551616}"#,
                Some(r#"{"stream":true,"stream_options": {"include_usage":true} ,"seed":18446744073709551616}"#),
            ),
            (
                r#"{"stream_options":{"include_usage":false,"x":[1]},"stream":true}"#,
                Some(r#"{"stream_options":{"include_usage":true,"x":[1]},"stream":true}"#),
            ),
            (
                r#"{"str\u0065am":true}"#,
                Some(r#"{"stream_options":{"include_usage":true},"str\u0065am":true}"#),
            ),
            (r#"{"stream_options":{"include_usage":true},"stream":true}"#, None),
            (r#"{"stream":false}"#, None),
            (r#"{"messages":[{"stream":true}]}"#, None),
            ("{}", None),
        ] {
            let got = chat(text);
            assert_eq!(got.as_deref(), wanted, "{text}");
            if let Some(got) = got {
                let read: Value = serde_json::from_str(&got).unwrap();
                assert_eq!(read["stream_options"]["include_usage"], json!(true));
            }
        }
    }

    #[test]
    fn what_two_readers_could_take_differently_is_refused() {
        for text in [
            r#"{"stream":false,"stream":true}"#,
            r#"{"stream":true,"stream_options":{},"stream_options":null}"#,
            r#"{"stream":"true"}"#,
            r#"{"stream":true,"stream_options":[]}"#,
            "[]",
            "",
            "{",
            "{} {}",
        ] {
            assert!(amended(text.as_bytes(), Reads::ChatCompletion).is_err(), "{text}");
        }
    }

    #[test]
    fn a_response_in_the_background_is_refused_and_any_other_is_not_touched() {
        let asks = |text: &str| amended(text.as_bytes(), Reads::Response);
        assert!(asks(r#"{"background":true}"#).is_err());
        assert!(asks(r#"{"background":false,"background":true}"#).is_err());
        for text in [
            r#"{"background":false}"#,
            r#"{"stream":true}"#,
            r#"{"input":{"background":true}}"#,
        ] {
            assert!(matches!(asks(text), Ok(None)), "{text}");
        }
    }
}
