//! What each host means right now: an in-memory copy of the slots, read without waiting, rebuilt from the store at
//! start and published after each commit. It must not decide who may pass.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use arc_swap::ArcSwap;
use choir_core::sandbox::Observed;
use choir_core::settings::{Access, DEFAULT_APP_PORT, PerSlot};
use choir_core::{Generation, Name, ReleaseConfig, SandboxHost, Slot, UserId, WorkspaceId};
use choir_proxy::Route;

use crate::reconcile::{Handle, launch};

/// One workspace's hosts.
pub struct Entry {
    pub workspace: WorkspaceId,
    pub owner: UserId,
    /// The workspace's epoch; an older one never replaces a newer.
    pub epoch: u64,
    pub access: PerSlot<Access>,
    pub ports: BTreeMap<u16, Access>,
    pub service_workers: bool,
    pub forward_authorization: bool,
    pub live: Target,
    pub dev: Target,
}

/// What a slot points at.
pub struct Target {
    pub handle: Handle,
    /// How to run it, but for what its home says on top.
    set: ReleaseConfig,
    /// Routes into the present generation by port, made at first use.
    routes: ArcSwap<HashMap<(u64, u16), Arc<Route>>>,
}

impl Target {
    pub fn new(handle: Handle, set: ReleaseConfig) -> Self {
        Self {
            handle,
            set,
            routes: ArcSwap::default(),
        }
    }

    /// Until when the programs of a generation that was just started may take to listen.
    fn listens_by(&self, generation: &Generation) -> Option<Instant> {
        match self.handle.status.borrow().observed {
            // Not after a thaw, which is no start.
            Observed::Ready {
                generation: number,
                attempt: 1..,
                ..
            } if number == generation.number => {
                let config = self.handle.says().over(&self.set);
                Some(Instant::now() + launch::starts_within(&config))
            }
            _ => None,
        }
    }

    /// The port that the app of the generation that is there listens on.
    fn app_port(&self) -> u16 {
        let own = self.handle.says();
        let own = own.config().and_then(|own| own.app_port);
        own.or(self.set.app_port).unwrap_or(DEFAULT_APP_PORT)
    }

    /// The route to a port of a generation; shared by all requests to it.
    pub fn route(&self, entry: &Entry, generation: &Generation, port: u16) -> Arc<Route> {
        let key = (generation.number, port);
        if let Some(route) = self.routes.load().get(&key) {
            return route.clone();
        }
        let route = Arc::new(Route {
            generation: generation.clone(),
            door: choir_core::Door::Port(port),
            service_workers: entry.service_workers,
            forward_authorization: entry.forward_authorization,
            listens_by: self.listens_by(generation),
            judged: port == self.app_port(),
            activity: self.handle.activity.clone(),
        });
        self.routes.rcu(|routes| {
            let mut routes: HashMap<_, _> = routes
                .iter()
                .filter(|((g, _), _)| *g == generation.number)
                .map(|(k, r)| (*k, r.clone()))
                .collect();
            routes.insert(key, route.clone());
            routes
        });
        route
    }
}

impl Entry {
    pub fn slot(&self, slot: Slot) -> &Target {
        match slot {
            Slot::Live => &self.live,
            Slot::Dev => &self.dev,
        }
    }

    /// Who may open a host.
    pub fn access(&self, host: &SandboxHost) -> Access {
        match host.port {
            None => *self.access.get(host.slot),
            Some(port) => self.ports.get(&port).copied().unwrap_or_default(),
        }
    }

    /// Which port a host leads to. To be asked once its sandbox is ready: its home may say.
    pub fn port(&self, host: &SandboxHost) -> u16 {
        host.port.unwrap_or_else(|| self.slot(host.slot).app_port())
    }
}

/// All entries by user and workspace name.
#[derive(Default)]
pub struct Table {
    entries: ArcSwap<HashMap<(Name, Name), Arc<Entry>>>,
    /// Writers take turns; readers never wait.
    writing: Mutex<()>,
}

impl Table {
    pub fn get(&self, user: &Name, workspace: &Name) -> Option<Arc<Entry>> {
        self.entries.load().get(&(user.clone(), workspace.clone())).cloned()
    }

    /// Puts an entry in place, unless a newer one of the same workspace is there.
    pub fn publish(&self, user: Name, workspace: Name, entry: Entry) {
        let _turn = self.writing.lock().expect("never poisoned: no panic while held");
        let present = self.entries.load_full();
        let key = (user, workspace);
        if present
            .get(&key)
            .is_some_and(|old| old.workspace == entry.workspace && old.epoch > entry.epoch)
        {
            return;
        }
        let mut entries = HashMap::clone(&present);
        entries.insert(key, Arc::new(entry));
        self.entries.store(Arc::new(entries));
    }

    /// Takes a workspace's hosts away.
    pub fn remove(&self, user: &Name, workspace: &Name, id: &WorkspaceId) {
        let _turn = self.writing.lock().expect("never poisoned: no panic while held");
        let mut entries = HashMap::clone(&self.entries.load());
        let key = (user.clone(), workspace.clone());
        if entries.get(&key).is_some_and(|e| e.workspace == *id) {
            entries.remove(&key);
            self.entries.store(Arc::new(entries));
        }
    }

    pub fn len(&self) -> usize {
        self.entries.load().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
