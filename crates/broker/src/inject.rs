//! Puts a secret into a request's head, after everything that could stand in its place, or lead the request elsewhere
//! than the rule says, was taken out. It must not send anything.

use std::str::FromStr;

use choir_core::Inject;
use data_encoding::BASE64;
use http::header::{ACCEPT_ENCODING, AUTHORIZATION, IF_RANGE, RANGE};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderName, HeaderValue, Uri};
use zeroize::Zeroizing;

use crate::SecretValue;

/// What stands for the value in a header's format.
const PLACE: &str = "{secret}";

/// A way of injecting that cannot work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    #[error("`inject.header` {0:?} is no header that a credential can go into; use one such as `authorization`")]
    Header(String),
    #[error("`inject.format` must be printable and have `{{secret}}` in it once, as in `Bearer {{secret}}`")]
    Format,
    #[error("`inject.basic` must be a user name without a colon, of at most 128 printable characters")]
    Basic,
    #[error("`inject.query` must be a parameter's name of at most 64 of A-Z, a-z, 0-9, `.`, `_` and `-`")]
    Query,
}

/// Why this secret cannot go into this request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InjectError {
    #[error("the secret has a line break or another character that no header can hold; store it without")]
    Unfit,
    #[error("the request's address is too long for the secret to be added")]
    TooLong,
    #[error("the grant is for SSH, where the secret signs and is never sent")]
    Signs,
}

/// Headers that frame a message, say where it goes, or are ours: none is a credential's place.
const NO_CREDENTIAL: [&str; 18] = [
    "accept-encoding",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "cookie",
    "expect",
    "forwarded",
    "host",
    "if-range",
    "keep-alive",
    "range",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "origin",
    "referer",
];
const NO_CREDENTIAL_PREFIXES: [&str; 4] = ["proxy-", "sec-", "x-choir-", "x-forwarded-"];

/// Headers by which some servers take another method or path than the request line's, which is what rules judge.
const OVERRIDES: [&str; 6] = [
    "x-http-method-override",
    "x-http-method",
    "x-method-override",
    "x-original-url",
    "x-rewrite-url",
    "x-original-uri",
];

/// Refuses a way of injecting that would not work or would change more than a credential.
pub fn check(inject: &Inject) -> Result<(), TemplateError> {
    match inject {
        Inject::Header { header, format } => {
            let name = HeaderName::from_str(header).map_err(|_| TemplateError::Header(header.clone()))?;
            let plain = dashed(&name);
            let ours = NO_CREDENTIAL_PREFIXES.iter().any(|prefix| plain.starts_with(prefix));
            if ours || NO_CREDENTIAL.contains(&plain.as_str()) || OVERRIDES.contains(&plain.as_str()) {
                return Err(TemplateError::Header(header.clone()));
            }
            let printable = format.bytes().all(|b| (b' '..=b'~').contains(&b));
            if !printable || format.len() > 256 || format.matches(PLACE).count() != 1 {
                return Err(TemplateError::Format);
            }
        }
        Inject::Basic { basic } => {
            let printable = basic.bytes().all(|b| (b'!'..=b'~').contains(&b) && b != b':');
            if !printable || basic.len() > 128 {
                return Err(TemplateError::Basic);
            }
        }
        Inject::Query { query } => {
            let plain = query.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
            if !plain || !(1..=64).contains(&query.len()) {
                return Err(TemplateError::Query);
            }
        }
        Inject::Ssh { .. } => {}
    }
    Ok(())
}

/// Makes a request ready that a sandbox wrote: takes its own copies of the credential out and puts the secret in. What
/// would keep an answer from being searched, compression and parts, is not asked for.
pub fn apply(inject: &Inject, secret: &SecretValue, head: &mut Parts) -> Result<(), InjectError> {
    clean(head);
    head.headers
        .insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    let (name, value) = match inject {
        Inject::Header { header, format } => {
            let name = HeaderName::from_str(header).map_err(|_| InjectError::Unfit)?;
            let (before, after) = format.split_once(PLACE).ok_or(InjectError::Unfit)?;
            (name, join(&[before.as_bytes(), secret.expose(), after.as_bytes()]))
        }
        Inject::Basic { basic } => {
            let pair = join(&[basic.as_bytes(), b":", secret.expose()]);
            let encoded = Zeroizing::new(BASE64.encode(&pair));
            (AUTHORIZATION, join(&[b"Basic ", encoded.as_bytes()]))
        }
        Inject::Query { query } => {
            head.uri = with_parameter(&head.uri, query, secret.expose())?;
            return Ok(());
        }
        Inject::Ssh { .. } => return Err(InjectError::Signs),
    };
    remove_alike(head, &name);
    let mut value = HeaderValue::from_bytes(&value).map_err(|_| InjectError::Unfit)?;
    value.set_sensitive(true);
    head.headers.insert(name, value);
    Ok(())
}

