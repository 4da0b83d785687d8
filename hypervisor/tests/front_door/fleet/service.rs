//! A container service that hangs up, talks nonsense or refuses (F20): what was asked for fails with one sentence, is tried
//! again with pauses, and is done once the service is back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use axum::http::{Method, StatusCode};
use choir_core::sandbox::{Exit, Observed};
use choir_core::{Door, Generation, Limits, SandboxId, Slot};
use choir_hypervisor::clock::{Clock, MockClock};
use choir_runtime::{
    Found, LogLine, Notice, Places, Podman, PodmanOptions, Result as Done, Runtime, Seen, Sim, Spec, Stats, Stream,
};
use jiff::SignedDuration;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::releases::upload;
use super::wire::{clock, start_at};
use super::{Box as Start, change, shown, workspace};

const SOON: Duration = Duration::from_secs(20);
/// Two pauses of a second, less what a timer may be early.
const TWO_PAUSES: Duration = Duration::from_millis(1900);

/// As Podman says it when its runtime ends with code 125.
const REFUSAL: &str = "HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n\
    {\"cause\":\"exit status 125\",\"message\":\"crun: cannot set up\\ncgroups: exit status 125\",\"response\":500}";
/// As it says it when somebody else holds a lock.
const LOCKED: &str = "HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n\
    {\"cause\":\"device or resource busy\",\"message\":\"acquiring lock 7: device or resource busy\",\"response\":500}";
const PAGE: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 15\r\n\r\n<html>hi</html>";
/// What a service that has no containers answers to whatever it is asked here.
const BACK: &str = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n[]";

/// The simulated runtime while the service is well; while it is not, Podman's client and what that makes of the answers.
struct Ailing {
    podman: Podman,
    sim: Arc<Sim>,
    well: Arc<AtomicBool>,
}

impl Ailing {
    fn present(&self) -> &dyn Runtime {
        if self.well.load(Ordering::SeqCst) {
            &*self.sim
        } else {
            &self.podman
        }
    }
}

#[async_trait]
impl Runtime for Ailing {
    async fn describe(&self) -> Done<BTreeMap<String, String>> {
        self.present().describe().await
    }

    async fn list(&self) -> Done<Vec<Found>> {
        self.present().list().await
    }

    async fn create(&self, spec: &Spec) -> Done<()> {
        self.present().create(spec).await
    }

    async fn adopt(&self, spec: &Spec) -> Done<()> {
        self.present().adopt(spec).await
    }

    async fn start(&self, generation: &Generation) -> Done<()> {
        self.present().start(generation).await
    }

    async fn stop(&self, generation: &Generation, grace: Duration) -> Done<Exit> {
        self.present().stop(generation, grace).await
    }

    async fn pause(&self, generation: &Generation) -> Done<()> {
        self.present().pause(generation).await
    }

    async fn unpause(&self, generation: &Generation) -> Done<()> {
        self.present().unpause(generation).await
    }

    async fn remove(&self, generation: &Generation) -> Done<()> {
        self.present().remove(generation).await
    }

    async fn inspect(&self, generation: &Generation) -> Done<Seen> {
        self.present().inspect(generation).await
    }

    async fn description(&self, generation: &Generation) -> Done<Vec<u8>> {
        self.present().description(generation).await
    }

    async fn limit(&self, generation: &Generation, limits: &Limits, slot: Slot) -> Done<()> {
        self.present().limit(generation, limits, slot).await
    }

    async fn stats(&self, generation: &Generation) -> Done<Stats> {
        self.present().stats(generation).await
    }

    async fn logs(&self, generation: &Generation, tail: usize, follow: bool) -> Done<mpsc::Receiver<LogLine>> {
        self.present().logs(generation, tail, follow).await
    }

    async fn open(&self, generation: &Generation, door: Door) -> Done<Stream> {
        // An agent's door does not need the service.
        self.sim.open(generation, door).await
    }

    fn notices(&self) -> Option<mpsc::Receiver<Notice>> {
        self.sim.notices()
    }
}

/// What the service was asked for, and when.
type Asked = watch::Receiver<Vec<(Instant, String)>>;

/// Answers this to everybody, or as a service that is back.
fn serve(socket: &Path, answer: &'static str, well: Arc<AtomicBool>) -> Asked {
    let listener = UnixListener::bind(socket).unwrap();
    let (asked, seen) = watch::channel(Vec::new());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = [0; 4096];
            let read = stream.read(&mut head).await.unwrap_or(0);
            let line = String::from_utf8_lossy(&head[..read]);
            let line = line.lines().next().unwrap_or_default().to_owned();
            asked.send_modify(|all| all.push((Instant::now(), line)));
            let answer = if well.load(Ordering::SeqCst) { BACK } else { answer };
            // Who hangs up before has its answer.
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    seen
}

