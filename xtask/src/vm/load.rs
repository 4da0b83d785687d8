//! Steady questions to a port while something is done, and how long the longest answer took. Knows nothing of what is done.

use std::fmt;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Longer than anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// One question after the other, each by a connection of its own.
pub struct Load {
    enough: Arc<AtomicBool>,
    asking: JoinHandle<Answered>,
}

#[derive(Default)]
pub struct Answered {
    pub good: usize,
    /// What was answered otherwise or not at all.
    pub bad: Vec<String>,
    pub longest: Duration,
    /// For how long there were questions.
    pub asked_for: Duration,
}

impl Answered {
    pub fn a_second(&self) -> f64 {
        self.good as f64 / self.asked_for.as_secs_f64()
    }
}

impl Load {
    /// Asks for a path of the box at this port.
    pub fn start(port: u16, path: &'static str) -> Self {
        let enough = Arc::new(AtomicBool::new(false));
        let until = enough.clone();
        let asking = std::thread::spawn(move || {
            let mut answered = Answered::default();
            let first = Instant::now();
            while !until.load(Ordering::Relaxed) {
                let begun = Instant::now();
                match ask(port, path) {
                    Ok(line) if line.starts_with("HTTP/1.1 200") => answered.good += 1,
                    Ok(line) => answered.bad.push(format!("answered `{line}`")),
                    Err(error) => answered.bad.push(format!("{error:#}")),
                }
                answered.longest = answered.longest.max(begun.elapsed());
            }
            answered.asked_for = first.elapsed();
            answered
        });
        Self { enough, asking }
    }

    pub fn end(self) -> Result<Answered> {
        self.enough.store(true, Ordering::Relaxed);
        let answered = self.asking.join();
        answered.ok().context("the thread that asked broke off")
    }
}

impl fmt::Display for Answered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} answered, longest {:.1} s", self.good, self.longest.as_secs_f64())?;
        match &self.bad[..] {
            [] => Ok(()),
            bad => write!(f, ", and not: {}", bad.join(", ")),
        }
    }
}

/// The first line of the answer.
fn ask(port: u16, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).context("not connected")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost:9090\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).context("the connection broke off")?;
    let text = String::from_utf8_lossy(&answer);
    Ok(text.lines().next().unwrap_or("nothing").to_owned())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn refusals_and_wrong_answers_are_counted_apart_from_good_ones() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let load = Load::start(port, "/healthz");
        for answer in ["HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 503 Later\r\n\r\n", ""] {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 512];
            assert!(stream.read(&mut request).unwrap() > 0);
            stream.write_all(answer.as_bytes()).unwrap();
        }
        drop(listener);
        let answered = load.end().unwrap();
        assert_eq!(answered.good, 1);
        assert!(answered.bad.iter().any(|it| it.contains("503")), "{:?}", answered.bad);
        assert!(
            answered.bad.iter().any(|it| it.contains("nothing")),
            "{:?}",
            answered.bad
        );
    }
}
