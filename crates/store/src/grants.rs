//! Grants, and what sandboxes asked for and were refused. It must not know what a rule lets pass, nor any secret.

use choir_core::settings::ProviderMode;
use choir_core::{
    Capability, EgressPolicy, GrantId, GrantRequestId, HostPattern, Inject, Name, Rule, SandboxId, SecretName, Slot,
    UserId, WorkspaceId, WorkspaceSettings,
};
use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, params};

use crate::audit::{self, AuditEvent};
use crate::row::{json, maybe_time, millis, parsed, time, to_json};
use crate::workspaces::{self, WorkspaceView};
use crate::{Error, Result, Store};

/// A permission to use a secret.
#[derive(Debug, Clone, PartialEq)]
pub struct Grant {
    pub id: GrantId,
    pub workspace: WorkspaceId,
    pub workspace_name: Name,
    pub slot: Slot,
    pub capability: Capability,
    pub secret: SecretName,
    pub rule: Rule,
    pub created_at: Timestamp,
    /// From then on it permits nothing.
    pub expires_at: Option<Timestamp>,
}

/// A grant to be written down.
#[derive(Debug, Clone)]
pub struct NewGrant {
    pub id: GrantId,
    pub workspace: WorkspaceId,
    pub slot: Slot,
    pub capability: Capability,
    pub secret: SecretName,
    pub rule: Rule,
    pub at: Timestamp,
    pub expires_at: Option<Timestamp>,
}

/// Where a sandbox stands at one moment: what its owner lets out of it depends on the slot it is in.
#[derive(Debug, Clone, PartialEq)]
pub struct Standing {
    pub user: UserId,
    pub workspace: WorkspaceId,
    pub workspace_name: Name,
    pub slot: Slot,
    pub egress: EgressPolicy,
    /// Whether programs are answered in a granted host's name.
    pub intercept_tls: bool,
    pub provider_mode: ProviderMode,
}

/// What a sandbox may ask its owner for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    Host(String),
    Capability(Capability),
    /// To use a key for SSH, in words: `sign in as root`.
    Ssh(String),
}

/// Something a sandbox was refused.
#[derive(Debug, Clone, PartialEq)]
pub struct GrantRequest {
    pub id: GrantRequestId,
    pub workspace: WorkspaceId,
    pub workspace_name: Name,
    pub slot: Slot,
    pub wanted: Wanted,
    /// How often it was asked for.
    pub count: u64,
    pub first_at: Timestamp,
    pub last_at: Timestamp,
    pub expires_at: Timestamp,
}

/// A refusal that its owner may want to lift.
#[derive(Debug, Clone)]
pub struct NewRequest {
    pub id: GrantRequestId,
    pub workspace: WorkspaceId,
    pub slot: Slot,
    pub wanted: Wanted,
    pub at: Timestamp,
    pub expires_at: Timestamp,
}

/// Grants of one workspace.
const MOST_GRANTS: u32 = 200;
/// Open requests of one workspace: a sandbox that asks for more is refused all the same, and audited.
const MOST_REQUESTS: u32 = 100;

const GRANTS: &str = "SELECT g.*, w.name AS workspace_name FROM grants g JOIN workspaces w ON w.id = g.workspace_id";
const REQUESTS: &str =
    "SELECT r.*, w.name AS workspace_name FROM grant_requests r JOIN workspaces w ON w.id = r.workspace_id";

