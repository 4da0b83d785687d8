//! Programs that know nothing of the broker: over TLS that their sandbox believes, in plain HTTP, and over websockets
//! (D15, D18, D26).

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Method, Request, StatusCode};
use choir_core::Slot;
use choir_runtime::ListenerKind;
use http_body_util::Full;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::time_provider::TimeProvider;
use rustls::{ClientConfig, RootCertStore};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;

use super::outdoors::{PUBLIC, accepted, plain, streamed};
use super::{API, Begun, SECRET, Scene, Told};

impl Scene {
    async fn intercept(&mut self) {
        let on = json!({"intercept_tls": true});
        let answer = self.ada.fetch(Method::PATCH, "/api/workspaces/main", Some(on)).await;
        answer.expect(StatusCode::OK);
    }

    /// What programs of a slot's first sandbox believe: its own authority, and nobody else.
    fn sandboxs_authority(&self, slot: Slot) -> RootCertStore {
        let authorities = self.start.app.fleet.services.authorities.as_ref().unwrap();
        let authority = authorities.of(&self.generation(slot).to_string()).unwrap();
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_slice(authority.pem().as_bytes()).unwrap())
            .unwrap();
        roots
    }

    /// A connection that a program in dev makes by the proxy to `host`, believing these roots.
    async fn secured(&self, host: &str, roots: RootCertStore) -> Result<SendRequest<Full<bytes::Bytes>>, String> {
        let generation = self.generation(Slot::Dev);
        let mut stream = self.start.sim.connect_inside(&generation, ListenerKind::Egress).await;
        let connect = format!("CONNECT {host}:443 HTTP/1.1\r\nHost: {host}:443\r\n\r\n");
        stream.write_all(connect.as_bytes()).await.unwrap();
        let mut got = Vec::new();
        while !got.ends_with(b"\r\n\r\n") {
            got.push(stream.read_u8().await.unwrap());
        }
        let got = String::from_utf8(got).unwrap();
        if !got.starts_with("HTTP/1.1 200") {
            return Err(got);
        }
        let seconds = self.start.app.clock.now().as_second().unsigned_abs();
        let now = UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_details(provider, Arc::new(At(now)))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from(host.to_owned()).unwrap();
        let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await;
        let (send, connection) = handshake(TokioIo::new(stream.map_err(|error| error.to_string())?))
            .await
            .unwrap();
        tokio::spawn(connection.with_upgrades());
        Ok(send)
    }

    async fn believing(&self, host: &str) -> SendRequest<Full<bytes::Bytes>> {
        self.secured(host, self.sandboxs_authority(Slot::Dev)).await.unwrap()
    }
}

/// The time that programs in these tests go by.
#[derive(Debug)]
struct At(UnixTime);

impl TimeProvider for At {
    fn current_time(&self) -> Option<UnixTime> {
        Some(self.0)
    }
}

fn asks(method: &str, path: &str) -> Request<Full<bytes::Bytes>> {
    let request = Request::builder().method(method).uri(path).header("host", API);
    request.body(Full::default()).unwrap()
}

async fn told(send: &mut SendRequest<Full<bytes::Bytes>>, request: Request<Full<bytes::Bytes>>) -> Told {
    send.ready().await.unwrap();
    Begun(send.send_request(request).await.unwrap()).whole().await
}

