//! The agent as it runs in a container: PID 1 in namespaces of its own, with identities. Needs root; without it, or
//! without namespaces, these say so and do nothing.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use serde_json::json;

use crate::sandbox::{BINARY, Link, Sandbox, config, signal, until};

const SETUP: &str = "set -e
mount -t tmpfs tmpfs /run
mkdir /run/choir
mount --bind $RUN /run/choir
mount -t tmpfs -o size=1m tmpfs /var/lib
mount -t tmpfs tmpfs /home
mount -t tmpfs tmpfs /etc/ssh
mount -t proc proc /proc
cp $AGENT /run/sudo
exec env -i $AGENT agent";

pub async fn sandbox() -> Option<(Sandbox, Link)> {
    let flags = [
        "--mount",
        "--pid",
        "--net",
        "--fork",
        "--kill-child",
        "--propagation",
        "private",
    ];
    let possible = Command::new("unshare").args(flags).arg("true").output();
    if !possible.is_ok_and(|o| o.status.success()) {
        skipped("this needs root and namespaces");
        return None;
    }
    let mut sandbox = Sandbox::start_with(libc::SIGKILL, |dir| {
        let mut command = Command::new("unshare");
        command.args(flags).args(["sh", "-c", SETUP]);
        command.env("RUN", dir.join("run")).env("AGENT", BINARY);
        command
    });
    let link = sandbox.welcome(config()).await;
    Some((sandbox, link))
}

/// Says so, and adds it to the list that `cargo xtask test` prints at its end.
fn skipped(reason: &str) {
    let test = std::thread::current().name().unwrap_or_default().to_owned();
    eprintln!("skipped: {test}: {reason}");
    if let Some(path) = std::env::var_os("CHOIR_SKIP_LOG") {
        let mut log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .unwrap();
        writeln!(log, "{test}: {reason}").unwrap();
    }
}

/// PID 1, seen from here.
pub fn agent(sandbox: &Sandbox) -> u32 {
    let id = sandbox.agent.id();
    let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
    children.trim().parse().unwrap()
}

pub async fn sh(sandbox: &Sandbox, script: &str) -> String {
    let result = sandbox.exec(json!({"command": ["bash", "-c", script]})).await;
    assert_eq!(result.exit.exit_code, 0, "{}", result.stderr);
    result.stdout
}

#[tokio::test]
async fn a_users_process_has_no_capability_and_can_get_none() {
    let Some((sandbox, _link)) = sandbox().await else {
        return;
    };
    let status = sh(
        &sandbox,
        "cat /proc/self/status /proc/self/oom_score_adj; umask; pwd; id -un || id -u",
    )
    .await;
    for line in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert!(status.contains(&format!("{line}:\t0000000000000000\n")), "{status}");
    }
    assert!(status.contains("NoNewPrivs:\t1\n"));
    assert!(!status.contains("Uid:\t0\t"));
    assert!(status.contains("\n500\n0022\n/home/choir\n"), "{status}");
    sh(&sandbox, "touch /home/choir/mine && ! touch /etc/not-mine 2>/dev/null").await;
}

#[tokio::test]
async fn the_processes_of_another_user_than_the_agents_are_shown_to_the_hypervisor() {
    let Some(inside) = sandbox().await else {
        return;
    };
    crate::sweep::processes_of_another_user_are_shown(inside).await;
}

#[tokio::test]
async fn sudo_is_root_with_the_documented_capabilities_and_no_more() {
    let Some((sandbox, _link)) = sandbox().await else {
        return;
    };
    let status = sh(
        &sandbox,
        "/run/sudo sh -c 'id -u; touch /etc/../run/by-root; cat /proc/self/status'",
    )
    .await;
    assert!(status.starts_with("0\n"));
    let field = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap();
        u64::from_str_radix(line.trim(), 16).unwrap()
    };
    let documented = 0x8004_05fb;
    assert_eq!(field("CapEff:"), documented);
    assert_eq!(field("CapBnd:"), documented);
    assert_eq!(field("CapInh:"), 0);
    let who = sh(
        &sandbox,
        "/run/sudo -u nobody sh -c 'id -un; echo $HOME; grep CapEff /proc/self/status'",
    )
    .await;
    assert!(
        who.starts_with("nobody\n/nonexistent\n") && who.ends_with("0000000000000000\n"),
        "{who}"
    );
}

