//! Keeps the programs running until a signal asks to stop: a program that ends is started again at
//! once, and slower when it keeps ending. Knows nothing of what the programs do.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::data::DataDir;
use crate::process::Handle;

/// Requests in flight may finish; what runs in sandboxes goes on.
const GRACE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);

/// More than this many ends within the window are a restart loop.
const CRASHES: usize = 5;
const WINDOW: Duration = Duration::from_secs(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

type MakeCommand = Box<dyn Fn() -> Result<Command>>;

/// A program to keep running; its log is a file, or our own output.
pub struct Service {
    name: &'static str,
    pid_file: PathBuf,
    log: Option<PathBuf>,
    command: MakeCommand,
    running: Option<Handle>,
    start_at: Option<Instant>,
    pauses: Pauses,
    ready_once: bool,
    /// Its exit code, when it gave up before it was ever ready: trying again would not help.
    refused: Option<i32>,
}

impl Service {
    pub fn new(
        name: &'static str,
        data: &DataDir,
        log: Option<PathBuf>,
        command: impl Fn() -> Result<Command> + 'static,
    ) -> Self {
        Self {
            name,
            pid_file: data.pid_file(name),
            log,
            command: Box::new(command),
            running: None,
            start_at: None,
            pauses: Pauses::default(),
            ready_once: false,
            refused: None,
        }
    }
}

/// Why waiting ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    Ready,
    Stop,
}

enum Event {
    Stop,
    Ended { service: usize, status: ExitStatus },
}

pub struct Supervisor {
    /// Nothing is a restart loop.
    may_crash: bool,
    services: Vec<Service>,
    sender: Sender<Event>,
    events: Receiver<Event>,
}

