//! The SSH agent at the broker's door: which keys a sandbox sees, what is signed with them, and what is not.

use std::process::Command;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use choir_core::Slot;
use choir_runtime::{ListenerKind, Stream};
use hyper_util::rt::TokioIo;
use jiff::SignedDuration;
use serde_json::{Value, json};
use signature::{Signer as _, Verifier as _};
use ssh_key::encoding::{Decode as _, Encode as _};
use ssh_key::{PrivateKey, PublicKey, Signature};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::Scene;
use crate::fleet::audit::Broken;

const FAILURE: [u8; 1] = [5];
const SUCCESS: [u8; 1] = [6];

/// As `ssh-keygen` makes it.
fn keygen(passphrase: &str) -> String {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("key");
    let mut keygen = Command::new("ssh-keygen");
    keygen.args(["-q", "-t", "ed25519", "-N", passphrase, "-f"]).arg(&file);
    assert!(keygen.status().unwrap().success());
    std::fs::read_to_string(file).unwrap()
}

fn line(key: &PrivateKey) -> String {
    PublicKey::from(key.public_key().key_data().clone())
        .to_openssh()
        .unwrap()
}

fn blob(key: &PrivateKey) -> Vec<u8> {
    key.public_key().to_bytes().unwrap()
}

/// A message's kind and its strings.
fn message(kind: u8, parts: &[&[u8]]) -> Vec<u8> {
    let mut message = vec![kind];
    for part in parts {
        part.encode(&mut message).unwrap();
    }
    message
}

fn bind(host: &PrivateKey, session: &[u8], forwarding: bool) -> Vec<u8> {
    let signature = host.try_sign(session).unwrap().encode_vec().unwrap();
    let parts: [&[u8]; 4] = [b"session-bind@openssh.com", &blob(host), session, &signature];
    let mut message = message(27, &parts);
    message.push(u8::from(forwarding));
    message
}

fn sign_in(key: &PrivateKey, session: &[u8], user: &str) -> Vec<u8> {
    let mut data = Vec::new();
    session.encode(&mut data).unwrap();
    data.extend(message(50, &[user.as_bytes(), b"ssh-connection", b"publickey"]));
    data.extend(message(1, &[b"ssh-ed25519", &blob(key)]));
    wish(key, &data)
}

fn wish(key: &PrivateKey, data: &[u8]) -> Vec<u8> {
    let mut wish = message(13, &[&blob(key), data]);
    wish.extend([0; 4]);
    wish
}

fn for_namespace(key: &PrivateKey, namespace: &str) -> Vec<u8> {
    let mut data = b"SSHSIG".to_vec();
    for part in [namespace.as_bytes(), b"", b"sha512", &[7; 64]] {
        part.encode(&mut data).unwrap();
    }
    wish(key, &data)
}

/// A connection of a program inside to its agent.
struct Agent(TokioIo<hyper::upgrade::Upgraded>);

impl Agent {
    async fn of(scene: &Scene, slot: Slot) -> Self {
        let generation = scene.generation(slot);
        let stream: Stream = scene.start.sim.connect_inside(&generation, ListenerKind::Broker).await;
        let (mut send, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .unwrap();
        tokio::spawn(connection.with_upgrades());
        let request = Request::get("/v1/ssh-agent")
            .header("host", "127.0.0.1:9091")
            .header("connection", "Upgrade")
            .header("upgrade", "ssh-agent")
            .body(Body::empty());
        let response = send.send_request(request.unwrap()).await.unwrap();
        assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
        Self(TokioIo::new(hyper::upgrade::on(response).await.unwrap()))
    }

    async fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.unwrap();
    }

    async fn ask(&mut self, message: &[u8]) -> Vec<u8> {
        let mut framed = Vec::new();
        message.encode(&mut framed).unwrap();
        self.send(&framed).await;
        let length = self.0.read_u32().await.unwrap();
        let mut answer = vec![0; length as usize];
        self.0.read_exact(&mut answer).await.unwrap();
        answer
    }

    /// Whether the other end has closed.
    async fn is_closed(&mut self) -> bool {
        !matches!(self.0.read(&mut [0; 8]).await, Ok(1..))
    }

