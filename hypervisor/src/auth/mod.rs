//! Who is calling, and everything that changes the answer: passkeys, sessions, recovery, tokens, invites. It must not
//! know workspaces or sandboxes; it only signs people in at their hosts.
//!
//! A request on the control host passes `guard::guard`, which puts a [`Caller`] into its extensions. Sandbox hosts have
//! a cookie of their own, see `hosts`. Sessions are in the database and remembered in `sessions`.

use std::sync::Arc;

use axum::http::HeaderMap;
use choir_core::{Hosts, UserId};
use choir_store::{AuditEvent, InviteKind, NewInvite, NewSession, Role, SessionKind, Store, User};
use jiff::{SignedDuration, Timestamp};
use tokio_util::sync::CancellationToken;
use url::Url;
use webauthn_rs::{Webauthn, WebauthnBuilder};

use crate::clock::Clock;
use crate::error::{ApiError, ApiResult};
use crate::random::{Random, draw};

mod account;
mod admin;
mod audit;
mod ceremonies;
mod cookies;
mod device;
pub mod extract;
mod guard;
mod hosts;
mod limits;
mod login;
mod next;
mod passkeys;
mod recovery;
mod register;
mod routes;
mod secret;
mod sessions;
mod tokens;
mod views;

pub use cookies::{APP as APP_COOKIE, SESSION as SESSION_COOKIE};
pub use extract::PeerAddr;
pub(crate) use guard::routes;
pub use guard::{Access, Route, protect};
pub use hosts::CALLBACK;
pub use next::safe_next;
pub use routes::ROUTES;
pub use secret::Secret;
pub use sessions::SessionRef;

/// How long a fresh passkey assertion opens the delicate things.
const STEP_UP: SignedDuration = SignedDuration::from_mins(5);
const CLAIM_LIFETIME: SignedDuration = SignedDuration::from_mins(30);
const RECOVER_LIFETIME: SignedDuration = SignedDuration::from_mins(30);

/// Who may register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RegistrationMode {
    Invite,
    /// Anybody, as a member. The first user needs the claim link all the same.
    Open,
}

/// What `Auth` is made of.
pub struct AuthDeps {
    pub store: Store,
    pub clock: Arc<dyn Clock>,
    pub random: Arc<dyn Random>,
    /// The control origin, exactly as browsers see it.
    pub origin: Url,
    /// The exact control host.
    pub rp_id: String,
    pub hosts: Hosts,
    /// The key under which recovery codes are hashed; `None` while the master key is missing.
    pub pepper: Option<[u8; 32]>,
    pub session_idle: SignedDuration,
    pub session_absolute: SignedDuration,
    pub registration: RegistrationMode,
}

/// The origin and the relying party do not fit together.
#[derive(Debug, thiserror::Error)]
#[error("the control origin {origin} cannot use passkeys of {rp_id:?}; set control.rp_id to the origin's host")]
pub struct OriginError {
    origin: String,
    rp_id: String,
    #[source]
    cause: webauthn_rs::prelude::WebauthnError,
}

/// The auth service; clones share it.
#[derive(Clone)]
pub struct Auth(Arc<Inner>);

struct Inner {
    store: Store,
    clock: Arc<dyn Clock>,
    random: Arc<dyn Random>,
    origin: String,
    hosts: Hosts,
    pepper: Option<[u8; 32]>,
    session_absolute: SignedDuration,
    registration: RegistrationMode,
    webauthn: Webauthn,
    sessions: sessions::Sessions,
    ceremonies: ceremonies::Ceremonies,
    tickets: hosts::Tickets,
    devices: device::Devices,
    starts: limits::Limiter,
    recoveries: limits::Limiter,
}

/// Who makes a request, and by what.
#[derive(Debug, Clone)]
pub struct Caller {
    pub user: Arc<User>,
    pub by: Credential,
}

/// What a caller showed.
#[derive(Debug, Clone)]
pub enum Credential {
    Session(Arc<SessionRef>),
    Token(Arc<TokenRef>),
}

/// The API token of a caller.
#[derive(Debug, Clone)]
pub struct TokenRef {
    pub id: String,
    pub scopes: Vec<String>,
    pub expires_at: Timestamp,
}

impl Caller {
    /// The session of a caller who came with a cookie; a token cannot do what needs one.
    pub fn session(&self) -> ApiResult<&Arc<SessionRef>> {
        match &self.by {
            Credential::Session(session) => Ok(session),
            Credential::Token(_) => Err(ApiError::forbidden(
                "session_needed",
                "A token cannot do this; sign in with a passkey.",
            )),
        }
    }

