//! What the agent shows to the hypervisor when everything is looked through, and that nobody else is shown it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::Path;

use choir_link::sweep::{Decoder, Frame, HEADER, Part, ROUTE};
use http_body_util::BodyExt as _;
use serde_json::{Value, json};

use crate::sandbox::{Client, Link, Sandbox, request, soon, until};

/// Items with their bytes, holes left out; whether the stream came to its end.
struct Shown {
    items: BTreeMap<(Part, String), Vec<u8>>,
    unread: Vec<(String, String)>,
    holes: u64,
    done: bool,
}

/// Reads a sweep, at most to the first item of this name.
async fn sweep(client: &mut Client, until: Option<&str>) -> Shown {
    let response = client.send(request("GET", ROUTE, &[(HEADER, "1")], Value::Null)).await;
    assert_eq!(response.status(), 200);
    let (mut body, mut decoder) = (response.into_body(), Decoder::default());
    let mut shown = Shown {
        items: BTreeMap::new(),
        unread: Vec::new(),
        holes: 0,
        done: false,
    };
    let mut item = None;
    while let Some(frame) = soon(body.frame()).await {
        decoder.push(frame.unwrap().data_ref().unwrap());
        while let Some(frame) = decoder.frame().unwrap() {
            match frame {
                Frame::Item { name, .. } if Some(name.as_str()) == until => return shown,
                Frame::Item { part, name } => {
                    shown.items.entry((part, name.clone())).or_default();
                    item = Some((part, name));
                }
                Frame::Bytes(bytes) => shown.items.get_mut(item.as_ref().unwrap()).unwrap().extend(bytes),
                Frame::Hole(zeroes) => shown.holes += zeroes,
                Frame::Unread(why) => shown.unread.push((item.clone().unwrap().1, why)),
                Frame::Done => shown.done = true,
            }
        }
    }
    shown
}

impl Shown {
    fn of(&self, part: Part, text: &str) -> Vec<&str> {
        let holds = |bytes: &[u8]| bytes.windows(text.len()).any(|window| window == text.as_bytes());
        let found = self.items.iter().filter(|((of, _), bytes)| *of == part && holds(bytes));
        found.map(|((_, name), _)| name.as_str()).collect()
    }

    fn file(&self, path: &Path) -> &[u8] {
        let key = (Part::Files, path.to_string_lossy().into_owned());
        self.items.get(&key).unwrap_or_else(|| panic!("no {}", path.display()))
    }
}

/// A task that goes on, with a canary in its environment, its command line, and a file that it has deleted.
async fn leak(sandbox: &Sandbox) {
    let line =
        "exec 9<>$HOME/gone; rm $HOME/gone; echo canary-deleted >&9; touch $HOME/ready; sleep 600; : canary-line";
    let task = json!({"command": ["bash", "-c", line], "env": {"LEAK": "canary-environment"}});
    let (status, body) = sandbox.request("POST", "/tasks", task).await;
    assert_eq!(status, 201, "{body}");
    until(async || {
        let there = sandbox.exec(json!({"command": "test -e ~/ready"})).await;
        there.exit.exit_code == 0
    })
    .await;
}

fn processes_are_shown(shown: &Shown) {
    assert_eq!(shown.of(Part::CommandLines, "canary-line").len(), 1);
    // The shell and the sleep that it started.
    assert_eq!(shown.of(Part::Environment, "LEAK=canary-environment").len(), 2);
    assert!(
        shown
            .of(Part::Files, "canary-deleted")
            .iter()
            .all(|name| name.contains("deleted file"))
    );
    assert!(!shown.of(Part::Files, "canary-deleted").is_empty());
}

