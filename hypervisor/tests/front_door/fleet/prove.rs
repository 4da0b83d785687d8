//! `prove` through the front door: canaries that were leaked everywhere are found everywhere by name and place, nothing is
//! found where nothing leaked, and nobody's report tells of another user.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use axum::body::Body;
use axum::http::{Method, Request, StatusCode};
use choir_api::prove::{NotGenuine, Owner, Place, Report, Scope, Signed, Verdict};
use choir_core::{Door, Generation, SandboxId, Slot};
use choir_hypervisor::backup::backup;
use choir_runtime::Runtime as _;
use choir_runtime::sweep::{HEADER, Part};
use choir_store::{AuditEvent, AuditFilter};
use data_encoding::{BASE64, HEXUPPER};
use jiff::SignedDuration;
use serde_json::{Value, json};

use super::audit::Broken;
use super::wire::{clock, start_at};
use super::{Box, change, workspace};
use crate::support::{Answer, Browser};

const CANARY: &str = "canary/7e41+\"c5\" d08b";
const PLATFORM: &str = "canary-of-the-platform-91aa";

/// The report at the end of a stream, which must be genuine.
fn report(answer: &Answer, key: &str) -> Report {
    signed(answer).verify(key).unwrap()
}

fn signed(answer: &Answer) -> Signed {
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    let text = answer.text();
    let (_, last) = text
        .split_once("event: report\ndata: ")
        .unwrap_or_else(|| panic!("no report: {text}"));
    serde_json::from_str(last.split_once('\n').unwrap().0).unwrap()
}

async fn prove(browser: &mut Browser, path: &str) -> Report {
    let key = key(browser).await;
    let answer = browser.fetch(Method::POST, path, None).await;
    report(&answer, &key)
}

async fn key(browser: &mut Browser) -> String {
    let key = browser.get("/api/prove/key").await.expect(StatusCode::OK);
    key["key"].as_str().unwrap().to_owned()
}

async fn put(browser: &mut Browser, name: &str, value: &str, reveal: bool) {
    let path = format!("/me/secrets/{name}");
    let body = json!({"value": value, "reveal": reveal});
    let stored = browser.fetch(Method::PUT, &path, Some(body)).await;
    assert!(stored.status.is_success(), "{}", stored.text());
}

/// Where hits are: the owner in a word, what, the item, and the form.
fn found(report: &Report) -> BTreeSet<(String, String, String)> {
    let row = |hit: &choir_api::prove::Hit| {
        let what = format!("{} {}", word(&hit.owner), hit.what);
        (what, hit.secret.name.clone(), hit.form.clone())
    };
    report.hits.iter().map(row).collect()
}

fn word(owner: &Owner) -> String {
    match owner {
        Owner::Box => "box".to_owned(),
        Owner::Sandbox { user, slot, .. } => format!("{user}/{slot}"),
        Owner::Volume { .. } => "volume".to_owned(),
    }
}

fn place<'a>(report: &'a Report, owner: &str, what: &str) -> &'a Place {
    let found = report.places.iter().find(|p| word(&p.owner) == owner && p.what == what);
    found.unwrap_or_else(|| panic!("no {what} of {owner} in {:?}", report.places))
}

async fn generation(browser: &mut Browser, slot: Slot) -> Generation {
    let shown = change(browser, slot, "start").await;
    Generation {
        sandbox: shown["sandbox"].as_str().unwrap().parse().unwrap(),
        number: shown["generation"].as_u64().unwrap(),
    }
}

/// A process whose command line everybody on this host can read.
struct Shown(Child);