    /// The names of the keys that are offered.
    async fn names(&mut self) -> Vec<String> {
        let answer = self.ask(&[11]).await;
        let (kind, mut rest) = answer.split_first().unwrap();
        assert_eq!(*kind, 12);
        let count = u32::decode(&mut rest).unwrap();
        let each = (0..count).map(|_| {
            (
                Vec::<u8>::decode(&mut rest).unwrap(),
                String::decode(&mut rest).unwrap(),
            )
        });
        each.map(|(_, name)| name).collect()
    }
}

/// A scene with a key that is stored as `deploy`, and a host.
struct Keys {
    scene: Scene,
    key: PrivateKey,
    text: String,
    host: PrivateKey,
}

impl Keys {
    async fn new() -> Self {
        let mut scene = Scene::new().await;
        let (text, host) = (keygen(""), keygen(""));
        scene.store("deploy", &text, false).await;
        Self {
            scene,
            key: PrivateKey::from_openssh(&text).unwrap(),
            text,
            host: PrivateKey::from_openssh(&host).unwrap(),
        }
    }

    fn asked(&self, changes: &Value) -> Value {
        let mut asked = json!({
            "workspace": "main", "slot": "dev", "capability": "deploy", "secret": "deploy", "hosts": ["git.a.example"],
            "inject": {"ssh": {"host_keys": [line(&self.host)]}},
        });
        for (field, value) in changes.as_object().unwrap() {
            asked[field] = value.clone();
        }
        asked
    }

    async fn grant(&mut self, changes: Value) -> String {
        let asked = self.asked(&changes);
        let made = self
            .scene
            .ada
            .post("/me/grants", asked)
            .await
            .expect(StatusCode::CREATED);
        assert_eq!(made["inject"]["ssh"]["public_key"], line(&self.key));
        made["id"].as_str().unwrap().to_owned()
    }

    /// Another hypervisor on the same database, with dev running.
    async fn restart(&mut self) {
        self.scene.restart().await;
    }

    async fn agent(&self) -> Agent {
        Agent::of(&self.scene, Slot::Dev).await
    }

    /// The honest way: bind, then sign in.
    async fn signs_in(&self) -> Vec<u8> {
        let mut agent = self.agent().await;
        agent.ask(&bind(&self.host, b"id", false)).await;
        agent.ask(&sign_in(&self.key, b"id", "git")).await
    }

    /// How each decision since the grant was made ended.
    async fn outcomes(&self) -> Vec<String> {
        let rows = self.scene.audited("secret.sign").await;
        rows.into_iter().map(|(_, outcome)| outcome).collect()
    }

    async fn requests(&mut self) -> Vec<String> {
        let page = self.scene.ada.get("/me/grants/requests").await.json();
        let items = page["items"].as_array().unwrap().iter();
        items
            .filter_map(|item| Some(item["ssh"].as_str()?.to_owned()))
            .collect()
    }
}

#[track_caller]
fn verifies(answer: &[u8], wish: &[u8], key: &PrivateKey) {
    assert_eq!(answer.first(), Some(&14), "{answer:?}");
    let mut rest = &answer[1..];
    let signature = Vec::<u8>::decode(&mut rest).unwrap();
    let signature = Signature::decode(&mut signature.as_slice()).unwrap();
    let mut rest = &wish[1..];
    Vec::<u8>::decode(&mut rest).unwrap();
    let data = Vec::<u8>::decode(&mut rest).unwrap();
    key.public_key().key_data().verify(&data, &signature).unwrap();
}