    pub fn is_admin(&self) -> bool {
        self.user.role == Role::Admin
    }

    /// Refuses a token that lacks a scope.
    pub fn needs_scope(&self, scope: &str) -> ApiResult<()> {
        if self.has_scope(scope) {
            return Ok(());
        }
        Err(ApiError::forbidden(
            "scope",
            format!("This token lacks the scope \"{scope}\"; make one that has it."),
        ))
    }

    fn has_scope(&self, scope: &str) -> bool {
        match &self.by {
            Credential::Session(session) => session.kind == SessionKind::Full,
            Credential::Token(token) => token.scopes.iter().any(|s| s == scope),
        }
    }

    /// What is done by this caller to something of their own.
    fn event(&self, action: &'static str, subject: impl Into<String>, at: Timestamp) -> AuditEvent {
        event(&self.user.id, action, subject, at)
    }
}

fn event(user: &UserId, action: &'static str, subject: impl Into<String>, at: Timestamp) -> AuditEvent {
    AuditEvent {
        at,
        actor: user.to_string(),
        user: Some(user.clone()),
        action,
        subject: subject.into(),
        outcome: "ok",
    }
}

impl Auth {
    pub fn new(deps: AuthDeps) -> Result<Self, OriginError> {
        let origin = deps.origin.origin().ascii_serialization();
        let webauthn = WebauthnBuilder::new(&deps.rp_id, &deps.origin)
            .and_then(|builder| {
                builder
                    .rp_name("ChoirOS")
                    .allow_subdomains(false)
                    .allow_any_port(false)
                    .build()
            })
            .map_err(|cause| OriginError {
                origin: origin.clone(),
                rp_id: deps.rp_id.clone(),
                cause,
            })?;
        Ok(Self(Arc::new(Inner {
            sessions: sessions::Sessions::new(deps.store.clone(), deps.session_idle),
            store: deps.store,
            clock: deps.clock,
            random: deps.random,
            origin,
            hosts: deps.hosts,
            pepper: deps.pepper,
            session_absolute: deps.session_absolute,
            registration: deps.registration,
            webauthn,
            ceremonies: Default::default(),
            tickets: Default::default(),
            devices: Default::default(),
            starts: limits::Limiter::new(60.0, 1.0),
            recoveries: limits::Limiter::new(20.0, 0.1),
        })))
    }

    /// Everything under `/auth`, `/me`, the auth pages and `/admin/{users,invites,audit}`; see [`ROUTES`].
    pub fn router(&self) -> axum::Router {
        routes::router().with_state(self.clone())
    }

    /// Ends what runs out, every second; deletes it from the database every minute. Runs until it is dropped.
    pub async fn run(self) {
        let mut seconds = tokio::time::interval(std::time::Duration::from_secs(1));
        seconds.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        for second in 0u64.. {
            seconds.tick().await;
            self.0.sessions.expire(self.now());
            if second % 60 == 0
                && let Err(error) = self.0.sessions.sweep(self.now()).await
            {
                tracing::warn!(%error, "old sessions could not be deleted");
            }
        }
    }

    /// The full session behind the control host's cookie.
    pub async fn session_of(&self, headers: &HeaderMap) -> ApiResult<Option<Arc<SessionRef>>> {
        let session = self.any_session_of(headers).await?;
        Ok(session.filter(|session| session.kind == SessionKind::Full))
    }

    async fn any_session_of(&self, headers: &HeaderMap) -> ApiResult<Option<Arc<SessionRef>>> {
        match cookies::read(headers, cookies::SESSION)? {
            Some(cookie) => Ok(self.0.sessions.by_hash(cookie.hash(), self.now()).await?),
            None => Ok(None),
        }
    }

    /// Fires within a second after the session ended, however it did.
    pub fn watch_session(&self, session: &SessionRef) -> CancellationToken {
        self.0.sessions.watch(session)
    }

    /// Fires within a second after what the caller showed stopped being good.
    pub fn watch(&self, caller: &Caller) -> CancellationToken {
        match &caller.by {
            Credential::Session(session) => self.watch_session(session),
            Credential::Token(token) => self
                .0
                .sessions
                .watch_token(&token.id, &caller.user.id, token.expires_at),
        }
    }

