//! `prove`: searches everything that a sandbox or an operator can see for every secret that the broker knows, and signs what
//! was found. It must not know a secret's value, nor HTTP.
//!
//! One search runs at a time. It begins with an audit intent, feeds places to the thread of `tally`, and ends with a report;
//! whoever asked and went away ends it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use choir_api::error::ErrorDetail;
use choir_api::prove::{Owner, Progress, PublicKey, Report, Scope, Signature, Signed, Unsought, Verdict, canonical};
use choir_broker::prove::{Builder, Kind, Search, Sought};
use choir_broker::{SecretValue, Signer};
use choir_core::{Name, Slot, UserId};
use choir_store::{AuditEvent, AuditId, User, WorkspaceView};
use data_encoding::HEXLOWER;
use jiff::Timestamp;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};

use crate::app::App;
use crate::error::{ApiError, ApiResult};
use crate::keys;

mod around;
mod inside;
pub mod routes;
mod tally;

use tally::{Ended, Feed, Tally};

/// How often whoever waits is told how far it is.
const TELL_EVERY: Duration = Duration::from_millis(300);

/// What no search of this kind sees.
const BEYOND: [&str; 5] = [
    "the memory of processes",
    "values as they were before the last change, of which nothing is kept to look for",
    "copies that were encrypted, compressed, or broken into lines or parts",
    "what a program hides on purpose from the agent in its sandbox",
    "disks and memory outside of this box, and backups that were moved away",
];

/// Which searches may begin.
pub struct Searches {
    one: Arc<Semaphore>,
    /// When a user may ask again: a search is followed by a pause as long as it took, so that nobody keeps others out.
    again: Mutex<HashMap<UserId, Timestamp>>,
}

impl Default for Searches {
    fn default() -> Self {
        Self {
            one: Arc::new(Semaphore::new(1)),
            again: Mutex::default(),
        }
    }
}

/// What a search says.
#[derive(Debug)]
pub enum Told {
    Progress(Progress),
    Report(Box<Signed>),
    Failed(ErrorDetail),
}

/// A search that may run.
struct Run {
    app: Arc<App>,
    user: User,
    scope: Scope,
    began_at: Timestamp,
    search: Search,
    names: HashMap<UserId, Name>,
    views: Vec<WorkspaceView>,
    signer: Signer,
    box_id: String,
    intent: AuditId,
    told: mpsc::Sender<Told>,
    _one: OwnedSemaphorePermit,
}

impl App {
    /// The key that reports of this box are signed with.
    pub async fn prove_key(&self) -> ApiResult<PublicKey> {
        let signer = self.vault.signer().await?;
        Ok(PublicKey {
            box_id: self.vault.box_id().await?,
            algorithm: ALGORITHM.to_owned(),
            key: HEXLOWER.encode(&signer.public()),
        })
    }

    /// Begins a search; it ends when what it returns is dropped.
    pub async fn begin_prove(self: &Arc<Self>, user: &User, scope: Scope) -> ApiResult<mpsc::Receiver<Told>> {
        let one = self.may_search(user, scope)?;
        let (app, user) = (self.clone(), user.clone());
        // In a task of its own: whoever goes away while it begins must not leave an intent without an outcome.
        let begun = tokio::spawn(async move { app.start_prove(user, scope, one).await });
        begun.await.map_err(ApiError::internal)?
    }

    async fn start_prove(
        self: Arc<Self>,
        user: User,
        scope: Scope,
        one: OwnedSemaphorePermit,
    ) -> ApiResult<mpsc::Receiver<Told>> {
        let signer = self.vault.signer().await?;
        let box_id = self.vault.box_id().await?;
        let began_at = self.clock.now();
        let event = AuditEvent {
            at: began_at,
            actor: user.id.to_string(),
            user: Some(user.id.clone()),
            action: "prove.start",
            subject: match scope {
                Scope::Own => "own".to_owned(),
                Scope::Box => "box".to_owned(),
            },
            outcome: "ok",
        };
        // No audit, no search: it opens every secret there is.
        let intent = self.store.audit_intent(event).await.map_err(|error| {
            tracing::error!(%error, "a search cannot be recorded");
            ApiError::unavailable(
                "audit_failing",
                "The audit trail cannot be written, so nothing is searched; ask the operator to look at the log.",
            )
        })?;
        let (search, names, views) = match self.gather(&user, scope).await {
            Ok(gathered) => gathered,
            Err(error) => {
                self.end_prove(intent, "failed").await;
                return Err(error);
            }
        };
        let (told, telling) = mpsc::channel(4);
        let run = Run {
            app: self,
            user,
            scope,
            began_at,
            search,
            names,
            views,
            signer,
            box_id,
            intent,
            told,
            _one: one,
        };
        tokio::spawn(run.run());
        Ok(telling)
    }

