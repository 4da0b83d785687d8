//! Everything a request handler may use, in one place. It must not hold state that the database should hold.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use choir_api::events::{WORKSPACE, WorkspaceChanged};
use choir_broker::Vault;
use choir_core::{Door, Generation, Hosts, Own, ReleaseConfig, SandboxHost, Slot};
use choir_proxy::route::BoxFuture;
use choir_proxy::{Answers, Dial, Forwarder, Io};
use choir_runtime::Runtime;
use choir_store::{AuditEvent, Store, WorkspaceView};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

use crate::auth::Auth;
use crate::clock::Clock;
use crate::config::Config;
use crate::downloads::Downloads;
use crate::egress::Outside;
use crate::error::{ApiError, ApiResult};
use crate::events::Events;
use crate::prove::Searches;
use crate::providers::Providers;
use crate::random::Random;
use crate::reconcile::{DataPlane, Fleet, Handle};
use crate::releases::Releases;
use crate::snapshots::archive::Carrying;
use crate::table::{Entry, Table, Target};

/// How long a request is held while its sandbox wakes.
pub const HOLD: Duration = Duration::from_secs(30);

/// The websocket close code that asks clients to come again (IANA registry of RFC 6455 codes).
pub const SERVICE_RESTART: u16 = 1012;

/// The composed control plane.
pub struct App {
    pub config: Arc<Config>,
    pub hosts: Hosts,
    pub store: Store,
    pub clock: Arc<dyn Clock>,
    pub random: Arc<dyn Random>,
    pub auth: Auth,
    pub fleet: Arc<Fleet>,
    pub releases: Arc<Releases>,
    pub table: Table,
    pub forwarder: Arc<Forwarder>,
    pub answers: Arc<Answers>,
    /// Rings whenever a deployment ends.
    pub deployment_ended: watch::Sender<()>,
    /// Whether what ran before this process was taken over.
    pub adopted: watch::Sender<bool>,
    /// Fires when the hypervisor is told to stop; streams of the control host end with it.
    pub stopping: CancellationToken,
    pub vault: Vault,
    pub providers: Arc<Providers>,
    pub outside: Outside,
    pub searches: Searches,
    /// Who may compare volumes now.
    pub diffs: Arc<Semaphore>,
    /// Whose snapshots go out of the box, or come to it.
    pub carrying: Arc<Carrying>,
    pub metrics_token: Option<String>,
    pub downloads: Downloads,
}

impl App {
    /// Returns once what ran before this process is taken over; false when that takes longer than a request is held.
    pub async fn taken_over(&self) -> bool {
        if *self.adopted.borrow() {
            return true;
        }
        let mut adopted = self.adopted.subscribe();
        tokio::time::timeout(HOLD, adopted.wait_for(|done| *done)).await.is_ok()
    }

    /// What changes, as it changes.
    pub fn events(&self) -> &Arc<Events> {
        &self.fleet.services.events
    }

    /// Publishes what a workspace's hosts mean, as read from the database.
    pub async fn publish(&self, view: &WorkspaceView) {
        let workspace = &view.workspace;
        let changed = WorkspaceChanged {
            id: workspace.id.clone(),
            name: workspace.name.clone(),
            deleting: workspace.deleting,
        };
        self.events().tell(&workspace.user, WORKSPACE, &changed);
        if workspace.deleting {
            self.table.remove(&workspace.user_name, &workspace.name, &workspace.id);
            return;
        }
        let (Some(live), Some(dev)) = (self.fleet.handle(&view.live.id), self.fleet.handle(&view.dev.id)) else {
            return;
        };
        let settings = &workspace.settings;
        let entry = Entry {
            workspace: workspace.id.clone(),
            owner: workspace.user.clone(),
            epoch: workspace.epoch,
            access: settings.access.unwrap_or_default(),
            ports: settings.ports.clone().unwrap_or_default(),
            service_workers: settings.service_workers.unwrap_or(false),
            forward_authorization: settings.forward_authorization.unwrap_or(false),
            live: self.target(view, Slot::Live, live).await,
            dev: self.target(view, Slot::Dev, dev).await,
        };
        self.table
            .publish(workspace.user_name.clone(), workspace.name.clone(), entry);
        self.fleet.policy_changed(view).await;
    }

    /// What a slot's hosts lead to.
    async fn target(&self, view: &WorkspaceView, slot: Slot, handle: Handle) -> Target {
        let release = self.releases.config(&view.slot(slot).release).await.unwrap_or_default();
        let set = ReleaseConfig {
            app_port: view.workspace.settings.app_port.or(release.app_port),
            ..release
        };
        Target::new(handle, set)
    }

    /// What the home of a slot's sandbox says of how to run it.
    pub(crate) fn says(&self, view: &WorkspaceView, slot: Slot) -> Arc<Own> {
        let handle = self.fleet.handle(&view.slot(slot).id);
        handle.map(|handle| handle.says()).unwrap_or_default()
    }

    /// Where a slot's app is served.
    pub fn address(&self, view: &WorkspaceView, slot: Slot) -> String {
        let host = SandboxHost {
            port: None,
            slot,
            workspace: view.workspace.name.clone(),
            user: view.workspace.user_name.clone(),
        };
        format!(
            "{}://{}/",
            self.config.control.origin.scheme(),
            self.hosts.sandbox(&host)
        )
    }

    /// An audit event about a workspace, by its owner.
    pub fn event(&self, view: &WorkspaceView, action: &'static str) -> AuditEvent {
        AuditEvent {
            at: self.clock.now(),
            actor: view.workspace.user.to_string(),
            user: Some(view.workspace.user.clone()),
            action,
            subject: view.workspace.id.to_string(),
            outcome: "ok",
        }
    }
}

/// Does it to its end, also where its caller goes away, who would otherwise leave it half done.
pub async fn apart<T: Send + 'static>(work: impl Future<Output = ApiResult<T>> + Send + 'static) -> ApiResult<T> {
    tokio::spawn(work).await.map_err(ApiError::internal)?
}

/// Reaches sandboxes through the runtime.
pub struct Doors(pub Arc<dyn Runtime>);

impl Dial for Doors {
    fn open<'a>(&'a self, generation: &'a Generation, door: Door) -> BoxFuture<'a, io::Result<Box<dyn Io>>> {
        Box::pin(async move {
            match self.0.open(generation, door).await {
                Ok(stream) => Ok(Box::new(stream) as Box<dyn Io>),
                Err(choir_runtime::Error::NotListening) => Err(io::ErrorKind::ConnectionRefused.into()),
                Err(choir_runtime::Error::Io(error)) => Err(error),
                Err(other) => Err(io::Error::other(other)),
            }
        })
    }
}

/// The forwarder, as the fleet sees it.
pub struct Plane(pub Arc<Forwarder>);

impl DataPlane for Plane {
    fn in_flight(&self, generation: &Generation) -> bool {
        self.0.in_flight(generation) > 0
    }

    fn drain<'a>(&'a self, generation: &'a Generation) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            self.0.close_tunnels(generation, SERVICE_RESTART);
            self.0.quiet(generation).await;
            // Of what was asked for before, some may have become a websocket since.
            self.0.close_tunnels(generation, SERVICE_RESTART);
        })
    }

    fn retire(&self, generation: &Generation) {
        self.0.retire(generation);
    }
}
