//! What comes out of sandboxes: the forward proxy to the outside, and the broker's door. A connection's sandbox is known
//! by the listener it came in on; which slot that is, and so what it may do, is looked up at each call. It must not know
//! who a user is beyond that.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use choir_broker::{AddressPolicy, Authorities, Authority, AuthorityError, Scanners, Vault};
use choir_core::egress::normal;
use choir_core::{Generation, GrantRequestId, HostName, HostPattern, Inject, Rule, SandboxId};
use choir_proxy::Io;
use choir_proxy::egress::{Outward, Plain, Refused, Way};
use choir_runtime::ListenerKind;
use choir_store::{AuditEvent, Grant, NewRequest, Standing, Store, Wanted};
use http::Request;
use hyper::body::Incoming;
use jiff::SignedDuration;
use rustls::ServerConfig;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use crate::broker::{self, Refusal};
use crate::clock::Clock;
use crate::providers::Providers;
use crate::random::{Random, draw};

mod https;
mod outside;
mod repeats;
mod taken;

pub(crate) use https::{Https, Lost, PORT, authority};

pub use outside::{Net, Outside};
use repeats::Repeats;

/// Connections from one sandbox at once, egress and broker together. A further one is closed.
const PER_SANDBOX: usize = 64;
/// How long the outside may take to answer a connect.
const CONNECT_WITHIN: Duration = Duration::from_secs(20);
/// How long what was refused waits for a person.
const REQUEST_LIFETIME: SignedDuration = SignedDuration::from_hours(7 * 24);
/// Sandboxes and generations whose connections and authorities are kept at hand; beyond, they are made anew.
const AT_HAND: usize = 256;
/// How often it is looked for repeated events whose window is over.
const TELL_EVERY: Duration = Duration::from_secs(5);

/// What the gateway needs of the rest.
pub struct Deps {
    pub store: Store,
    pub clock: Arc<dyn Clock>,
    pub random: Arc<dyn Random>,
    pub vault: Vault,
    /// `None` while sealed: nobody is answered in another's name then.
    pub authorities: Option<Arc<Authorities>>,
    pub providers: Arc<Providers>,
    pub addresses: AddressPolicy,
    pub outside: Outside,
}

/// Everything that leaves sandboxes passes here.
pub struct Gateway {
    pub(crate) deps: Deps,
    places: Mutex<HashMap<SandboxId, Arc<Semaphore>>>,
    https: Mutex<HashMap<SandboxId, Https>>,
    authorities: Mutex<HashMap<Generation, Arc<Authority>>>,
    pub(crate) scanners: Scanners,
    repeats: Repeats,
}

impl Gateway {
    pub fn new(deps: Deps) -> Arc<Self> {
        Arc::new(Self {
            deps,
            places: Mutex::default(),
            https: Mutex::default(),
            authorities: Mutex::default(),
            scanners: Scanners::default(),
            repeats: Repeats::default(),
        })
    }

    /// Records repeated events with their number when their window is over, and all of them at the end.
    pub async fn tell_repeats(self: Arc<Self>, stop: CancellationToken) {
        while !stop.is_cancelled() {
            tokio::select! {
                () = stop.cancelled() => {}
                () = tokio::time::sleep(TELL_EVERY) => {}
            }
            self.record_repeats(stop.is_cancelled()).await;
        }
    }

    async fn record_repeats(&self, all: bool) {
        for (event, times) in self.repeats.due(self.deps.clock.now(), all) {
            if let Err(error) = self.deps.store.record_repeats(event.clone(), times).await {
                tracing::error!(%error, "repeated events could not be recorded yet");
                self.repeats.owe(&event, times);
            }
        }
    }

    /// Serves what comes from inside until the runtime ends.
    pub async fn run(self: Arc<Self>, mut inside: mpsc::UnboundedReceiver<(Generation, ListenerKind, Box<dyn Io>)>) {
        while let Some((generation, kind, stream)) = inside.recv().await {
            let Some(place) = self.place(&generation.sandbox) else {
                tracing::debug!(%generation, "too many connections from one sandbox; one is closed");
                continue;
            };
            let outlet = Outlet {
                gateway: self.clone(),
                sandbox: generation.sandbox.clone(),
                generation,
            };
            tokio::spawn(async move {
                match kind {
                    ListenerKind::Egress => choir_proxy::egress::serve(stream, Arc::new(outlet)).await,
                    ListenerKind::Broker => broker::serve(stream, outlet).await,
                }
                drop(place);
            });
        }
    }

    fn place(&self, sandbox: &SandboxId) -> Option<OwnedSemaphorePermit> {
        let mut places = self.places.lock().expect("never poisoned: no panic while held");
        places.retain(|id, s| id == sandbox || s.available_permits() < PER_SANDBOX);
        let semaphore = places
            .entry(sandbox.clone())
            .or_insert_with(|| Arc::new(Semaphore::new(PER_SANDBOX)));
        semaphore.clone().try_acquire_owned().ok()
    }

