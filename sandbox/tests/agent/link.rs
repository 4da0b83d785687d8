//! The control link, services, and the duties of PID 1.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;

use choir_link::{AgentConfig, FromAgent, ToAgent};
use futures_util::StreamExt;
use serde_json::{Value, json};

use crate::sandbox::{Sandbox, config, is_alive, soon, until};

#[tokio::test]
async fn the_hello_carries_the_homes_choir_toml_as_it_was_at_the_start_and_a_refusal_is_logged() {
    let said = |hello| match hello {
        FromAgent::Hello { own, .. } => own,
        other => panic!("the first message is {other:?}"),
    };
    let mut sandbox = Sandbox::start_in(|home| std::fs::write(home.join("choir.toml"), "app_port = 5173\n").unwrap());
    let (first, hello) = sandbox.accept().await;
    assert_eq!(said(hello), Some(Ok("app_port = 5173\n".to_owned())));
    drop(first);
    std::fs::write(sandbox.home().join("choir.toml"), "app_port = 5174\n").unwrap();
    let (second, hello) = sandbox.accept().await;
    assert_eq!(
        said(hello),
        Some(Ok("app_port = 5173\n".to_owned())),
        "what is new is of the next start"
    );
    drop(second);
    let unheeded = Some("line 1: the sun".to_owned());
    let _link = sandbox.welcome(AgentConfig { unheeded, ..config() }).await;
    sandbox.logged("choir.toml is not in effect: line 1: the sun").await;

    let silent = Sandbox::start();
    assert_eq!(said(silent.accept().await.1), None);
}

#[tokio::test]
async fn a_new_handshake_keeps_tasks_and_open_connections() {
    let (mut sandbox, link) = Sandbox::ready().await;
    let (_, task) = sandbox
        .request("POST", "/tasks", json!({"command": ["sleep", "1000"]}))
        .await;
    let path = format!("/tasks/{}", task["id"].as_str().unwrap());
    let mut old = sandbox.client().await;
    let mut socket = sandbox.websocket(&format!("{path}/events")).await;
    soon(socket.next()).await.unwrap().unwrap();
    let old_api = sandbox.api();
    drop(link);
    let _link = sandbox.welcome(config()).await;
    let (status, state) = old.json("GET", &path, Value::Null).await;
    assert_eq!((status.as_u16(), &state["state"]), (200, &json!("running")));
    assert_eq!(sandbox.get(&path).await["state"], "running");
    soon(socket.next()).await.unwrap().unwrap();
    // Nobody holds the old socket any more.
    until(async || tokio::net::UnixStream::connect(&old_api).await.is_err()).await;
}

#[tokio::test]
async fn connections_to_the_broker_wait_for_the_next_hypervisor() {
    let (mut sandbox, link) = Sandbox::ready().await;
    let (broker, egress) = (link.broker.local_addr().unwrap(), link.egress.local_addr().unwrap());
    assert_ne!(broker, egress);
    drop(link);
    let mut stream = TcpStream::connect(broker).unwrap();
    stream.write_all(b"hello").unwrap();
    let link = sandbox.welcome(config()).await;
    assert_eq!(link.broker.local_addr().unwrap(), broker);
    link.broker.set_nonblocking(true).unwrap();
    let listener = tokio::net::TcpListener::from_std(link.broker).unwrap();
    let (_, from) = soon(listener.accept()).await.unwrap();
    assert_eq!(from, stream.local_addr().unwrap());
}

#[tokio::test]
async fn a_dial_reaches_an_app_on_either_loopback_address() {
    let (_sandbox, link) = Sandbox::ready().await;
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let Ok(app) = TcpListener::bind(address) else {
            eprintln!("skipped {address}: this machine has no such address");
            continue;
        };
        let port = app.local_addr().unwrap().port();
        let fd = link.dial(7, port).await.unwrap();
        choir_link::channel::check_socket(fd.as_fd(), rustix::net::sockopt::socket_domain(&fd).unwrap(), false)
            .unwrap();
        let (accepted, _) = app.accept().unwrap();
        assert_eq!(TcpStream::from(fd).local_addr().unwrap(), accepted.peer_addr().unwrap());
    }
}

#[tokio::test]
async fn a_dial_to_nothing_or_to_the_agents_own_ports_fails() {
    let (_sandbox, link) = Sandbox::ready().await;
    let own = [
        link.broker.local_addr().unwrap().port(),
        link.egress.local_addr().unwrap().port(),
    ];
    for port in [9091, 9092].into_iter().chain(own) {
        assert_eq!(link.dial(1, port).await.unwrap_err(), "this port is the agent's own");
    }
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    assert!(link.dial(2, free).await.unwrap_err().contains("nothing listens"));
}

