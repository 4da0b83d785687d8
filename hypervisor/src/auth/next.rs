//! Where to go after signing in: a path on the same host or nothing. It must not know any route.

use url::Url;

/// `wanted` when it is a path that no browser and no proxy can take for another site; `/` otherwise.
pub fn safe_next(wanted: Option<&str>) -> &str {
    wanted.filter(|path| is_safe(path)).unwrap_or("/")
}

fn is_safe(path: &str) -> bool {
    let Some(rest) = path.strip_prefix('/') else {
        return false;
    };
    let lower = rest.to_ascii_lowercase();
    // Browsers read `\` as `/`, and a proxy may decode once before it compares.
    let doubled = ["/", "\\", "%2f", "%5c", "%09", "%0a", "%0d"]
        .iter()
        .any(|start| lower.starts_with(start));
    let plain = path.len() <= 2048 && path.bytes().all(|b| b.is_ascii_graphic() && b != b'\\');
    let base = Url::parse("http://base.invalid").expect("a constant URL");
    !doubled && plain && base.join(path).is_ok_and(|url| url.origin() == base.origin())
}

#[cfg(test)]
mod tests {
    use super::safe_next;

    #[test]
    fn only_a_path_of_the_same_host_is_followed() {
        for bad in [
            "",
            "//e",
            "/\\e",
            "\\e",
            "\\\\e",
            "https:e",
            "https://e",
            "http:/e",
            "%09//e",
            "/%09/e",
            "/\t/e",
            "/\n/e",
            "/%2fe",
            "/%2Fe",
            "/%5ce",
            "e",
            ".",
            "javascript:alert(1)",
            "/a\\b",
            "/\u{2f}\u{2f}e",
            "/é",
            "///e",
            " /e",
            "/ /e",
            "//e/../x",
        ] {
            assert_eq!(safe_next(Some(bad)), "/", "{bad:?}");
        }
        assert_eq!(safe_next(None), "/");
        for good in [
            "/",
            "/account",
            "/a?b=c&d=//x",
            "/auth/open?host=live--main--ada.localhost:9090&next=%2Fx",
            "/a#b",
        ] {
            assert_eq!(safe_next(Some(good)), good);
        }
    }
}