impl Store {
    /// Makes a grant, and closes the request for it; one of a key for SSH closes all for keys: what is still missing is
    /// asked for again. One that has expired makes room; `Exists` when the slot has this capability already, `NotFound`
    /// when the secret is gone.
    pub async fn add_grant(&self, new: NewGrant, event: AuditEvent) -> Result<Grant> {
        self.write(move |c| {
            let (workspace, slot, capability) = (new.workspace.as_str(), new.slot.as_str(), new.capability.as_str());
            c.execute(
                "DELETE FROM grants WHERE workspace_id = ?1 AND slot = ?2 AND capability = ?3 AND expires_at <= ?4",
                params![workspace, slot, capability, millis(new.at)],
            )?;
            let count = "SELECT count(*) FROM grants WHERE workspace_id = ?1";
            if c.query_row(count, [workspace], |row| row.get::<_, u32>(0))? >= MOST_GRANTS {
                return Err(Error::Conflict(
                    "this workspace has 200 grants, which is the most; delete one first",
                ));
            }
            // In the same step as the grant, so that none is left over from a secret that is deleted meanwhile.
            let made = c.execute(
                "INSERT INTO grants (id, workspace_id, slot, capability, secret, rule, created_at, expires_at)
                 SELECT ?1, w.id, ?3, ?4, s.name, ?6, ?7, ?8
                 FROM workspaces w JOIN secrets s ON s.user_id = w.user_id WHERE w.id = ?2 AND s.name = ?5",
                params![
                    new.id.as_str(),
                    workspace,
                    slot,
                    capability,
                    new.secret.as_str(),
                    to_json(&new.rule)?,
                    millis(new.at),
                    new.expires_at.map(millis)
                ],
            )?;
            if made == 0 {
                return Err(Error::NotFound);
            }
            c.execute(
                "DELETE FROM grant_requests
                 WHERE workspace_id = ?1 AND slot = ?2 AND kind = 'capability' AND subject = ?3",
                params![workspace, slot, capability],
            )?;
            if matches!(new.rule.inject, Inject::Ssh { .. }) {
                c.execute(
                    "DELETE FROM grant_requests WHERE workspace_id = ?1 AND slot = ?2 AND kind = 'ssh'",
                    params![workspace, slot],
                )?;
            }
            audit::append(c, &event)?;
            let sql = format!("{GRANTS} WHERE g.id = ?1");
            c.prepare_cached(&sql)?
                .query_row([new.id.as_str()], |row| Ok(grant(row)))?
        })
        .await
    }

    /// A user's grants by workspace, slot and capability, those that have expired included.
    pub async fn grants(&self, of: UserId) -> Result<Vec<Grant>> {
        self.read(move |c| {
            let order = "ORDER BY w.name, g.slot, g.capability";
            grants(
                c,
                &format!("{GRANTS} WHERE w.user_id = ?1 AND w.deleting = 0 {order}"),
                [of.as_str()],
            )
        })
        .await
    }

    /// One of a user's grants. `NotFound` when the user has none with this id.
    pub async fn grant(&self, of: UserId, id: GrantId) -> Result<Grant> {
        self.read(move |c| {
            let sql = format!("{GRANTS} WHERE w.user_id = ?1 AND g.id = ?2");
            grants(c, &sql, [of.as_str(), id.as_str()])?
                .pop()
                .ok_or(Error::NotFound)
        })
        .await
    }

    /// Ends one of a user's grants. `NotFound` when the user has none with this id.
    pub async fn delete_grant(&self, of: UserId, id: GrantId, event: AuditEvent) -> Result<()> {
        self.write(move |c| {
            match c.execute(
                "DELETE FROM grants WHERE id = ?1 AND workspace_id IN (SELECT id FROM workspaces WHERE user_id = ?2)",
                [id.as_str(), of.as_str()],
            )? {
                0 => Err(Error::NotFound),
                _ => audit::append(c, &event),
            }
        })
        .await
    }

    /// Where a sandbox stands and what it is granted there, read at one moment; without what has expired.
    pub async fn granted(&self, sandbox: &SandboxId, now: Timestamp) -> Result<Option<(Standing, Vec<Grant>)>> {
        let sandbox = sandbox.clone();
        self.read(move |c| {
            let Some(standing) = standing(c, &sandbox)? else {
                return Ok(None);
            };
            let sql = format!(
                "{GRANTS} WHERE g.workspace_id = ?1 AND g.slot = ?2 AND (g.expires_at IS NULL OR g.expires_at > ?3)
                 ORDER BY g.capability"
            );
            let place = params![standing.workspace.as_str(), standing.slot.as_str(), millis(now)];
            let granted = grants(c, &sql, place)?;
            Ok(Some((standing, granted)))
        })
        .await
    }

    /// Records that something was refused, unless that was recorded just before, and, where its owner can lift that,
    /// puts it before them.
    pub async fn record_refusal(&self, event: Option<AuditEvent>, request: Option<NewRequest>) -> Result<()> {
        if event.is_none() && request.is_none() {
            return Ok(());
        }
        self.write(move |c| {
            if let Some(request) = &request {
                ask(c, request)?;
            }
            event.map_or(Ok(()), |event| audit::append(c, &event))
        })
        .await
    }

    /// Records an event that happened several times, in one row.
    pub async fn record_repeats(&self, event: AuditEvent, times: u64) -> Result<()> {
        self.write(move |c| audit::append_times(c, &event, times)).await
    }

