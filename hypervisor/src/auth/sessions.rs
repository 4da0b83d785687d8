//! Live sessions in memory, so that a request with a valid cookie does no database work, and so that what hangs on a
//! session ends with it. The database stays the truth: this only remembers it. It must not know cookies or HTTP.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use choir_core::UserId;
use choir_store::{Hash, Session, SessionKind, Store, User};
use jiff::{SignedDuration, Timestamp};
use tokio_util::sync::CancellationToken;

/// How often the last use of a session is written down.
const WRITE_EVERY: SignedDuration = SignedDuration::from_secs(60);

/// One browser's session: who it is, and since when.
#[derive(Debug, Clone)]
pub struct SessionRef {
    pub id: String,
    pub kind: SessionKind,
    pub user: Arc<User>,
    /// When the user last proved presence with a passkey.
    pub verified_at: Option<Timestamp>,
    pub created_at: Timestamp,
    /// Its absolute end.
    pub expires_at: Timestamp,
    pub(super) hash: Hash,
}

struct Live {
    session: Arc<SessionRef>,
    activity: Activity,
}

/// What outlives the replacement of a session's cookie.
struct Activity {
    /// Milliseconds since 1970.
    seen: AtomicI64,
    written: AtomicI64,
    ended: CancellationToken,
}

#[derive(Default)]
struct Table {
    live: HashMap<String, Live>,
    by_hash: HashMap<Hash, String>,
    /// Cookies of sandbox hosts: the host and the session's id.
    hosts: HashMap<Hash, (String, String)>,
    /// Watched API tokens by id.
    tokens: HashMap<String, WatchedToken>,
    /// Raised by every removal: what was read from the database before it is not remembered after it.
    revision: u64,
}

struct WatchedToken {
    user: UserId,
    expires_at: Timestamp,
    ended: CancellationToken,
}

pub(super) struct Sessions {
    store: Store,
    idle: SignedDuration,
    table: Mutex<Table>,
}

impl Sessions {
    pub fn new(store: Store, idle: SignedDuration) -> Self {
        Self {
            store,
            idle,
            table: Mutex::default(),
        }
    }

    /// The valid session with this cookie hash; being asked for counts as use.
    pub async fn by_hash(&self, hash: Hash, now: Timestamp) -> choir_store::Result<Option<Arc<SessionRef>>> {
        loop {
            let revision = {
                let table = self.lock();
                if let Some(id) = table.by_hash.get(&hash) {
                    return Ok(self.touched(&table, id, now));
                }
                table.revision
            };
            let Some(found) = self.store.session(hash).await? else {
                return Ok(None);
            };
            if let Some(id) = self.remember(found, revision) {
                return Ok(self.touched(&self.lock(), &id, now));
            }
        }
    }

    /// The valid session behind the cookie of one sandbox host; being asked for counts as use.
    pub async fn by_host(
        &self,
        hash: Hash,
        host: &str,
        now: Timestamp,
    ) -> choir_store::Result<Option<Arc<SessionRef>>> {
        loop {
            let revision = {
                let table = self.lock();
                if let Some((bound, id)) = table.hosts.get(&hash) {
                    return Ok(if bound == host {
                        self.touched(&table, id, now)
                    } else {
                        None
                    });
                }
                table.revision
            };
            let Some(found) = self.store.host_session(hash, host.to_owned()).await? else {
                return Ok(None);
            };
            if let Some(id) = self.remember(found, revision) {
                let mut table = self.lock();
                table.hosts.insert(hash, (host.to_owned(), id.clone()));
                return Ok(self.touched(&table, &id, now));
            }
        }
    }

    /// Whether a session with this id is alive, without counting as use.
    pub fn is_live(&self, id: &str, now: Timestamp) -> bool {
        self.lock().live.get(id).is_some_and(|live| self.valid(live, now))
    }

    /// Puts a session under the hash of its new cookie.
    pub fn rotate(&self, old: &Hash, new: Hash, verified_at: Timestamp) {
        let mut table = self.lock();
        table.revision += 1;
        let Some(id) = table.by_hash.remove(old) else { return };
        if let Some(live) = table.live.get_mut(&id) {
            let session = SessionRef {
                hash: new,
                verified_at: Some(verified_at),
                ..(*live.session).clone()
            };
            live.session = Arc::new(session);
            table.by_hash.insert(new, id);
        }
    }

