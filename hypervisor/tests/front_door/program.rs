//! The program itself: what it refuses to start with (A19), and the claim link that it keeps beside its database (C01).

use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use axum::http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{Browser, remote};

/// A configuration file in a directory of its own.
pub struct Place(pub tempfile::TempDir);

impl Place {
    fn with(text: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("hypervisor.toml"), text).unwrap();
        Self(directory)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_choir-hypervisor"));
        command.arg("--config").arg(self.path("hypervisor.toml")).arg(verb);
        command.current_dir(self.0.path()).stdin(Stdio::null());
        command
    }

    pub fn run(&self, verb: &str) -> Output {
        self.command(verb).output().unwrap()
    }

    /// `audit verify`, with a head from the log or without: whether it found the trail whole, and what it said.
    fn verify(&self, head: Option<&str>) -> (bool, String) {
        let mut command = self.command("audit");
        command.arg("verify");
        if let Some(head) = head {
            command.args(["--head", head]);
        }
        let output = command.output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(said).unwrap())
    }

    /// The database as one file, while nobody has it open.
    fn whole_database(&self) -> Vec<u8> {
        let connection = rusqlite::Connection::open(self.path("choir.db")).unwrap();
        connection
            .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
            .unwrap();
        drop(connection);
        std::fs::read(self.path("choir.db")).unwrap()
    }

    /// Of a serving hypervisor without sandboxes; nothing starts, so any file will do for the agent.
    pub fn serving(port: u16) -> Self {
        Self::serving_with(port, "")
    }

    fn serving_with(port: u16, more: &str) -> Self {
        Self::with(&format!(
            "[listen]\nport = {port}\n[sandboxes]\nruntime = \"process\"\nagent = \"hypervisor.toml\"\n[store]\npath = \"choir.db\"\n{more}",
        ))
    }
}

fn origins(origin: &str, domain: &str, extra: &str) -> Place {
    Place::with(&format!(
        "[control]\norigin = \"{origin}\"\n{extra}\n[sandboxes]\ndomain = \"{domain}\"\n"
    ))
}

#[test]
fn with_origins_that_would_share_cookies_or_passkeys_the_program_ends_with_one_sentence() {
    const EACH_OTHER: &str = "contain each other";
    for (origin, domain, extra, said) in [
        ("https://choir.example.com", "choir.example.com", "", EACH_OTHER),
        ("https://choir.example.com", "apps.choir.example.com", "", EACH_OTHER),
        ("https://choir.example.com", "example.com", "", EACH_OTHER),
        (
            "https://choir.example.com",
            "choir.example.com",
            "allow_shared_domain = true",
            EACH_OTHER,
        ),
        (
            "https://choir.example.com",
            "apps.example.com",
            "",
            "allow_shared_domain = true",
        ),
        ("https://192.0.2.1", "apps.example", "", "not an IP address"),
        ("https://[2001:db8::1]", "apps.example", "", "not an IP address"),
        ("https://choir.example.com", "192.0.2.1", "", "must be a host name"),
        ("http://choir.example.com", "apps.example", "", "must be https"),
        ("https://choir.example.com/x", "apps.example", "", "without a path"),
        (
            "https://choir.example.com",
            "apps.example",
            "rp_id = \"example.com\"",
            "rp_id must be the control host",
        ),
    ] {
        let place = origins(origin, domain, extra);
        for verb in ["check-config", "serve"] {
            let output = place.run(verb);
            let case = format!("{verb} with {origin} and {domain}: {output:?}");
            assert_eq!(output.status.code(), Some(1), "{case}");
            assert!(output.stdout.is_empty(), "{case}");
            let errors = String::from_utf8(output.stderr).unwrap();
            assert!(
                errors.starts_with("choir-hypervisor: [") && errors.contains(said),
                "{case}"
            );
            assert_eq!(errors.lines().count(), 1, "{case}");
        }
        let left: Vec<_> = std::fs::read_dir(place.0.path()).unwrap().collect();
        assert_eq!(left.len(), 1, "nothing was made before it was refused: {left:?}");
    }
}

/// The control: separate domains are taken, and a shared one with its flag and a warning.
#[test]
fn with_separate_origins_the_configuration_is_complete_and_safe() {
    let output = origins("https://choir.example.com", "choir-apps.net", "").run("check-config");
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success() && said.ends_with("is complete and safe\n"),
        "{said}"
    );
    assert!(!said.contains("warning"), "{said}");
    let output = origins(
        "https://choir.example.com",
        "apps.example.com",
        "allow_shared_domain = true",
    )
    .run("check-config");
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success() && said.starts_with("warning: sandboxes at `apps.example.com`"),
        "{said}"
    );
}