#[tokio::test]
async fn a_granted_key_signs_in_at_its_host_and_never_comes_inside() {
    let mut keys = Keys::new().await;
    assert!(keys.agent().await.names().await.is_empty());
    assert_eq!(keys.signs_in().await, FAILURE);
    keys.grant(json!({})).await;
    let mut agent = keys.agent().await;
    assert_eq!(agent.names().await, ["deploy"]);
    assert_eq!(agent.ask(&bind(&keys.host, b"id", false)).await, SUCCESS);
    assert_eq!(agent.names().await, ["deploy"]);
    let wish = sign_in(&keys.key, b"id", "git");
    verifies(&agent.ask(&wish).await, &wish, &keys.key);
    keys.scene.until("secret.sign", "ok").await;
    let rows = keys.scene.rows("secret.sign").await;
    let intent = rows.iter().find(|row| row.outcome == "intent").unwrap();
    let ended = rows.iter().find(|row| row.intent == Some(intent.id)).unwrap();
    assert!(
        ended.subject.starts_with("main/dev deploy sign-in git SHA256:"),
        "{}",
        ended.subject
    );

    let known = keys.scene.get("/v1/ssh-known-hosts").await.text();
    assert_eq!(known, format!("git.a.example,[git.a.example]:* {}\n", line(&keys.host)));
    let listed = keys.scene.get("/v1/capabilities").await;
    assert_eq!(listed.json()["items"][0]["path"], "/v1/ssh-agent");
    let middle = keys.text.lines().nth(3).unwrap();
    assert!(!listed.has(middle) && !keys.scene.ada.get("/me/grants").await.text().contains(middle));
}

#[tokio::test]
async fn nothing_is_signed_but_sign_ins_to_a_bound_session_of_a_granted_host_as_a_granted_user() {
    let mut keys = Keys::new().await;
    keys.grant(json!({})).await;
    let stranger = PrivateKey::from_openssh(keygen("")).unwrap();
    let honest = sign_in(&keys.key, b"id", "git");
    let bound = bind(&keys.host, b"id", false);
    let mut replayed = bind(&keys.host, b"another", false);
    let at = replayed.windows(7).position(|part| part == b"another").unwrap();
    replayed[at..at + 7].copy_from_slice(b"session");
    for (bind, wish, outcome) in [
        (None, honest.clone(), "unbound"),
        (Some(bind(&stranger, b"id", false)), honest.clone(), "host_keys"),
        (Some(bind(&keys.host, b"id", true)), honest.clone(), "forwarded"),
        (Some(replayed), sign_in(&keys.key, b"session", "git"), "unproven"),
        (Some(bound.clone()), sign_in(&keys.key, b"other", "git"), "unbound"),
        (Some(bound.clone()), sign_in(&keys.key, b"id", "root"), "users"),
        (Some(bound.clone()), sign_in(&stranger, b"id", "git"), "no_grant"),
        (Some(bound.clone()), wish_for_anything(&keys.key), "form"),
        (None, for_namespace(&keys.key, "git"), "namespaces"),
    ] {
        let mut agent = keys.agent().await;
        if let Some(bind) = bind {
            agent.ask(&bind).await;
        }
        assert_eq!(agent.ask(&wish).await, FAILURE, "{outcome}");
        assert!(
            keys.outcomes().await.contains(&outcome.to_owned()),
            "{outcome}: {:?}",
            keys.outcomes().await
        );
    }
    assert!(
        !keys.outcomes().await.contains(&"intent".to_owned()),
        "no key was opened"
    );
    // What a grant could allow waits for its owner; what none could does not.
    let mut requests = keys.requests().await;
    requests.sort();
    assert_eq!(requests.len(), 4, "{requests:?}");
    assert!(requests.contains(&"sign in as root".to_owned()) && requests.contains(&"sign for git".to_owned()));
    assert!(
        requests
            .iter()
            .any(|it| it.starts_with("sign in at the host with the key SHA256:"))
    );
    // The control: the same messages, honest.
    verifies(&keys.signs_in().await, &honest, &keys.key);
}

fn wish_for_anything(key: &PrivateKey) -> Vec<u8> {
    wish(key, b"whatever somebody would like to have signed")
}