    fn may_search(&self, user: &User, scope: Scope) -> ApiResult<OwnedSemaphorePermit> {
        let again = self.searches.again.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.clock.now();
        let wait = again.get(&user.id).map_or(0, |at| at.duration_since(now).as_secs());
        drop(again);
        // Less than a second is not worth a refusal, and whose box it is may keep it busy.
        if let (Scope::Own, Ok(wait @ 1..)) = (scope, u64::try_from(wait)) {
            return Err(ApiError::too_many(wait));
        }
        self.searches.one.clone().try_acquire_owned().map_err(|_| {
            let message = "A search is under way on this box; try again when it has ended.";
            ApiError::conflict("prove_running", message).retry_after(30)
        })
    }

    /// What is looked for, whose it is, and in which workspaces.
    async fn gather(
        &self,
        user: &User,
        scope: Scope,
    ) -> ApiResult<(Search, HashMap<UserId, Name>, Vec<WorkspaceView>)> {
        let mut builder = Builder::default();
        let (users, views) = match scope {
            Scope::Own => (vec![user.clone()], self.store.workspaces_of(&user.id).await?),
            Scope::Box => (self.store.users().await?, self.store.all_workspaces().await?),
        };
        for one in &users {
            self.vault.seek_secrets(&one.id, &mut builder).await?;
        }
        if scope == Scope::Box {
            self.vault.seek_keys(&keys::LABELS, &mut builder).await?;
            for generation in self.fleet.handles().iter().filter_map(|handle| handle.present()) {
                if let Some(authorities) = &self.fleet.services.authorities {
                    authorities.seek(&generation.to_string(), &mut builder);
                }
            }
            for (provider, key) in self.providers.keys().await {
                builder.add(Sought::of_the_box(Kind::Platform, format!("key for {provider}")), &key);
            }
            if let Some(token) = &self.metrics_token {
                let sought = Sought::of_the_box(Kind::Platform, "metrics token");
                builder.add(sought, &SecretValue::new(token.as_bytes().to_vec()));
            }
        }
        // Thousands of forms take a moment.
        let search = tokio::task::spawn_blocking(move || builder.build()).await;
        let search = search.map_err(ApiError::internal)?.map_err(ApiError::internal)?;
        let names = users.into_iter().map(|user| (user.id, user.name)).collect();
        Ok((search, names, views))
    }

    async fn end_prove(&self, intent: AuditId, outcome: &'static str) {
        if let Err(error) = self.store.audit_outcome(intent, self.clock.now(), outcome).await {
            tracing::error!(%error, outcome, "the end of a search is not in the audit trail");
        }
    }
}

impl Run {
    async fn run(self) {
        let outcome = tokio::select! {
            outcome = self.search() => outcome,
            () = self.told.closed() => "cancelled",
        };
        self.app.end_prove(self.intent, outcome).await;
        let now = self.app.clock.now();
        let took = now.duration_since(self.began_at);
        let mut again = self.app.searches.again.lock().unwrap_or_else(PoisonError::into_inner);
        again.retain(|_, at| *at > now);
        if self.scope == Scope::Own {
            again.insert(self.user.id.clone(), now + took);
        }
    }

