//! The provider gateway inside a sandbox: `ANY /v1/providers/{name}/{path}`. Decides with whose key a call is made, counts
//! it, and has the broker make it. It must not know what a key says.

use std::sync::Arc;

use choir_broker::{PlatformError, grant};
use choir_core::Capability;
use choir_core::settings::ProviderMode;
use choir_proxy::Body;
use choir_store::{AuditId, Counted, Grant, KeyOwner, Standing, UsePlace, Wanted};
use http::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, COOKIE};
use http::{HeaderMap, HeaderName, Request, Response};
use hyper::body::Incoming;

use super::meter::{Bill, Metered};
use super::reader::Reader;
use super::refusal::No;
use super::request::{self, Outgoing, Reads};
use super::{Provider, Providers, Way, day};
use crate::broker::call::{Call, Secret};
use crate::broker::refusal::Refusal;
use crate::broker::{Door, Receipt};
use crate::config::providers::TLS_PORT;

/// The action's name in the audit trail where the key is the box's; a user's own is a `secret.use` as everywhere.
const ACTION: &str = "provider.use";

/// Under these names SDKs send what stands in for a key, and servers may take one.
const CREDENTIALS: [HeaderName; 4] = [
    AUTHORIZATION,
    COOKIE,
    HeaderName::from_static("x-api-key"),
    HeaderName::from_static("api-key"),
];
/// With these a caller chooses a part of the account that a key is of.
const PARTS_OF_ACCOUNT: [HeaderName; 2] = [
    HeaderName::from_static("openai-organization"),
    HeaderName::from_static("openai-project"),
];

/// One call, before it is known whether it may be made.
struct Asked<'a> {
    door: &'a Door,
    providers: &'a Providers,
    standing: Standing,
    name: &'a Capability,
    provider: &'a Provider,
    method: &'a str,
    /// The API's path, as it was written.
    path: &'a str,
}

/// With whose key, and how.
enum Key {
    Own(Box<Grant>),
    Platform { file: String },
}