fn clean(head: &mut Parts) {
    for name in [RANGE, IF_RANGE, ACCEPT_ENCODING] {
        remove_alike(head, &name);
    }
    let misleading: Vec<HeaderName> = head
        .headers
        .keys()
        .filter(|name| {
            let plain = dashed(name);
            OVERRIDES.contains(&plain.as_str())
                || plain == "forwarded"
                || ["x-choir-", "x-forwarded-"]
                    .iter()
                    .any(|prefix| plain.starts_with(prefix))
        })
        .cloned()
        .collect();
    for name in misleading {
        head.headers.remove(name);
    }
}

/// Removes a header under every name that a server may take for it.
fn remove_alike(head: &mut Parts, name: &HeaderName) {
    let wanted = dashed(name);
    let alike: Vec<HeaderName> = head.headers.keys().filter(|n| dashed(n) == wanted).cloned().collect();
    for name in alike {
        head.headers.remove(name);
    }
}

/// CGI-like servers read `_` as `-`.
fn dashed(name: &HeaderName) -> String {
    name.as_str().replace('_', "-")
}

fn join(parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
    // Made large enough at once: growing would leave copies behind that are not wiped.
    let mut whole = Zeroizing::new(Vec::with_capacity(parts.iter().map(|p| p.len()).sum()));
    for part in parts {
        whole.extend_from_slice(part);
    }
    whole
}

/// The address with this parameter, and without the sandbox's own of that name.
fn with_parameter(uri: &Uri, name: &str, value: &[u8]) -> Result<Uri, InjectError> {
    let encoded = Zeroizing::new(encode(value));
    let own = uri.query().unwrap_or_default().split('&').filter(|pair| {
        let key = pair.split(['=', ';']).next().unwrap_or_default();
        !pair.is_empty() && decoded(key) != name.as_bytes()
    });
    let mut query: Vec<&str> = own.collect();
    let parameter = Zeroizing::new(format!("{name}={}", *encoded));
    query.push(&parameter);
    let target = Zeroizing::new(format!("{}?{}", uri.path(), query.join("&")));
    let target = PathAndQuery::try_from(target.as_bytes()).map_err(|_| InjectError::TooLong)?;
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(target);
    Uri::from_parts(parts).map_err(|_| InjectError::TooLong)
}

