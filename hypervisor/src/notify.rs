//! What the service manager is told, by the protocol of sd_notify(3): that the hypervisor serves, that it stops, and
//! while it is alive that it is. It must not decide what happens when nothing is told.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use choir_proxy::Pulse;
use choir_store::{Error, Store};
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};
use tokio_util::sync::CancellationToken;

/// Who started this process, where that wants to be told.
pub struct Manager {
    socket: Option<UnixDatagram>,
    /// After how long without a sign of life it starts another process in the place of this one.
    patience: Option<Duration>,
}

impl Manager {
    /// As systemd names itself to what it starts.
    pub fn of_environment() -> Self {
        let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        let ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let patience = number("WATCHDOG_USEC").filter(|usec| ours && *usec > 0);
        let socket = std::env::var_os("NOTIFY_SOCKET").map(PathBuf::from);
        Self::at(socket.as_deref(), patience.map(Duration::from_micros))
    }

    fn at(socket: Option<&Path>, patience: Option<Duration>) -> Self {
        let connect = |path: &Path| {
            let socket = UnixDatagram::unbound()?;
            socket.connect(path)?;
            // Serving never waits for who wants to know of it.
            socket.set_nonblocking(true)?;
            Ok::<_, std::io::Error>(socket)
        };
        let socket = socket.and_then(|path| match connect(path) {
            Ok(socket) => Some(socket),
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "the service manager cannot be reached");
                None
            }
        });
        Self { socket, patience }
    }

    pub fn ready(&self) {
        self.tell("READY=1");
    }

    pub fn stopping(&self) {
        self.tell("STOPPING=1");
    }

    /// Until `stop` fires, twice in the time that the manager waits: looks whether the hypervisor is alive, and says so.
    pub async fn vouch(self: Arc<Self>, store: Store, pulse: Arc<Pulse>, stop: CancellationToken) {
        let Some(patience) = self.patience else { return };
        let half = patience / 2;
        let mut ticks = interval_at(Instant::now() + half, half);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            match alive(&store, &pulse, half).await {
                Ok(()) => self.tell("WATCHDOG=1"),
                Err(dead) => tracing::error!("{dead}; the service manager is not told that all is well"),
            }
        }
    }

    fn tell(&self, what: &str) {
        let sent = self.socket.as_ref().map(|socket| socket.send(what.as_bytes()));
        if let Some(Err(error)) = sent {
            tracing::warn!(%error, what, "the service manager could not be told");
        }
    }
}

/// Whether the database's writer and every loop that accepts connections answer in time; else which does not. A writer that
/// answers with an error is alive: a full disk is not mended by starting anew.
async fn alive(store: &Store, pulse: &Pulse, within: Duration) -> Result<(), &'static str> {
    let (writes, accepts) = tokio::join!(timeout(within, store.check()), timeout(within, pulse.is_felt()));
    if matches!(writes, Err(_) | Ok(Err(Error::Closed))) {
        return Err("the database's writer does not answer");
    }
    match accepts {
        Ok(true) => Ok(()),
        _ => Err("connections are not being accepted"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Longer than anything here takes, so that what is alive is never too late.
    const LONG: Duration = Duration::from_secs(20);

    struct Place {
        directory: tempfile::TempDir,
        /// Where a manager listens.
        told: UnixDatagram,
    }

    impl Place {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let told = UnixDatagram::bind(directory.path().join("notify")).unwrap();
            told.set_read_timeout(Some(LONG)).unwrap();
            Self { directory, told }
        }

        fn manager(&self, patience: Option<Duration>) -> Arc<Manager> {
            Arc::new(Manager::at(Some(&self.directory.path().join("notify")), patience))
        }

        fn store(&self) -> Store {
            Store::open(&self.directory.path().join("choir.db")).unwrap()
        }

        fn next(&self) -> String {
            let mut text = [0; 64];
            let length = self.told.recv(&mut text).unwrap();
            String::from_utf8_lossy(&text[..length]).into_owned()
        }
    }

    /// A pulse of one loop, which lives until its task is aborted.
    fn accepting() -> (Arc<Pulse>, tokio::task::JoinHandle<()>) {
        let pulse = Arc::new(Pulse::default());
        let mut heart = pulse.join();
        let beating = tokio::spawn(async move {
            loop {
                heart.beat().await;
            }
        });
        (pulse, beating)
    }

    #[test]
    fn the_manager_is_told_that_the_hypervisor_serves_and_stops() {
        let place = Place::new();
        let manager = place.manager(None);
        manager.ready();
        assert_eq!(place.next(), "READY=1");
        manager.stopping();
        assert_eq!(place.next(), "STOPPING=1");
    }

    #[test]
    fn without_a_manager_and_with_one_that_is_gone_nothing_fails() {
        Manager::at(None, None).ready();
        let place = Place::new();
        let manager = place.manager(None);
        drop(place);
        manager.ready();
        Manager::at(Some(Path::new("/nowhere/notify")), None).stopping();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_manager_is_told_again_and_again_while_all_is_well() {
        let place = Place::new();
        let (pulse, _beating) = accepting();
        let stop = CancellationToken::new();
        let manager = place.manager(Some(Duration::from_millis(20)));
        let vouching = tokio::spawn(manager.vouch(place.store(), pulse, stop.clone()));
        let place = tokio::task::spawn_blocking(move || {
            assert_eq!([place.next(), place.next()], ["WATCHDOG=1", "WATCHDOG=1"]);
            place
        });
        let _place = place.await.unwrap();
        stop.cancel();
        vouching.await.unwrap();
    }

    #[tokio::test]
    async fn a_loop_that_has_ended_is_not_vouched_for() {
        let place = Place::new();
        let store = place.store();
        let (pulse, beating) = accepting();
        assert_eq!(alive(&store, &pulse, LONG).await, Ok(()));
        beating.abort();
        _ = beating.await;
        let dead = alive(&store, &pulse, LONG).await.unwrap_err();
        assert!(dead.contains("accepted"), "{dead}");
    }

    #[tokio::test]
    async fn a_writer_that_hangs_is_not_vouched_for_and_one_that_goes_on_is() {
        let place = Place::new();
        let store = place.store();
        let (pulse, _beating) = accepting();
        let other = rusqlite::Connection::open(place.directory.path().join("choir.db")).unwrap();
        other.execute_batch("BEGIN IMMEDIATE").unwrap();
        let dead = alive(&store, &pulse, Duration::from_millis(50)).await.unwrap_err();
        assert!(dead.contains("writer"), "{dead}");
        other.execute_batch("ROLLBACK").unwrap();
        assert_eq!(alive(&store, &pulse, LONG).await, Ok(()));
    }
}