/// The program serving, until this is dropped.
pub struct Running {
    pub child: Child,
    pub address: SocketAddr,
}

impl Drop for Running {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

impl Running {
    pub fn start(place: &Place, port: u16, log: Stdio) -> Self {
        let mut command = place.command("serve");
        // SAFETY: ignoring a signal is async-signal-safe. A write beyond the file size limit then fails as one to a
        // full disk does, instead of ending the process.
        unsafe {
            command.pre_exec(|| {
                libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
                Ok(())
            })
        };
        let child = command.stderr(log).spawn().unwrap();
        Self {
            child,
            address: (Ipv4Addr::LOCALHOST, port).into(),
        }
    }
}

impl Running {
    /// Lets it write no byte to any file, as on a full disk, or lets it again.
    fn fill_the_disk(&self, full: bool) {
        use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
        let free = getrlimit(Resource::Fsize);
        let current = if full { Some(1) } else { free.maximum };
        prlimit(
            Some(Pid::from_child(&self.child)),
            Resource::Fsize,
            Rlimit { current, ..free },
        )
        .unwrap();
    }

    /// Waits until it takes connections.
    pub async fn answers(&self) {
        let answers = async {
            while tokio::net::TcpStream::connect(self.address).await.is_err() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), answers).await.unwrap();
    }

    /// Asks it to stop and waits until it has.
    pub fn stop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

/// Waits until a file is there, or is gone.
pub async fn wait_for(path: &Path, there: bool) {
    let wait = async {
        while path.exists() != there {
            tokio::task::yield_now().await;
        }
    };
    let seen = tokio::time::timeout(Duration::from_secs(20), wait).await;
    seen.unwrap_or_else(|_| panic!("{} is there: {}", path.display(), !there));
}

pub fn token(link: &str) -> &str {
    let (address, token) = link.trim_end().split_once("/register?invite=").expect(link);
    assert_eq!(address, "http://localhost:9090");
    token
}

#[tokio::test]
async fn the_claim_link_is_private_works_once_and_goes_for_ever_with_the_first_user() {
    let port = free_port();
    let place = Place::serving(port);
    let running = Running::start(&place, port, Stdio::null());
    let file = place.path("claim-link");
    wait_for(&file, true).await;
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&file), 0o600);
    let first = std::fs::read_to_string(&file).unwrap();
    // A new one, made by root on the console, takes the place of the first.
    let output = place.run("claim");
    let second = String::from_utf8(output.stdout).unwrap();
    assert_ne!(token(&first), token(&second));
    let browser = || Browser::new(remote(running.address));
    let mut late = browser();
    let refused = late.register("eve", Some(token(&first))).await;
    refused.refused(StatusCode::FORBIDDEN, "invite_required");
    let mut ada = browser();
    ada.register("ada", Some(token(&second))).await.expect(StatusCode::OK);
    assert!(ada.is_signed_in().await);
    wait_for(&file, false).await;
    for used in [&first, &second] {
        let again = late.register("eve", Some(token(used))).await;
        again.refused(StatusCode::FORBIDDEN, "invite_required");
    }
    let output = place.run("claim");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("this box is claimed"),
        "{output:?}"
    );
}

pub fn free_port() -> u16 {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    free.local_addr().unwrap().port()
}

/// D21, with the head as an operator finds it in the journal.
#[tokio::test]
async fn a_metrics_token_that_cannot_be_read_keeps_nothing_from_serving() {
    for (file, degraded) in [("missing", true), ("token", false)] {
        let port = free_port();
        let place = Place::serving_with(port, &format!("[metrics]\ntoken_file = \"{file}\"\n"));
        std::fs::write(place.path("token"), "0123456789abcdef").unwrap();
        let running = Running::start(&place, port, Stdio::null());
        running.answers().await;
        let ready = Browser::new(remote(running.address)).get("/readyz").await.json();
        let said = ready["degraded"].as_array().unwrap();
        assert_eq!(said.contains(&json!("metrics token")), degraded, "{ready}");
    }
}

