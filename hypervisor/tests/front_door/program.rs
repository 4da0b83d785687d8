//! The program itself: what it refuses to start with (A19), and the claim link that it keeps beside its database (C01).

use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use axum::http::StatusCode;

use crate::support::{Browser, remote};

/// A configuration file in a directory of its own.
struct Place(tempfile::TempDir);

impl Place {
    fn with(text: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("hypervisor.toml"), text).unwrap();
        Self(directory)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_choir-hypervisor"));
        command.arg("--config").arg(self.path("hypervisor.toml")).arg(verb);
        command.current_dir(self.0.path()).stdin(Stdio::null());
        command
    }

    fn run(&self, verb: &str) -> Output {
        self.command(verb).output().unwrap()
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
struct Running {
    child: Child,
    address: SocketAddr,
}

impl Drop for Running {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

impl Running {
    fn start(place: &Place, port: u16) -> Self {
        let child = place.command("serve").stderr(Stdio::null()).spawn().unwrap();
        Self {
            child,
            address: (Ipv4Addr::LOCALHOST, port).into(),
        }
    }
}

/// Waits until a file is there, or is gone.
async fn wait_for(path: &Path, there: bool) {
    let wait = async {
        while path.exists() != there {
            tokio::task::yield_now().await;
        }
    };
    let seen = tokio::time::timeout(Duration::from_secs(20), wait).await;
    seen.unwrap_or_else(|_| panic!("{} is there: {}", path.display(), !there));
}

fn token(link: &str) -> &str {
    let (address, token) = link.trim_end().split_once("/register?invite=").expect(link);
    assert_eq!(address, "http://localhost:9090");
    token
}

#[tokio::test]
async fn the_claim_link_is_private_works_once_and_goes_for_ever_with_the_first_user() {
    let free = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    // No sandbox starts here, so any file will do for the agent.
    let place = Place::with(&format!(
        "[listen]\nport = {}\n[sandboxes]\nruntime = \"process\"\nagent = \"hypervisor.toml\"\n[store]\npath = \"choir.db\"\n",
        free.port()
    ));
    let running = Running::start(&place, free.port());
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