    /// Resolves once, keeps what the policy lets pass, and dials just those addresses.
    pub(crate) async fn dial(&self, host: &str, port: u16) -> Result<Box<dyn Io>, Refused> {
        let Deps { outside, addresses, .. } = &self.deps;
        let found: Vec<IpAddr> = match host.parse() {
            Ok(address) => vec![address],
            Err(_) => tokio::time::timeout(CONNECT_WITHIN, outside.net.resolve(host))
                .await
                .ok()
                .and_then(Result::ok)
                .ok_or_else(|| Refused::Unresolved(host.to_owned()))?,
        };
        let allowed = addresses.pick(&found).map_err(|refusal| Refused::Denied {
            host: host.to_owned(),
            rule: refusal.to_string(),
            remedy: "the operator can allow the network with [egress] allow_networks".to_owned(),
        })?;
        for address in allowed {
            let to = SocketAddr::new(address, port);
            if let Ok(Ok(stream)) = tokio::time::timeout(CONNECT_WITHIN, outside.net.connect(to)).await {
                return Ok(stream);
            }
        }
        Err(Refused::Unreachable(host.to_owned()))
    }
}

/// What is at hand under this key, or made now.
fn at_hand<K: std::hash::Hash + Eq + Clone, V: Clone, E>(
    kept: &Mutex<HashMap<K, V>>,
    key: &K,
    make: impl FnOnce() -> Result<V, E>,
) -> Result<V, E> {
    let mut kept = kept.lock().expect("never poisoned: no panic while held");
    if let Some(found) = kept.get(key) {
        return Ok(found.clone());
    }
    let made = make()?;
    if kept.len() >= AT_HAND {
        kept.clear();
    }
    kept.insert(key.clone(), made.clone());
    Ok(made)
}

/// The grants whose secret goes to this host. A key for SSH goes nowhere.
fn meant_for<'g>(grants: &'g [Grant], host: &HostName) -> impl Iterator<Item = &'g Grant> {
    let goes = |rule: &Rule| !matches!(rule.inject, Inject::Ssh { .. }) && rule.hosts.contains(host);
    grants.iter().filter(move |grant| goes(&grant.rule))
}

/// One sandbox's way out.
#[derive(Clone)]
pub(crate) struct Outlet {
    pub(crate) gateway: Arc<Gateway>,
    pub(crate) sandbox: SandboxId,
    generation: Generation,
}

impl Outlet {
    /// This sandbox's kept connections.
    pub(crate) fn https(&self) -> Https {
        let made = || Ok::<_, Infallible>(Https::new(Arc::downgrade(&self.gateway)));
        let Ok(https) = at_hand(&self.gateway.https, &self.sandbox, made);
        https
    }

    /// How to answer this generation's programs in a host's name.
    fn leaf(&self, host: &HostName) -> Result<Arc<ServerConfig>, AuthorityError> {
        let Gateway { deps, authorities, .. } = &*self.gateway;
        let authority = at_hand(authorities, &self.generation, || {
            let all = deps.authorities.as_ref().ok_or(AuthorityError::Key)?;
            all.of(&self.generation.to_string()).map(Arc::new)
        })?;
        authority.leaf(host, deps.clock.now())
    }

    /// Where this sandbox stands, and what is granted there.
    pub(crate) async fn granted(&self) -> Result<Option<(Standing, Vec<Grant>)>, Refusal> {
        let deps = &self.gateway.deps;
        let granted = deps.store.granted(&self.sandbox, deps.clock.now()).await;
        granted.map_err(|error| {
            tracing::error!(%error, "grants cannot be read, so nothing is granted");
            Refusal::unavailable()
        })
    }

    /// An event about this sandbox, as it stands.
    pub(crate) fn event(
        &self,
        standing: &Standing,
        action: &'static str,
        what: &str,
        outcome: &'static str,
    ) -> AuditEvent {
        // What a sandbox writes is cut to a length that a trail can bear.
        let what: String = what.chars().take(300).collect();
        AuditEvent {
            at: self.gateway.deps.clock.now(),
            actor: self.sandbox.to_string(),
            user: Some(standing.user.clone()),
            action,
            subject: format!("{}/{} {what}", standing.workspace_name, standing.slot),
            outcome,
        }
    }