impl Shown {
    fn with(text: &str) -> Self {
        let mut shell = Command::new("sh");
        shell.args(["-c", "read wait", text]).stdin(Stdio::piped());
        Self(shell.spawn().unwrap())
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A box with a metrics token, whose backups somebody can read.
async fn start() -> (Box, tempfile::TempDir) {
    let elsewhere = tempfile::tempdir().unwrap();
    let token = elsewhere.path().join("token");
    std::fs::write(&token, PLATFORM).unwrap();
    std::fs::set_permissions(&token, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let identity = age::x25519::Identity::generate();
    let start = Box::with(|config| {
        config.metrics.token_file = Some(token);
        config.backup.recipients = vec![identity.to_public().to_string()];
    })
    .await;
    (start, elsewhere)
}

/// The leaks, each in another form: as an owner makes them, and as a bug of ours would.
async fn leak_everywhere(start: &Box, ada: &mut Browser, live: &Generation, backups: &Path) {
    start.world.plant(
        &live.sandbox,
        Part::Files,
        "/home/choir/notes",
        format!("x{}", BASE64.encode(CANARY.as_bytes())).as_bytes(),
    );
    start.world.plant(
        &live.sandbox,
        Part::CommandLines,
        "process 7",
        HEXUPPER.encode(CANARY.as_bytes()).as_bytes(),
    );
    start
        .world
        .plant(&live.sandbox, Part::Sockets, "unix", b"canary%2F7e41%2B%22c5%22+d08b");
    start
        .world
        .plant(&live.sandbox, Part::Files, "/etc/metrics", PLATFORM.as_bytes());
    let master = std::fs::read_to_string(start.directory.path().join("key")).unwrap();
    start
        .world
        .plant(&live.sandbox, Part::Files, "/etc/key", master.as_bytes());
    start
        .world
        .print(live, "{\"t\":\"canary/7e41+\\\"c5\\\" d08b\"}")
        .unwrap();
    let patch = json!({"env": {"LEAK": CANARY}});
    ada.fetch(Method::PATCH, "/api/workspaces/main", Some(patch))
        .await
        .expect(StatusCode::OK);
    change(ada, Slot::Live, "restart").await;
    let leak = AuditEvent {
        at: "2026-01-02T03:04:05Z".parse().unwrap(),
        actor: "system".to_owned(),
        user: None,
        action: "test.leak",
        subject: CANARY.to_owned(),
        outcome: "ok",
    };
    start.app.store.audit(leak).await.unwrap();
    std::fs::write(backups.join("choir-plain.db.age"), CANARY).unwrap();
}

#[tokio::test]
async fn what_leaked_anywhere_is_found_by_name_place_and_form_and_without_a_leak_nothing_is() {
    let (start, elsewhere) = start().await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    put(&mut ada, "TOKEN", CANARY, false).await;
    let live = generation(&mut ada, Slot::Live).await;
    let backups = elsewhere.path().join("backups");
    let now = "2026-01-02T03:04:05Z".parse().unwrap();
    backup(&start.app.config, &backups, now).await.unwrap();

    let clean = prove(&mut ada, "/admin/prove").await;
    assert_eq!((clean.hits_total, &clean.hits[..]), (0, &[][..]));
    let own = prove(&mut ada, "/me/prove").await;
    assert_eq!(own.hits_total, 0);

    leak_everywhere(&start, &mut ada, &live, &backups).await;
    let _shown = Shown::with(CANARY);

    let leaky = prove(&mut ada, "/admin/prove").await;
    assert_eq!(leaky.verdict, Verdict::Hits, "{}", leaky.summary);
    let found = found(&leaky);
    for (at, name, form) in [
        ("ada/live files", "TOKEN", "base64"),
        ("ada/live command lines", "TOKEN", "hex"),
        ("ada/live sockets", "TOKEN", "url"),
        ("ada/live environment", "TOKEN", "clear"),
        ("ada/live files", "metrics token", "clear"),
        ("box audit trail", "TOKEN", "json"),
        ("box write-ahead log", "TOKEN", "clear"),
        ("box backups", "TOKEN", "clear"),
        ("box command lines of the host", "TOKEN", "clear"),
    ] {
        let row = (at.to_owned(), name.to_owned(), form.to_owned());
        assert!(found.contains(&row), "{row:?} is not in {found:?}");
    }
    // Keys are looked for as well: here the master key as its file has it.
    assert!(
        found
            .iter()
            .any(|(at, name, form)| at == "ada/live files" && name.starts_with("master key") && form == "hex")
    );
    assert!(
        !serde_json::to_string(&leaky).unwrap().contains("7e41"),
        "no report has a value in it"
    );
}

#[tokio::test]
async fn a_clean_search_says_of_each_place_how_much_of_it_was_searched_and_what_was_not() {
    let (start, _elsewhere) = start().await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    put(&mut ada, "TOKEN", CANARY, false).await;
    put(&mut ada, "PIN", "1234", false).await;
    generation(&mut ada, Slot::Live).await;
    start.world.plant(
        &generation(&mut ada, Slot::Live).await.sandbox,
        Part::Files,
        "/etc/passwd",
        b"root",
    );
    let whole = prove(&mut ada, "/admin/prove").await;
    for (owner, what) in [
        ("ada/live", "description"),
        ("ada/live", "log"),
        ("ada/live", "environment"),
        ("ada/live", "files"),
        ("box", "database"),
        ("box", "write-ahead log"),
        ("box", "shared memory"),
        ("box", "audit trail"),
        ("box", "metrics"),
        ("box", "own process"),
        ("box", "command lines of the host"),
    ] {
        let place = place(&whole, owner, what);
        assert!(place.searched && place.bytes > 0, "{place:?}");
    }
    assert!(place(&whole, "box", "backups").searched);
    // Nothing runs in dev, and the simulated disks cannot be read.
    let dev = place(&whole, "ada/dev", "files");
    assert!(!dev.searched && dev.why[0].contains("start it"), "{dev:?}");
    assert!(!place(&whole, "volume", "files").searched);
    assert_eq!((whole.verdict, whole.complete), (Verdict::Incomplete, false));
    assert!(
        whole.summary.contains("not everything was searched"),
        "{}",
        whole.summary
    );
    assert_eq!(whole.unsought.len(), 1);
    assert_eq!(
        (
            whole.unsought[0].secret.name.as_str(),
            whole.unsought[0].secret.owner.as_deref()
        ),
        ("PIN", Some("ada"))
    );
    let kinds: BTreeSet<&str> = whole.sought.iter().map(|sought| sought.kind.as_str()).collect();
    assert_eq!(kinds, ["key", "platform", "user"].into());
    assert_eq!(whole.bytes, whole.places.iter().map(|place| place.bytes).sum::<u64>());

    // The same box, with both slots running and no secret too short, by a user for themselves: all was searched.
    generation(&mut ada, Slot::Dev).await;
    ada.delete("/me/secrets/PIN").await.expect(StatusCode::OK);
    let own = prove(&mut ada, "/me/prove").await;
    assert_eq!((own.verdict, own.complete), (Verdict::Clean, true), "{own:?}");
    let kinds: BTreeSet<&str> = own.sought.iter().map(|sought| sought.kind.as_str()).collect();
    assert_eq!(kinds, ["user"].into());
}

#[tokio::test]
async fn a_users_own_search_has_neither_another_users_secrets_nor_their_sandboxes() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let mut bob = start.member(&mut ada, "bob").await;
    let mut sandboxes = Vec::new();
    for (browser, value) in [(&mut ada, "canary-of-ada-11"), (&mut bob, "canary-of-bob-22")] {
        workspace(browser).await;
        put(browser, "TOKEN", value, false).await;
        sandboxes.push(generation(browser, Slot::Live).await.sandbox);
    }
    // Each one's secret is in the other's sandbox.
    start
        .world
        .plant(&sandboxes[0], Part::Files, "/tmp/x", b"canary-of-bob-22");
    start
        .world
        .plant(&sandboxes[1], Part::Files, "/tmp/x", b"canary-of-ada-11");
    let own = prove(&mut bob, "/me/prove").await;
    let text = serde_json::to_string(&own).unwrap();
    assert_eq!(own.hits_total, 0, "{text}");
    assert!(!text.contains("ada") && !text.contains(sandboxes[0].as_str()), "{text}");
    assert_eq!(own.sought.len(), 1);
    let refused = bob.fetch(Method::POST, "/admin/prove", None).await;
    assert_eq!(refused.status, StatusCode::FORBIDDEN);

    // The control: the whole box's search finds both.
    let whole = prove(&mut ada, "/admin/prove").await;
    let found: Vec<_> = whole
        .hits
        .iter()
        .map(|hit| (word(&hit.owner), hit.secret.owner.clone().unwrap()))
        .collect();
    for (at, of) in [("ada/live", "bob"), ("bob/live", "ada")] {
        assert!(found.contains(&(at.to_owned(), of.to_owned())), "{found:?}");
    }
}

#[tokio::test]
async fn a_report_that_was_changed_or_signed_by_another_box_is_not_genuine() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let key = key(&mut ada).await;
    let genuine = signed(&ada.fetch(Method::POST, "/me/prove", None).await);
    let report = genuine.verify(&key).unwrap();
    assert_eq!(report.asked_by.as_str(), "ada");
    // However it is laid out.
    let text = serde_json::to_string_pretty(&genuine).unwrap();
    assert!(serde_json::from_str::<Signed>(&text).unwrap().verify(&key).is_ok());

    let fields: Vec<String> = genuine.report.as_object().unwrap().keys().cloned().collect();
    assert!(fields.len() > 15, "{fields:?}");
    for field in fields {
        let mut forged = genuine.clone();
        forged.report[&field] = json!("forged");
        assert_eq!(forged.verify(&key), Err(NotGenuine::Changed), "{field}");
    }
    let mut more = genuine.clone();
    more.report["note"] = json!("approved");
    assert_eq!(more.verify(&key), Err(NotGenuine::Changed));
    let other = Box::new().await;
    let mut eve = other.ada().await;
    let forged = signed(&eve.fetch(Method::POST, "/me/prove", None).await);
    assert_eq!(forged.verify(&key), Err(NotGenuine::OtherKey));
    // One that only claims to be signed with the right key.
    let mut claimed = forged.clone();
    claimed.signature.key.clone_from(&key);
    assert_eq!(claimed.verify(&key), Err(NotGenuine::Changed));
    // The key is the same after a restart.
    let restarted = start.restarted().await;
    ada.router = restarted.router.clone();
    assert_eq!(self::key(&mut ada).await, key);
}

#[tokio::test]
async fn a_secret_that_may_be_revealed_is_allowed_in_its_owners_sandboxes_only() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let mut bob = start.member(&mut ada, "bob").await;
    workspace(&mut ada).await;
    put(&mut ada, "OPEN", "canary-revealed-33", true).await;
    let own = generation(&mut ada, Slot::Live).await.sandbox;
    generation(&mut ada, Slot::Dev).await;
    start
        .world
        .plant(&own, Part::Environment, "process 9", b"T=canary-revealed-33");
    let report = prove(&mut ada, "/me/prove").await;
    assert_eq!(report.hits[0].allowed.as_deref(), Some("reveal"));
    assert_eq!((report.hits_total, report.verdict), (1, Verdict::Revealed));