#[tokio::test]
async fn files_names_links_and_processes_are_shown_to_the_end() {
    let (sandbox, _link) = Sandbox::ready().await;
    let home = sandbox.home();
    fs::create_dir_all(home.join("a/b")).unwrap();
    fs::write(home.join("a/b/file"), "canary-file").unwrap();
    symlink("canary-target", home.join("a/link")).unwrap();
    symlink("/", home.join("a/everything")).unwrap();
    let sparse = File::create(home.join("sparse")).unwrap();
    sparse.write_all_at(b"canary-early", 0).unwrap();
    sparse.write_all_at(b"canary-late", 1 << 40).unwrap();
    fs::write(home.join("large"), vec![b'x'; 300_000]).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        home.join("pipe"),
        rustix::fs::FileType::Fifo,
        0o600.into(),
        0,
    )
    .unwrap();
    leak(&sandbox).await;

    let shown = sweep(&mut sandbox.client().await, None).await;
    assert!(shown.done && shown.unread.is_empty(), "{:?}", shown.unread);
    processes_are_shown(&shown);
    assert_eq!(shown.file(&home.join("a/b/file")), b"canary-file");
    assert_eq!(shown.file(&home.join("a/link")), b"canary-target");
    assert_eq!(shown.file(&home.join("a/everything")), b"/");
    assert_eq!(shown.file(&home.join("large")).len(), 300_000);
    assert_eq!(shown.file(&home.join("pipe")), b"");
    let sparse = shown.file(&home.join("sparse"));
    assert!(sparse.starts_with(b"canary-early") && sparse.ends_with(b"canary-late"));
    assert!(shown.holes > 1 << 39 && sparse.len() < 1 << 20);
    // No link was followed, and no process but the sandbox's own was looked at.
    assert!(!shown.items.keys().any(|(_, name)| name == "/etc/passwd"));
    let own = std::process::id();
    assert!(!shown.items.keys().any(|(_, name)| *name == format!("process {own}")));
}

#[tokio::test]
async fn what_cannot_be_read_is_said() {
    let (sandbox, _link) = Sandbox::ready().await;
    let mut deep = sandbox.home();
    fs::write(deep.join("beside"), "canary").unwrap();
    // Deeper than anybody goes.
    let mut directory = File::open(&deep).unwrap();
    for _ in 0..520 {
        rustix::fs::mkdirat(&directory, "d", 0o700.into()).unwrap();
        let flags = rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::RDONLY;
        directory = rustix::fs::openat(&directory, "d", flags, 0.into()).unwrap().into();
        deep.push("d");
    }
    let shown = sweep(&mut sandbox.client().await, None).await;
    assert!(shown.done);
    assert_eq!(shown.unread.len(), 1);
    assert!(shown.unread[0].1.contains("too deep"), "{:?}", shown.unread);
    // The control: everything else was read all the same.
    assert_eq!(shown.file(&sandbox.home().join("beside")), b"canary");
}

#[tokio::test]
async fn only_the_hypervisors_socket_shows_it_and_only_to_who_asks_as_the_hypervisor() {
    let (sandbox, _link) = Sandbox::ready().await;
    let inside = sandbox.directory.path().join("agent/api.sock");
    let asked = || request("GET", ROUTE, &[(HEADER, "1")], Value::Null);
    let refused = Client::connect(&inside).await.send(asked()).await;
    assert_eq!(refused.status(), 404);
    let plain = request("GET", ROUTE, &[], Value::Null);
    assert_eq!(sandbox.client().await.send(plain).await.status(), 404);
    // The controls: the socket inside answers, and the hypervisor's shows it.
    let health = request("GET", "/health", &[], Value::Null);
    assert_eq!(Client::connect(&inside).await.send(health).await.status(), 200);
    assert_eq!(sandbox.client().await.send(asked()).await.status(), 200);
}

/// In namespaces of its own, where the user's processes are another's than the agent's.
pub async fn processes_of_another_user_are_shown((sandbox, _link): (Sandbox, Link)) {
    leak(&sandbox).await;
    let mut client = sandbox.client().await;
    let shown = sweep(&mut client, Some("/")).await;
    processes_are_shown(&shown);
    assert!(shown.unread.is_empty(), "{:?}", shown.unread);
    // The agent's own environment, which only root can read.
    let agent = (Part::Environment, "process 1".to_owned());
    assert!(shown.items.contains_key(&agent));
    assert!(!shown.of(Part::Sockets, "api.sock").is_empty());
}