#[tokio::test]
async fn an_unmodified_programs_call_carries_the_secret_where_its_owner_switched_that_on() {
    let mut scene = Scene::new().await;
    scene.grant(json!({})).await;
    let request = || {
        let mut request = asks("POST", "/repos/x?per_page=2");
        *request.body_mut() = Full::from("{\"title\":1}");
        let headers = request.headers_mut();
        headers.insert("authorization", "Bearer placeholder".parse().unwrap());
        headers.insert("x-app", "kept".parse().unwrap());
        request
    };
    // The control: before that, the program speaks with the host itself, which sees what the program sent.
    assert!(scene.secured(API, scene.sandboxs_authority(Slot::Dev)).await.is_err());
    let mut itself = scene.secured(API, scene.outdoors.roots.clone()).await.unwrap();
    assert_eq!(told(&mut itself, request()).await.status, StatusCode::OK);
    assert_eq!(scene.outdoors.seen()[0].header("authorization"), ["Bearer placeholder"]);

    scene.intercept().await;
    let mut send = scene.believing(API).await;
    let answer = told(&mut send, request()).await;
    assert_eq!((answer.status, answer.text().as_str()), (StatusCode::OK, "fine"));
    assert!(!answer.has(SECRET));
    let seen = &scene.outdoors.seen()[1];
    assert_eq!(
        (
            seen.method.as_str(),
            seen.uri.as_str(),
            seen.host.as_str(),
            &seen.body[..]
        ),
        ("POST", "/repos/x?per_page=2", API, &b"{\"title\":1}"[..])
    );
    assert_eq!(seen.header("authorization"), [format!("Bearer {SECRET}")]);
    assert_eq!(seen.header("x-app"), ["kept"]);
    scene.until("secret.use", "ok").await;
    scene.until("egress.connect", "intercepted").await;
    let uses = scene.audited("secret.use").await;
    assert_eq!(uses[0], (format!("main/dev github POST {API}"), "intent".to_owned()));
}

#[tokio::test]
async fn only_granted_hosts_are_answered_in_their_name_and_only_to_the_sandbox_that_asked() {
    let mut scene = Scene::new().await;
    scene.outdoors.host("b.example", "93.184.215.15");
    scene.grant(json!({})).await;
    scene.intercept().await;
    let other = scene.secured("b.example", scene.sandboxs_authority(Slot::Dev)).await;
    assert!(other.is_err(), "a host without a grant was answered in its name");
    assert!(scene.secured("b.example", scene.outdoors.roots.clone()).await.is_ok());
    // What live believes is another authority.
    assert!(scene.secured(API, scene.sandboxs_authority(Slot::Live)).await.is_err());
    assert!(scene.secured(API, scene.sandboxs_authority(Slot::Dev)).await.is_ok());
}

#[tokio::test]
async fn what_a_grant_does_not_cover_goes_without_the_secret_or_where_the_policy_forbids_it_not_at_all() {
    let mut scene = Scene::new().await;
    scene.grant(json!({"methods": ["POST"], "path_prefix": "/v1/x"})).await;
    scene.intercept().await;
    let uncovered = [
        ("GET", "/v1/x"),
        ("POST", "/v1/xy"),
        ("POST", "/v1/x/../y"),
        ("POST", "/v1/x/%2e%2e/y"),
        ("POST", "//v1/x"),
        ("POST", "/v1/x/..;/y"),
    ];
    let mut send = scene.believing(API).await;
    for (method, path) in uncovered {
        assert_eq!(
            told(&mut send, asks(method, path)).await.status,
            StatusCode::OK,
            "{path}"
        );
    }
    let seen = scene.outdoors.seen();
    assert_eq!(seen.len(), uncovered.len());
    assert!(seen.iter().all(|s| s.header("authorization").is_empty()), "{seen:?}");
    // The control: covered, on the same connection.
    assert_eq!(told(&mut send, asks("POST", "/v1/x/y")).await.status, StatusCode::OK);
    assert_eq!(scene.outdoors.seen()[uncovered.len()].header("authorization").len(), 1);

    let locked = json!({"egress": "locked"});
    let answer = scene
        .ada
        .fetch(Method::PATCH, "/api/workspaces/main", Some(locked))
        .await;
    answer.expect(StatusCode::OK);
    let mut send = scene.believing(API).await;
    for (method, path) in uncovered {
        let refused = told(&mut send, asks(method, path)).await;
        assert_eq!(refused.status, StatusCode::FORBIDDEN, "{path}");
        assert!(
            refused.has("grant.methods") || refused.has("grant.path_prefix"),
            "{}",
            refused.text()
        );
    }
    assert_eq!(told(&mut send, asks("POST", "/v1/x")).await.status, StatusCode::OK);
    assert_eq!(scene.outdoors.seen().len(), uncovered.len() + 2);
}