    workspace(&mut bob).await;
    let bobs = generation(&mut bob, Slot::Live).await.sandbox;
    start
        .world
        .plant(&bobs, Part::Environment, "process 9", b"T=canary-revealed-33");
    let whole = prove(&mut ada, "/admin/prove").await;
    let mut allowed: Vec<_> = whole
        .hits
        .iter()
        .map(|hit| (word(&hit.owner), hit.allowed.is_some()))
        .collect();
    allowed.sort();
    assert_eq!(allowed, [("ada/live".to_owned(), true), ("bob/live".to_owned(), false)]);
    assert_eq!(whole.verdict, Verdict::Hits);
}

#[tokio::test]
async fn logins_that_tools_keep_in_files_are_listed_without_their_tokens() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    let live = generation(&mut ada, Slot::Live).await.sandbox;
    let token = "sk-ant-oat01-canary";
    for (path, text) in [
        (
            "/home/choir/.claude/.credentials.json",
            format!("{{\"claudeAiOauth\":{{\"accessToken\":\"{token}\"}}}}"),
        ),
        ("/home/choir/.npmrc", "registry=https://npm.a.example/\n".to_owned()),
        (
            "/home/choir/.config/gh/hosts.yml",
            format!("github.com:\n  oauth_token: {token}\n"),
        ),
    ] {
        start.world.plant(&live, Part::Files, path, text.as_bytes());
    }
    let report = prove(&mut ada, "/me/prove").await;
    let logins: Vec<_> = report
        .logins
        .iter()
        .map(|login| (login.tool.as_str(), login.file.as_str()))
        .collect();
    assert_eq!(
        logins,
        [
            ("claude", "/home/choir/.claude/.credentials.json"),
            ("gh", "/home/choir/.config/gh/hosts.yml")
        ]
    );
    assert!(
        report.logins[0].advice.contains("--template claude"),
        "{}",
        report.logins[0].advice
    );
    assert!(!serde_json::to_string(&report).unwrap().contains(token));
}