    /// What a user's sandboxes asked for, newest first; without what has expired.
    pub async fn grant_requests(&self, of: UserId, now: Timestamp) -> Result<Vec<GrantRequest>> {
        self.read(move |c| {
            let sql = format!(
                "{REQUESTS} WHERE w.user_id = ?1 AND r.expires_at > ?2 AND w.deleting = 0 ORDER BY r.last_at DESC, r.id"
            );
            requests(c, &sql, params![of.as_str(), millis(now)])
        })
        .await
    }

    /// One unexpired request. `NotFound` when the user has none with this id.
    pub async fn grant_request(&self, of: UserId, id: GrantRequestId, now: Timestamp) -> Result<GrantRequest> {
        self.read(move |c| {
            let sql = format!("{REQUESTS} WHERE w.user_id = ?1 AND r.id = ?2 AND r.expires_at > ?3");
            let found = requests(c, &sql, params![of.as_str(), id.as_str(), millis(now)])?.pop();
            found.ok_or(Error::NotFound)
        })
        .await
    }

    /// Puts a requested host on its workspace's allow list and closes the request, in one step. `NotFound` when the user
    /// has no such request for a host.
    pub async fn approve_host(&self, of: UserId, id: GrantRequestId, event: AuditEvent) -> Result<WorkspaceView> {
        self.write(move |c| {
            let (workspace, host): (String, String) = c
                .prepare_cached(
                    "DELETE FROM grant_requests WHERE id = ?1 AND kind = 'host'
                     AND workspace_id IN (SELECT id FROM workspaces WHERE user_id = ?2 AND deleting = 0)
                     RETURNING workspace_id, subject",
                )?
                .query_row([id.as_str(), of.as_str()], |row| Ok((row.get(0)?, row.get(1)?)))?;
            let corrupt = |what: &str| Error::Corrupt(format!("grant_requests.{what}"));
            let host: HostPattern = host.parse().map_err(|_| corrupt("subject"))?;
            let workspace = workspace.parse().map_err(|_| corrupt("workspace_id"))?;
            let settings = workspaces::view(c, &workspace)?.workspace.settings;
            let egress = settings.egress.clone().unwrap_or_default().allowing(host);
            let after = WorkspaceSettings {
                egress: Some(egress),
                ..settings
            };
            after
                .validate()
                .map_err(|_| Error::Conflict("the allow list is full; use patterns such as `*.example.com`"))?;
            c.execute(
                "UPDATE workspaces SET settings = ?2, epoch = epoch + 1 WHERE id = ?1",
                params![workspace.as_str(), to_json(&after)?],
            )?;
            audit::append(c, &event)?;
            workspaces::view(c, &workspace)
        })
        .await
    }

    /// Closes a request. `NotFound` when the user has none with this id.
    pub async fn close_grant_request(&self, of: UserId, id: GrantRequestId, event: AuditEvent) -> Result<()> {
        self.write(move |c| {
            let own = "workspace_id IN (SELECT id FROM workspaces WHERE user_id = ?2)";
            match c.execute(
                &format!("DELETE FROM grant_requests WHERE id = ?1 AND {own}"),
                [id.as_str(), of.as_str()],
            )? {
                0 => Err(Error::NotFound),
                _ => audit::append(c, &event),
            }
        })
        .await
    }
}

fn standing(c: &Connection, sandbox: &SandboxId) -> Result<Option<Standing>> {
    c.prepare_cached(
        "SELECT w.user_id, w.id, w.name, w.settings, t.slot FROM slots t JOIN workspaces w ON w.id = t.workspace_id
         WHERE t.sandbox_id = ?1 AND w.deleting = 0",
    )?
    .query_row([sandbox.as_str()], |row| {
        Ok((|| {
            let settings: WorkspaceSettings = json(row, "settings")?;
            Ok(Standing {
                user: parsed(row, "user_id")?,
                workspace: parsed(row, "id")?,
                workspace_name: parsed(row, "name")?,
                slot: parsed(row, "slot")?,
                egress: settings.egress.unwrap_or_default(),
                intercept_tls: settings.intercept_tls.unwrap_or(false),
                provider_mode: settings.provider_mode.unwrap_or_default(),
            })
        })())
    })
    .optional()?
    .transpose()
}

