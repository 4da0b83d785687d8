//! What a person may set on a workspace, and what a release brings; later layers win over earlier ones.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::egress::{self, EgressPolicy};
use crate::limits::LimitsPatch;
use crate::{Awake, Slot};

/// Who may open a slot's app, or a port of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// The owner and people it was shared with.
    #[default]
    Private,
    /// Any user of this box.
    Members,
    Public,
}

/// A value for each slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PerSlot<T: Default> {
    pub live: T,
    pub dev: T,
}

impl<T: Default> PerSlot<T> {
    pub fn get(&self, slot: Slot) -> &T {
        match slot {
            Slot::Live => &self.live,
            Slot::Dev => &self.dev,
        }
    }
}

/// How programs in a workspace's sandboxes get at model providers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProviderMode {
    /// Through the provider gateway: their environment points there, and they may use the box's keys.
    ApiKey,
    /// By a login of their own. Nothing is set, because a key in the environment makes agents ignore a login.
    Subscription,
    /// Not by our doing.
    #[default]
    #[serde(rename = "none")]
    Unset,
}

/// Who commits made in a sandbox are by, unless the repository says otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GitIdentity {
    pub name: String,
    pub email: String,
}

/// Everything a PATCH of a workspace may set. In a PATCH a missing field changes nothing.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkspaceSettings {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub app_port: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access: Option<PerSlot<Access>>,
    /// Who may open a port other than the app's, by number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ports: Option<BTreeMap<u16, Access>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub git: Option<GitIdentity>,
    /// IANA name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timezone: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limits: Option<LimitsPatch>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub awake: Option<PerSlot<Awake>>,
    /// Seconds of idleness before a slot is paused; 0 never pauses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_pause_s: Option<u64>,
    /// Seconds of idleness before a slot is stopped; 0 never stops.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_stop_s: Option<u64>,
    /// Seconds from one snapshot that is taken by itself to the next, of a slot that ran meanwhile; 0 takes none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot_every_s: Option<u64>,
    /// Whether pages of the sandbox may register service workers, which outlive swaps and rollbacks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_workers: Option<bool>,
    /// Whether an `Authorization` header that is not ours reaches the app.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forward_authorization: Option<bool>,
    /// Where programs in the sandboxes may connect to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress: Option<EgressPolicy>,
    /// Whether the gateway answers programs over TLS in the name of hosts that a grant names, so that unmodified
    /// programs' calls carry its secret.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub intercept_tls: Option<bool>,
    /// How programs in the sandboxes get at model providers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub provider_mode: Option<ProviderMode>,
    /// What takes a swap back by itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guard: Option<Guard>,
}

/// How live is watched after a swap. Where it does worse than this, it is rolled back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guard {
    /// Seconds from the swap on; 0 for not at all.
    pub watch_s: u64,
    /// Of 100 requests, how many may fail: be answered with a status of 500 or more, or not at all.
    #[serde(default = "few_percent")]
    pub max_error_percent: u8,
    /// How long 95 of 100 answers may take to begin; as long as they like where missing. Measured in powers of two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_p95_ms: Option<u64>,
    /// Before that many requests nothing is judged.
    #[serde(default = "some_requests")]
    pub min_requests: u64,
}

fn few_percent() -> u8 {
    5
}

fn some_requests() -> u64 {
    20
}

/// How an app shows that it is well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HealthCheck {
    #[serde(default = "root_path")]
    pub path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The HTTP status that means well.
    #[serde(default = "status_ok")]
    pub expect: u16,
    #[serde(default = "ten_seconds")]
    pub timeout_s: u64,
    /// A path that must accept a websocket, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub websocket: Option<String>,
}

fn root_path() -> String {
    "/".to_owned()
}

fn status_ok() -> u16 {
    200
}

fn ten_seconds() -> u64 {
    10
}

/// What a release says about how to run it. A workspace's own settings win over it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReleaseConfig {
    pub env: BTreeMap<String, String>,
    /// A shell line run as the user `choir` in its home with each new generation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start: Option<String>,
    /// Further shell lines by name, run beside `start`. An empty one is not run.
    pub services: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub app_port: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthCheck>,
    pub limits: LimitsPatch,
}

/// Seconds from one scheduled snapshot to the next, at least.
const OFTEN_S: u64 = 600;

/// How long a guard may watch, in seconds.
const MOST_WATCHED_S: u64 = 3600;

/// The port of a slot's app where nothing says otherwise.
pub const DEFAULT_APP_PORT: u16 = 3000;

/// A setting that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SettingError(String);

