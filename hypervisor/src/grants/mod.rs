//! What a user does with grants and with what sandboxes ask for. It must not know HTTP, nor any secret's value.

use choir_api::grants as api;
use choir_broker::{VaultError, grant, ssh, template};
use choir_core::{GrantId, GrantRequestId, HostName, Inject, Rule, SecretName, SshUse};
use choir_store::{AuditEvent, NewGrant, User, Wanted};

use crate::app::App;
use crate::error::{ApiError, ApiResult};
use crate::random::draw;

pub mod routes;

impl App {
    pub async fn grants(&self, user: &User) -> ApiResult<Vec<api::Grant>> {
        let found = self.store.grants(user.id.clone()).await?;
        Ok(found.into_iter().map(view).collect())
    }

    pub async fn grant(&self, user: &User, id: GrantId) -> ApiResult<api::Grant> {
        Ok(view(self.store.grant(user.id.clone(), id).await?))
    }

    /// Lets a slot use a secret.
    pub async fn create_grant(&self, user: &User, asked: api::CreateGrant) -> ApiResult<api::Grant> {
        let mut rule = rule(&asked)?;
        grant::check(&rule).map_err(|e| ApiError::bad_request("bad_grant", format!("The grant is refused: {e}.")))?;
        let now = self.clock.now();
        if asked.expires_at.is_some_and(|at| at <= now) {
            let message = "`expires_at` has passed already; choose a later time or leave it out.";
            return Err(ApiError::bad_request("bad_expiry", message));
        }
        let view_of = self.store.workspace_named(&user.id, &asked.workspace).await?;
        if let Inject::Ssh { ssh: key } = &mut rule.inject {
            key.public_key = self.public_half(user, &asked.secret).await?;
        }
        let new = NewGrant {
            id: GrantId::from_random(draw(&*self.random)),
            workspace: view_of.workspace.id,
            slot: asked.slot,
            capability: asked.capability.clone(),
            secret: asked.secret.clone(),
            rule,
            at: now,
            expires_at: asked.expires_at,
        };
        let subject = format!("{}/{} {} {}", asked.workspace, asked.slot, asked.capability, new.id);
        let event = self.grant_event(user, "grant.create", subject);
        let made = self.store.add_grant(new, event).await.map_err(|error| match error {
            choir_store::Error::Exists => {
                let message = format!(
                    "The {} slot has a grant for {} already; delete it first.",
                    asked.slot, asked.capability
                );
                ApiError::conflict("granted_already", message)
            }
            choir_store::Error::NotFound => no_such_secret(&asked.secret),
            other => other.into(),
        })?;
        Ok(view(made))
    }

    /// The public half of a secret that is a key. To see whether it is one it is opened, which is recorded before.
    async fn public_half(&self, user: &User, secret: &SecretName) -> ApiResult<String> {
        let event = self.grant_event(user, "secret.inspect", secret.to_string());
        let intent = self.store.audit_intent(event).await?;
        let found = match self.vault.open(&user.id, secret).await {
            // Proving that it signs takes a while with RSA.
            Ok(opened) => tokio::task::spawn_blocking(move || ssh::public_key(&opened.value))
                .await
                .unwrap_or(Err(ssh::KeyError::Broken))
                .map_err(|error| ApiError::bad_request("not_a_key", format!("The grant is refused: {error}."))),
            Err(VaultError::NotFound) => Err(no_such_secret(secret)),
            Err(error) => Err(error.into()),
        };
        let outcome = if found.is_ok() { "ok" } else { "failed" };
        self.store.audit_outcome(intent, self.clock.now(), outcome).await?;
        found
    }

    pub async fn delete_grant(&self, user: &User, id: GrantId) -> ApiResult<()> {
        let event = self.grant_event(user, "grant.delete", id.to_string());
        Ok(self.store.delete_grant(user.id.clone(), id, event).await?)
    }

    pub async fn grant_requests(&self, user: &User) -> ApiResult<Vec<api::GrantRequest>> {
        let found = self.store.grant_requests(user.id.clone(), self.clock.now()).await?;
        Ok(found.into_iter().map(request).collect())
    }

    pub async fn grant_request(&self, user: &User, id: GrantRequestId) -> ApiResult<api::GrantRequest> {
        let found = self.store.grant_request(user.id.clone(), id, self.clock.now()).await?;
        Ok(request(found))
    }