/// Percent-encoding of everything that is not unreserved (RFC 3986, section 2.3).
pub(crate) fn encode(value: &[u8]) -> String {
    let mut text = String::with_capacity(value.len() * 3);
    for byte in value {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(byte) {
            text.push(char::from(*byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}

fn decoded(key: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(key.len());
    let mut rest = key.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let hex = tail.get(..2).and_then(|pair| std::str::from_utf8(pair).ok());
        match hex
            .filter(|_| *first == b'%')
            .and_then(|pair| u8::from_str_radix(pair, 16).ok())
        {
            Some(byte) => {
                out.push(byte);
                rest = &tail[2..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn head(uri: &str, headers: &[(&str, &str)]) -> Parts {
        let mut request = http::Request::builder().uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    fn secret(text: &str) -> SecretValue {
        SecretValue::new(text.as_bytes().to_vec())
    }

    fn bearer() -> Inject {
        Inject::Header {
            header: "Authorization".into(),
            format: "Bearer {secret}".into(),
        }
    }

    #[test]
    fn the_sandboxs_own_credentials_make_room_for_the_secret() {
        let mut head = head(
            "/v1",
            &[
                ("authorization", "Bearer mine"),
                ("Authorization", "Bearer again"),
                ("x-app", "kept"),
            ],
        );
        apply(&bearer(), &secret("s3cr3t-value"), &mut head).unwrap();
        let all: Vec<_> = head.headers.get_all("authorization").iter().collect();
        assert_eq!(all, ["Bearer s3cr3t-value"]);
        assert!(all[0].is_sensitive() && !format!("{head:?}").contains("s3cr3t"));
        assert_eq!(head.headers["x-app"], "kept");

        let key = Inject::Header {
            header: "x-api-key".into(),
            format: "{secret}".into(),
        };
        let mut head = super::tests::head(
            "/",
            &[("x_api_key", "mine"), ("x-api_key", "mine"), ("X-API-Key", "mine")],
        );
        apply(&key, &secret("s3cr3t-value"), &mut head).unwrap();
        assert_eq!(head.headers.iter().filter(|(n, _)| dashed(n) == "x-api-key").count(), 1);
    }

    #[test]
    fn basic_authentication_is_encoded_as_a_whole() {
        let mut head = head("/", &[("authorization", "Basic eDp5")]);
        apply(&Inject::Basic { basic: "me".into() }, &secret("pässword"), &mut head).unwrap();
        assert_eq!(head.headers["authorization"], "Basic bWU6cMOkc3N3b3Jk");
    }

    #[test]
    fn a_query_parameter_replaces_the_sandboxs_own_however_it_is_written() {
        let key = Inject::Query { query: "key".into() };
        for (from, to) in [
            ("/a", "/a?key=a%26b%2Fc"),
            ("/a?x=1&key=mine&y=2", "/a?x=1&y=2&key=a%26b%2Fc"),
            ("/a?k%65y=mine&%6b%65%79=mine&keys=1", "/a?keys=1&key=a%26b%2Fc"),
            ("/a?key&key=&", "/a?key=a%26b%2Fc"),
        ] {
            let mut head = head(from, &[]);
            apply(&key, &secret("a&b/c"), &mut head).unwrap();
            assert_eq!(head.uri, to);
        }
    }

    #[test]
    fn what_leads_elsewhere_or_hides_the_answer_is_taken_out() {
        let sent = [
            ("x-http-method-override", "DELETE"),
            ("x_http_method_override", "DELETE"),
            ("x-original-url", "/admin"),
            ("x-forwarded-host", "evil.example"),
            ("forwarded", "host=evil.example"),
            ("x-choir-host", "b.example"),
            ("range", "bytes=0-3"),
            ("if-range", "x"),
            ("accept-encoding", "gzip, br"),
        ];
        let mut head = head("/", &sent);
        apply(&bearer(), &secret("s3cr3t-value"), &mut head).unwrap();
        let mut left: Vec<&str> = head.headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["accept-encoding", "authorization"]);
        assert_eq!(head.headers["accept-encoding"], "identity");
    }

    #[test]
    fn a_secret_with_a_line_break_is_refused_and_not_cut() {
        for bad in ["one\ntwo", "one\r\nx: y", "nul\0"] {
            let mut head = head("/", &[]);
            assert_eq!(
                apply(&bearer(), &secret(bad), &mut head),
                Err(InjectError::Unfit),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn headers_that_frame_or_steer_are_no_place_for_a_credential() {
        for bad in [
            "Host",
            "content-length",
            "Transfer-Encoding",
            "x-choir-user",
            "Proxy-Authorization",
            "cookie",
            "a b",
            "",
        ] {
            let inject = Inject::Header {
                header: bad.into(),
                format: "{secret}".into(),
            };
            assert!(check(&inject).is_err(), "{bad}");
        }
        for bad in ["", "x", "{secret}{secret}", "{secret}\r\nx: y", "{secret}ä"] {
            let inject = Inject::Header {
                header: "authorization".into(),
                format: bad.into(),
            };
            assert_eq!(check(&inject), Err(TemplateError::Format), "{bad:?}");
        }
        assert_eq!(check(&Inject::Basic { basic: "a:b".into() }), Err(TemplateError::Basic));
        assert_eq!(check(&Inject::Query { query: "a=b".into() }), Err(TemplateError::Query));
        assert_eq!(check(&bearer()), Ok(()));
    }

    proptest! {
        #[test]
        fn a_query_always_ends_in_the_one_true_parameter(own in "[a-z%0-9=&]{0,30}", value in proptest::collection::vec(any::<u8>(), 1..40)) {
            let uri = format!("/p?{own}");
            prop_assume!(uri.parse::<Uri>().is_ok());
            let mut head = head(&uri, &[]);
            apply(&Inject::Query { query: "key".into() }, &SecretValue::new(value.clone()), &mut head).unwrap();
            let query = head.uri.query().unwrap();
            let named: Vec<&str> = query.split('&').filter(|pair| decoded(pair.split('=').next().unwrap()) == b"key").collect();
            prop_assert_eq!(named.len(), 1);
            prop_assert_eq!(decoded(named[0].strip_prefix("key=").unwrap()), value);
        }
    }
}