    /// A new claim link's token, in the place of any earlier one; `None` once there is a user.
    pub async fn ensure_claim(&self) -> choir_store::Result<Option<Secret>> {
        let now = self.now();
        let secret = Secret::draw(self.random());
        let invite = self.invite(&secret, InviteKind::Claim, Role::Admin, None, now + CLAIM_LIFETIME);
        let made = self
            .0
            .store
            .replace_claim(invite, root("claim.create", "first user", None, now))
            .await?;
        Ok(made.then_some(secret))
    }

    /// A one-time link's token with which `user` gets back in. `NotFound` when there is no such user.
    pub async fn recover_link(&self, user: &choir_core::Name) -> choir_store::Result<Secret> {
        let now = self.now();
        let user = self
            .0
            .store
            .user_by_name(user.clone())
            .await?
            .ok_or(choir_store::Error::NotFound)?;
        let secret = Secret::draw(self.random());
        let mut invite = self.invite(&secret, InviteKind::Recover, user.role, None, now + RECOVER_LIFETIME);
        invite.for_user = Some(user.id.clone());
        let event = root("recovery.link", user.id.as_str(), Some(user.id.clone()), now);
        self.0.store.add_invite(invite, event).await?;
        Ok(secret)
    }

    /// Where a claim or an invite is used.
    pub fn register_url(&self, invite: &Secret) -> String {
        format!("{}/register?invite={}", self.0.origin, invite.expose())
    }

    /// Where a recovery link is used.
    pub fn recover_url(&self, link: &Secret) -> String {
        format!("{}/recover?link={}", self.0.origin, link.expose())
    }

    fn invite(
        &self,
        secret: &Secret,
        kind: InviteKind,
        role: Role,
        created_by: Option<UserId>,
        expires_at: Timestamp,
    ) -> NewInvite {
        NewInvite {
            hash: secret.hash(),
            id: secret::public_id(self.random()),
            kind,
            role,
            for_user: None,
            created_by,
            created_at: self.now(),
            expires_at,
        }
    }

    /// A full session that begins now with a passkey that was just used.
    fn new_session(&self, user: &UserId, user_agent: String) -> (Secret, NewSession) {
        let (secret, now) = (Secret::draw(self.random()), self.now());
        let session = NewSession {
            hash: secret.hash(),
            id: secret::public_id(self.random()),
            user: user.clone(),
            kind: SessionKind::Full,
            user_agent,
            created_at: now,
            expires_at: now + self.0.session_absolute,
            verified_at: Some(now),
        };
        (secret, session)
    }

    /// Refuses a session whose last passkey assertion is older than five minutes.
    fn fresh<'c>(&self, caller: &'c Caller) -> ApiResult<&'c Arc<SessionRef>> {
        let session = caller.session()?;
        match session.verified_at {
            Some(at) if self.now().duration_since(at) <= STEP_UP => Ok(session),
            _ => Err(ApiError::forbidden(
                "step_up_required",
                "Confirm with your passkey first, then try again.",
            )),
        }
    }

    /// For what cannot be undone: a person at a browser proves presence anew. A token was made with such a proof, and
    /// its scopes say what it may do.
    pub fn confirm(&self, caller: &Caller) -> ApiResult<()> {
        match &caller.by {
            Credential::Session(_) => self.fresh(caller).map(drop),
            Credential::Token(_) => Ok(()),
        }
    }

    /// What recovery codes are hashed with. Without it none is made, since it could never be used, and none is checked.
    fn pepper(&self) -> ApiResult<&[u8; 32]> {
        self.0.pepper.as_ref().ok_or_else(|| {
            let message = "The server's master key is missing, so recovery codes can be neither made nor used; ask the \
                           operator to put the key file back. Passkeys and recovery links work.";
            ApiError::unavailable("sealed", message)
        })
    }

    fn limit_starts(&self, peer: PeerAddr) -> ApiResult<()> {
        self.0.starts.take(peer.0, self.now()).map_err(ApiError::too_many)
    }

    fn now(&self) -> Timestamp {
        self.0.clock.now()
    }

    fn random(&self) -> &dyn Random {
        &*self.0.random
    }

    fn new_user_id(&self) -> UserId {
        UserId::from_random(draw(self.random()))
    }

    fn scheme(&self) -> &'static str {
        if self.0.origin.starts_with("https:") {
            "https"
        } else {
            "http"
        }
    }
}

/// What root did at the host's console.
fn root(action: &'static str, subject: &str, user: Option<UserId>, at: Timestamp) -> AuditEvent {
    AuditEvent {
        at,
        actor: "root".into(),
        user,
        action,
        subject: subject.into(),
        outcome: "ok",
    }
}
