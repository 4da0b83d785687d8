//! The services of a sandbox: the app and what it needs, started once a generation and again when they end. Their
//! output is the container's log. It must not know where the list comes from.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use choir_api::sandbox::Command;
use tokio::time::Instant;

use crate::agent::Agent;
use crate::command::launch;
use crate::log;
use crate::process::{Process, Step};

const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LAST_PAUSE: Duration = Duration::from_secs(30);
/// A service that ran this long has earned a short pause again.
const STABLE: Duration = Duration::from_secs(30);

/// Starts every service of the configuration.
pub fn start(agent: &Arc<Agent>) {
    for (name, line) in &agent.config().services {
        tokio::spawn(keep(Arc::clone(agent), name.clone(), line.clone()));
    }
}

async fn keep(agent: Arc<Agent>, name: String, line: String) {
    let mut pause = FIRST_PAUSE;
    while !agent.is_stopping() {
        let began = Instant::now();
        let outcome = run(&agent, &name, &line).await;
        if agent.is_stopping() {
            return;
        }
        if began.elapsed() >= STABLE {
            pause = FIRST_PAUSE;
        }
        log::say(&format!(
            "service {name} {outcome}; it starts again in {} ms",
            pause.as_millis()
        ));
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

/// Runs it once; how it ended.
async fn run(agent: &Agent, name: &str, line: &str) -> String {
    let command = Command::Line(line.to_owned());
    let launch = match launch(agent, &command, None, &Default::default()) {
        Ok(launch) => launch,
        Err(e) => return format!("cannot start: {e}"),
    };
    let mut process = match Process::start(&agent.reaper, launch, Bytes::new()) {
        Ok(process) => process,
        Err(e) => return format!("cannot start: {e}"),
    };
    let mut lines = BytesMut::new();
    loop {
        match process.next().await {
            Step::Output(_, bytes) => {
                lines.extend_from_slice(&bytes);
                pass_on(name, &mut lines).await;
            }
            Step::Ended(exit) => {
                if !lines.is_empty() {
                    log::service(name, &String::from_utf8_lossy(&lines)).await;
                }
                return match exit.signal_name() {
                    Some(signal) => format!("was ended by {signal}"),
                    None => format!("ended with exit code {}", exit.code),
                };
            }
        }
    }
}

/// Writes the whole lines; one that is too long is cut into several.
async fn pass_on(name: &str, lines: &mut BytesMut) {
    loop {
        let most = log::MAX_LINE - 256;
        let (length, skip) = match lines.iter().take(most).position(|b| *b == b'\n') {
            Some(end) => (end, 1),
            None if lines.len() >= most => (most, 0),
            None => return,
        };
        let line = lines.split_to(length);
        lines.advance(skip);
        log::service(name, &String::from_utf8_lossy(&line)).await;
    }
}