/// Answers `rest` of the path: the provider's name, and the path of its API.
pub(crate) async fn answer(door: &Door, rest: &str, request: Request<Incoming>) -> Response<Body> {
    let (name, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let path = if path.is_empty() { "/" } else { path };
    let answered = attempt(door, name, path, request).await;
    answered.unwrap_or_else(|no| no.response(&*door.outlet.gateway.deps.random))
}

async fn attempt(door: &Door, name: &str, path: &str, request: Request<Incoming>) -> Result<Response<Body>, No> {
    let providers: Arc<Providers> = door.outlet.gateway.deps.providers.clone();
    let Some((standing, granted)) = door.outlet.granted().await? else {
        return Err(Refusal::nowhere().into());
    };
    let Some((name, provider)) = providers.get(name) else {
        let no = No::no_such_provider(&providers.names());
        return Err(recorded(door, &standing, name, None, no).await);
    };
    let method = request.method().clone();
    let asked = Asked {
        door,
        providers: &providers,
        standing,
        name,
        provider,
        method: method.as_str(),
        path,
    };
    let (key, way) = asked.judge(granted).await?;
    asked.make(key, way, request).await
}

/// Records a refusal before it is told.
async fn recorded(door: &Door, standing: &Standing, what: &str, wanted: Option<Wanted>, no: No) -> No {
    let event = door.outlet.event(standing, ACTION, what, no.outcome());
    door.outlet.refused(standing, event, wanted).await;
    no
}

impl Asked<'_> {
    /// The path at the host.
    fn target(&self) -> String {
        format!("{}{}", self.provider.at.prefix, self.path)
    }

    /// With whose key the call may be made, and what the API has there. The user's own key comes first, wherever its
    /// grant covers the call; what it does not cover is asked of the box's.
    async fn judge(&self, granted: Vec<Grant>) -> Result<(Key, Option<&Way>), No> {
        let (at, way) = (&self.provider.at, self.provider.way(self.method, self.path));
        // A grant is for TLS on its one port, whatever an operator writes into the configuration.
        let grant = granted
            .into_iter()
            .find(|grant| grant.capability == *self.name && at.port == TLS_PORT);
        let covered = grant.as_ref().map(|grant| {
            let target = self.target();
            grant::admit(&grant.rule, self.method, Some(at.host.as_str()), &target).map(drop)
        });
        let (key, denied) = match (grant, covered) {
            (Some(grant), Some(Ok(()))) => return Ok((Key::Own(Box::new(grant)), way)),
            (Some(grant), Some(Err(denial))) => (at.key.as_ref(), Some(Refusal::not_covered(&denial, &grant))),
            _ => (at.key.as_ref(), None),
        };
        let no: No = match (key, way) {
            (Some(_), _) if self.standing.provider_mode != ProviderMode::ApiKey => {
                No::not_for_this_mode(self.standing.workspace_name.as_str(), self.name.as_str())
            }
            (Some(file), Some(way)) => match self.providers.check(file).await {
                Ok(()) => return Ok((Key::Platform { file: file.clone() }, Some(way))),
                Err(error) => self.no_key(&error),
            },
            (Some(_), None) => No::not_this_path(self.name.as_str(), &self.provider.ways()),
            (None, _) => match denied {
                Some(refusal) => refusal.into(),
                None => {
                    let wanted = Some(Wanted::Capability(self.name.clone()));
                    let no = Refusal::not_granted(&self.standing, Some(self.name)).into();
                    return Err(recorded(self.door, &self.standing, self.name.as_str(), wanted, no).await);
                }
            },
        };
        let what = format!("{} {} {}", self.name, self.method, self.path);
        Err(recorded(self.door, &self.standing, &what, None, no).await)
    }

    /// Counts the call, makes it, and has its answer counted as it passes.
    async fn make(&self, key: Key, way: Option<&Way>, request: Request<Incoming>) -> Result<Response<Body>, No> {
        let owner = match &key {
            Key::Own(_) => KeyOwner::Own,
            Key::Platform { .. } => KeyOwner::Platform,
        };
        let (mut head, body) = request.into_parts();
        let held = self.providers.held(&self.door.outlet.sandbox);
        let reads = way.map_or(Reads::Nothing, |way| way.reads);
        let strict = owner == KeyOwner::Platform;
        let prepared = request::prepare(&head.headers, body, reads, strict, &held).await;
        let outgoing = match prepared {
            Ok(outgoing) => outgoing,
            Err(no) => {
                let what = format!("{} {} {}", self.name, self.method, self.path);
                return Err(recorded(self.door, &self.standing, &what, None, no).await);
            }
        };
        let place = self.place(owner);
        let deps = &self.door.outlet.gateway.deps;
        let intent = self.count(&place).await?;
        let receipt = Receipt::new(deps.store.clone(), deps.clock.clone(), intent);
        let (inject, secret) = match &key {
            Key::Own(grant) => (grant.rule.inject.clone(), Secret::Granted(grant)),
            Key::Platform { file } => match self.providers.key(file).await {
                Ok(key) => (self.provider.at.kind.inject(), Secret::OfTheBox(key)),
                Err(error) => {
                    let no = self.no_key(&error);
                    receipt.end(no.outcome());
                    return Err(no);
                }
            },
        };
        clear(&mut head.headers, owner);
        let Outgoing { body, bytes, uninvited } = outgoing;
        let call = Call {
            standing: &self.standing,
            host: &self.provider.at.host,
            port: self.provider.at.port,
            path: &self.target(),
            inject: &inject,
        };
        let request = Box::new(Request::from_parts(head, body));
        let answer = self.door.outlet.carry(&call, secret, request, None, receipt).await?;
        let bill = Bill {
            store: deps.store.clone(),
            place,
            sent_bytes: bytes,
        };
        Ok(match way {
            Some(way) if way.spends && answer.status().is_success() => metered(answer, uninvited, bill),
            _ => answer,
        })
    }

    fn no_key(&self, error: &PlatformError) -> No {
        tracing::error!(%error, provider = %self.name, "a key of the box cannot be used");
        No::no_key(self.name.as_str())
    }

    fn place(&self, key: KeyOwner) -> UsePlace {
        let (today, _) = day(self.door.outlet.gateway.deps.clock.now());
        UsePlace {
            day: today,
            user: self.standing.user.clone(),
            workspace: self.standing.workspace_name.clone(),
            slot: self.standing.slot,
            sandbox: self.door.outlet.sandbox.clone(),
            provider: self.name.clone(),
            key,
        }
    }

    /// Counts the request and commits that a key is about to be used.
    async fn count(&self, place: &UsePlace) -> Result<AuditId, No> {
        let deps = &self.door.outlet.gateway.deps;
        let action = match place.key {
            KeyOwner::Own => crate::broker::call::ACTION,
            KeyOwner::Platform => ACTION,
        };
        let what = format!("{} {} {}", self.name, self.method, self.provider.at.host);
        let event = self.door.outlet.event(&self.standing, action, &what, "ok");
        let counted = deps.store.begin_use(place.clone(), self.provider.at.caps, event).await;
        match counted {
            Ok(Counted::Go(intent)) => Ok(intent),
            Ok(Counted::Capped(spent)) => {
                let (today, seconds_left) = day(deps.clock.now());
                Err(No::capped(self.name.as_str(), &spent, today, seconds_left))
            }
            Err(error) => {
                tracing::error!(%error, sandbox.id = %self.door.outlet.sandbox, "the audit trail cannot be written: no key is used");
                Err(Refusal::no_audit().into())
            }
        }
    }
}

/// Takes the sandbox's own credentials out, and with the box's key the choice of a part of its account.
fn clear(headers: &mut HeaderMap, owner: KeyOwner) {
    for name in CREDENTIALS {
        headers.remove(name);
    }
    if owner == KeyOwner::Platform {
        for name in PARTS_OF_ACCOUNT {
            headers.remove(name);
        }
    }
}

/// The same answer, read as it passes.
fn metered(answer: Response<Body>, uninvited: bool, bill: Bill) -> Response<Body> {
    let (mut head, body) = answer.into_parts();
    let kind = head.headers.get(CONTENT_TYPE).map_or(&[][..], |kind| kind.as_bytes());
    let reader = if kind.to_ascii_lowercase().starts_with(b"text/event-stream") {
        if uninvited {
            head.headers.remove(CONTENT_LENGTH);
        }
        Reader::events(uninvited)
    } else {
        Reader::text()
    };
    Response::from_parts(head, Body::wrap(Metered::new(body, reader, bill)))
}