    /// Searches and tells; returns the outcome in a word.
    async fn search(&self) -> &'static str {
        let none = Progress {
            place: String::new(),
            bytes: 0,
            places_done: 0,
            places: 0,
            hits: 0,
        };
        let (progress, mut changes) = watch::channel(none);
        let tallied = async {
            let (mut feed, tally) = tally::begin(self.search.clone(), self.names.clone(), progress).ok()?;
            self.give(&mut feed).await.ok()?;
            drop(feed);
            tally.await.ok()
        };
        let telling = async {
            while changes.changed().await.is_ok() {
                let now = changes.borrow_and_update().clone();
                // Whoever is slow misses some of it.
                let _ = self.told.try_send(Told::Progress(now));
                tokio::time::sleep(TELL_EVERY).await;
            }
            std::future::pending::<()>().await;
        };
        let tally = tokio::select! {
            tally = tallied => tally,
            () = telling => None,
        };
        let Some(tally) = tally else {
            let detail = ErrorDetail {
                code: "prove_failed".to_owned(),
                message: "The search ended before its end; try again, or ask the operator to look at the log."
                    .to_owned(),
                request_id: String::new(),
                more: Default::default(),
            };
            tracing::error!("a search ended before its end");
            let _ = self.told.send(Told::Failed(detail)).await;
            return "failed";
        };
        let report = self.report(tally);
        let verdict = report.verdict;
        if verdict == Verdict::Hits {
            tracing::warn!(hits = report.hits_total, "secrets were found where they should not be");
        }
        let _ = self
            .told
            .send(Told::Report(Box::new(sign(&report, &self.signer))))
            .await;
        verdict.as_str()
    }

    /// Gives every place there is.
    async fn give(&self, feed: &mut Feed) -> Result<(), Ended> {
        let app = &*self.app;
        let mut disks = Vec::new();
        if self.scope == Scope::Box {
            let known: Vec<&str> = self
                .views
                .iter()
                .flat_map(|view| Slot::ALL.map(|slot| view.slot(slot).id.as_str()))
                .collect();
            match app.fleet.services.volumes.list().await {
                Ok(all) => disks.extend(all.into_iter().filter(|id| !known.contains(&id.as_str()))),
                Err(error) => {
                    let place = feed.open(&Owner::Box, "releases and snapshots").await?;
                    feed.incomplete(place, error.to_string()).await?;
                }
            }
        }
        let of = self.views.len() * Slot::ALL.len() + disks.len() + 1;
        let mut done = 0;
        feed.done(done, of).await?;
        for view in &self.views {
            for slot in Slot::ALL {
                self.sandbox(view, slot, feed).await?;
                done += 1;
                feed.done(done, of).await?;
            }
        }
        for id in disks {
            let owner = Owner::Volume { id: id.clone() };
            around::disk(app, &id, "nothing runs on it", &owner, feed).await?;
            done += 1;
            feed.done(done, of).await?;
        }
        match self.scope {
            Scope::Own => around::audit(app, Some(&self.user.id), feed, &Owner::Box).await?,
            Scope::Box => around::of_the_box(app, feed).await?,
        }
        feed.done(of, of).await
    }

    async fn sandbox(&self, view: &WorkspaceView, slot: Slot, feed: &mut Feed) -> Result<(), Ended> {
        let id = &view.slot(slot).id;
        let owner = Owner::Sandbox {
            id: id.clone(),
            user: view.workspace.user_name.clone(),
            workspace: view.workspace.name.clone(),
            slot,
        };
        let runtime = &*self.app.fleet.services.runtime;
        let handle = self.app.fleet.handle(id);
        if let Some(generation) = handle.as_ref().and_then(|handle| handle.present()) {
            inside::outside(runtime, &generation, &owner, feed).await?;
        }
        match handle.as_ref().and_then(|handle| Some((handle, handle.ready()?))) {
            Some((handle, generation)) => inside::inside(runtime, &generation, handle, &owner, feed).await,
            None => {
                let why = "it is not running; start it, and search again";
                around::disk(&self.app, id.as_str(), why, &owner, feed).await
            }
        }
    }

    fn report(&self, tally: Tally) -> Report {
        let sought = self.search.sought().iter();
        let unsought = self.search.unsought().iter();
        let complete = tally.places.iter().all(|place| place.searched) && self.search.unsought().is_empty();
        // Those that are not listed could be of any kind.
        let revealed =
            tally.hits.iter().all(|hit| hit.allowed.is_some()) && tally.hits.len() as u64 == tally.hits_total;
        let verdict = match (tally.hits_total, complete) {
            (0, true) => Verdict::Clean,
            (0, false) => Verdict::Incomplete,
            _ if revealed => Verdict::Revealed,
            _ => Verdict::Hits,
        };
        Report {
            format: 1,
            box_id: self.box_id.clone(),
            origin: self.app.config.control.origin.origin().ascii_serialization(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            scope: self.scope,
            asked_by: self.user.name.clone(),
            began_at: self.began_at,
            ended_at: self.app.clock.now(),
            verdict,
            complete,
            summary: summary(verdict, complete, &tally),
            bytes: tally.bytes,
            sought: sought.map(|sought| tally::shown(sought, &self.names)).collect(),
            unsought: unsought
                .map(|(sought, why)| Unsought {
                    secret: tally::shown(sought, &self.names),
                    why: why.as_str().to_owned(),
                })
                .collect(),
            places: tally.places,
            hits_total: tally.hits_total,
            hits: tally.hits,
            logins_total: tally.logins_total,
            logins: tally.logins,
            beyond: BEYOND.map(str::to_owned).to_vec(),
        }
    }
}

const ALGORITHM: &str = "ed25519";

fn summary(verdict: Verdict, complete: bool, tally: &Tally) -> String {
    let found = match verdict {
        Verdict::Clean => "no secret was found anywhere, and everything was searched",
        Verdict::Incomplete => "no secret was found, but not everything was searched",
        Verdict::Revealed => "only secrets that their owner lets sandboxes read were found, in sandboxes of that owner",
        Verdict::Hits => "secrets were found where they should not be",
    };
    let rest = if complete || verdict == Verdict::Incomplete {
        String::new()
    } else {
        ", and not everything was searched".to_owned()
    };
    let unsearched = tally.places.iter().filter(|place| !place.searched).count();
    format!(
        "{found}{rest}: {} hits in {} bytes, {unsearched} of {} places not searched to their end",
        tally.hits_total,
        tally.bytes,
        tally.places.len()
    )
}

fn sign(report: &Report, signer: &Signer) -> Signed {
    let report = serde_json::to_value(report).expect("a report is plain JSON");
    let value = signer.sign(canonical(&report).as_bytes());
    Signed {
        report,
        signature: Signature {
            algorithm: ALGORITHM.to_owned(),
            key: HEXLOWER.encode(&signer.public()),
            value: HEXLOWER.encode(&value),
        },
    }
}