impl WorkspaceSettings {
    /// These settings with a patch's values on top.
    pub fn merged(self, patch: Self) -> Self {
        Self {
            app_port: patch.app_port.or(self.app_port),
            access: patch.access.or(self.access),
            ports: patch.ports.or(self.ports),
            env: patch.env.or(self.env),
            git: patch.git.or(self.git),
            timezone: patch.timezone.or(self.timezone),
            limits: match (self.limits, patch.limits) {
                (Some(old), Some(new)) => Some(old.merged(&new)),
                (old, new) => new.or(old),
            },
            awake: patch.awake.or(self.awake),
            idle_pause_s: patch.idle_pause_s.or(self.idle_pause_s),
            idle_stop_s: patch.idle_stop_s.or(self.idle_stop_s),
            snapshot_every_s: patch.snapshot_every_s.or(self.snapshot_every_s),
            service_workers: patch.service_workers.or(self.service_workers),
            forward_authorization: patch.forward_authorization.or(self.forward_authorization),
            intercept_tls: patch.intercept_tls.or(self.intercept_tls),
            egress: patch.egress.or(self.egress),
            provider_mode: patch.provider_mode.or(self.provider_mode),
            guard: patch.guard.or(self.guard),
        }
    }

    /// Refuses, with a sentence, what could not be put into effect.
    pub fn validate(&self) -> Result<(), SettingError> {
        if let Some(limits) = &self.limits {
            limits.validate().map_err(|e| SettingError(e.to_string()))?;
        }
        if let Some(port) = self.app_port {
            check_port("app_port", port)?;
        }
        for port in self.ports.iter().flat_map(|p| p.keys()) {
            check_port("ports", *port)?;
        }
        for awake in self
            .awake
            .iter()
            .flat_map(|awake| Slot::ALL.map(|slot| awake.get(slot)))
        {
            if let Awake::At(schedule) = awake {
                schedule
                    .validate()
                    .map_err(|text| SettingError(format!("`awake`: {text}")))?;
            }
        }
        if let Some(zone) = &self.timezone {
            jiff::tz::TimeZone::get(zone).map_err(|_| {
                SettingError(format!(
                    "`timezone` {zone:?} is not an IANA time zone such as `Europe/Berlin`"
                ))
            })?;
        }
        if self.snapshot_every_s.is_some_and(|every| (1..OFTEN_S).contains(&every)) {
            return Err(SettingError(format!(
                "`snapshot_every_s` is 0 for none, or at least {OFTEN_S}"
            )));
        }
        if let Some(EgressPolicy::Allowlist(hosts)) = &self.egress
            && hosts.len() > egress::MOST_HOSTS
        {
            return Err(SettingError(format!(
                "`egress` lists over {} hosts; use patterns such as `*.example.com`",
                egress::MOST_HOSTS
            )));
        }
        if let Some(guard) = &self.guard
            && (guard.watch_s > MOST_WATCHED_S || guard.max_error_percent > 100 || guard.min_requests == 0)
        {
            return Err(SettingError(format!(
                "`guard` needs a `watch_s` of at most {MOST_WATCHED_S}, a `max_error_percent` of at most 100 and \
                 `min_requests` of at least 1"
            )));
        }
        self.env.as_ref().map_or(Ok(()), validate_env)
    }
}

impl ReleaseConfig {
    /// The shell lines to run, by name; `start` is the app itself.
    pub fn commands(&self) -> BTreeMap<String, String> {
        let mut commands = self.services.clone();
        commands.extend(self.start.iter().map(|start| ("start".to_owned(), start.clone())));
        commands.retain(|_, line| !line.trim().is_empty());
        commands
    }

    /// Refuses, with a sentence, what could not be put into effect.
    pub fn validate(&self) -> Result<(), SettingError> {
        self.limits.validate().map_err(|e| SettingError(e.to_string()))?;
        if let Some(port) = self.app_port {
            check_port("app_port", port)?;
        }
        let line_ok = |line: &String| !line.contains('\0') && line.len() <= 32 << 10;
        for (name, line) in &self.services {
            let name_ok = name != "start" && name.parse::<crate::Name>().is_ok();
            if !name_ok || !line_ok(line) {
                return Err(SettingError(format!(
                    "`services` {name:?} needs a name of a-z, 0-9 and hyphens other than `start`, and a line without NUL"
                )));
            }
        }
        if !self.start.as_ref().is_none_or(line_ok) {
            return Err(SettingError("`start` has a NUL or is over 32 KiB".to_owned()));
        }
        if let Some(check) = &self.health {
            if let Some(port) = check.port {
                check_port("health.port", port)?;
            }
            let paths = [Some(&check.path), check.websocket.as_ref()];
            if !(1..=600).contains(&check.timeout_s) || paths.into_iter().flatten().any(|path| !path.starts_with('/')) {
                return Err(SettingError(
                    "`health` needs a `path` (and a `websocket`, if any) that begins with / and a `timeout_s` of 1 to 600"
                        .to_owned(),
                ));
            }
        }
        validate_env(&self.env)
    }
}