#[tokio::test]
async fn what_root_asks_for_is_done_as_the_owner_of_the_database() {
    const OWNER: u32 = 54_321;
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let port = free_port();
    let place = Place::serving(port);
    let mut running = Running::start(&place, port, Stdio::null());
    wait_for(&place.path("claim-link"), true).await;
    running.stop();
    assert!(place.run("claim").status.success(), "the control: it is root's");
    std::fs::set_permissions(place.0.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let give = |name: &str| std::os::unix::fs::chown(place.path(name), Some(OWNER), Some(OWNER)).unwrap();
    give("choir.db");
    let refused = place.run("claim");
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(
        !refused.status.success() && said.contains("not writable"),
        "the directory is root's: {said}"
    );
    give(".");
    for entry in std::fs::read_dir(place.0.path()).unwrap() {
        give(entry.unwrap().file_name().to_str().unwrap());
    }
    let given = place.run("claim");
    assert!(given.status.success(), "{}", String::from_utf8_lossy(&given.stderr));
}

#[tokio::test]
async fn the_doctor_says_of_each_part_whether_it_is_well_and_what_to_do() {
    let port = free_port();
    let place = Place::serving(port);
    std::fs::create_dir(place.path("volumes")).unwrap();
    let look = || {
        let output = place.command("doctor").arg("--json").output().unwrap();
        assert!(!output.status.success(), "there is no volumes helper");
        let checks: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
        move |name: &str| {
            let check = checks.iter().find(|check| check["name"] == name).unwrap();
            let text = |key: &str| check[key].as_str().unwrap().to_owned();
            (text("result"), text("detail"))
        }
    };
    let failed = |(result, detail): (String, String), why: &str| {
        assert!(result == "failed" && detail.contains(why), "{result}: {detail}");
    };
    let nothing = look();
    assert_eq!(nothing("configuration").0, "advice", "nothing is isolated");
    failed(nothing("hypervisor"), "start it, or look into its log");
    failed(nothing("keys"), "cannot be read");
    failed(nothing("volumes"), "choir-volumes");

    let running = Running::start(&place, port, Stdio::null());
    running.answers().await;
    let up = look();
    failed(up("hypervisor"), "it answers, but for: ");
    failed(up("hypervisor"), "volumes not ready");
    assert_eq!(up("keys").0, "ok");
    assert_eq!(up("containers").0, "ok");
    assert_eq!(up("disk").0, "ok");

    std::fs::copy(place.path("key"), place.path("copy")).unwrap();
    std::fs::write(place.path("key"), [7; 32]).unwrap();
    failed(look()("keys"), "is another database's");
    std::fs::remove_file(place.path("key")).unwrap();
    failed(look()("keys"), "put it back");
    assert!(!place.path("key").exists(), "it changes nothing");
    std::fs::rename(place.path("copy"), place.path("key")).unwrap();
    assert_eq!(look()("keys").0, "ok");
}

#[tokio::test]
async fn a_trail_that_was_changed_or_cut_offline_is_found_by_the_program() {
    let place = Place::serving(free_port());
    let port = std::fs::read_to_string(place.path("hypervisor.toml")).unwrap();
    let port: u16 = port
        .lines()
        .nth(1)
        .unwrap()
        .trim_start_matches("port = ")
        .parse()
        .unwrap();
    let log = std::fs::File::create(place.path("log")).unwrap();
    let mut running = Running::start(&place, port, log.into());
    wait_for(&place.path("claim-link"), true).await;
    let claim = std::fs::read_to_string(place.path("claim-link")).unwrap();
    let mut ada = Browser::new(remote(running.address));
    ada.register("ada", Some(token(&claim))).await.expect(StatusCode::OK);
    running.stop();
    let older = place.whole_database();
    let log = std::fs::File::create(place.path("log")).unwrap();
    let mut running = Running::start(&place, port, log.into());
    running.answers().await;
    for _ in 0..3 {
        ada.post("/auth/logout", json!({})).await.expect(StatusCode::NO_CONTENT);
        ada.login().await.expect(StatusCode::OK);
    }
    let (whole, said) = place.verify(None);
    assert!(whole && said.contains("rows are as they were written\nhead "), "{said}");
    running.stop();
    let log = std::fs::read_to_string(place.path("log")).unwrap();
    let (_, head) = log.rsplit_once("audit.head=").expect("the head is logged at the end");
    let head = head.split_whitespace().next().unwrap();
    let (whole, said) = place.verify(Some(head));
    assert!(whole && said.contains(&format!("head {head}")), "{said}");
    // The control: an older copy of the whole file looks whole, and only the head tells.
    let newer = place.whole_database();
    std::fs::write(place.path("choir.db"), older).unwrap();
    let (whole, said) = place.verify(None);
    assert!(whole && said.contains("an older copy"), "{said}");
    let (whole, said) = place.verify(Some(head));
    assert!(!whole && said.contains("is missing"), "{said}");
    std::fs::write(place.path("choir.db"), newer).unwrap();
    let tamper = |sql: &str| {
        let connection = rusqlite::Connection::open(place.path("choir.db")).unwrap();
        connection.pragma_update(None, "foreign_keys", false).unwrap();
        connection.execute_batch(sql).unwrap();
    };
    tamper(
        "DROP TRIGGER audit_is_never_deleted; DROP TRIGGER audit_chain_is_never_deleted; DROP TRIGGER audit_is_never_changed;
         DELETE FROM audit WHERE id > 5; DELETE FROM audit_chain WHERE id > 5;
         UPDATE sqlite_sequence SET seq = 5 WHERE name = 'audit';",
    );
    for head in [None, Some(head)] {
        let (whole, said) = place.verify(head);
        assert!(
            !whole && said.starts_with("choir-hypervisor: audit row 6 is missing; 5:"),
            "{said}"
        );
    }
    tamper("UPDATE audit SET actor = 'somebody else' WHERE id = 3");
    let (whole, said) = place.verify(None);
    assert!(
        !whole && said.contains("audit row 3 is not as it was written; 2:"),
        "{said}"
    );
    assert_eq!(said.lines().count(), 1, "{said}");
    let (whole, said) = place.verify(Some("5:abc"));
    assert!(!whole && said.contains("64 hexadecimal digits"), "{said}");
}

/// D20 on a full disk, short of the secrets themselves: nothing is lost, who is signed in stays so, and it heals.
#[tokio::test]
async fn on_a_full_disk_people_stay_signed_in_what_needs_a_row_answers_503_and_room_heals_it() {
    let port = free_port();
    let place = Place::serving(port);
    let running = Running::start(&place, port, Stdio::null());
    wait_for(&place.path("claim-link"), true).await;
    let claim = std::fs::read_to_string(place.path("claim-link")).unwrap();
    let mut ada = Browser::new(remote(running.address));
    ada.register("ada", Some(token(&claim))).await.expect(StatusCode::OK);
    wait_for(&place.path("claim-link"), false).await;
    running.fill_the_disk(true);
    let put = ada
        .fetch(Method::PUT, "/me/secrets/token", Some(json!({"value": "x"})))
        .await;
    put.refused(StatusCode::SERVICE_UNAVAILABLE, "disk_full");
    let mut late = ada.clone();
    late.cookies.clear();
    late.login().await.refused(StatusCode::SERVICE_UNAVAILABLE, "disk_full");
    ada.key = late.key.clone();
    assert!(ada.is_signed_in().await);
    ada.get("/api/workspaces").await.expect(StatusCode::OK);
    assert_eq!(ada.get("/me/secrets").await.expect(StatusCode::OK)["items"], json!([]));
    // The control: with room again the same things are done.
    running.fill_the_disk(false);
    let put = ada
        .fetch(Method::PUT, "/me/secrets/token", Some(json!({"value": "x"})))
        .await;
    assert!(put.status.is_success(), "{}", put.text());
    late.key = ada.key.clone();
    late.login().await.expect(StatusCode::OK);
    let (whole, said) = place.verify(None);
    assert!(whole, "{said}");
}

/// As under a unit of `Type=notify` with `WatchdogSec`.
#[tokio::test]
async fn the_program_tells_who_started_it_that_it_serves_that_it_is_alive_and_that_it_stops() {
    let port = free_port();
    let place = Place::serving(port);
    let manager = std::os::unix::net::UnixDatagram::bind(place.path("notify")).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let next = || {
        let mut text = [0; 64];
        let length = manager.recv(&mut text).unwrap();
        String::from_utf8_lossy(&text[..length]).into_owned()
    };
    let mut command = place.command("serve");
    command
        .env("NOTIFY_SOCKET", place.path("notify"))
        .env("WATCHDOG_USEC", "400000");
    let mut running = Running {
        child: command.stderr(Stdio::null()).spawn().unwrap(),
        address: (Ipv4Addr::LOCALHOST, port).into(),
    };
    assert_eq!(next(), "READY=1");
    std::net::TcpStream::connect(running.address).expect("what is ready takes connections");
    assert_eq!([next(), next()], ["WATCHDOG=1", "WATCHDOG=1"]);
    running.stop();
    let last = std::iter::repeat_with(next).find(|told| told != "WATCHDOG=1");
    assert_eq!(last.as_deref(), Some("STOPPING=1"));
    // The control: a process whose watchdog is another's is not asked for signs of life.
    let mut command = place.command("serve");
    command
        .env("NOTIFY_SOCKET", place.path("notify"))
        .env("WATCHDOG_USEC", "20000");
    command.env("WATCHDOG_PID", std::process::id().to_string());
    let mut running = Running {
        child: command.stderr(Stdio::null()).spawn().unwrap(),
        address: (Ipv4Addr::LOCALHOST, port).into(),
    };
    assert_eq!(next(), "READY=1");
    running.answers().await;
    running.stop();
    assert_eq!(next(), "STOPPING=1");
}