#[tokio::test]
async fn a_request_for_another_host_on_a_granted_hosts_connection_is_refused() {
    let mut scene = Scene::new().await;
    scene.grant(json!({})).await;
    scene.intercept().await;
    for host in [
        "b.example",
        "api.a.example:8443",
        "api.a.example.",
        "api.a.example:443, b.example",
        "",
    ] {
        let mut send = scene.believing(API).await;
        let mut request = asks("GET", "/");
        request.headers_mut().insert("host", host.parse().unwrap());
        assert_eq!(told(&mut send, request).await.status, StatusCode::BAD_REQUEST, "{host}");
    }
    assert!(scene.outdoors.seen().is_empty());
    let mut send = scene.believing(API).await;
    let mut request = asks("GET", "/");
    request
        .headers_mut()
        .insert("host", "API.a.example:443".parse().unwrap());
    assert_eq!(told(&mut send, request).await.status, StatusCode::OK);
    assert_eq!(scene.outdoors.seen()[0].host, API);
}

#[tokio::test]
async fn a_grant_that_ends_takes_its_secret_from_connections_that_are_open() {
    let mut scene = Scene::new().await;
    let id = scene.grant(json!({})).await;
    scene.intercept().await;
    let mut send = scene.believing(API).await;
    assert_eq!(told(&mut send, asks("GET", "/")).await.status, StatusCode::OK);
    let path = format!("/me/grants/{id}");
    scene.ada.delete(&path).await.expect(StatusCode::NO_CONTENT);
    assert_eq!(told(&mut send, asks("GET", "/")).await.status, StatusCode::OK);
    let seen = scene.outdoors.seen();
    assert_eq!(seen[0].header("authorization").len(), 1);
    assert!(seen[1].header("authorization").is_empty());
}

#[tokio::test]
async fn plain_http_to_a_granted_host_goes_out_over_tls_with_the_secret() {
    let mut scene = Scene::new().await;
    let ask =
        |target: &str| format!("GET http://{target}/user HTTP/1.1\r\nHost: {target}\r\nConnection: close\r\n\r\n");
    // The control: without a grant it is tried in plain, which this host does not speak.
    assert!(scene.proxied(&ask(API)).await.starts_with("HTTP/1.1 502"));
    scene.grant(json!({})).await;
    let got = scene.proxied(&ask(API)).await;
    assert!(got.starts_with("HTTP/1.1 200") && !got.contains(SECRET), "{got}");
    let seen = scene.outdoors.seen();
    assert_eq!((seen.len(), seen[0].uri.as_str()), (1, "/user"));
    assert_eq!(seen[0].header("authorization"), [format!("Bearer {SECRET}")]);
    let to = scene.outdoors.dialled.lock().unwrap().last().copied().unwrap();
    assert_eq!(to, format!("{PUBLIC}:443").parse().unwrap());
    // Another port is another server.
    assert!(
        scene
            .proxied(&ask("api.a.example:8080"))
            .await
            .starts_with("HTTP/1.1 502")
    );
    assert_eq!(scene.outdoors.seen().len(), 1);
}

#[tokio::test]
async fn events_come_one_by_one_and_a_reflected_secret_is_cut_for_unmodified_programs_too() {
    let mut scene = Scene::new().await;
    scene.grant(json!({})).await;
    scene.intercept().await;
    let (says, body) = streamed();
    scene.outdoors.answers(move |_| {
        let mut answer = plain("");
        answer
            .headers_mut()
            .insert("content-type", "text/event-stream".parse().unwrap());
        *answer.body_mut() = body();
        answer
    });
    let mut send = scene.believing(API).await;
    let mut begun = Begun(send.send_request(asks("GET", "/events")).await.unwrap());
    for event in ["data: one\n\n", "data: two\n\n"] {
        says.send(event).await.unwrap();
        assert_eq!(begun.next().await, event.as_bytes());
    }
    says.send("data: ghp_Canary0Canary1Canary2\n\n").await.unwrap();
    let rest = begun.whole().await;
    assert!(rest.cut && !rest.has("Canary2"), "{}", rest.text());
    scene.until("secret.use", "reflected").await;
}

