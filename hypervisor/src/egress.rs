//! What comes out of sandboxes: the forward proxy to the outside, and the broker's door. It must not know who a user
//! is beyond which generation's listener a connection came in on.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use choir_broker::AddressPolicy;
use choir_core::{Generation, SandboxId};
use choir_proxy::Io;
use choir_proxy::egress::{Outward, Refused};
use choir_runtime::{ListenerKind, Stream};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::broker;

/// Connections from one sandbox at once, egress and broker together. A further one is closed.
const PER_SANDBOX: usize = 64;
/// How long the outside may take to answer a connect.
const CONNECT_WITHIN: Duration = Duration::from_secs(20);

/// Dials out under the address policy.
pub struct Gateway {
    policy: AddressPolicy,
    places: Mutex<HashMap<SandboxId, Arc<Semaphore>>>,
}

impl Gateway {
    pub fn new(policy: AddressPolicy) -> Arc<Self> {
        Arc::new(Self {
            policy,
            places: Mutex::default(),
        })
    }

    /// Serves what comes from inside until the runtime ends.
    pub async fn run(self: Arc<Self>, mut inside: mpsc::Receiver<(Generation, ListenerKind, Stream)>) {
        while let Some((generation, kind, stream)) = inside.recv().await {
            let Some(place) = self.place(&generation.sandbox) else {
                tracing::debug!(%generation, "too many connections from one sandbox; one is closed");
                continue;
            };
            let gateway = self.clone();
            tokio::spawn(async move {
                match kind {
                    ListenerKind::Egress => choir_proxy::egress::serve(stream, gateway).await,
                    ListenerKind::Broker => broker::serve(stream).await,
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
    async fn dial(&self, host: &str, port: u16) -> Result<TcpStream, Refused> {
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let found: Vec<SocketAddr> = tokio::time::timeout(CONNECT_WITHIN, tokio::net::lookup_host((bare, port)))
            .await
            .map_err(|_| Refused::Unresolved(host.to_owned()))?
            .map_err(|_| Refused::Unresolved(host.to_owned()))?
            .collect();
        let addresses: Vec<_> = found.iter().map(SocketAddr::ip).collect();
        let allowed = self.policy.pick(&addresses).map_err(|refusal| Refused::Denied {
            host: host.to_owned(),
            rule: refusal.to_string(),
            remedy: "the operator can allow the network with [egress] allow_networks".to_owned(),
        })?;
        for address in allowed {
            if let Ok(Ok(stream)) = tokio::time::timeout(CONNECT_WITHIN, TcpStream::connect((address, port))).await {
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
        }
        Err(Refused::Unreachable(host.to_owned()))
    }
}

impl Outward for Gateway {
    async fn connect(&self, host: &str, port: u16) -> Result<Box<dyn Io>, Refused> {
        match self.dial(host, port).await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(refused) => {
                tracing::info!(%refused, "egress refused");
                Err(refused)
            }
        }
    }
}