#[tokio::test]
async fn a_commit_is_signed_where_the_grant_has_the_namespace_and_asking_before_leaves_a_request() {
    let mut keys = Keys::new().await;
    let id = keys.grant(json!({})).await;
    let wish = for_namespace(&keys.key, "git");
    assert_eq!(keys.agent().await.ask(&wish).await, FAILURE);
    assert_eq!(keys.requests().await, ["sign for git"]);
    let page = keys.scene.ada.get("/me/grants/requests").await.json();
    let request = format!("/me/grants/requests/{}", page["items"][0]["id"].as_str().unwrap());
    let approve = json!({"decision": "approve"});
    let told = keys.scene.ada.post(&request, approve).await;
    told.refused(StatusCode::CONFLICT, "needs_a_grant");
    assert!(told.text().contains("--template ssh"), "{}", told.text());
    keys.scene
        .ada
        .delete(&format!("/me/grants/{id}"))
        .await
        .expect(StatusCode::NO_CONTENT);
    let signing = json!({"hosts": [], "inject": {"ssh": {"namespaces": ["git"]}}});
    keys.grant(signing).await;
    assert!(keys.requests().await.is_empty(), "the grant closes the request");
    let mut agent = keys.agent().await;
    verifies(&agent.ask(&wish).await, &wish, &keys.key);
    for other in ["file", ""] {
        assert_eq!(agent.ask(&for_namespace(&keys.key, other)).await, FAILURE);
    }
    // A grant for signing signs in nowhere.
    assert_eq!(keys.signs_in().await, FAILURE);
}

#[tokio::test]
async fn a_key_is_its_slots_and_is_gone_at_once_when_its_grant_ends() {
    let mut keys = Keys::new().await;
    let id = keys.grant(json!({"expires_at": "2026-01-02T04:00:00Z"})).await;
    let mut live = Agent::of(&keys.scene, Slot::Live).await;
    assert!(live.names().await.is_empty());
    assert_eq!(live.ask(&bind(&keys.host, b"id", false)).await, FAILURE);
    let mut live = Agent::of(&keys.scene, Slot::Live).await;
    assert_eq!(live.ask(&sign_in(&keys.key, b"id", "git")).await, FAILURE);
    // A connection that was bound while the grant was there.
    let mut agent = keys.agent().await;
    agent.ask(&bind(&keys.host, b"id", false)).await;
    let wish = sign_in(&keys.key, b"id", "git");
    verifies(&agent.ask(&wish).await, &wish, &keys.key);
    keys.scene.clock.advance(SignedDuration::from_hours(1));
    assert_eq!(agent.ask(&wish).await, FAILURE);
    assert!(agent.names().await.is_empty());
    assert!(keys.scene.get("/v1/ssh-known-hosts").await.text().is_empty());
    keys.scene
        .ada
        .delete(&format!("/me/grants/{id}"))
        .await
        .expect(StatusCode::NO_CONTENT);
    let id = keys.grant(json!({})).await;
    verifies(&agent.ask(&wish).await, &wish, &keys.key);
    keys.scene
        .ada
        .delete(&format!("/me/grants/{id}"))
        .await
        .expect(StatusCode::NO_CONTENT);
    assert_eq!(agent.ask(&wish).await, FAILURE);
}

#[tokio::test]
async fn without_an_audit_row_and_without_the_right_key_nothing_is_signed() {
    let mut keys = Keys::new().await;
    keys.grant(json!({})).await;
    let broken = Broken::trail_of(&keys.scene.start);
    assert_eq!(keys.signs_in().await, FAILURE);
    broken.mend();
    let wish = sign_in(&keys.key, b"id", "git");
    // The control: with the trail back, the same is signed.
    verifies(&keys.signs_in().await, &wish, &keys.key);

    let other = keygen("");
    keys.scene.store("deploy", &other, false).await;
    assert_eq!(keys.signs_in().await, FAILURE);
    keys.scene.until("secret.sign", "key_changed").await;
    let text = keys.text.clone();
    keys.scene.store("deploy", &text, false).await;
    verifies(&keys.signs_in().await, &wish, &keys.key);
    keys.scene.ada.delete("/me/secrets/deploy").await.expect(StatusCode::OK);
    assert_eq!(keys.signs_in().await, FAILURE);
}

