//! What a grant covers (D18) and where its hosts may lead (D12, D13).

use axum::body::Body;
use axum::http::{Request, StatusCode};
use serde_json::json;

use super::outdoors::{PUBLIC, plain};
use super::{API, Scene};

#[tokio::test]
async fn a_call_keeps_to_the_grants_method_and_path_however_it_is_written() {
    let mut scene = Scene::new().await;
    scene.grant(json!({"methods": ["POST"], "path_prefix": "/v1/x"})).await;
    let call = |method: &str, path: &str| {
        let request = Request::builder()
            .method(method)
            .uri(format!("/v1/egress/github{path}"));
        request.body(Body::empty()).unwrap()
    };
    for method in [
        "GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "post", "PROPFIND",
    ] {
        let told = scene.ask(call(method, "/v1/x")).await;
        assert_eq!(told.status, StatusCode::FORBIDDEN, "{method}");
        assert!(
            method == "HEAD" || told.has("grant.methods"),
            "{method}: {}",
            told.text()
        );
    }
    for path in [
        "",
        "/",
        "/v1",
        "/v1/xy",
        "/v1/y",
        "/V1/x",
        "//v1/x",
        "/v1//x",
        "/%76%31/x",
        "/v1/x/../y",
        "/v1/x/..",
        "/v1/x/./y",
        "/v1/x//y",
        "/v1/x/%2e%2e/y",
        "/v1/x/%2E./y",
        "/v1/x/%252e%252e/y",
        "/v1/x/..%2fy",
        "/v1/x/..%5cy",
        "/v1/x/..;/y",
        "/v1/x/%c0%ae%c0%ae/y",
        "/v1/x/%00",
        "/v1/x/%0d%0aX:y",
    ] {
        scene.ask(call("POST", path)).await.denied("grant.path_prefix");
    }
    assert!(scene.outdoors.seen().is_empty() && scene.outdoors.dialled.lock().unwrap().is_empty());
    // The control: within the scope the same calls arrive, letter by letter, and no header makes another of them.
    for path in ["/v1/x", "/v1/x/", "/v1/x/y?a=../b//c", "/v1/x/group%2Fproject"] {
        let mut request = call("POST", path);
        request
            .headers_mut()
            .insert("x-http-method-override", "DELETE".parse().unwrap());
        request.headers_mut().insert("x-original-url", "/v1/y".parse().unwrap());
        assert_eq!(scene.ask(request).await.status, StatusCode::OK, "{path}");
        let seen = scene.outdoors.seen().pop().unwrap();
        assert_eq!((seen.method.as_str(), seen.uri.as_str()), ("POST", path));
        assert!(seen.header("x-http-method-override").is_empty() && seen.header("x-original-url").is_empty());
    }
    let rows = scene.audited("secret.use").await;
    assert_eq!(rows.iter().filter(|(_, outcome)| outcome == "intent").count(), 4);
    // Those of one kind are told of together; each method is another kind.
    assert!(scene.told_in_the_end("secret.use", "methods", 9).await.len() <= 9);
    assert_eq!(scene.told_in_the_end("secret.use", "path_prefix", 22).await.len(), 2);
}

#[tokio::test]
async fn a_granted_host_that_leads_into_the_box_or_its_network_is_not_called() {
    let mut scene = Scene::new().await;
    scene.grant(json!({})).await;
    for inside in [
        "127.0.0.1",
        "10.0.0.5",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "::1",
        "fd00:ec2::254",
        "fe80::1",
        "::ffff:127.0.0.1",
        "64:ff9b::a9fe:a9fe",
    ] {
        scene.outdoors.name(API, &[&[inside]]);
        let told = scene.get("/v1/egress/github/").await;
        told.denied("egress.address");
        assert!(told.has(inside), "{}", told.text());
    }
    let own = choir_hypervisor::places::own_addresses();
    assert!(!own.is_empty());
    for address in own {
        scene.outdoors.name(API, &[&[address.to_string().as_str()]]);
        scene.get("/v1/egress/github/").await.denied("egress.address");
    }
    assert!(scene.outdoors.dialled.lock().unwrap().is_empty());
    // The control: at a public address it is called.
    scene.outdoors.host(API, PUBLIC);
    assert_eq!(scene.get("/v1/egress/github/").await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_name_is_resolved_once_and_only_what_was_checked_is_dialled() {
    let mut scene = Scene::new().await;
    scene.grant(json!({})).await;
    // A kept connection would need no second look-up.
    scene.outdoors.answers(|_| {
        let mut answer = plain("fine");
        answer.headers_mut().insert("connection", "close".parse().unwrap());
        answer
    });
    // Public when it is checked, the box itself when it is asked for again.
    scene.outdoors.name(API, &[&[PUBLIC], &["127.0.0.1"]]);
    assert_eq!(scene.get("/v1/egress/github/").await.status, StatusCode::OK);
    assert_eq!(*scene.outdoors.resolved.lock().unwrap(), [API]);
    assert_eq!(
        *scene.outdoors.dialled.lock().unwrap(),
        [format!("{PUBLIC}:443").parse().unwrap()]
    );
    // The control: the second look-up does lead inside, and is refused as such.
    scene.get("/v1/egress/github/").await.denied("egress.address");
    // Of a mixed answer only the public part is dialled.
    scene.outdoors.name(API, &[&["127.0.0.1", PUBLIC, "10.0.0.1"]]);
    assert_eq!(scene.get("/v1/egress/github/").await.status, StatusCode::OK);
    let dialled = scene.outdoors.dialled.lock().unwrap().clone();
    assert!(
        dialled.len() == 2 && dialled.iter().all(|to| to.ip().to_string() == PUBLIC),
        "{dialled:?}"
    );
}
