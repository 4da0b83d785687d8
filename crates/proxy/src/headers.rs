//! Rebuilds heads: what must not pass is left out, what we vouch for is added after. It must not know who asks.

use http::header::{
    self, AUTHORIZATION, CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, HOST, SET_COOKIE, STRICT_TRANSPORT_SECURITY, TE,
    TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::cookies;
use crate::forward::{Face, Via};
use crate::head;

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const ALT_SVC: HeaderName = HeaderName::from_static("alt-svc");
const CLEAR_SITE_DATA: HeaderName = HeaderName::from_static("clear-site-data");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// Names that only a proxy may set. CGI-like servers read `_` as `-`, so both spellings are meant.
/// `Proxy` would become HTTP_PROXY in them.
const VOUCHED: [&str; 4] = ["forwarded", "x-real-ip", "true-client-ip", "proxy"];
const VOUCHED_PREFIXES: [&str; 4] = ["x-choir-", "x-forwarded-", "cf-", "proxy-"];

/// The head for the sandbox. `host` is the Host received.
pub(crate) fn request(from: HeaderMap, host: HeaderValue, websocket: bool, via: &Via<'_>) -> HeaderMap {
    let mut to = cleaned(from, |name, value| match *name {
        // Framing is written anew from the body that was decoded here.
        HOST | CONTENT_LENGTH | EXPECT => None,
        COOKIE if via.face == Face::App => cookies::strip(value),
        COOKIE => None,
        AUTHORIZATION if via.route.forward_authorization && !is_ours(&value) => Some(value),
        AUTHORIZATION => None,
        _ => (!vouched(name)).then_some(value),
    });
    if let Ok(addr) = HeaderValue::from_str(&via.peer.addr.to_canonical().to_string()) {
        to.insert(FORWARDED_FOR, addr);
    }
    to.insert(FORWARDED_PROTO, HeaderValue::from_static(via.peer.scheme()));
    to.insert(FORWARDED_HOST, host.clone());
    to.insert(HOST, host);
    for (name, value) in &via.visitor.identity {
        to.insert(name.clone(), value.clone());
    }
    if websocket {
        upgrade_to_websocket(&mut to);
    }
    to
}

/// The head for the client. Content-Length stays: it tells of HEAD and 304 what no body does.
pub(crate) fn response(from: HeaderMap, websocket: bool, face: Face) -> HeaderMap {
    let chunked = from.contains_key(TRANSFER_ENCODING);
    let mut to = cleaned(from, |name, value| {
        let keep = match *name {
            STRICT_TRANSPORT_SECURITY => false,
            CONTENT_LENGTH => !chunked && !websocket,
            SET_COOKIE => face == Face::App && cookies::may_set(&value),
            _ if *name == ALT_SVC || *name == CLEAR_SITE_DATA => false,
            // The control host answers no other origin, whatever a sandbox says.
            _ => face == Face::App || !name.as_str().starts_with("access-control-"),
        };
        keep.then_some(value)
    });
    if face == Face::Api {
        to.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        to.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static("sandbox"));
    }
    if websocket {
        upgrade_to_websocket(&mut to);
    }
    to
}

/// The head of a sandbox's request to the outside.
pub fn outward(from: HeaderMap, host: HeaderValue, websocket: bool) -> HeaderMap {
    let mut to = cleaned(from, |name, value| {
        let drop = matches!(*name, HOST | CONTENT_LENGTH | EXPECT) || name.as_str().starts_with("proxy-");
        (!drop).then_some(value)
    });
    to.insert(HOST, host);
    if websocket {
        upgrade_to_websocket(&mut to);
    }
    to
}

/// The head of the outside's answer.
pub fn inward(from: HeaderMap, websocket: bool) -> HeaderMap {
    let framed = from.contains_key(TRANSFER_ENCODING) || websocket;
    let mut to = cleaned(from, |name, value| {
        (*name != CONTENT_LENGTH || !framed).then_some(value)
    });
    if websocket {
        upgrade_to_websocket(&mut to);
    }
    to
}

/// Copies what `keep` returns, without hop-by-hop headers and those that Connection lists.
fn cleaned(from: HeaderMap, mut keep: impl FnMut(&HeaderName, HeaderValue) -> Option<HeaderValue>) -> HeaderMap {
    let listed = listed(&from);
    let mut to = HeaderMap::with_capacity(from.len() + 6);
    let mut current = None;
    for (name, value) in from {
        if name.is_some() {
            current = name;
        }
        let Some(name) = &current else { continue };
        if hop_by_hop(name) || listed.contains(name) {
            continue;
        }
        if let Some(value) = keep(name, value) {
            to.append(name, value);
        }
    }
    to
}

fn hop_by_hop(name: &HeaderName) -> bool {
    matches!(*name, CONNECTION | TE | TRAILER | TRANSFER_ENCODING | UPGRADE)
        || *name == KEEP_ALIVE
        || *name == HTTP2_SETTINGS
        || name.as_str().starts_with("proxy-")
}

/// The headers that Connection names, apart from the ones every client names.
fn listed(headers: &HeaderMap) -> Vec<HeaderName> {
    head::tokens(headers, &CONNECTION)
        .filter(|t| {
            !["keep-alive", "close", "upgrade"]
                .iter()
                .any(|usual| t.eq_ignore_ascii_case(usual))
        })
        .filter_map(|t| t.parse().ok())
        .collect()
}

fn vouched(name: &HeaderName) -> bool {
    let name = name.as_str();
    // Almost every header: the first letter already tells.
    if !name.starts_with(['c', 'f', 'p', 't', 'x']) {
        return false;
    }
    let dashed;
    let name = if name.contains('_') {
        dashed = name.replace('_', "-");
        &dashed
    } else {
        name
    };
    VOUCHED.contains(&name) || VOUCHED_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// Whether a credential is a token of ours, whatever its scheme is called.
fn is_ours(value: &HeaderValue) -> bool {
    value.as_bytes().windows(6).any(|w| w.eq_ignore_ascii_case(b"choir_"))
}

fn upgrade_to_websocket(headers: &mut HeaderMap) {
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
}