/// So much that a search of it is still under way when something else is asked.
fn plant_much(start: &Box, sandbox: &SandboxId) {
    for n in 0..24 {
        start
            .world
            .plant(sandbox, Part::Files, &format!("/large/{n}"), &vec![b'x'; 4 << 20]);
    }
}

async fn trail(start: &Box) -> Vec<(String, String, String)> {
    let filter = AuditFilter {
        action: Some("prove".to_owned()),
        limit: 100,
        ..AuditFilter::default()
    };
    let rows = start.app.store.audit_rows(filter).await.unwrap();
    rows.into_iter()
        .rev()
        .map(|row| (row.action, row.subject, row.outcome))
        .collect()
}

fn rows(of: &[(&str, &str)]) -> Vec<(String, String, String)> {
    let row =
        |(subject, outcome): &(&str, &str)| ("prove.start".to_owned(), (*subject).to_owned(), (*outcome).to_owned());
    of.iter().map(row).collect()
}

#[tokio::test]
async fn one_search_runs_at_a_time_and_whoever_goes_away_ends_theirs() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let mut bob = start.member(&mut ada, "bob").await;
    workspace(&mut ada).await;
    let live = generation(&mut ada, Slot::Live).await.sandbox;
    plant_much(&start, &live);
    let user = start
        .app
        .store
        .user_by_name("ada".parse().unwrap())
        .await
        .unwrap()
        .unwrap();
    let told = start.app.begin_prove(&user, Scope::Own).await.unwrap();
    bob.fetch(Method::POST, "/me/prove", None)
        .await
        .refused(StatusCode::CONFLICT, "prove_running");
    drop(told);
    let cancelled = rows(&[("own", "intent"), ("own", "cancelled")]);
    while trail(&start).await != cancelled {
        tokio::task::yield_now().await;
    }
    // The control: then the next one runs to its end.
    while bob.fetch(Method::POST, "/me/prove", None).await.status == StatusCode::CONFLICT {
        tokio::task::yield_now().await;
    }
    let after = rows(&[
        ("own", "intent"),
        ("own", "cancelled"),
        ("own", "intent"),
        ("own", "clean"),
    ]);
    assert_eq!(trail(&start).await, after);
}