    /// Approves or dismisses what a sandbox asked for.
    pub async fn decide_request(&self, user: &User, id: GrantRequestId, decision: api::Decision) -> ApiResult<()> {
        let found = self
            .store
            .grant_request(user.id.clone(), id.clone(), self.clock.now())
            .await?;
        let wanted = match &found.wanted {
            Wanted::Host(host) => host.clone(),
            Wanted::Capability(capability) => capability.to_string(),
            Wanted::Ssh(what) => what.clone(),
        };
        let subject = format!("{}/{} {wanted}", found.workspace_name, found.slot);
        match (decision, found.wanted) {
            (api::Decision::Dismiss, _) => {
                let event = self.grant_event(user, "grant.dismiss", subject);
                Ok(self.store.close_grant_request(user.id.clone(), id, event).await?)
            }
            (api::Decision::Approve, Wanted::Capability(capability)) => {
                let message = format!(
                    "Say which secret: `choir grants add {capability} --slot {} --secret NAME`; that closes the request.",
                    found.slot
                );
                Err(ApiError::conflict("needs_a_grant", message))
            }
            (api::Decision::Approve, Wanted::Ssh(what)) => {
                let message = format!(
                    "Say with which key it may {what}: `choir grants add NAME --slot {} --secret KEY --template ssh …` with \
                     the host's key from where the host publishes it; that closes the request.",
                    found.slot
                );
                Err(ApiError::conflict("needs_a_grant", message))
            }
            (api::Decision::Approve, Wanted::Host(_)) => {
                let event = self.grant_event(user, "egress.allow", subject);
                let after = self.store.approve_host(user.id.clone(), id, event).await?;
                self.publish(&after).await;
                Ok(())
            }
        }
    }

    fn grant_event(&self, user: &User, action: &'static str, subject: String) -> AuditEvent {
        AuditEvent {
            at: self.clock.now(),
            actor: user.id.to_string(),
            user: Some(user.id.clone()),
            action,
            subject,
            outcome: "ok",
        }
    }
}

/// The template's rule with what was said on top. Without a template it is the one called like the capability, if any.
fn rule(asked: &api::CreateGrant) -> ApiResult<Rule> {
    let name = asked.template.as_deref().unwrap_or(asked.capability.as_str());
    let (ready, way) = (template::template(name), template::way(name));
    if asked.template.is_some() && ready.is_none() && way.is_none() {
        let message = format!(
            "There is no such template; use {}, bearer, basic:USER, header:NAME, query:NAME or ssh.",
            template::NAMES.join(", ")
        );
        return Err(ApiError::bad_request("bad_template", message));
    }
    let inject = asked
        .inject
        .clone()
        .or(way)
        .or_else(|| ready.as_ref().map(|r| r.inject.clone()));
    let hosts = asked.hosts.clone().or_else(|| ready.as_ref().map(|r| r.hosts.clone()));
    if let Some(Inject::Ssh { ssh: key }) = inject {
        return Ok(for_ssh(asked, hosts.unwrap_or_default(), key));
    }
    let (Some(inject), Some(hosts)) = (inject, hosts) else {
        let message = "Name a template, or say `hosts` and `inject`.";
        return Err(ApiError::bad_request("bad_grant", message));
    };
    let (methods, prefix) = ready.map_or_else(
        || (template::default_methods(), "/".to_owned()),
        |ready| (ready.methods, ready.path_prefix),
    );
    Ok(Rule {
        hosts,
        methods: asked.methods.clone().unwrap_or(methods),
        path_prefix: asked.path_prefix.clone().unwrap_or(prefix),
        inject,
    })
}

fn no_such_secret(name: &SecretName) -> ApiError {
    let message = format!("You have no secret {name}; store it first with `choir secrets set`.");
    ApiError::bad_request("no_such_secret", message)
}

/// A key's rule. Hosts that publish their keys need none said.
fn for_ssh(asked: &api::CreateGrant, hosts: Vec<HostName>, mut key: SshUse) -> Rule {
    key.public_key = String::new();
    if key.host_keys.is_empty() {
        let published: Vec<_> = hosts.iter().map(ssh::published).collect();
        // All or none: a host that is granted without its key would be refused, and nobody could tell why.
        if published.iter().all(|keys| !keys.is_empty()) {
            key.host_keys = published.concat();
        }
    }
    Rule {
        hosts,
        methods: asked.methods.clone().unwrap_or_default(),
        path_prefix: asked.path_prefix.clone().unwrap_or_else(|| "/".to_owned()),
        inject: Inject::Ssh { ssh: key },
    }
}

pub(crate) fn view(grant: choir_store::Grant) -> api::Grant {
    api::Grant {
        id: grant.id,
        workspace: grant.workspace_name,
        slot: grant.slot,
        capability: grant.capability,
        secret: grant.secret,
        hosts: grant.rule.hosts,
        methods: grant.rule.methods,
        path_prefix: grant.rule.path_prefix,
        inject: grant.rule.inject,
        created_at: grant.created_at,
        expires_at: grant.expires_at,
    }
}

fn request(request: choir_store::GrantRequest) -> api::GrantRequest {
    let (host, capability, ssh) = match request.wanted {
        Wanted::Host(host) => (Some(host), None, None),
        Wanted::Capability(capability) => (None, Some(capability), None),
        Wanted::Ssh(what) => (None, None, Some(what)),
    };
    api::GrantRequest {
        id: request.id,
        workspace: request.workspace_name,
        slot: request.slot,
        host,
        capability,
        ssh,
        count: request.count,
        first_at: request.first_at,
        last_at: request.last_at,
        expires_at: request.expires_at,
    }
}
