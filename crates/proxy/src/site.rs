//! Refuses what another site made a visitor's browser send to a sandbox host. In production all sandbox hosts may be
//! one site, so SameSite cookies alone do not keep sandboxes apart. It must not know who the visitor is.

use choir_core::{Hosts, SandboxHost, Target};
use http::header::{ORIGIN, SEC_WEBSOCKET_KEY, UPGRADE};
use http::request::Parts;
use http::{Method, StatusCode};

use crate::answer::Refusal;
use crate::route::Peer;

const CROSS_SITE: Refusal = Refusal::new(
    StatusCode::FORBIDDEN,
    "cross_site",
    "open this address itself; other sites may not send requests to it",
);
pub(crate) const SERVICE_WORKER: Refusal = Refusal::new(
    StatusCode::FORBIDDEN,
    "service_worker",
    "turn on service_workers for this workspace to register one",
);

/// Where a request was made, by the browser's account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum From {
    /// No Origin: an ordinary navigation or same-origin GET, or not a browser.
    Unsaid,
    /// `null`: sandboxed frames, redirects, and same-origin forms of pages without a referrer.
    Opaque,
    /// This host, or another of the same workspace.
    Friend,
    Foreign,
}

pub(crate) fn check(hosts: &Hosts, host: &SandboxHost, head: &Parts, peer: &Peer) -> Result<(), Refusal> {
    let from = from(hosts, host, head, peer);
    let site = head.headers.get("sec-fetch-site").map(|v| v.as_bytes());
    let websocket = looks_like_websocket(head);
    let from_elsewhere = matches!(site, Some(b"same-site" | b"cross-site"));
    let allowed = match from {
        From::Friend => true,
        _ if websocket => false,
        From::Unsaid => !from_elsewhere || is_top_navigation(head),
        From::Opaque => site == Some(b"same-origin") || is_safe(&head.method) && !from_elsewhere,
        From::Foreign => is_safe(&head.method) && (!from_elsewhere || is_top_navigation(head)),
    };
    if allowed { Ok(()) } else { Err(CROSS_SITE) }
}

/// Whether the request asks for a service worker's script.
pub(crate) fn registers_worker(head: &Parts) -> bool {
    head.headers.contains_key("service-worker")
}

fn from(hosts: &Hosts, host: &SandboxHost, head: &Parts, peer: &Peer) -> From {
    let mut origins = head.headers.get_all(ORIGIN).iter();
    let origin = match (origins.next(), origins.next()) {
        (None, _) => return From::Unsaid,
        (Some(origin), None) => origin.to_str().unwrap_or_default(),
        _ => return From::Foreign,
    };
    if origin == "null" {
        return From::Opaque;
    }
    let authority = origin
        .strip_prefix(peer.scheme())
        .and_then(|rest| rest.strip_prefix("://"));
    match authority.map(|a| hosts.parse(a)) {
        Some(Ok(Target::Sandbox(other))) if other.user == host.user && other.workspace == host.workspace => {
            From::Friend
        }
        _ => From::Foreign,
    }
}

/// Wider than what we would upgrade, so that no upstream knows better.
fn looks_like_websocket(head: &Parts) -> bool {
    let named = |v: &[u8]| v.windows(9).any(|w| w.eq_ignore_ascii_case(b"websocket"));
    head.headers.contains_key(SEC_WEBSOCKET_KEY) || head.headers.get_all(UPGRADE).iter().any(|v| named(v.as_bytes()))
}

fn is_safe(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS)
}

fn is_top_navigation(head: &Parts) -> bool {
    let says = |name: &str, value: &str| head.headers.get(name).is_some_and(|v| v == value);
    head.method == Method::GET && says("sec-fetch-mode", "navigate") && says("sec-fetch-dest", "document")
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: &str = "http://live--main--ada.localhost:9090";
    const DEV: &str = "http://5173--dev--main--ada.localhost:9090";

    fn verdict(method: &str, headers: &[(&str, &str)]) -> bool {
        let hosts = Hosts::new("localhost", "localhost", Some(9090));
        let Ok(Target::Sandbox(host)) = hosts.parse("live--main--ada.localhost:9090") else {
            panic!("not a sandbox host")
        };
        let mut request = http::Request::builder().method(method).uri("/");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let peer = Peer {
            addr: [127, 0, 0, 1].into(),
            https: false,
        };
        check(&hosts, &host, &request.body(()).unwrap().into_parts().0, &peer).is_ok()
    }

    #[test]
    fn requests_of_other_sites_are_refused() {
        let site = |s| ("sec-fetch-site", s);
        let nav = [("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document")];
        for (method, headers, allowed) in [
            ("GET", vec![], true),
            ("POST", vec![], true),
            ("GET", vec![site("none"), nav[0], nav[1]], true),
            ("GET", vec![site("cross-site"), nav[0], nav[1]], true),
            ("GET", vec![site("same-site"), nav[0], nav[1]], true),
            ("POST", vec![site("cross-site"), nav[0], nav[1]], false),
            (
                "GET",
                vec![site("cross-site"), nav[0], ("sec-fetch-dest", "iframe")],
                false,
            ),
            ("GET", vec![site("same-site"), ("sec-fetch-mode", "no-cors")], false),
            (
                "GET",
                vec![site("same-site"), ("sec-fetch-mode", "cors"), ("origin", DEV)],
                true,
            ),
            ("POST", vec![site("same-site"), ("origin", DEV)], true),
            ("POST", vec![site("same-origin"), ("origin", OWN)], true),
            ("POST", vec![site("same-origin"), ("origin", "null")], true),
            ("POST", vec![("origin", "null")], false),
            ("POST", vec![("origin", "http://localhost:9090")], false),
            (
                "POST",
                vec![("origin", "https://live--main--ada.localhost:9090")],
                false,
            ),
            ("POST", vec![("origin", "http://live--main--bob.localhost:9090")], false),
            (
                "POST",
                vec![("origin", "http://live--other--ada.localhost:9090")],
                false,
            ),
            ("POST", vec![("origin", OWN), ("origin", "http://evil.example")], false),
            ("DELETE", vec![("origin", "http://evil.example")], false),
            ("GET", vec![("origin", "http://evil.example")], true),
            (
                "GET",
                vec![site("cross-site"), ("origin", "http://evil.example")],
                false,
            ),
        ] {
            assert_eq!(verdict(method, &headers), allowed, "{method} {headers:?}");
        }
    }

    #[test]
    fn a_websocket_needs_an_origin_of_its_workspace() {
        let ws = ("upgrade", "websocket");
        for (origin, allowed) in [
            (None, false),
            (Some("null"), false),
            (Some("http://evil.example"), false),
            (Some("http://localhost:9090"), false),
            (Some("http://live--main--bob.localhost:9090"), false),
            (Some("http://live--main--ada.localhost:9090.evil.example"), false),
            (Some(OWN), true),
            (Some(DEV), true),
        ] {
            let headers: Vec<_> = origin.map(|o| ("origin", o)).into_iter().chain([ws]).collect();
            assert_eq!(verdict("GET", &headers), allowed, "{origin:?}");
        }
        assert!(!verdict("GET", &[ws, ("sec-fetch-site", "same-origin")]));
    }
}
