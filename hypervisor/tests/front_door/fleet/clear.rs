//! No secret of signing in is kept in clear (C15): not in the database, not in what SQLite keeps beside it, not in the
//! log at its most talkative.

use std::io::Write;
use std::sync::{Arc, Mutex};

use axum::http::StatusCode;
use serde_json::{Value, json};
use tracing_subscriber::fmt::MakeWriter;

use super::wire::{CONTROL, Served, control_cookie};
use super::{Box, workspace};

const HOST: &str = "live--main--ada.localhost:9090";

/// All that is logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

/// A named secret, or something that is kept on purpose.
type Named = (&'static str, String);

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}")).to_owned()
}

/// Uses every kind of secret there is; each with its name.
async fn use_everything(start: &Box, server: &Served) -> Vec<Named> {
    let claim = start
        .app
        .auth
        .ensure_claim()
        .await
        .unwrap()
        .unwrap()
        .expose()
        .to_owned();
    let mut ada = start.browser();
    ada.register("ada", Some(&claim)).await.expect(StatusCode::OK);
    let mut secrets = vec![("a claim", claim), ("the first session's cookie", ada.session())];
    workspace(&mut ada).await;
    ada.post("/auth/step-up/start", json!({})).await.expect(StatusCode::OK);
    secrets.push(("a ceremony's cookie", ada.cookies["__Host-choir-ceremony"].clone()));
    ada.step_up().await.expect(StatusCode::OK);
    secrets.push(("the session's cookie after a step-up", ada.session()));
    let token = ada
        .post("/me/tokens", json!({"name": "ci", "scopes": ["read"]}))
        .await
        .expect(StatusCode::CREATED);
    let token = text(&token["token"]);
    secrets.push(("a token", token.trim_start_matches("choir_").to_owned()));
    let lines = format!("Host: {CONTROL}\r\nAuthorization: Bearer {token}\r\nConnection: close");
    let answer = server
        .raw(format!("GET /me/sessions HTTP/1.1\r\n{lines}\r\n\r\n"))
        .await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let invite = ada.post("/admin/invites", json!({})).await.expect(StatusCode::CREATED);
    secrets.push(("an invite", text(&invite["invite"])));
    start
        .browser()
        .register("bob", invite["invite"].as_str())
        .await
        .expect(StatusCode::OK);
    let unused = ada.post("/admin/invites", json!({})).await.expect(StatusCode::CREATED);
    secrets.push(("an invite that waits", text(&unused["invite"])));
    let login = ada
        .post("/auth/device/start", json!({"client_name": "cli"}))
        .await
        .expect(StatusCode::OK);
    secrets.push(("a device code", text(&login["device_code"])));
    secrets.push(("a user code", text(&login["user_code"])));
    let approval = json!({"user_code": login["user_code"]});
    ada.post("/auth/device/approve", approval)
        .await
        .expect(StatusCode::NO_CONTENT);
    let poll = json!({"device_code": login["device_code"]});
    let given = ada.post("/auth/device/poll", poll).await.expect(StatusCode::OK);
    secrets.push((
        "a device's token",
        text(&given["token"]).trim_start_matches("choir_").to_owned(),
    ));
    secrets.extend(tickets(server, &mut ada).await);
    let link = start.app.auth.recover_link(&"ada".parse().unwrap()).await.unwrap();
    secrets.push(("a recovery link", link.expose().to_owned()));
    for code in &ada.recovery_codes {
        secrets.push(("a recovery code", code.clone()));
        secrets.push(("a recovery code without hyphens", code.replace('-', "")));
    }
    let mut lost = start.browser();
    let code = json!({"username": "ada", "code": ada.recovery_codes[0]});
    lost.post("/auth/recovery", code).await.expect(StatusCode::OK);
    secrets.push(("a recovery session's cookie", lost.session()));
    lost.register_with(json!({})).await.expect(StatusCode::OK);
    secrets
}

/// A ticket and a sandbox host's cookie, over the server as a browser carries them.
async fn tickets(server: &Served, ada: &mut crate::support::Browser) -> Vec<Named> {
    let open = format!(
        "GET /auth/open?host={HOST}&next=%2F HTTP/1.1\r\nHost: {CONTROL}\r\nCookie: {}\r\nConnection: close\r\n\r\n",
        control_cookie(ada)
    );
    let to_host = server.raw(open).await;
    let between = |text: &str, from: &str, to: char| -> String {
        let (_, rest) = text.split_once(from).unwrap_or_else(|| panic!("no {from} in {text}"));
        rest.split(to).next().unwrap().to_owned()
    };
    let ticket = between(&to_host, "ticket=", '&');
    let callback =
        format!("GET /_choir/callback?ticket={ticket}&next=%2F HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n");
    let back = server.raw(&callback).await;
    let cookie = between(&back, "__Host-choir-sbx=", ';');
    // Shown again it is refused, which may be logged.
    assert!(server.raw(&callback).await.starts_with("HTTP/1.1 403 "));
    let visit =
        format!("GET / HTTP/1.1\r\nHost: {HOST}\r\nCookie: __Host-choir-sbx={cookie}\r\nConnection: close\r\n\r\n");
    let visited = server.raw(visit).await;
    assert!(visited.starts_with("HTTP/1.1 200 "), "{visited}");
    vec![("a ticket", ticket), ("a sandbox host's cookie", cookie)]
}

#[tokio::test]
async fn no_secret_of_signing_in_is_in_the_database_its_log_or_ours() {
    let log = Log::default();
    // For the whole process: the database and the sandboxes have tasks and threads of their own.
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(log.clone())
        .finish();
    tracing::subscriber::set_global_default(subscriber).expect("no other test listens to the log");
    let start = Box::new().await;
    let server = Served::over(&start).await;
    let secrets = use_everything(&start, &server).await;
    let planted = "planted-in-the-log-4b1f";
    tracing::trace!(cookie = planted, "the control");
    let logged = log.0.lock().unwrap().clone();
    let mut places = vec![("the log".to_owned(), logged)];
    for entry in std::fs::read_dir(start.directory.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            places.push((path.display().to_string(), std::fs::read(&path).unwrap()));
        }
    }
    let found = |what: &str| -> Vec<&str> {
        let holds = |bytes: &[u8]| bytes.windows(what.len()).any(|window| window == what.as_bytes());
        let all = places.iter().filter(|(_, bytes)| holds(bytes));
        all.map(|(place, _)| place.as_str()).collect()
    };
    assert_eq!(found(planted), ["the log"]);
    let live = start.app.store.all_workspaces().await.unwrap()[0].live.id.to_string();
    let kept = found(&live);
    assert!(kept.contains(&"the log"), "the log says what happens: {kept:?}");
    assert!(
        kept.iter().any(|place| place.contains("choir.db")),
        "what is stored in clear is found: {kept:?}"
    );
    for (name, secret) in secrets {
        assert!(secret.len() >= 8, "{name} is too short to be looked for");
        assert_eq!(found(&secret), [""; 0], "{name} is kept in clear");
    }
}
