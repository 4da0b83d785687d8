//! A control link's far end that lies, floods and cheats. The gate is the same for all real runtimes, so the
//! development runtime opens it here, with nothing started behind it.

use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use choir_core::{Door, Generation, IdRange, Limits, SandboxId};
use choir_link::message::{PROTOCOL, SOCKET};
use choir_link::{AgentConfig, Channel, FromAgent, ListenerKind, ToAgent};
use choir_runtime::{Error, Notice, Places, Process, Runtime, Spec};
use tempfile::TempDir;
use tokio::sync::mpsc;

const PATIENCE: Duration = Duration::from_secs(10);

struct Rig {
    runtime: Process,
    notices: mpsc::Receiver<Notice>,
    spec: Spec,
    socket: PathBuf,
    _dir: TempDir,
}

async fn rig() -> Rig {
    let dir = tempfile::Builder::new().prefix("choir-").tempdir_in("/tmp").unwrap();
    let run = dir.path().join("r");
    let runtime = Process::new(Places {
        volumes: dir.path().join("v"),
        run: run.clone(),
        agent: PathBuf::new(),
    });
    let generation = Generation {
        sandbox: SandboxId::from_random([7; 16]),
        number: 3,
    };
    let spec = Spec {
        nonce: "ab".repeat(32),
        ids: IdRange::nth(0).unwrap(),
        limits: Limits::default(),
        slot: choir_core::Slot::Dev,
        hostname: "box".to_owned(),
        agent: AgentConfig {
            generation: 3,
            ..AgentConfig::default()
        },
        generation,
    };
    runtime.create(&spec).await.unwrap();
    Rig {
        notices: runtime.notices().unwrap(),
        runtime,
        socket: run.join(format!("{}-3/choir/{SOCKET}", spec.generation.sandbox)),
        spec,
        _dir: dir,
    }
}

impl Rig {
    fn hello(&self) -> FromAgent {
        FromAgent::Hello {
            protocol: PROTOCOL,
            version: "0".to_owned(),
            generation: 0,
            nonce: self.spec.nonce.clone(),
            report: Box::default(),
            own: None,
        }
    }

    /// A link that was welcomed.
    async fn link(&mut self) -> Channel {
        let channel = Channel::connect(&self.socket).unwrap();
        channel.send(&self.hello(), None).await.unwrap();
        let (welcome, fd) = receive(&channel).await.expect("a welcome");
        assert!(matches!(welcome, ToAgent::Welcome { .. }));
        fd.expect("the listening socket of the agent's API");
        assert!(matches!(self.notice().await, Notice::Ready { .. }));
        channel
    }

    async fn notice(&mut self) -> Notice {
        let notice = tokio::time::timeout(PATIENCE, self.notices.recv()).await;
        notice.expect("a notice comes").expect("the runtime lives")
    }

    /// Dials port 3000 and lets `answer` play the agent.
    async fn dial(
        &self,
        channel: &Channel,
        answer: impl AsyncFnOnce(u64),
    ) -> choir_runtime::Result<choir_runtime::Stream> {
        let (dialled, ()) = tokio::join!(self.runtime.open(&self.spec.generation, Door::Port(3000)), async {
            let Some((ToAgent::Dial { id, port: 3000 }, None)) = receive(channel).await else {
                panic!("it asks for a connection");
            };
            answer(id).await;
        });
        dialled
    }
}

async fn receive(channel: &Channel) -> Option<(ToAgent, Option<std::os::fd::OwnedFd>)> {
    let received = tokio::time::timeout(PATIENCE, channel.receive()).await;
    received.expect("something comes, or the end").ok().flatten()
}

#[tokio::test]
async fn only_the_right_nonce_generation_and_protocol_are_welcomed() {
    let mut rig = rig().await;
    let right = rig.hello();
    let FromAgent::Hello {
        nonce, report, version, ..
    } = right
    else {
        unreachable!()
    };
    let hello = |protocol, generation, nonce: &str| FromAgent::Hello {
        protocol,
        version: version.clone(),
        generation,
        nonce: nonce.to_owned(),
        report: report.clone(),
        own: None,
    };
    let wrong = [
        hello(PROTOCOL, 0, ""),
        hello(PROTOCOL, 0, &"0".repeat(64)),
        hello(PROTOCOL, 0, &nonce[..63]),
        hello(PROTOCOL, 2, &nonce),
        hello(PROTOCOL + 1, 0, &nonce),
        hello(0, 0, &nonce),
        FromAgent::Activity {
            tasks: 0,
            terminals: 0,
            oom_kills: 0,
        },
    ];
    for message in wrong {
        let channel = Channel::connect(&rig.socket).unwrap();
        channel.send(&message, None).await.unwrap();
        assert!(receive(&channel).await.is_none(), "{message:?}");
    }
    rig.link().await;
}

#[tokio::test]
async fn a_malformed_message_ends_the_link_and_the_agent_may_come_back() {
    let mut rig = rig().await;
    let nobody = rig.runtime.open(&rig.spec.generation, Door::Agent).await;
    assert!(matches!(nobody, Err(Error::Unavailable(_))));
    let channel = rig.link().await;
    channel.send(&"rubbish", None).await.unwrap();
    assert!(receive(&channel).await.is_none());
    assert!(matches!(rig.notice().await, Notice::Lost { .. }));
    rig.link().await;
}