#[tokio::test]
async fn activity_is_told_when_it_changes() {
    let (sandbox, link) = Sandbox::ready().await;
    let next = async || match link.next().await.0 {
        FromAgent::Activity { tasks, terminals, .. } => (tasks, terminals),
        other => panic!("instead of activity came {other:?}"),
    };
    assert_eq!(next().await, (0, 0));
    let (_, task) = sandbox
        .request("POST", "/tasks", json!({"command": ["sleep", "1000"]}))
        .await;
    assert_eq!(next().await, (1, 0));
    sandbox
        .request("POST", "/terminals", json!({"cols": 80, "rows": 24}))
        .await;
    assert_eq!(next().await, (1, 1));
    sandbox
        .request(
            "DELETE",
            &format!("/tasks/{}", task["id"].as_str().unwrap()),
            Value::Null,
        )
        .await;
    assert_eq!(next().await, (0, 1));
}

#[tokio::test]
async fn services_start_once_and_again_only_when_they_end() {
    let mut sandbox = Sandbox::start();
    let mut config = config();
    let line = "echo run >> runs; echo started $FROM_CONFIG; read x < gate; exit 3";
    config.services = [("start".to_owned(), line.to_owned())].into();
    let gate = sandbox.home().join("gate");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &gate, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let link = sandbox.welcome(config.clone()).await;
    assert_eq!(sandbox.logged("started").await, "[start] started yes");
    drop(link);
    let _link = sandbox.welcome(config).await;
    sandbox.get("/health").await;
    assert_eq!(std::fs::read_to_string(sandbox.home().join("runs")).unwrap(), "run\n");
    std::fs::write(&gate, "go\n").unwrap();
    let ended = sandbox.logged("service start").await;
    assert_eq!(
        ended,
        "choir-sandbox: service start ended with exit code 3; it starts again in 500 ms"
    );
    sandbox.logged("started").await;
    assert_eq!(
        std::fs::read_to_string(sandbox.home().join("runs")).unwrap(),
        "run\nrun\n"
    );
}

#[tokio::test]
async fn a_service_that_floods_the_log_does_not_stop_the_agent() {
    let mut sandbox = Sandbox::start();
    let mut config = config();
    config.services = [("start".to_owned(), "exec yes flood".to_owned())].into();
    let _link = sandbox.welcome(config).await;
    sandbox.logged("flood").await;
    // Nobody reads the log from here on.
    for _ in 0..20 {
        assert_eq!(sandbox.exec(json!({"command": ["echo", "hi"]})).await.stdout, "hi\n");
    }
}

#[tokio::test]
async fn a_welcome_without_a_listening_socket_ends_the_link() {
    let sandbox = Sandbox::start();
    for _ in 0..2 {
        let (channel, _) = sandbox.accept().await;
        let file = std::fs::File::open("/dev/null").unwrap();
        let config = Box::new(config());
        channel
            .send(&ToAgent::Welcome { config }, Some(file.as_fd()))
            .await
            .unwrap();
        assert!(soon(channel.receive::<FromAgent>()).await.unwrap().is_none());
    }
}

#[tokio::test]
async fn the_report_tells_what_is_and_the_proof_holds_the_nonce() {
    let (_sandbox, link) = Sandbox::ready().await;
    let report = link.report;
    assert_eq!(
        std::fs::read_to_string(&report.proof_file).unwrap(),
        crate::sandbox::NONCE
    );
    assert!(report.interfaces.contains(&"lo".to_owned()));
    assert!(report.mounts.contains_key("/"));
    assert!(report.rlimits["nofile"] > 0);
    assert!(report.env_names.contains(&"CHOIR_RUN_DIR".to_owned()));
    assert!(!report.uid_map.is_empty() && !report.cap_bounding.is_empty());
}

#[tokio::test]
async fn orphans_are_reaped() {
    let (sandbox, _link) = Sandbox::ready().await;
    let line = "for i in 1 2 3 4 5; do setsid sh -c 'sleep 0.1' & done";
    sandbox.exec(json!({"command": ["sh", "-c", line]})).await;
    let agent = sandbox.agent.id();
    let children = || std::fs::read_to_string(format!("/proc/{agent}/task/{agent}/children")).unwrap();
    until(async || children().trim().is_empty()).await;
}

#[tokio::test]
async fn sigterm_ends_everything_and_then_the_agent() {
    let (mut sandbox, _link) = Sandbox::ready().await;
    let body =
        json!({"command": ["sh", "-c", "trap 'echo end > ended; exit' TERM; echo $$; while :; do sleep 0.02; done"]});
    let (_, task) = sandbox.request("POST", "/tasks", body).await;
    let (_, terminal) = sandbox
        .request("POST", "/terminals", json!({"cols": 80, "rows": 24}))
        .await;
    assert!(terminal["id"].is_string());
    let path = format!("/tasks/{}/events", task["id"].as_str().unwrap());
    let mut events = sandbox.client().await.events("GET", &path, &[], Value::Null).await;
    let pid = loop {
        let event = events.next().await.unwrap();
        if event.name == "output" {
            break event.data["data"].as_str().unwrap().trim().parse().unwrap();
        }
    };
    let status = sandbox.stop().await;
    assert_eq!(status.code(), Some(0));
    assert!(!is_alive(pid));
    assert_eq!(std::fs::read_to_string(sandbox.home().join("ended")).unwrap(), "end\n");
}