#[tokio::test]
async fn sealed_a_hypervisor_lists_keys_and_signs_with_none() {
    let mut keys = Keys::new().await;
    keys.grant(json!({})).await;
    let file = keys.scene.start.directory.path().join("key");
    let aside = file.with_extension("aside");
    std::fs::rename(&file, &aside).unwrap();
    keys.restart().await;
    assert_eq!(keys.agent().await.names().await, ["deploy"]);
    assert_eq!(keys.signs_in().await, FAILURE);
    keys.scene.until("secret.sign", "sealed").await;
    // The control: with the master key back, the same is signed.
    std::fs::rename(&aside, &file).unwrap();
    keys.restart().await;
    let wish = sign_in(&keys.key, b"id", "git");
    verifies(&keys.signs_in().await, &wish, &keys.key);
}

#[tokio::test]
async fn what_changes_an_agent_is_refused_and_what_is_no_message_ends_the_connection() {
    let mut keys = Keys::new().await;
    keys.grant(json!({})).await;
    let mut agent = keys.agent().await;
    for kind in [1, 3, 7, 9, 17, 18, 19, 20, 21, 22, 23, 25, 26, 255] {
        assert_eq!(agent.ask(&message(kind, &[b"x"])).await, FAILURE, "{kind}");
    }
    assert_eq!(agent.ask(&message(27, &[b"query"])).await, FAILURE);
    assert_eq!(agent.ask(&[13]).await, FAILURE);
    // The control: none of it has changed anything.
    assert_eq!(agent.names().await, ["deploy"]);
    for bad in [[0; 4], (64_u32 << 10 | 1).to_be_bytes(), [0xff; 4]] {
        let mut agent = keys.agent().await;
        agent.send(&bad).await;
        assert!(agent.is_closed().await, "{bad:?}");
    }
    let told = keys.scene.get("/v1/ssh-agent").await;
    assert_eq!(told.status, StatusCode::UPGRADE_REQUIRED);
}

#[tokio::test]
async fn a_grant_of_a_key_carries_nothing_over_http_and_one_that_could_not_work_is_refused() {
    let mut keys = Keys::new().await;
    let (locked, host) = (keygen("a passphrase"), line(&keys.host));
    keys.scene.store("locked", &locked, false).await;
    for (changes, code, said) in [
        (json!({"secret": "locked"}), "not_a_key", "ssh-keygen -p"),
        (json!({"secret": "gh"}), "not_a_key", "ssh-keygen -t"),
        (json!({"methods": ["GET"]}), "bad_grant", "methods"),
        (json!({"path_prefix": "/x"}), "bad_grant", "path_prefix"),
        (json!({"hosts": []}), "bad_grant", "host_keys"),
        (json!({"inject": {"ssh": {}}}), "bad_grant", "host_keys"),
        (
            json!({"inject": {"ssh": {"host_keys": ["ssh-ed25519 AAAA"]}}}),
            "bad_grant",
            "host_keys",
        ),
        (
            json!({"inject": {"ssh": {"host_keys": [host], "users": []}}}),
            "bad_grant",
            "users",
        ),
    ] {
        let asked = keys.asked(&changes);
        let told = keys.scene.ada.post("/me/grants", asked).await;
        told.refused(StatusCode::BAD_REQUEST, code);
        assert!(told.text().contains(said), "{}", told.text());
    }
    // What a person says of the public half is not taken for it; hosts that publish their keys need none said.
    let lied = json!({"inject": {"ssh": {"host_keys": [line(&keys.host)], "public_key": line(&keys.host)}}});
    keys.grant(lied).await;
    let known = json!({
        "workspace": "main", "slot": "live", "capability": "hub", "secret": "deploy", "template": "ssh",
        "hosts": ["github.com"],
    });
    let made = keys
        .scene
        .ada
        .post("/me/grants", known)
        .await
        .expect(StatusCode::CREATED);
    assert_eq!(made["inject"]["ssh"]["host_keys"].as_array().unwrap().len(), 2);
    keys.scene.outdoors.host("git.a.example", super::outdoors::PUBLIC);
    let told = keys.scene.get("/v1/egress/deploy/x").await;
    told.denied("grant.inject");
    assert!(keys.scene.outdoors.seen().is_empty());
    let opened = keys.scene.audited("secret.inspect").await;
    assert!(opened.iter().any(|(_, outcome)| outcome == "intent") && opened.iter().any(|(_, it)| it == "failed"));
}