#[tokio::test]
async fn a_websocket_carries_the_secret_in_its_handshake_and_is_cut_where_the_host_says_it() {
    let mut scene = Scene::new().await;
    scene.grant(json!({})).await;
    scene.intercept().await;
    scene.outdoors.answers(|_| accepted());
    let wants = |request: &mut Request<Full<bytes::Bytes>>| {
        for (name, value) in [
            ("connection", "Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("sec-websocket-extensions", "permessage-deflate"),
        ] {
            request.headers_mut().insert(name, value.parse().unwrap());
        }
    };
    let mut by_tls = asks("GET", "/ws");
    wants(&mut by_tls);
    let mut by_broker = asks("GET", "/v1/egress/github/ws");
    wants(&mut by_broker);
    by_broker
        .headers_mut()
        .insert("host", "127.0.0.1:9091".parse().unwrap());
    let inside = scene
        .start
        .sim
        .connect_inside(&scene.generation(Slot::Dev), ListenerKind::Broker)
        .await;
    let (to_broker, connection) = handshake(TokioIo::new(inside)).await.unwrap();
    tokio::spawn(connection.with_upgrades());
    for (nth, (mut send, request)) in [(scene.believing(API).await, by_tls), (to_broker, by_broker)]
        .into_iter()
        .enumerate()
    {
        let answer = send.send_request(request).await.unwrap();
        assert_eq!(answer.status(), StatusCode::SWITCHING_PROTOCOLS);
        assert_eq!(answer.headers()["sec-websocket-accept"], "yes");
        let seen = &scene.outdoors.seen()[nth];
        assert_eq!(seen.header("authorization"), [format!("Bearer {SECRET}")]);
        assert!(
            seen.header("sec-websocket-extensions").is_empty(),
            "what is compressed cannot be searched"
        );
        let mut socket = TokioIo::new(hyper::upgrade::on(answer).await.unwrap());
        socket.write_all(b"hello").await.unwrap();
        let mut echo = [0; 5];
        socket.read_exact(&mut echo).await.unwrap();
        assert_eq!(&echo, b"hello");
        // The host repeats what it is told; the secret it must not.
        socket.write_all(SECRET.as_bytes()).await.unwrap();
        let mut rest = Vec::new();
        let _ = socket.read_to_end(&mut rest).await;
        assert!(rest.is_empty(), "{:?}", String::from_utf8_lossy(&rest));
    }
    scene.until("secret.use", "reflected").await;
}

#[tokio::test]
async fn a_host_that_switches_unasked_is_not_followed() {
    let mut scene = Scene::new().await;
    scene.grant(json!({})).await;
    scene.outdoors.answers(|_| accepted());
    let told = scene.get("/v1/egress/github/").await;
    assert_eq!(
        (told.status, &told.json()["error"]["code"]),
        (StatusCode::BAD_GATEWAY, &json!("switched"))
    );
}

#[tokio::test]
async fn connections_are_kept_for_the_sandbox_that_made_them_and_for_no_other() {
    let mut scene = Scene::new().await;
    scene.grant(json!({})).await;
    scene.grant(json!({"slot": "live"})).await;
    for _ in 0..3 {
        assert_eq!(scene.get("/v1/egress/github/user").await.status, StatusCode::OK);
    }
    assert_eq!(scene.outdoors.dialled.lock().unwrap().len(), 1);
    let live = Request::get("/v1/egress/github/user").body(Body::empty()).unwrap();
    assert_eq!(scene.ask_from(Slot::Live, live).await.status, StatusCode::OK);
    assert_eq!(scene.outdoors.dialled.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn while_sealed_programs_speak_with_the_host_itself() {
    let mut scene = Scene::new().await;
    scene.grant(json!({})).await;
    scene.intercept().await;
    let key = scene.start.app.config.key_file();
    std::fs::rename(&key, key.with_extension("aside")).unwrap();
    scene.restart().await;
    let mut itself = scene.secured(API, scene.outdoors.roots.clone()).await.unwrap();
    assert_eq!(told(&mut itself, asks("GET", "/")).await.status, StatusCode::OK);
    assert!(scene.outdoors.seen()[0].header("authorization").is_empty());
}