struct Scene {
    start: Start,
    clock: Arc<MockClock>,
    well: Arc<AtomicBool>,
    asked: Asked,
    _directory: tempfile::TempDir,
}

impl Scene {
    /// The service is well at first.
    async fn new(answer: &'static str) -> Self {
        let directory = tempfile::Builder::new().prefix("choir-").tempdir_in("/tmp").unwrap();
        let below = |name: &str| -> PathBuf { directory.path().join(name) };
        let well = Arc::new(AtomicBool::new(true));
        let asked = serve(&below("s"), answer, well.clone());
        let places = Places {
            volumes: below("v"),
            run: below("r"),
            agent: below("a"),
        };
        let options = PodmanOptions {
            socket: below("s"),
            oci_runtime: String::new(),
        };
        let podman = Podman::new(places, options).unwrap();
        let clock = clock();
        let state = well.clone();
        let start = start_at(&clock, |sim| {
            Arc::new(Ailing {
                podman,
                sim,
                well: state,
            })
        })
        .await;
        Self {
            start,
            clock,
            well,
            asked,
            _directory: directory,
        }
    }

    fn is_well(&self, well: bool) {
        self.well.store(well, Ordering::SeqCst);
    }

    /// How long it was from the first to the n-th request with this in its first line, from now on.
    async fn within(&self, what: &str, n: usize) -> Duration {
        let mut asked = self.asked.clone();
        let before = asked.borrow().len();
        let times = |all: &Vec<(Instant, String)>| -> Vec<Instant> {
            let new = all[before..].iter().filter(|(_, line)| line.contains(what));
            new.map(|(at, _)| *at).collect()
        };
        let enough = asked.wait_for(|all| times(all).len() >= n);
        let times = match tokio::time::timeout(SOON, enough).await {
            Ok(all) => times(&all.unwrap()),
            Err(_) => panic!("the service was not asked for {what} {n} times"),
        };
        times[n - 1].duration_since(times[0])
    }

    /// Moves the clock to whatever is waited for, until the sandbox is as wanted.
    async fn becomes(&self, sandbox: &SandboxId, wanted: impl Fn(&Observed) -> bool) {
        let handle = self.start.app.fleet.handle(sandbox).unwrap();
        let reached = async {
            loop {
                let observed = handle.status.borrow().observed.clone();
                if wanted(&observed) {
                    return;
                }
                if let Observed::Starting { not_before, .. } = observed {
                    let wait = not_before.duration_since(self.clock.now());
                    self.clock.advance(wait.max(SignedDuration::ZERO));
                }
                // Any message makes a worker look at the clock.
                _ = handle.wake(Duration::ZERO).await;
                tokio::task::yield_now().await;
            }
        };
        let reached = tokio::time::timeout(SOON, reached).await;
        reached.unwrap_or_else(|_| panic!("it is {:?}", handle.status.borrow().observed));
    }

