//! What a sandbox's redirect does to the proxy: nothing (B18).

use std::sync::atomic::Ordering;

use crate::harness::{COOKIE, LIVE, status, world};

/// Redirects to where a follower would be dangerous, and to the sandbox itself, where a follower would be seen.
fn away(head: &str) -> Option<&'static [u8]> {
    let path = head.split(' ').nth(1)?;
    Some(match path {
        "/metadata" => b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/latest/\r\nContent-Length: 0\r\n\r\n",
        "/box" => {
            b"HTTP/1.1 307 Temporary Redirect\r\nLocation: http://127.0.0.1:9090/admin\r\nContent-Length: 0\r\n\r\n"
        }
        "/six" => b"HTTP/1.1 301 Moved Permanently\r\nLocation: http://[::1]/\r\nContent-Length: 0\r\n\r\n",
        "/itself" => b"HTTP/1.1 308 Permanent Redirect\r\nLocation: /followed\r\nContent-Length: 0\r\n\r\n",
        _ => return None,
    })
}

#[tokio::test]
async fn a_sandboxs_redirect_is_handed_to_the_browser_and_not_followed() {
    for (path, place) in [
        ("/metadata", "http://169.254.169.254/latest/"),
        ("/box", "http://127.0.0.1:9090/admin"),
        ("/six", "http://[::1]/"),
        ("/itself", "/followed"),
    ] {
        let world = world(away).await;
        let ask = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: {LIVE}\r\n{COOKIE}\r\nConnection: close\r\n\r\n");
        let answer = world.raw(ask(path)).await;
        assert!((300..400).contains(&status(&answer)), "{answer}");
        assert!(answer.contains(&format!("location: {place}\r\n")), "{answer}");
        let requests = || world.sandbox.text().matches(" HTTP/1.1\r\n").count();
        assert_eq!((requests(), world.sandbox.dials.load(Ordering::Relaxed)), (1, 1));
        // The control: one who follows is seen.
        assert_eq!(status(&world.raw(ask("/followed")).await), 200);
        assert_eq!(requests(), 2);
    }
}