    /// Records a refusal, and puts it before the owner where that can lift it.
    pub(crate) async fn refused(&self, standing: &Standing, event: AuditEvent, wanted: Option<Wanted>) {
        let Deps { store, random, .. } = &self.gateway.deps;
        let request = wanted.map(|wanted| NewRequest {
            id: GrantRequestId::from_random(draw(&**random)),
            workspace: standing.workspace.clone(),
            slot: standing.slot,
            wanted,
            at: event.at,
            expires_at: event.at + REQUEST_LIFETIME,
        });
        let repeats = &self.gateway.repeats;
        let told = repeats.take(&event);
        let row = told.then(|| event.clone());
        if let Err(error) = store.record_refusal(row, request).await {
            tracing::error!(%error, sandbox.id = %self.sandbox, "a refusal could not be recorded");
            if told {
                repeats.owe(&event, 1);
            }
        }
    }

    /// Why the policy of the workspace lets nobody through to `host`, recorded; nothing is resolved for it.
    async fn policy(&self, standing: &Standing, host: &str, port: u16) -> Result<(), Refused> {
        let Some(rule) = standing.egress.refuses(host) else {
            return Ok(());
        };
        let outcome = rule.rsplit('.').next().unwrap_or(rule);
        let event = self.event(standing, "egress.connect", &format!("{host}:{port}"), outcome);
        let host = normal(host);
        let wanted = host.parse::<HostPattern>().is_ok().then(|| Wanted::Host(host.clone()));
        self.refused(standing, event, wanted).await;
        Err(Refused::Denied {
            remedy: format!(
                "a person can allow it at /me/grants/requests, or with `choir grants requests` (workspace {})",
                standing.workspace_name
            ),
            rule: rule.to_owned(),
            host,
        })
    }
}

impl Outlet {
    /// Where this sandbox stands now, for one that asks for `host`.
    async fn stand(&self, host: &str) -> Result<(Standing, Vec<Grant>), Refused> {
        match self.granted().await {
            Err(_) => Err(Refused::Unavailable),
            Ok(Some(found)) => Ok(found),
            Ok(None) => Err(Refused::Denied {
                host: host.to_owned(),
                rule: "egress.no_slot".to_owned(),
                remedy: "this sandbox is in no slot; it is being deleted".to_owned(),
            }),
        }
    }

    /// Dials under the workspace's policy, and records it.
    async fn through(&self, standing: &Standing, host: &str, port: u16) -> Result<Box<dyn Io>, Refused> {
        self.policy(standing, host, port).await?;
        let dialled = self.gateway.dial(host, port).await;
        let outcome = match &dialled {
            Ok(_) => "ok",
            Err(Refused::Denied { .. }) => "address",
            Err(Refused::Unresolved(_)) => "unresolved",
            Err(_) => "unreachable",
        };
        self.connected(standing, host, port, outcome);
        dialled
    }

    /// No secret goes with a connection, so it does not wait for its row.
    fn connected(&self, standing: &Standing, host: &str, port: u16, outcome: &'static str) {
        let event = self.event(standing, "egress.connect", &format!("{host}:{port}"), outcome);
        if !self.gateway.repeats.take(&event) {
            return;
        }
        let gateway = self.gateway.clone();
        tokio::spawn(async move {
            if let Err(error) = gateway.deps.store.audit(event.clone()).await {
                tracing::error!(%error, "a connection could not be recorded");
                gateway.repeats.owe(&event, 1);
            }
        });
    }
}

impl Outward for Outlet {
    async fn connect(&self, host: &str, port: u16) -> Result<Way, Refused> {
        let (standing, grants) = self.stand(host).await?;
        let named = normal(host).parse::<HostName>();
        if let Ok(named) = named
            && port == https::PORT
            && standing.intercept_tls
            && self.gateway.deps.authorities.is_some()
            && meant_for(&grants, &named).next().is_some()
        {
            self.connected(&standing, host, port, "intercepted");
            let outlet = self.clone();
            return Ok(Way::Taken(Box::new(move |stream| {
                Box::pin(taken::serve(outlet, named, stream))
            })));
        }
        Ok(Way::Through(self.through(&standing, host, port).await?))
    }

    /// In plain HTTP a program may ask for what a grant covers; it is then sent over TLS, with the secret.
    async fn request(&self, host: &str, port: u16, request: Request<Incoming>) -> Result<Plain, Refused> {
        let (standing, grants) = self.stand(host).await?;
        if let Ok(named) = normal(host).parse::<HostName>()
            && port == 80
            && let path = request.uri().path().to_owned()
            && let Ok(grant) = taken::covering(&grants, &named, request.method().as_str(), &path)
        {
            let answered = self.call(&standing, grant, &named, &path, Box::new(request)).await;
            let random = &*self.gateway.deps.random;
            return Ok(Plain::Answered(
                answered.unwrap_or_else(|refusal| refusal.response(random)),
            ));
        }
        Ok(Plain::Through(self.through(&standing, host, port).await?, request))
    }
}
