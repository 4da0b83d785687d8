//! The proxy that sandboxes use.

use std::sync::{Arc, Mutex};

use choir_proxy::egress::{Outward, Plain, Refused, Way, serve};
use http::Request;
use hyper::body::Incoming;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

/// Knows one host, and keeps what is sent there.
#[derive(Default)]
struct Outside {
    asked: Mutex<Vec<(String, u16)>>,
    far: Mutex<Option<DuplexStream>>,
}

impl Outward for Outside {
    async fn connect(&self, host: &str, port: u16) -> Result<Way, Refused> {
        self.dial(host, port).map(|near| Way::Through(Box::new(near)))
    }

    async fn request(&self, host: &str, port: u16, request: Request<Incoming>) -> Result<Plain, Refused> {
        let near = self.dial(host, port)?;
        Ok(Plain::Through(Box::new(near), request))
    }
}

impl Outside {
    fn dial(&self, host: &str, port: u16) -> Result<DuplexStream, Refused> {
        self.asked.lock().unwrap().push((host.into(), port));
        match host {
            "evil.example" => Err(Refused::Denied {
                host: host.into(),
                rule: "egress.allowlist".into(),
                remedy: "ask the owner to allow it with `choir config`".into(),
            }),
            "nowhere.example" => Err(Refused::Unresolved(host.into())),
            "down.example" => Err(Refused::Unreachable(host.into())),
            _ => {
                let (near, far) = tokio::io::duplex(4096);
                *self.far.lock().unwrap() = Some(far);
                Ok(near)
            }
        }
    }
}

async fn start() -> (DuplexStream, Arc<Outside>) {
    let (client, inside) = tokio::io::duplex(4096);
    let outside = Arc::new(Outside::default());
    tokio::spawn(serve(inside, outside.clone()));
    (client, outside)
}

async fn head(stream: &mut DuplexStream) -> String {
    let mut got = Vec::new();
    while !got.ends_with(b"\r\n\r\n") {
        got.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(got).unwrap()
}

async fn answer(request: &str) -> String {
    let (mut client, _) = start().await;
    client.write_all(request.as_bytes()).await.unwrap();
    let mut got = Vec::new();
    client.read_to_end(&mut got).await.unwrap();
    String::from_utf8(got).unwrap()
}

#[tokio::test]
async fn connect_relays_bytes_both_ways() {
    for (target, asked) in [
        ("api.example:443", ("api.example", 443)),
        ("[2606:4700::1111]:443", ("2606:4700::1111", 443)),
    ] {
        let (mut client, outside) = start().await;
        client
            .write_all(format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n").as_bytes())
            .await
            .unwrap();
        assert!(head(&mut client).await.starts_with("HTTP/1.1 200"));
        assert_eq!(*outside.asked.lock().unwrap(), [(asked.0.to_owned(), asked.1)]);
        let mut far = outside.far.lock().unwrap().take().unwrap();
        client.write_all(b"hello").await.unwrap();
        let mut got = [0; 5];
        far.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"hello");
        far.write_all(b"world").await.unwrap();
        client.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"world");
    }
}

#[tokio::test]
async fn plain_requests_are_rebuilt_and_redirects_are_handed_back() {
    let (mut client, outside) = start().await;
    client
        .write_all(
            b"GET http://deb.example/a?b HTTP/1.1\r\nHost: deb.example\r\nProxy-Authorization: Basic eA==\r\n\
              Proxy-Connection: keep-alive\r\nConnection: x-hop\r\nX-Hop: gone\r\nX-App: kept\r\n\r\n",
        )
        .await
        .unwrap();
    let mut far = loop {
        if let Some(far) = outside.far.lock().unwrap().take() {
            break far;
        }
        tokio::task::yield_now().await;
    };
    let seen = head(&mut far).await;
    assert!(seen.starts_with("GET /a?b HTTP/1.1\r\n"), "{seen}");
    assert!(
        seen.contains("host: deb.example\r\n") && seen.contains("x-app: kept"),
        "{seen}"
    );
    assert!(!seen.contains("proxy-") && !seen.contains("gone"), "{seen}");
    far.write_all(b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n")
        .await
        .unwrap();
    let got = head(&mut client).await;
    assert!(got.starts_with("HTTP/1.1 302") && got.contains("169.254"), "{got}");
    assert_eq!(outside.asked.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn refusals_name_the_rule_and_the_remedy() {
    for (request, status, says) in [
        (
            "CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443",
            "403",
            "egress.allowlist; ask the owner",
        ),
        (
            "GET http://evil.example/ HTTP/1.1\r\nHost: evil.example",
            "403",
            "\"rule\":\"egress.allowlist\"",
        ),
        (
            "CONNECT nowhere.example:443 HTTP/1.1\r\nHost: nowhere.example:443",
            "502",
            "cannot be resolved",
        ),
        (
            "CONNECT down.example:443 HTTP/1.1\r\nHost: down.example:443",
            "502",
            "does not answer",
        ),
        ("GET / HTTP/1.1\r\nHost: api.example", "400", "this is an HTTP proxy"),
        (
            "GET https://api.example/ HTTP/1.1\r\nHost: api.example",
            "400",
            "send CONNECT",
        ),
        (
            "CONNECT api.example HTTP/1.1\r\nHost: api.example",
            "400",
            "a host and a port",
        ),
        (
            "CONNECT u@api.example:443 HTTP/1.1\r\nHost: api.example:443",
            "400",
            "a host and a port",
        ),
        (
            "GET http://u:p@api.example/ HTTP/1.1\r\nHost: api.example",
            "400",
            "http://",
        ),
        (
            "GET http://api.example/ HTTP/1.1\r\nHost: other.example",
            "400",
            "one Host",
        ),
        (
            "GET http://api.example/ HTTP/1.1\r\nHost: api.example\r\nTransfer-Encoding: gzip, chunked",
            "400",
            "chunked",
        ),
    ] {
        let got = answer(&format!("{request}\r\nConnection: close\r\n\r\n")).await;
        assert_eq!(got.get(9..12), Some(status), "{request}: {got}");
        assert!(got.contains(says), "{request}: {got}");
    }
}
