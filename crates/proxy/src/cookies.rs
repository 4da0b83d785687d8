//! Our cookies among others in raw header bytes. It must not know what a cookie means.
//!
//! Only SP and TAB are trimmed: a sibling domain can send names that begin with other white space, which a lenient
//! parser would take for ours.

use http::header::COOKIE;
use http::{HeaderMap, HeaderValue};

/// The control host's session cookie.
pub const CONTROL: &str = "__Host-choir";
/// A sandbox host's session cookie.
pub const SANDBOX: &str = "__Host-choir-sbx";

/// Two cookies of one name: whoever set the second is not us, so neither is believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("two cookies have the same name; clear this site's cookies and log in again")]
pub struct Duplicate;

/// The value of exactly this cookie. Answer 400 to a [`Duplicate`].
pub fn ours<'a>(headers: &'a HeaderMap, name: &str) -> Result<Option<&'a [u8]>, Duplicate> {
    let mut found = None;
    for line in headers.get_all(COOKIE) {
        for pair in line.as_bytes().split(|b| *b == b';') {
            let (key, value) = split(pair);
            if key == name.as_bytes() && found.replace(value).is_some() {
                return Err(Duplicate);
            }
        }
    }
    Ok(found)
}

/// A Cookie line without our cookies; the others stay byte for byte. `None` when nothing is left.
pub(crate) fn strip(line: HeaderValue) -> Option<HeaderValue> {
    let bytes = line.as_bytes();
    // What most requests are: untouched, or ours alone.
    if !bytes.windows(CONTROL.len()).any(|w| w == CONTROL.as_bytes()) {
        return Some(line);
    }
    let mut kept: Vec<u8> = Vec::with_capacity(bytes.len());
    for pair in bytes.split(|b| *b == b';') {
        let (key, _) = split(pair);
        if key == CONTROL.as_bytes() || key == SANDBOX.as_bytes() {
            continue;
        }
        if !kept.is_empty() {
            kept.push(b';');
        }
        kept.extend_from_slice(pair);
    }
    let kept = trim(&kept);
    if kept.is_empty() {
        return None;
    }
    HeaderValue::from_bytes(kept).ok()
}

/// Whether a sandbox may set this cookie: not one named like ours, and not one for other hosts.
pub(crate) fn may_set(line: &HeaderValue) -> bool {
    let mut parts = line.as_bytes().split(|b| *b == b';');
    let pair = parts.next().unwrap_or_default();
    // The value too: browsers once read `=name=value` back as `name=value`.
    let like_ours = pair
        .windows(CONTROL.len())
        .any(|w| w.eq_ignore_ascii_case(CONTROL.as_bytes()));
    let domain = parts.any(|attribute| split(attribute).0.trim_ascii().eq_ignore_ascii_case(b"domain"));
    !like_ours && !domain
}

fn split(pair: &[u8]) -> (&[u8], &[u8]) {
    match pair.iter().position(|b| *b == b'=') {
        Some(at) => (trim(&pair[..at]), trim(&pair[at + 1..])),
        None => (trim(pair), &[]),
    }
}

fn trim(mut bytes: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] = bytes {
        bytes = rest;
    }
    while let [rest @ .., b' ' | b'\t'] = bytes {
        bytes = rest;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stripped(line: &str) -> Option<String> {
        strip(HeaderValue::from_str(line).unwrap()).map(|v| String::from_utf8(v.as_bytes().to_vec()).unwrap())
    }

    #[test]
    fn ours_is_removed_and_every_other_cookie_stays_as_it_was() {
        for (line, left) in [
            ("__Host-choir=t", None),
            ("__Host-choir-sbx=t", None),
            ("__Host-choir", None),
            ("__Host-choir=t; a=1", Some("a=1")),
            ("a=1; __Host-choir=t", Some("a=1")),
            ("a=1; __Host-choir=t; b=2", Some("a=1; b=2")),
            ("a=1;__Host-choir=t;b=2", Some("a=1;b=2")),
            ("a=1;\t__Host-choir \t=\tt ;  b=\"2\"", Some("a=1;  b=\"2\"")),
            ("__Host-choir=t; __Host-choir=u; b=2", Some("b=2")),
            ("__Host-choir=t; b=2; __Host-choir-sbx=u", Some("b=2")),
            (
                "__Host-choirs=1; x__Host-choir=2; __host-choir=3",
                Some("__Host-choirs=1; x__Host-choir=2; __host-choir=3"),
            ),
            ("__Host-choir-sbx2=1", Some("__Host-choir-sbx2=1")),
            ("a=__Host-choir=t", Some("a=__Host-choir=t")),
            ("a=1;; b", Some("a=1;; b")),
        ] {
            assert_eq!(stripped(line).as_deref(), left, "{line}");
        }
    }

    #[test]
    fn only_the_exact_name_is_ours_and_only_once() {
        let get = |lines: &[&str]| {
            let headers: HeaderMap = lines
                .iter()
                .map(|l| (COOKIE, HeaderValue::from_bytes(l.as_bytes()).unwrap()))
                .collect();
            ours(&headers, CONTROL).map(|v| v.map(|v| String::from_utf8(v.to_vec()).unwrap()))
        };
        assert_eq!(get(&["a=1; __Host-choir=t"]), Ok(Some("t".into())));
        assert_eq!(get(&["a=1", "\t__Host-choir = t"]), Ok(Some("t".into())));
        assert_eq!(
            get(&["\u{2000}__Host-choir=t; __host-choir=u; __Host-choir-sbx=v"]),
            Ok(None)
        );
        assert_eq!(get(&["__Host-choir=t; __Host-choir=t"]), Err(Duplicate));
        assert_eq!(get(&["__Host-choir=t", "__Host-choir=u"]), Err(Duplicate));
    }

    #[test]
    fn a_sandbox_sets_its_own_cookies_only() {
        for (line, may) in [
            ("a=1; Path=/; HttpOnly", true),
            ("__Host-session=1; Secure; Path=/", true),
            ("__Host-choir=1", false),
            ("__host-CHOIR-sbx=1; Secure", false),
            ("\u{2000}__Host-choir=1", false),
            ("=__Host-choir=1", false),
            ("a=1; domain=example.com", false),
            ("a=1;DOMAIN =x", false),
            ("a=domain", true),
        ] {
            assert_eq!(
                may_set(&HeaderValue::from_bytes(line.as_bytes()).unwrap()),
                may,
                "{line}"
            );
        }
    }

    proptest! {
        #[test]
        fn nothing_of_ours_survives_and_nothing_else_is_lost(
            line in proptest::collection::vec("(a|bb|__Host-choir|__Host-choir-sbx|__Host-choirx)[ \t]?=?[a-z\"=]{0,3}", 0..6)
        ) {
            let text = line.join("; ");
            let Ok(value) = HeaderValue::from_str(&text) else { return Ok(()) };
            let left = strip(value).map(|v| v.to_str().unwrap().to_owned()).unwrap_or_default();
            let name = |pair: &str| pair.split('=').next().unwrap_or_default().trim_matches([' ', '\t']).to_owned();
            let expected: Vec<_> = text.split(';').filter(|p| !matches!(name(p).as_str(), CONTROL | SANDBOX))
                .map(|p| p.trim_matches([' ', '\t']).to_owned()).filter(|p| !p.is_empty()).collect();
            let got: Vec<_> = left.split(';').map(|p| p.trim_matches([' ', '\t']).to_owned()).filter(|p| !p.is_empty()).collect();
            prop_assert_eq!(got, expected);
        }
    }
}