#[tokio::test]
async fn a_newer_link_replaces_the_older_one_silently() {
    let mut rig = rig().await;
    let old = rig.link().await;
    let new = rig.link().await;
    assert!(receive(&old).await.is_none());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let refused = rig
        .dial(&new, async |id| {
            let reason = "refused".to_owned();
            new.send(&FromAgent::DialFailed { id, reason }, None).await.unwrap();
        })
        .await;
    assert!(matches!(refused, Err(Error::NotListening)));
    drop(listener);
    assert!(rig.notices.try_recv().is_err(), "the old link's end is no loss");
}

#[tokio::test]
async fn a_dial_takes_only_a_connected_loopback_socket_of_its_port() {
    let mut rig = rig().await;
    let channel = rig.link().await;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let elsewhere = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    let (unix, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    for fd in [elsewhere.as_fd(), listener.as_fd(), file.as_fd(), unix.as_fd()] {
        let answered = rig
            .dial(&channel, async |id| {
                // What nobody asked for is ignored.
                channel
                    .send(&FromAgent::Dialled { id: id + 7 }, Some(fd))
                    .await
                    .unwrap();
                channel.send(&FromAgent::Dialled { id }, Some(fd)).await.unwrap();
            })
            .await;
        assert!(matches!(answered, Err(Error::Protocol(_))), "{answered:?}");
    }
    let bare = rig
        .dial(&channel, async |id| {
            channel.send(&FromAgent::Dialled { id }, None).await.unwrap()
        })
        .await;
    assert!(matches!(bare, Err(Error::NotListening)));
}

#[tokio::test]
async fn a_flood_of_messages_ends_the_link() {
    let mut rig = rig().await;
    let channel = rig.link().await;
    let flood = async {
        loop {
            let message = FromAgent::Activity {
                tasks: 1,
                terminals: 0,
                oom_kills: 0,
            };
            if channel.send(&message, None).await.is_err() {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, flood).await.expect("it is cut off");
    let mut heard = 0;
    while !matches!(rig.notice().await, Notice::Lost { .. }) {
        heard += 1;
    }
    assert!((32..=128).contains(&heard), "{heard}");
}

#[tokio::test]
async fn a_listener_must_listen_on_loopback() {
    let mut rig = rig().await;
    let everywhere = TcpListener::bind("0.0.0.0:0").unwrap();
    let local = TcpListener::bind("127.0.0.1:0").unwrap();
    let connected = TcpStream::connect(local.local_addr().unwrap()).unwrap();
    for fd in [everywhere.as_fd(), connected.as_fd()] {
        let channel = rig.link().await;
        let kind = ListenerKind::Broker;
        channel.send(&FromAgent::Listener { kind }, Some(fd)).await.unwrap();
        assert!(receive(&channel).await.is_none());
        assert!(matches!(rig.notice().await, Notice::Lost { .. }));
    }
}

#[tokio::test]
async fn at_most_64_connections_from_inside_are_open_at_once() {
    let mut rig = rig().await;
    let channel = rig.link().await;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let kind = ListenerKind::Egress;
    channel
        .send(&FromAgent::Listener { kind }, Some(listener.as_fd()))
        .await
        .unwrap();
    let address = listener.local_addr().unwrap();
    let clients: Vec<_> = (0..70).map(|_| TcpStream::connect(address).unwrap()).collect();
    let mut inside = Vec::new();
    for _ in 0..64 {
        match rig.notice().await {
            Notice::Inside { kind, stream, .. } => {
                assert_eq!(kind, ListenerKind::Egress);
                inside.push(stream);
            }
            other => panic!("{other:?}"),
        }
    }
    let more = tokio::time::timeout(Duration::from_millis(200), rig.notices.recv()).await;
    assert!(more.is_err(), "{more:?}");
    inside.pop();
    assert!(matches!(rig.notice().await, Notice::Inside { .. }));
    drop(clients);
}

#[tokio::test]
async fn a_listener_made_blocking_holds_up_nobody_else() {
    let mut rig = rig().await;
    let channel = rig.link().await;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let kind = ListenerKind::Broker;
    channel
        .send(&FromAgent::Listener { kind }, Some(listener.as_fd()))
        .await
        .unwrap();
    let address = listener.local_addr().unwrap();
    let _first = TcpStream::connect(address).unwrap();
    assert!(matches!(rig.notice().await, Notice::Inside { .. }));
    listener.set_nonblocking(false).unwrap();
    let _second = TcpStream::connect(address).unwrap();
    assert!(matches!(rig.notice().await, Notice::Inside { .. }));
    // Now an accept waits for a third, in a thread of its own: this one still serves. Each round lets every other
    // task run, so an accept on this thread would end the test in the first of them.
    for _ in 0..100 {
        let refused = rig
            .dial(&channel, async |id| {
                let reason = String::new();
                channel.send(&FromAgent::DialFailed { id, reason }, None).await.unwrap();
            })
            .await;
        assert!(matches!(refused, Err(Error::NotListening)));
    }
}

#[tokio::test]
async fn a_data_directory_too_long_for_sockets_is_refused_with_a_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let spec = rig().await.spec;
    let runtime = Process::new(Places {
        volumes: dir.path().join("v"),
        run: dir.path().join("x".repeat(100)),
        agent: PathBuf::new(),
    });
    let why = runtime.create(&spec).await.unwrap_err().to_string();
    assert!(why.contains("choose a shorter data directory"), "{why}");
}