#[tokio::test]
async fn after_a_search_its_user_waits_as_long_as_it_took() {
    let clock = clock();
    let start = start_at(&clock, |sim| sim).await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    let live = generation(&mut ada, Slot::Live).await.sandbox;
    plant_much(&start, &live);
    let user = start
        .app
        .store
        .user_by_name("ada".parse().unwrap())
        .await
        .unwrap()
        .unwrap();
    let mut told = start.app.begin_prove(&user, Scope::Own).await.unwrap();
    clock.advance(SignedDuration::from_secs(60));
    while told.recv().await.is_some() {}
    let refused = ada.fetch(Method::POST, "/me/prove", None).await;
    refused.refused(StatusCode::TOO_MANY_REQUESTS, "too_many_requests");
    assert_eq!(refused.headers["retry-after"], "60");
    // The control: then it runs.
    clock.advance(SignedDuration::from_secs(60));
    prove(&mut ada, "/me/prove").await;
}

#[tokio::test]
async fn nothing_is_searched_that_cannot_be_recorded_or_while_sealed() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let broken = Broken::trail_of(&start);
    ada.fetch(Method::POST, "/me/prove", None)
        .await
        .refused(StatusCode::SERVICE_UNAVAILABLE, "audit_failing");
    broken.mend();
    prove(&mut ada, "/me/prove").await;
    std::fs::remove_file(start.directory.path().join("key")).unwrap();
    let sealed = start.restarted().await;
    ada.router = sealed.router.clone();
    ada.fetch(Method::POST, "/me/prove", None)
        .await
        .refused(StatusCode::SERVICE_UNAVAILABLE, "sealed");
    ada.get("/api/prove/key")
        .await
        .refused(StatusCode::SERVICE_UNAVAILABLE, "sealed");
}

#[tokio::test]
async fn what_the_agent_shows_to_the_hypervisor_nobody_else_gets_through_it() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    let live = generation(&mut ada, Slot::Live).await;
    let request = Request::get("/api/workspaces/main/slots/live/sandbox/sweep").header(HEADER, "1");
    let answer = ada.send(request.body(Body::empty()).unwrap()).await;
    assert_eq!(answer.status, StatusCode::NOT_FOUND, "{}", answer.text());
    // The control: the same request on the hypervisor's own connection.
    let stream = start.sim.open(&live, Door::Agent).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(hyper_util::rt::TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    let request = Request::get("/sweep")
        .header("host", "sandbox")
        .header(HEADER, "1")
        .body(Body::empty())
        .unwrap();
    assert_eq!(sender.send_request(request).await.unwrap().status(), StatusCode::OK);
}

#[tokio::test]
async fn a_sandbox_that_stops_meanwhile_or_shows_nonsense_is_said_to_be_unsearched() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    let live = generation(&mut ada, Slot::Live).await;
    start
        .world
        .exit(
            &live,
            choir_core::sandbox::Exit {
                code: 1,
                oom_killed: false,
            },
        )
        .await;
    let report = prove(&mut ada, "/me/prove").await;
    let files: Vec<&Place> = report.places.iter().filter(|place| place.what == "files").collect();
    assert!(
        files.iter().all(|place| !place.searched && !place.why.is_empty()),
        "{files:?}"
    );
    assert_eq!(report.verdict, Verdict::Incomplete);
    let _: Value = serde_json::to_value(&report).unwrap();
}