    /// Forgets the sessions for which `which` holds and ends what hangs on them.
    pub fn end(&self, which: impl Fn(&SessionRef) -> bool) {
        let mut table = self.lock();
        table.revision += 1;
        let Table {
            live, by_hash, hosts, ..
        } = &mut *table;
        live.retain(|id, entry| {
            let ends = which(&entry.session);
            if ends {
                entry.activity.ended.cancel();
                by_hash.remove(&entry.session.hash);
                hosts.retain(|_, (_, session)| session != id);
            }
            !ends
        });
    }

    /// Ends what hangs on a user's API tokens; on all of them when no id is given.
    pub fn end_tokens(&self, user: &UserId, id: Option<&str>) {
        self.lock().tokens.retain(|token, watched| {
            let ends = watched.user == *user && id.is_none_or(|id| id == token);
            if ends {
                watched.ended.cancel();
            }
            !ends
        });
    }

    /// Fires when the session ends: logged out, revoked, idle or past its end.
    pub fn watch(&self, session: &SessionRef) -> CancellationToken {
        match self.lock().live.get(&session.id) {
            Some(live) => live.activity.ended.clone(),
            None => ended(),
        }
    }

    /// Fires when the API token is deleted or past its end.
    pub fn watch_token(&self, id: &str, user: &UserId, expires_at: Timestamp) -> CancellationToken {
        let watched = WatchedToken {
            user: user.clone(),
            expires_at,
            ended: CancellationToken::new(),
        };
        self.lock().tokens.entry(id.to_owned()).or_insert(watched).ended.clone()
    }

    /// Ends what has run out by now.
    pub fn expire(&self, now: Timestamp) {
        let over: Vec<String> = {
            let mut table = self.lock();
            table.tokens.retain(|_, watched| {
                if watched.expires_at <= now {
                    watched.ended.cancel();
                }
                watched.expires_at > now
            });
            table
                .live
                .iter()
                .filter(|(_, live)| !self.valid(live, now))
                .map(|(id, _)| id.clone())
                .collect()
        };
        if !over.is_empty() {
            self.end(|session| over.contains(&session.id));
        }
    }

    /// Deletes from the database what nothing can use any more.
    pub async fn sweep(&self, now: Timestamp) -> choir_store::Result<()> {
        // Uses are written down with a delay, so a row may look this much older than it is.
        self.store
            .sweep_auth(now, now - self.idle - WRITE_EVERY - WRITE_EVERY)
            .await
    }

    fn touched(&self, table: &Table, id: &str, now: Timestamp) -> Option<Arc<SessionRef>> {
        let live = table.live.get(id).filter(|live| self.valid(live, now))?;
        let (seen, written) = (&live.activity.seen, &live.activity.written);
        let at = now.as_millisecond();
        seen.fetch_max(at, Ordering::Relaxed);
        let last = written.load(Ordering::Relaxed);
        if at - last >= WRITE_EVERY.as_millis() as i64
            && written
                .compare_exchange(last, at, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        {
            let (store, id) = (self.store.clone(), id.to_owned());
            tokio::spawn(async move {
                if let Err(error) = store.touch_session(id, now).await {
                    tracing::warn!(%error, "the last use of a session could not be written");
                }
            });
        }
        Some(live.session.clone())
    }

    fn valid(&self, live: &Live, now: Timestamp) -> bool {
        let idle = now.as_millisecond() - live.activity.seen.load(Ordering::Relaxed);
        now < live.session.expires_at && i128::from(idle) < self.idle.as_millis()
    }

    /// Keeps what was read at `revision`; `None` when something was revoked since, so it must be read again.
    fn remember(&self, (session, user): (Session, User), revision: u64) -> Option<String> {
        let mut table = self.lock();
        if table.revision != revision {
            return None;
        }
        let id = session.id.clone();
        table.by_hash.insert(session.hash, id.clone());
        table.live.entry(id.clone()).or_insert_with(|| {
            let seen = session.last_seen_at.as_millisecond();
            let activity = Activity {
                seen: seen.into(),
                written: seen.into(),
                ended: CancellationToken::new(),
            };
            Live {
                session: Arc::new(with_user(session, user)),
                activity,
            }
        });
        Some(id)
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("no holder of this lock panics")
    }
}

fn with_user(session: Session, user: User) -> SessionRef {
    SessionRef {
        id: session.id,
        kind: session.kind,
        user: Arc::new(user),
        verified_at: session.verified_at,
        created_at: session.created_at,
        expires_at: session.expires_at,
        hash: session.hash,
    }
}

fn ended() -> CancellationToken {
    let token = CancellationToken::new();
    token.cancel();
    token
}