#[tokio::test]
async fn loopback_is_up_and_the_contracts_ports_are_there() {
    let Some((sandbox, link)) = sandbox().await else { return };
    assert_eq!(link.report.interfaces, ["lo"]);
    assert_eq!(link.report.proof_file, "/var/lib/choir/proof");
    assert_eq!(sh(&sandbox, "cat /var/lib/choir/proof").await, crate::sandbox::NONCE);
    for (listener, port) in [(link.broker, 9091), (link.egress, 9092)] {
        assert_eq!(listener.local_addr().unwrap().port(), port);
        sh(&sandbox, &format!("exec 3<>/dev/tcp/127.0.0.1/{port}")).await;
        listener.set_nonblocking(true).unwrap();
        assert!(listener.accept().is_ok());
    }
}

#[tokio::test]
async fn the_api_is_on_a_port_inside_but_not_for_pages_and_not_from_outside() {
    let Some((sandbox, link)) = sandbox().await else { return };
    let ask = async |host: &str, more: &str| {
        let head = format!("GET /health HTTP/1.1\\r\\nHost: {host}\\r\\n{more}Connection: close\\r\\n\\r\\n");
        let script = format!("exec 3<>/dev/tcp/127.0.0.1/8080; printf '{head}' >&3; cat <&3");
        sh(&sandbox, &script).await
    };
    assert!(ask("127.0.0.1:8080", "").await.starts_with("HTTP/1.1 200"));
    assert!(ask("localhost:8080", "").await.starts_with("HTTP/1.1 200"));
    assert!(
        ask("localhost:8080", "Origin: http://localhost:3000\\r\\n")
            .await
            .starts_with("HTTP/1.1 403")
    );
    assert!(ask("rebound.example:8080", "").await.starts_with("HTTP/1.1 403"));
    assert!(link.dial(1, 8080).await.is_err());
}

#[tokio::test]
async fn pid_1_reaps_orphans_and_ends_everything_on_sigterm() {
    let Some((mut sandbox, _link)) = sandbox().await else {
        return;
    };
    sh(&sandbox, "for i in 1 2 3; do setsid sleep 0.1 & done").await;
    sh(
        &sandbox,
        "setsid sh -c 'trap \"\" HUP; exec sleep 1000' > /dev/null 2>&1 &",
    )
    .await;
    let agent = agent(&sandbox);
    let children = || std::fs::read_to_string(format!("/proc/{agent}/task/{agent}/children")).unwrap();
    until(async || children().split_whitespace().count() == 1).await;
    sandbox
        .request("POST", "/terminals", json!({"cols": 80, "rows": 24}))
        .await;
    signal(agent, libc::SIGTERM);
    let mut status = None;
    until(async || {
        status = sandbox.agent.try_wait().unwrap();
        status.is_some()
    })
    .await;
    assert_eq!(status.unwrap().into_raw(), 0);
}

#[tokio::test]
async fn a_terminal_belongs_to_its_user() {
    let Some((sandbox, _link)) = sandbox().await else {
        return;
    };
    let (_, made) = sandbox
        .request("POST", "/terminals", json!({"cols": 80, "rows": 24}))
        .await;
    assert!(made["id"].is_string());
    let agent = agent(&sandbox);
    let shell = std::fs::read_to_string(format!("/proc/{agent}/task/{agent}/children")).unwrap();
    let terminal = std::fs::metadata(format!("/proc/{}/fd/0", shell.trim())).unwrap();
    let user: u32 = sh(&sandbox, "id -u").await.trim().parse().unwrap();
    assert_eq!((terminal.uid(), terminal.mode() & 0o777), (user, 0o620));
}
