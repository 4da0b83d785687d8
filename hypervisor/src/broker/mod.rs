//! The broker's door inside a sandbox: lists what is granted, gives out what may be revealed, and makes calls with the
//! secret put in. Deny by default; who calls is the listener the call came in on. It must not keep a secret.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use choir_api::grants::GrantedCapability;
use choir_broker::VaultError;
use choir_core::{Capability, Inject};
use choir_proxy::egress::answer_all;
use choir_proxy::{Body, Io};
use choir_store::{AuditEvent, Grant, Standing, Wanted};
use http::{Method, Request, Response};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use serde_json::json;

use crate::egress::Outlet;
use crate::providers;

pub(crate) mod call;
pub(crate) mod refusal;
mod scanned;
mod ssh;

pub(crate) use refusal::Refusal;
pub(crate) use scanned::Receipt;

const EGRESS: &str = "/v1/egress/";
const PROVIDERS: &str = "/v1/providers/";

/// How long a program may take over a request's head, and between two requests.
const HEADERS_WITHIN: Duration = Duration::from_secs(10);

/// Serves one connection from inside.
pub(crate) async fn serve<S: Io>(stream: S, outlet: Outlet) {
    let door = Arc::new(Door {
        outlet,
        upgraded: Mutex::default(),
    });
    let asked = door.clone();
    let answer = |request| {
        let door = asked.clone();
        async move { door.answer(request).await }
    };
    answer_all(stream, HEADERS_WITHIN, answer).await;
    // Here, so that the connection keeps its place among the sandbox's.
    let upgraded = door
        .upgraded
        .lock()
        .expect("never poisoned: no panic while held")
        .take();
    if let Some(upgraded) = upgraded {
        Box::pin(ssh::serve(upgraded, &door)).await;
    }
}

/// One sandbox's door, for one connection.
pub(crate) struct Door {
    pub(crate) outlet: Outlet,
    /// The connection as its SSH agent's, once it was asked for.
    upgraded: Mutex<Option<OnUpgrade>>,
}

impl Door {
    async fn answer(&self, mut request: Request<Incoming>) -> Response<Body> {
        let path = request.uri().path().to_owned();
        let resolved = path
            .strip_prefix("/v1/capabilities/")
            .and_then(|rest| rest.strip_suffix("/resolve"));
        let answer = if let Some(rest) = path.strip_prefix(EGRESS) {
            let (name, below) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            self.call(name, below, Box::new(request)).await
        } else if let Some(rest) = path.strip_prefix(PROVIDERS) {
            Ok(Box::pin(providers::door::answer(self, rest, request)).await)
        } else if let (Some(name), &Method::POST) = (resolved, request.method()) {
            self.reveal(name).await
        } else if (path.as_str(), request.method()) == ("/v1/capabilities", &Method::GET) {
            self.list().await
        } else if (path.as_str(), request.method()) == (ssh::AGENT, &Method::GET) {
            self.to_agent(&mut request)
        } else if (path.as_str(), request.method()) == (ssh::KNOWN_HOSTS, &Method::GET) {
            self.known_hosts().await
        } else {
            Err(Refusal::nothing_here())
        };
        answer.unwrap_or_else(|refusal| refusal.response(&*self.outlet.gateway.deps.random))
    }

    async fn list(&self) -> Result<Response<Body>, Refusal> {
        let granted = self
            .outlet
            .granted()
            .await?
            .map(|(_, granted)| granted)
            .unwrap_or_default();
        let items: Vec<GrantedCapability> = granted
            .into_iter()
            .map(|grant| GrantedCapability {
                path: match grant.rule.inject {
                    Inject::Ssh { .. } => ssh::AGENT.to_owned(),
                    _ => format!("{EGRESS}{}", grant.capability),
                },
                capability: grant.capability,
                hosts: grant.rule.hosts,
                methods: grant.rule.methods,
                path_prefix: grant.rule.path_prefix,
                expires_at: grant.expires_at,
            })
            .collect();
        Ok(refusal::json(&json!({ "items": items })))
    }

