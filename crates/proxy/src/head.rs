//! Refuses request heads that two parsers could read differently. It must not know where a request goes.
//!
//! hyper already answers 400 to bad lines, folded headers, control bytes, other bytes than digits in Content-Length,
//! differing Content-Lengths, and Transfer-Encoding in HTTP/1.0 or without a final `chunked`; it merges equal
//! Content-Lengths and, beside Transfer-Encoding, drops Content-Length and closes after the answer. Since the
//! upstream head is written afresh from what was parsed here, none of that can reach a sandbox as a second request.

use http::header::{CONNECTION, CONTENT_LENGTH, HOST, TRANSFER_ENCODING, UPGRADE};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, StatusCode, Version};

use crate::answer::Refusal;

/// The methods served, as `Allow` lists them.
pub(crate) const METHODS: &str = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS";
/// Bytes of a request target; more is 414.
const MAX_TARGET: usize = 16 * 1024;
/// Bytes of a request head; more is 431.
const MAX_HEAD: usize = 32 * 1024;

const fn bad(message: &'static str) -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, "bad_request", message).closing()
}

const METHOD: Refusal = Refusal::new(
    StatusCode::METHOD_NOT_ALLOWED,
    "method_not_allowed",
    "use one of the methods that the Allow header lists",
)
.closing();
const TARGET: Refusal = Refusal::new(
    StatusCode::URI_TOO_LONG,
    "uri_too_long",
    "shorten the address to 16 KiB",
)
.closing();
const HEAD: Refusal = Refusal::new(
    StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
    "headers_too_large",
    "shorten the request's headers to 32 KiB, for instance by clearing cookies",
)
.closing();

/// The one Host of a well-formed head, or why it is refused.
pub(crate) fn check(head: &Parts) -> Result<HeaderValue, Refusal> {
    if !served(&head.method) {
        return Err(METHOD);
    }
    sizes(head)?;
    let mut hosts = head.headers.get_all(HOST).iter();
    let host = match (hosts.next(), hosts.next()) {
        (Some(host), None) => host,
        (None, _) => return Err(bad("send a Host header")),
        _ => return Err(bad("send only one Host header")),
    };
    if head
        .uri
        .authority()
        .is_some_and(|a| a.as_str().as_bytes() != host.as_bytes())
    {
        return Err(bad("send a Host header that equals the request's address"));
    }
    if !head.uri.path().starts_with('/') {
        return Err(bad("send a request target that starts with a slash"));
    }
    framing(head)?;
    Ok(host.clone())
}

fn served(method: &Method) -> bool {
    matches!(
        *method,
        Method::GET | Method::HEAD | Method::POST | Method::PUT | Method::PATCH | Method::DELETE | Method::OPTIONS
    )
}

fn sizes(head: &Parts) -> Result<(), Refusal> {
    let target = head.uri.path_and_query().map_or(0, |p| p.as_str().len());
    if target > MAX_TARGET {
        return Err(TARGET);
    }
    let fields = head.headers.iter().map(|(n, v)| n.as_str().len() + v.len() + 4);
    if target + fields.sum::<usize>() > MAX_HEAD {
        return Err(HEAD);
    }
    Ok(())
}

/// Whether the body's end is said once and plainly.
pub(crate) fn framing(head: &Parts) -> Result<(), Refusal> {
    let mut lengths = head.headers.get_all(CONTENT_LENGTH).iter();
    let length = lengths.next();
    let digits = |v: &HeaderValue| !v.is_empty() && v.as_bytes().iter().all(u8::is_ascii_digit);
    if lengths.next().is_some() || length.is_some_and(|v| !digits(v)) {
        return Err(bad("send one Content-Length, in digits"));
    }
    let mut codings = head.headers.get_all(TRANSFER_ENCODING).iter();
    match (codings.next(), codings.next()) {
        (None, _) => Ok(()),
        (Some(coding), None)
            if coding.as_bytes().eq_ignore_ascii_case(b"chunked")
                && length.is_none()
                && head.version == Version::HTTP_11 =>
        {
            Ok(())
        }
        _ => Err(bad("send Transfer-Encoding as one `chunked`, without a Content-Length")),
    }
}

/// Whether the client asks for a websocket; any other upgrade is not one we offer.
pub fn wants_websocket(head: &Parts) -> bool {
    let mut upgrades = head.headers.get_all(UPGRADE).iter();
    let websocket = matches!((upgrades.next(), upgrades.next()), (Some(v), None) if v.as_bytes().eq_ignore_ascii_case(b"websocket"));
    websocket
        && head.method == Method::GET
        && head.version == Version::HTTP_11
        && tokens(&head.headers, &CONNECTION).any(|t| t.eq_ignore_ascii_case("upgrade"))
}

/// The comma-separated tokens of all lines of a header.
pub(crate) fn tokens<'a>(headers: &'a HeaderMap, name: &'a http::HeaderName) -> impl Iterator<Item = &'a str> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .map(|t| t.trim_matches([' ', '\t']))
        .filter(|t| !t.is_empty())
}
