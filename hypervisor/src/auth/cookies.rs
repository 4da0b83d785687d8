//! Our cookies, read from the raw header bytes. It must not be lenient: a sibling site can send look-alikes that a
//! parser which trims Unicode spaces would take for ours.

use axum::http::{HeaderMap, HeaderValue, header};
use jiff::SignedDuration;

use super::secret::Secret;
use crate::error::ApiError;

// By the names that the proxy keeps from sandboxes.
/// The session on the control host.
pub const SESSION: &str = choir_proxy::cookies::CONTROL;
/// The session on one sandbox host.
pub const APP: &str = choir_proxy::cookies::SANDBOX;
/// Binds a passkey ceremony to the browser that began it.
pub const CEREMONY: &str = "__Host-choir-ceremony";

/// The secret that a cookie carries. Two cookies of one name are refused, because one of them is not from us.
pub(super) fn read(headers: &HeaderMap, name: &str) -> Result<Option<Secret>, ApiError> {
    let mut found = values(headers, name);
    match (found.next(), found.next()) {
        (_, Some(_)) => Err(ApiError::bad_request(
            "two_cookies",
            "Two cookies of the same name came in; clear this site's cookies.",
        )),
        (value, None) => Ok(value.and_then(Secret::parse)),
    }
}

/// Whether any cookie of this name came in.
pub(super) fn present(headers: &HeaderMap, name: &str) -> bool {
    values(headers, name).next().is_some()
}

fn values<'h>(headers: &'h HeaderMap, name: &str) -> impl Iterator<Item = &'h [u8]> {
    headers
        .get_all(header::COOKIE)
        .iter()
        .flat_map(|value| value.as_bytes().split(|&b| b == b';'))
        .filter_map(move |pair| {
            let pair = trim(pair);
            let (key, rest) = pair.split_at_checked(name.len())?;
            (key == name.as_bytes()).then_some(rest)?.strip_prefix(b"=")
        })
}

fn trim(mut bytes: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = bytes {
        bytes = rest;
    }
    bytes
}

/// A `Set-Cookie` value; browsers forget the cookie after `lifetime`.
pub(super) fn set(name: &str, secret: &Secret, lifetime: SignedDuration) -> HeaderValue {
    header_value(format!(
        "{name}={}; Path=/; Secure; HttpOnly; SameSite=Lax; Max-Age={}",
        secret.expose(),
        lifetime.as_secs()
    ))
}

/// A `Set-Cookie` value that makes browsers forget the cookie now.
pub(super) fn clear(name: &str) -> HeaderValue {
    header_value(format!("{name}=; Path=/; Secure; HttpOnly; SameSite=Lax; Max-Age=0"))
}

fn header_value(text: String) -> HeaderValue {
    HeaderValue::try_from(text).expect("cookie names and base64url are visible ASCII")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[&[u8]]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for line in lines {
            map.append(header::COOKIE, HeaderValue::from_bytes(line).unwrap());
        }
        map
    }

    #[test]
    fn our_cookie_is_found_wherever_it_stands() {
        let token = "A".repeat(43);
        for line in [
            format!("{SESSION}={token}"),
            format!("a=1; {SESSION}={token}; b=2"),
            format!("a=1;\t{SESSION}={token} "),
            format!("{SESSION}-app=x; x{SESSION}=y; {SESSION}={token}"),
        ] {
            let found = read(&headers(&[line.as_bytes()]), SESSION).unwrap();
            assert_eq!(found.unwrap().expose(), token, "{line}");
        }
    }

    #[test]
    fn look_alikes_are_not_ours() {
        let token = "A".repeat(43);
        for line in [
            format!("\u{a0}{SESSION}={token}"),
            format!("\u{2000}{SESSION}={token}"),
            format!("{SESSION} ={token}"),
            format!("__host-choir={token}"),
            format!("{SESSION}={token}x"),
            SESSION.to_owned(),
            format!("{SESSION}=\"{token}\""),
        ] {
            assert!(read(&headers(&[line.as_bytes()]), SESSION).unwrap().is_none(), "{line}");
        }
    }

    #[test]
    fn two_exact_matches_are_refused() {
        let pair = format!("{SESSION}={}", "A".repeat(43));
        let both = format!("{pair}; {pair}");
        assert!(read(&headers(&[both.as_bytes()]), SESSION).is_err());
        assert!(read(&headers(&[pair.as_bytes(), pair.as_bytes()]), SESSION).is_err());
    }
}