    /// The value itself, where its owner allows that.
    async fn reveal(&self, name: &str) -> Result<Response<Body>, Refusal> {
        const ACTION: &str = "secret.reveal";
        let deps = &self.outlet.gateway.deps;
        let (standing, grant) = self.find(ACTION, name).await?;
        let described = deps.vault.describe(&standing.user, &grant.secret).await;
        if !described.is_ok_and(|secret| secret.reveal) {
            let refusal = Refusal::not_revealed(&grant);
            return Err(self.refuse(&standing, ACTION, name, None, refusal).await);
        }
        let receipt = self.outlet.receipt(&standing, ACTION, name).await?;
        let opened = deps.vault.open(&standing.user, &grant.secret).await;
        let revealed = match opened {
            // What was allowed a moment ago may be another secret by now.
            Ok(opened) if opened.reveal => Ok(opened),
            Ok(_) => Err(Refusal::not_revealed(&grant)),
            Err(error) => Err(Refusal::from_vault(&error, &standing, &grant)),
        };
        receipt.end(revealed.as_ref().map_or_else(|refusal| refusal.outcome, |_| "ok"));
        let opened = revealed?;
        self.outlet.used(&standing, &grant);
        let text = String::from_utf8_lossy(opened.value.expose()).into_owned();
        Ok(refusal::json(&json!({ "value": text })))
    }

    /// The grant for a capability in the slot that this sandbox is in now. Whether there is none, was one, or is one in
    /// the other slot is all the same to who asks.
    async fn find(&self, action: &'static str, name: &str) -> Result<(Standing, Grant), Refusal> {
        let Some((standing, granted)) = self.outlet.granted().await? else {
            return Err(Refusal::nowhere());
        };
        match granted.into_iter().find(|grant| grant.capability.as_str() == name) {
            Some(grant) => Ok((standing, grant)),
            None => {
                let wanted = name.parse::<Capability>().ok();
                let refusal = Refusal::not_granted(&standing, wanted.as_ref());
                let wanted = wanted.map(Wanted::Capability);
                Err(self.refuse(&standing, action, name, wanted, refusal).await)
            }
        }
    }

    /// Records a refusal before it is told.
    async fn refuse(
        &self,
        standing: &Standing,
        action: &'static str,
        what: &str,
        wanted: Option<Wanted>,
        refusal: Refusal,
    ) -> Refusal {
        let event = self.outlet.event(standing, action, what, refusal.outcome);
        self.outlet.refused(standing, event, wanted).await;
        refusal
    }
}

impl Outlet {
    /// Commits that a secret is about to be used. Where that fails, it is not. A caller that goes away meanwhile leaves
    /// nothing open: the intent ends with the receipt, whoever holds it.
    async fn receipt(&self, standing: &Standing, action: &'static str, what: &str) -> Result<Receipt, Refusal> {
        let event: AuditEvent = self.event(standing, action, what, "ok");
        let (gateway, sandbox) = (self.gateway.clone(), self.sandbox.clone());
        let committed = tokio::spawn(async move {
            let deps = &gateway.deps;
            let intent = deps.store.audit_intent(event).await.map_err(|error| {
                tracing::error!(%error, sandbox.id = %sandbox, "the audit trail cannot be written: no secret is released");
                Refusal::no_audit()
            })?;
            Ok(Receipt::new(deps.store.clone(), deps.clock.clone(), intent))
        });
        committed.await.unwrap_or_else(|_| Err(Refusal::no_audit()))
    }

    fn used(&self, standing: &Standing, grant: &Grant) {
        let deps = &self.gateway.deps;
        let (vault, at) = (deps.vault.clone(), deps.clock.now());
        let (user, secret) = (standing.user.clone(), grant.secret.clone());
        tokio::spawn(async move {
            if let Err(error) = vault.used(&user, &secret, at).await
                && !matches!(error, VaultError::NotFound)
            {
                tracing::warn!(%error, "the last use of a secret could not be noted");
            }
        });
    }
}