fn check_port(field: &str, port: u16) -> Result<(), SettingError> {
    if port == 0 || crate::host::RESERVED_PORTS.contains(&port) || port == crate::host::AGENT_PORT {
        return Err(SettingError(format!(
            "`{field}` cannot be {port}: it is 0 or belongs to ChoirOS; choose another port"
        )));
    }
    Ok(())
}

/// Names as a shell takes them, values without NUL, and nothing that would replace what we set ourselves.
pub fn validate_env(env: &BTreeMap<String, String>) -> Result<(), SettingError> {
    for (name, value) in env {
        let mut bytes = name.bytes();
        let first = bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
        if !first || !bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_') || name.len() > 128 {
            return Err(SettingError(format!(
                "`env` name {name:?} is not a shell variable name of at most 128 characters"
            )));
        }
        if name.starts_with("CHOIR_") {
            return Err(SettingError(format!(
                "`env` name {name} is reserved: names that begin with CHOIR_ are set by ChoirOS"
            )));
        }
        if value.contains('\0') || value.len() > 32 << 10 {
            return Err(SettingError(format!(
                "`env` value of {name} has a NUL or is over 32 KiB"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_changes_only_what_it_names() {
        let old = WorkspaceSettings {
            app_port: Some(3001),
            idle_stop_s: Some(5),
            ..Default::default()
        };
        let new = old.clone().merged(WorkspaceSettings {
            app_port: Some(5173),
            ..Default::default()
        });
        assert_eq!((new.app_port, new.idle_stop_s), (Some(5173), Some(5)));
    }

    #[test]
    fn a_release_config_that_cannot_be_is_refused() {
        for bad in [
            r#"{"app_port": 9091}"#,
            r#"{"env": {"1A": ""}}"#,
            r#"{"services": {"start": "x"}}"#,
            r#"{"services": {"Web": "x"}}"#,
            r#"{"limits": {"pids": 1}}"#,
            r#"{"health": {"timeout_s": 601}}"#,
            r#"{"health": {"timeout_s": 0}}"#,
            r#"{"health": {"path": "well"}}"#,
            r#"{"health": {"websocket": "socket"}}"#,
            r#"{"health": {"port": 9091}}"#,
        ] {
            assert!(
                serde_json::from_str::<ReleaseConfig>(bad).unwrap().validate().is_err(),
                "{bad}"
            );
        }
        let good = r#"{"start": "npm start", "services": {"db": "redis-server"}, "app_port": 5173, "env": {"A": "1"}}"#;
        assert!(serde_json::from_str::<ReleaseConfig>(good).unwrap().validate().is_ok());
    }

    #[test]
    fn unknown_fields_are_refused_by_name() {
        let error = serde_json::from_str::<WorkspaceSettings>(r#"{"colour": 1}"#).unwrap_err();
        assert!(error.to_string().contains("colour"));
    }

    #[test]
    fn settings_that_cannot_be_are_refused_with_a_sentence() {
        for bad in [
            r#"{"app_port": 9091}"#,
            r#"{"app_port": 0}"#,
            r#"{"snapshot_every_s": 59}"#,
            r#"{"timezone": "Mars/Base"}"#,
            r#"{"awake": {"live": {"cron": "8 o'clock", "tz": "UTC"}}}"#,
            r#"{"awake": {"live": {"cron": "0 8 * * *", "tz": "Mars/Base"}}}"#,
            r#"{"env": {"A B": "1"}}"#,
            r#"{"env": {"CHOIR_X": "1"}}"#,
            r#"{"limits": {"memory": 1}}"#,
            r#"{"limits": {"cpus": -1.0}}"#,
            r#"{"guard": {"watch_s": 3601}}"#,
            r#"{"guard": {"watch_s": 60, "max_error_percent": 101}}"#,
            r#"{"guard": {"watch_s": 60, "min_requests": 0}}"#,
        ] {
            let settings: WorkspaceSettings = serde_json::from_str(bad).unwrap();
            assert!(settings.validate().is_err(), "{bad}");
        }
        let good =
            r#"{"app_port": 5173, "timezone": "Europe/Berlin", "env": {"A": "1"}, "limits": {"memory": 536870912}}"#;
        assert!(
            serde_json::from_str::<WorkspaceSettings>(good)
                .unwrap()
                .validate()
                .is_ok()
        );
    }
}