impl Supervisor {
    /// From here on SIGINT, SIGTERM and SIGHUP ask to stop instead of ending us.
    pub fn new(may_crash: bool) -> Result<Self> {
        let (sender, events) = channel();
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot watch signals")?;
        let stop = sender.clone();
        std::thread::spawn(move || {
            for _signal in signals.forever() {
                if stop.send(Event::Stop).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            may_crash,
            services: Vec::new(),
            sender,
            events,
        })
    }

    /// Starts a service and keeps it running.
    pub fn start(&mut self, service: Service) -> Result<()> {
        self.services.push(service);
        self.spawn(self.services.len() - 1)
    }

    /// Waits for a service that was started until `is_ready`; gives up when it keeps ending or
    /// `limit` has passed.
    pub fn wait_for(&mut self, name: &str, limit: Duration, is_ready: impl Fn() -> bool) -> Result<Outcome> {
        let begun = Instant::now();
        let index = self.services.iter().position(|service| service.name == name);
        let index = index.context("a service is started before it is waited for")?;
        loop {
            if is_ready() {
                self.services[index].ready_once = true;
                return Ok(Outcome::Ready);
            }
            if self.handle_event(POLL)? == Outcome::Stop {
                return Ok(Outcome::Stop);
            }
            let service = &self.services[index];
            if let Some(code) = service.refused {
                bail!(
                    "{name} ended with exit code {code} before it was ready{}",
                    said(service)
                );
            }
            if service.start_at.is_some() {
                bail!("{name} ends again and again{}", said(service));
            }
            if begun.elapsed() > limit {
                bail!("{name} was not ready within {} s{}", limit.as_secs(), said(service));
            }
        }
    }

    /// Keeps everything running until a signal comes.
    pub fn run_until_stopped(&mut self) -> Result<()> {
        while self.handle_event(WINDOW)? != Outcome::Stop {}
        Ok(())
    }

    /// Stops in the opposite order of starting. A second signal kills what is left.
    pub fn stop_all(&mut self) {
        while let Some(service) = self.services.pop() {
            let Some(handle) = service.running else { continue };
            handle.signal(rustix::process::Signal::TERM);
            let begun = Instant::now();
            while begun.elapsed() < GRACE && !handle.wait(POLL) {
                if matches!(self.events.try_recv(), Ok(Event::Stop)) {
                    break;
                }
            }
            handle.stop(Duration::ZERO);
            let _absent = fs::remove_file(&service.pid_file);
        }
    }

    /// Handles one event, or what is due after at most `limit`.
    fn handle_event(&mut self, limit: Duration) -> Result<Outcome> {
        let now = Instant::now();
        let due = self.services.iter().filter_map(|service| service.start_at).min();
        let wait = due.map_or(limit, |due| limit.min(due.saturating_duration_since(now)));
        match self.events.recv_timeout(wait) {
            Ok(Event::Stop) => return Ok(Outcome::Stop),
            Ok(Event::Ended { service, status }) => self.ended(service, status)?,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => bail!("the event channel is closed"),
        }
        let now = Instant::now();
        for index in 0..self.services.len() {
            if self.services[index].start_at.is_some_and(|due| due <= now) {
                self.spawn(index)?;
            }
        }
        Ok(Outcome::Ready)
    }

    fn ended(&mut self, index: usize, status: ExitStatus) -> Result<()> {
        let service = &mut self.services[index];
        service.running = None;
        if !service.ready_once && status.code().is_some() {
            service.refused = status.code();
            return Ok(());
        }
        let pause = service.pauses.after_end(Instant::now());
        let how = match (status.code(), status.signal()) {
            (Some(code), _) => format!("exit code {code}"),
            (None, Some(signal)) => format!("signal {signal}"),
            (None, None) => status.to_string(),
        };
        if pause.is_zero() || self.may_crash {
            eprintln!("==> {} ended ({how}); starting it again", service.name);
            return self.spawn(index);
        }
        eprintln!(
            "==> {} ended more than {CRASHES} times within {} s ({how}); next try in {} s{}",
            service.name,
            WINDOW.as_secs(),
            pause.as_secs(),
            said(service),
        );
        service.start_at = Some(Instant::now() + pause);
        Ok(())
    }

    fn spawn(&mut self, index: usize) -> Result<()> {
        let service = &mut self.services[index];
        service.start_at = None;
        let mut command = (service.command)()?;
        if let Some(path) = &service.log {
            let log = File::options().create(true).append(true).open(path)?;
            command.stdout(log.try_clone()?).stderr(log);
        }
        // Ctrl-C at the terminal is for us: we stop the programs, in order.
        command.process_group(0);
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start {}", service.name))?;
        let handle = Handle::of_child(&child)?;
        handle.write_file(&service.pid_file)?;
        service.running = Some(handle);
        let sender = self.sender.clone();
        std::thread::spawn(move || {
            let status = child.wait().unwrap_or_default();
            // Nobody listens any more when everything is being stopped.
            let _closed = sender.send(Event::Ended { service: index, status });
        });
        Ok(())
    }
}

/// Ends what an earlier `up` on this directory left running when it was killed.
pub fn stop_leftovers(data: &DataDir) {
    for name in ["choir-hypervisor", "podman", "choir-volumes"] {
        let file = data.pid_file(name);
        if let Some(handle) = Handle::from_file(&file) {
            println!("==> stopping {name}, which an earlier `up` left running");
            handle.stop(GRACE);
        }
        let _absent = fs::remove_file(file);
    }
}

fn said(service: &Service) -> String {
    match &service.log {
        Some(path) => format!("; the end of {}:\n{}", path.display(), tail(path)),
        None => "; its own messages are above".into(),
    }
}

/// The last lines of a log.
pub fn tail(path: &Path) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

/// How long to wait before starting a program again.
#[derive(Default)]
struct Pauses {
    ends: VecDeque<Instant>,
    last: Duration,
}

impl Pauses {
    /// Nothing at first; from the sixth end within ten seconds on, 1 s, then twice the last, until
    /// the program has run for ten seconds again.
    fn after_end(&mut self, now: Instant) -> Duration {
        let previous = self.ends.back().map(|end| now.duration_since(*end));
        if previous.is_some_and(|gap| gap >= self.last + WINDOW) {
            self.ends.clear();
            self.last = Duration::ZERO;
        }
        self.ends.push_back(now);
        if self.last.is_zero() {
            self.ends.retain(|end| now.duration_since(*end) < WINDOW);
        }
        if self.ends.len() > CRASHES {
            self.ends.pop_front();
            self.last = (self.last * 2).clamp(Duration::from_secs(1), LONGEST_PAUSE);
        }
        self.last
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::Pauses;

    #[test]
    fn the_first_five_ends_cost_no_pause() {
        let (mut pauses, now) = (Pauses::default(), Instant::now());
        assert!((0..5).all(|_| pauses.after_end(now).is_zero()));
        assert_eq!(pauses.after_end(now), Duration::from_secs(1));
    }

    #[test]
    fn a_restart_loop_slows_down_to_half_a_minute() {
        let (mut pauses, mut now) = (Pauses::default(), Instant::now());
        let mut seen = Vec::new();
        for _ in 0..12 {
            let pause = pauses.after_end(now);
            seen.push(pause.as_secs());
            now += pause + Duration::from_millis(20);
        }
        assert_eq!(seen, [0, 0, 0, 0, 0, 1, 2, 4, 8, 16, 30, 30]);
    }

    #[test]
    fn a_program_that_ran_well_again_starts_afresh() {
        let (mut pauses, now) = (Pauses::default(), Instant::now());
        for _ in 0..6 {
            pauses.after_end(now);
        }
        assert!(pauses.after_end(now + Duration::from_secs(60)).is_zero());
    }
}
