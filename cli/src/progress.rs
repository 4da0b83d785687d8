//! A sign of life on the terminal for what takes over a second. It must not write anything where nobody watches.

use std::future::Future;
use std::io::{self, IsTerminal as _, Write as _};
use std::pin::pin;
use std::time::{Duration, Instant};

/// Waits for `work`, and from the first second on says on a terminal what is waited for and how long already.
pub async fn watch<T>(what: &str, quiet: bool, work: impl Future<Output = T>) -> T {
    if quiet || !io::stderr().is_terminal() {
        return work.await;
    }
    let mut work = pin!(work);
    let begun = Instant::now();
    let mut ticks = tokio::time::interval_at(
        tokio::time::Instant::now() + Duration::from_secs(1),
        Duration::from_millis(200),
    );
    loop {
        tokio::select! {
            done = &mut work => {
                if begun.elapsed() >= Duration::from_secs(1) {
                    draw("");
                }
                return done;
            }
            _ = ticks.tick() => draw(&format!("{what} … {} s", begun.elapsed().as_secs())),
        }
    }
}

/// A line about work that says itself how far it is.
pub struct Line {
    quiet: bool,
    begun: Instant,
}

impl Line {
    pub fn begin(quiet: bool) -> Self {
        Self {
            quiet: quiet || !io::stderr().is_terminal(),
            begun: Instant::now(),
        }
    }

    /// Says it, once the work has taken a second.
    pub fn tell(&mut self, text: &str) {
        if !self.quiet && self.begun.elapsed() >= Duration::from_secs(1) {
            draw(text);
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.tell("");
    }
}

/// Replaces the line the cursor is on.
fn draw(text: &str) {
    let mut err = io::stderr().lock();
    // A terminal that went away is noticed by whoever writes the result.
    let _gone = write!(err, "\r\x1b[K{text}").and_then(|()| err.flush());
}