    /// Waits until its container is seen like this.
    async fn is_seen(&self, generation: &Generation, wanted: &Seen) {
        let seen = async {
            while self.start.sim.inspect(generation).await.unwrap() != *wanted {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(SOON, seen)
            .await
            .expect("it happens to the container");
    }
}

#[tokio::test]
async fn a_start_that_the_service_spoils_says_why_in_one_sentence_and_is_done_once_it_is_back() {
    for (answer, why) in [
        ("", "the container service does not answer: "),
        (
            "\0\u{1} 220 smtp.example ready\r\n\r\n",
            "the container service answered what it should not: ",
        ),
        (PAGE, "the container service answered what it should not: "),
        (
            REFUSAL,
            "the container service refused: crun: cannot set up cgroups: exit status 125",
        ),
        (
            LOCKED,
            "the container is busy: acquiring lock 7: device or resource busy",
        ),
    ] {
        let scene = Scene::new(answer).await;
        let mut ada = scene.start.ada().await;
        let [live, dev] = workspace(&mut ada).await;
        scene.is_well(false);
        ada.post("/api/workspaces/main/slots/live/start", json!({}))
            .await
            .expect(StatusCode::ACCEPTED);
        let handle = scene.start.app.fleet.handle(&live).unwrap();
        let status = handle.settle(SOON, |s| s.observed.reason().is_some()).await;
        assert!(
            matches!(status.observed, Observed::Starting { attempt: 2, .. }),
            "{answer:?}: {status:?}"
        );
        let slot = shown(&mut ada).await["slots"]["live"].clone();
        assert_eq!(slot["state"], "starting", "{answer:?}");
        let reason = slot["reason"].as_str().unwrap();
        assert!(reason.starts_with(why), "{answer:?}: {reason}");
        assert!(reason.len() < 500 && !reason.contains(['\n', '<']), "{reason}");
        // What may be left of it is removed before it is started again, and that is asked for until it works.
        scene.within("/containers/", 4).await;
        assert_eq!(scene.start.world.starts(), 0);

        scene.is_well(true);
        scene
            .becomes(&live, |o| matches!(o, Observed::Ready { generation: 2, .. }))
            .await;
        assert_eq!(scene.start.world.starts(), 1, "{answer:?}");
        // The control: with a service that is well the first start is good.
        change(&mut ada, Slot::Dev, "start").await;
        let dev = scene.start.app.fleet.handle(&dev).unwrap();
        assert_eq!(dev.ready().unwrap().number, 1);
    }
}

#[tokio::test]
async fn what_is_to_stop_while_the_remains_of_a_start_cannot_be_removed_stops() {
    let scene = Scene::new(REFUSAL).await;
    let mut ada = scene.start.ada().await;
    let [live, _] = workspace(&mut ada).await;
    scene.is_well(false);
    let start = ada.post("/api/workspaces/main/slots/live/start", json!({})).await;
    start.expect(StatusCode::ACCEPTED);
    let handle = scene.start.app.fleet.handle(&live).unwrap();
    let status = handle.settle(SOON, |s| s.observed.reason().is_some()).await;
    assert!(
        matches!(status.observed, Observed::Starting { attempt: 2, .. }),
        "{status:?}"
    );
    scene.within("/containers/", 3).await;
    let stop = ada.post("/api/workspaces/main/slots/live/stop", json!({})).await;
    stop.expect(StatusCode::ACCEPTED);
    scene.is_well(true);
    scene.becomes(&live, |o| matches!(o, Observed::Stopped { .. })).await;
    assert_eq!(change(&mut ada, Slot::Live, "start").await["state"], "ready");
    assert_eq!(scene.start.world.starts(), 1);
}

#[tokio::test]
async fn what_the_service_refuses_is_asked_for_again_with_pauses_and_done_once_it_does_not() {
    let scene = Scene::new(REFUSAL).await;
    let mut ada = scene.start.ada().await;
    let [live, dev] = workspace(&mut ada).await;
    change(&mut ada, Slot::Live, "start").await;
    let first = Generation {
        sandbox: live.clone(),
        number: 1,
    };
    scene.is_well(false);
    let idle = json!({"idle_pause_s": 1});
    ada.fetch(Method::PATCH, "/api/workspaces/main", Some(idle))
        .await
        .expect(StatusCode::OK);
    let took = scene.within("/pause ", 3).await;
    assert!(took >= TWO_PAUSES, "three pauses were asked for within {took:?}");
    assert_eq!(scene.start.sim.inspect(&first).await.unwrap(), Seen::Running);
    scene.is_well(true);
    scene.is_seen(&first, &Seen::Paused).await;

    let fleet = &scene.start.app.fleet;
    let handles = [&live, &dev].map(|sandbox| fleet.handle(sandbox).unwrap());
    scene.is_well(false);
    ada.delete("/api/workspaces/main").await.expect(StatusCode::ACCEPTED);
    // Both sandboxes ask which containers there are.
    let took = scene.within("/containers/json?", 5).await;
    assert!(
        took >= TWO_PAUSES,
        "two deletions were tried five times within {took:?}"
    );
    assert_eq!(scene.start.sim.inspect(&first).await.unwrap(), Seen::Paused);
    scene.is_well(true);
    for handle in handles {
        let status = handle.settle(SOON, |s| s.observed == Observed::Deleted).await;
        assert_eq!(status.observed, Observed::Deleted);
    }
    assert_eq!(scene.start.sim.inspect(&first).await.unwrap(), Seen::Absent);
}

#[tokio::test]
async fn an_image_that_could_not_be_tried_since_the_service_was_away_is_not_lost_for_it() {
    for (answer, state) in [("", "candidate"), (REFUSAL, "rejected")] {
        let scene = Scene::new(answer).await;
        let mut ada = scene.start.ada().await;
        scene.is_well(false);
        upload(&mut ada, "name=alpine&wait_s=20", "image of alpine").await;
        scene.is_well(true);
        let listed = ada.get("/api/releases").await.expect(StatusCode::OK);
        let made = listed["items"].as_array().unwrap();
        let made = made.iter().find(|release| release["name"] == "alpine").unwrap();
        assert_eq!(made["state"], state, "{made}");
    }
}
