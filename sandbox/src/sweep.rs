//! `GET /sweep`: everything in the sandbox, for the hypervisor's search for secrets. Children of the agent look around, each
//! as the user whose processes it reads: root lacks the capability to read others'. It must not know what is looked for.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use choir_api::sandbox::OutputStream;
use choir_link::sweep::{Frame, HEADER, ROUTE};

use crate::agent::Agent;
use crate::api::{ApiError, Status};
use crate::process::{Process, Step};
use crate::spawn::{Become, Directory, Launch};
use crate::sweep_look;
use crate::user::User;
use crate::{api, log};

/// The API with what is for the hypervisor alone.
pub fn router(agent: Arc<Agent>) -> Router {
    api::router(Arc::clone(&agent)).merge(Router::new().route(ROUTE, get(sweep)).with_state(agent))
}

async fn sweep(State(agent): State<Arc<Agent>>, headers: HeaderMap) -> Result<Response, ApiError> {
    if !headers.contains_key(HEADER) {
        let message = "There is nothing here; see the API docs.";
        return Err(ApiError::new(Status::NOT_FOUND, "no_such_route", message));
    }
    let looks = Looks {
        left: looks(&agent),
        running: None,
        agent,
        failed: false,
    };
    let body = futures_util::stream::unfold(looks, async |mut looks| {
        let piece = looks.next().await?;
        Some((Ok::<_, std::convert::Infallible>(piece), looks))
    });
    Ok(Body::from_stream(body).into_response())
}

/// Root's look at processes, that of each user who has some, and root's look at files, which takes longest.
fn looks(agent: &Agent) -> VecDeque<(Become, &'static str)> {
    if agent.place.is_dev() {
        return [(Become::Same, sweep_look::DEVELOPMENT)].into();
    }
    let mut looks = VecDeque::from([(Become::Same, sweep_look::PROCESSES)]);
    let identities: BTreeSet<(u32, u32)> = sweep_look::processes()
        .filter_map(sweep_look::identity)
        .filter(|identity| *identity != (0, 0))
        .collect();
    for (uid, gid) in identities {
        let user = User {
            gid,
            groups: vec![gid],
            ..User::by_uid(uid)
        };
        looks.push_back((Become::User(user), sweep_look::OWN));
    }
    looks.push_back((Become::Same, sweep_look::FILES));
    looks
}

/// Children one after the other, and what they write as one stream.
struct Looks {
    agent: Arc<Agent>,
    left: VecDeque<(Become, &'static str)>,
    running: Option<Process>,
    failed: bool,
}

impl Looks {
    /// The next bytes; the last ones say that all was shown, unless a child failed.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if self.failed {
                return None;
            }
            let Some(process) = &mut self.running else {
                let Some((who, look)) = self.left.pop_front() else {
                    let mut done = Vec::new();
                    Frame::Done.write(&mut done);
                    self.failed = true;
                    return Some(done.into());
                };
                match start(&self.agent, who, look) {
                    Ok(process) => self.running = Some(process),
                    Err(e) => self.fail(&e.to_string()),
                }
                continue;
            };
            match process.next().await {
                Step::Output(OutputStream::Stdout, bytes) => return Some(bytes),
                Step::Output(OutputStream::Stderr, bytes) => log::say(String::from_utf8_lossy(&bytes).trim()),
                Step::Ended(exit) if exit.code == 0 => self.running = None,
                Step::Ended(exit) => self.fail(&format!("exit code {}", exit.code)),
            }
        }
    }

    fn fail(&mut self, why: &str) {
        log::say(&format!("a look around the sandbox failed: {why}"));
        self.failed = true;
    }
}

fn start(agent: &Agent, who: Become, look: &str) -> std::io::Result<Process> {
    let mut env = BTreeMap::new();
    if let Some(home) = &agent.place.dev_home {
        env.insert("CHOIR_HOME".into(), home.into());
        env.insert("CHOIR_AGENT_DIR".into(), agent.place.agent.clone().into());
        env.insert("CHOIR_RUN_DIR".into(), agent.place.run.clone().into());
    }
    let launch = Launch {
        argv: vec![std::env::current_exe()?.into(), "look".into(), look.into()],
        name: None,
        env,
        directory: Directory::Path("/".into()),
        become_who: who,
        terminal: false,
    };
    Process::start(&agent.reaper, launch, Bytes::new())
}