/// Counts a request that is open, opens one that is not; nothing when too many are.
fn ask(c: &Connection, new: &NewRequest) -> Result<()> {
    let (kind, subject) = match &new.wanted {
        Wanted::Host(host) => ("host", host.as_str()),
        Wanted::Capability(capability) => ("capability", capability.as_str()),
        Wanted::Ssh(what) => ("ssh", what.as_str()),
    };
    c.prepare_cached("DELETE FROM grant_requests WHERE workspace_id = ?1 AND expires_at <= ?2")?
        .execute(params![new.workspace.as_str(), millis(new.at)])?;
    c.prepare_cached(
        "INSERT INTO grant_requests (id, workspace_id, slot, kind, subject, count, first_at, last_at, expires_at)
         SELECT ?1, ?2, ?3, ?4, ?5, 1, ?6, ?6, ?7
         WHERE (SELECT count(*) FROM grant_requests WHERE workspace_id = ?2) < ?8
            OR EXISTS (SELECT 1 FROM grant_requests WHERE workspace_id = ?2 AND slot = ?3 AND kind = ?4 AND subject = ?5)
         ON CONFLICT (workspace_id, slot, kind, subject)
         DO UPDATE SET count = count + 1, last_at = excluded.last_at, expires_at = excluded.expires_at",
    )?
    .execute(params![
        new.id.as_str(),
        new.workspace.as_str(),
        new.slot.as_str(),
        kind,
        subject,
        millis(new.at),
        millis(new.expires_at),
        MOST_REQUESTS
    ])?;
    Ok(())
}

/// Ends the grants of a secret that was just deleted, each with a row beside the deletion's own.
pub(crate) fn end_of_secret(
    c: &Connection,
    of: &UserId,
    secret: &SecretName,
    event: &AuditEvent,
) -> Result<Vec<Grant>> {
    let sql = format!("{GRANTS} WHERE w.user_id = ?1 AND g.secret = ?2 ORDER BY w.name, g.slot, g.capability");
    let ended = grants(c, &sql, [of.as_str(), secret.as_str()])?;
    for grant in &ended {
        c.execute("DELETE FROM grants WHERE id = ?1", [grant.id.as_str()])?;
        let Grant {
            id,
            workspace_name,
            slot,
            capability,
            ..
        } = grant;
        let subject = format!("{workspace_name}/{slot} {capability} {id}");
        let action = "grant.delete";
        audit::append(
            c,
            &AuditEvent {
                action,
                subject,
                ..event.clone()
            },
        )?;
    }
    Ok(ended)
}

fn grants<P: rusqlite::Params>(c: &Connection, sql: &str, params: P) -> Result<Vec<Grant>> {
    let mut statement = c.prepare_cached(sql)?;
    let mut rows = statement.query(params)?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.push(grant(row)?);
    }
    Ok(found)
}

fn grant(row: &Row<'_>) -> Result<Grant> {
    Ok(Grant {
        id: parsed(row, "id")?,
        workspace: parsed(row, "workspace_id")?,
        workspace_name: parsed(row, "workspace_name")?,
        slot: parsed(row, "slot")?,
        capability: parsed(row, "capability")?,
        secret: parsed(row, "secret")?,
        rule: json(row, "rule")?,
        created_at: time(row, "created_at")?,
        expires_at: maybe_time(row, "expires_at")?,
    })
}

fn requests<P: rusqlite::Params>(c: &Connection, sql: &str, params: P) -> Result<Vec<GrantRequest>> {
    let mut statement = c.prepare_cached(sql)?;
    let mut rows = statement.query(params)?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.push(request(row)?);
    }
    Ok(found)
}

fn request(row: &Row<'_>) -> Result<GrantRequest> {
    let wanted = match row.get::<_, String>("kind")?.as_str() {
        "host" => Wanted::Host(row.get("subject")?),
        "ssh" => Wanted::Ssh(row.get("subject")?),
        _ => Wanted::Capability(parsed(row, "subject")?),
    };
    Ok(GrantRequest {
        id: parsed(row, "id")?,
        workspace: parsed(row, "workspace_id")?,
        workspace_name: parsed(row, "workspace_name")?,
        slot: parsed(row, "slot")?,
        wanted,
        count: row.get("count")?,
        first_at: time(row, "first_at")?,
        last_at: time(row, "last_at")?,
        expires_at: time(row, "expires_at")?,
    })
}
