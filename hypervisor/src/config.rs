//! The one TOML file, parsed and judged before anything is bound. It must not act on what it reads.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use choir_core::limits::LimitsPatch;
use choir_core::{Awake, Hosts, Limits};
use ipnet::IpNet;
use serde::Deserialize;
use url::{Host, Url};

pub mod providers;

use providers::Providers;

/// Everything an operator may set. Unknown keys are refused.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub listen: Listen,
    pub control: Control,
    pub sandboxes: Sandboxes,
    pub auth: AuthConfig,
    pub store: StoreConfig,
    pub keys: Keys,
    pub egress: Egress,
    pub providers: Providers,
    pub backup: Backup,
    pub audit: Audit,
    pub metrics: Metrics,
    pub downloads: DownloadsConfig,
    pub log: Log,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Listen {
    pub address: IpAddr,
    pub port: u16,
    /// Peers whose `X-Forwarded-For` and `-Proto` are believed.
    pub trusted_proxies: Vec<IpNet>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Control {
    pub origin: Url,
    /// The passkeys' relying party; must be the control host itself.
    pub rp_id: Option<String>,
    /// Start although sandboxes share the control host's registrable domain.
    pub allow_shared_domain: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RuntimeKind {
    Podman,
    Process,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sandboxes {
    pub domain: String,
    pub runtime: RuntimeKind,
    /// The container service's socket.
    pub socket: PathBuf,
    /// The volumes helper's socket.
    pub volumes_socket: PathBuf,
    /// The volumes helper's directory; `volumes` beside the database where missing.
    pub volumes: Option<PathBuf>,
    /// Where sockets of generations go; `run/sandboxes` beside the database where missing.
    pub run: Option<PathBuf>,
    /// The static agent binary.
    pub agent: PathBuf,
    /// The archive new workspaces start from.
    pub default_image: Option<PathBuf>,
    pub oci_runtime: Option<String>,
    pub limits: LimitsPatch,
    pub awake: Awake,
    pub idle_pause_s: u64,
    pub idle_stop_s: u64,
    /// Seconds from one snapshot of a slot that runs to the next; 0 takes none.
    pub snapshot_every_s: u64,
    /// How many sandboxes may run at once.
    pub max_running: usize,
    /// Bytes of the box's memory that are to stay available: below, dev slots are paused, then stopped. 0 for none.
    pub memory_reserve: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Registration {
    Invite,
    Open,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuthConfig {
    pub registration: Registration,
    pub session_idle_s: u64,
    pub session_absolute_s: u64,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreConfig {
    pub path: PathBuf,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Keys {
    /// 32 random bytes; `key` beside the database where missing, made at the first start.
    pub file: Option<PathBuf>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Egress {
    /// Networks that sandboxes may reach although they are not public.
    pub allow_networks: Vec<IpNet>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Backup {
    /// Public keys of the identities that can read backups, `age1…` each.
    pub recipients: Vec<String>,
    /// How many stay in a directory after one was written there; 0 keeps all.
    pub keep: usize,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Audit {
    /// How long rows of the audit trail are kept; 0 keeps them for ever.
    pub keep_days: u32,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Metrics {
    /// A file with the token that lets peers other than loopback read `/metrics`.
    pub token_file: Option<PathBuf>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DownloadsConfig {
    /// The directory of programs that everybody may download at `/download`; none where missing.
    pub dir: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    pub format: LogFormat,
    /// `error`, `warn`, `info`, `debug`, or a list of `target=level`.
    pub level: String,
}

impl Default for Listen {
    fn default() -> Self {
        Self {
            address: IpAddr::from([127, 0, 0, 1]),
            port: 9090,
            trusted_proxies: Vec::new(),
        }
    }
}

impl Default for Backup {
    fn default() -> Self {
        Self {
            recipients: Vec::new(),
            keep: 30,
        }
    }
}

impl Default for Control {
    fn default() -> Self {
        let origin = Url::parse("http://localhost:9090").expect("a constant URL");
        Self {
            origin,
            rp_id: None,
            allow_shared_domain: false,
        }
    }
}

impl Default for Sandboxes {
    fn default() -> Self {
        Self {
            domain: "localhost".into(),
            runtime: RuntimeKind::Podman,
            socket: "data/run/podman.sock".into(),
            volumes_socket: "data/run/volumes.sock".into(),
            volumes: None,
            run: None,
            agent: "data/bin/choir-sandbox".into(),
            default_image: None,
            oci_runtime: None,
            limits: LimitsPatch::default(),
            awake: Awake::OnDemand,
            idle_pause_s: 900,
            idle_stop_s: 1800,
            snapshot_every_s: 3600,
            max_running: 16,
            memory_reserve: 512 << 20,
        }
    }
}

impl Default for AuthConfig {
    fn default() -> Self {
        Self {
            registration: Registration::Invite,
            session_idle_s: 24 * 3600,
            session_absolute_s: 7 * 24 * 3600,
        }
    }
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            path: "data/choir.db".into(),
        }
    }
}

impl Default for Audit {
    fn default() -> Self {
        // A year and a month: a yearly look at the trail finds all of the year.
        Self { keep_days: 400 }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self {
            format: LogFormat::Text,
            level: "info".into(),
        }
    }
}

/// Why a configuration is refused: one sentence that says what to set.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("the configuration {path} cannot be read: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}: {message}")]
    Parse { path: PathBuf, message: String },
    #[error("{0}")]
    Invalid(String),
}

/// What to do about a configuration that is risky but wanted.
pub type Warnings = Vec<String>;

impl Config {
    /// Reads and judges the file.
    pub fn load(path: &Path) -> Result<(Self, Warnings), ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        let config: Self = toml::from_str(&text).map_err(|e| ConfigError::Parse {
            path: path.to_owned(),
            message: e.to_string(),
        })?;
        let warnings = config.judge()?;
        Ok((config, warnings))
    }

    /// Refuses what would be unsafe or could not work.
    pub fn judge(&self) -> Result<Warnings, ConfigError> {
        let mut warnings = Warnings::new();
        self.judge_origins(&mut warnings)?;
        self.sandboxes
            .limits
            .validate()
            .map_err(|e| invalid(format!("[sandboxes] {e}")))?;
        if self.sandboxes.runtime == RuntimeKind::Process {
            if !self.listen.address.is_loopback() {
                return Err(invalid(
                    "[sandboxes] runtime = \"process\" isolates nothing, so [listen] address must be a loopback address",
                ));
            }
            warnings.push("the process runtime isolates nothing: use it for development only".into());
        }
        if self.auth.session_idle_s == 0 || self.auth.session_absolute_s < self.auth.session_idle_s {
            return Err(invalid(
                "[auth] session_idle_s must be above 0 and at most session_absolute_s",
            ));
        }
        if let Awake::At(schedule) = &self.sandboxes.awake {
            schedule
                .validate()
                .map_err(|e| invalid(format!("[sandboxes] awake: {e}")))?;
        }
        if self.audit.keep_days > 36_500 {
            return Err(invalid(
                "[audit] keep_days must be at most 36500; 0 keeps rows for ever",
            ));
        }
        if self.sandboxes.max_running == 0 {
            return Err(invalid("[sandboxes] max_running must be at least 1"));
        }
        self.backup_recipients()?;
        self.providers.judged()?;
        Ok(warnings)
    }

    fn judge_origins(&self, warnings: &mut Warnings) -> Result<(), ConfigError> {
        let origin = &self.control.origin;
        let host = match origin.host() {
            Some(Host::Domain(host)) => host,
            _ => {
                return Err(invalid(
                    "[control] origin must name a host, not an IP address: passkeys cannot be bound to an address",
                ));
            }
        };
        let bare = origin.path() == "/" && origin.query().is_none() && origin.username().is_empty();
        if !bare || !matches!(origin.scheme(), "http" | "https") {
            return Err(invalid(
                "[control] origin must look like https://choir.example.com, without a path",
            ));
        }
        if origin.scheme() == "http" && host != "localhost" {
            return Err(invalid("[control] origin must be https unless it is http://localhost"));
        }
        if self.control.rp_id.as_deref().is_some_and(|rp| rp != host) {
            return Err(invalid(format!(
                "[control] rp_id must be the control host itself, `{host}`, or be left out"
            )));
        }
        let domain = self.sandboxes.domain.as_str();
        let labels_ok = domain.split('.').all(|l| {
            !l.is_empty()
                && l.bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        });
        if !labels_ok || domain.parse::<IpAddr>().is_ok() {
            return Err(invalid(
                "[sandboxes] domain must be a host name in lower case, such as choir-apps.example",
            ));
        }
        if host == "localhost" && domain == "localhost" {
            return Ok(());
        }
        if domain == host || is_below(domain, host) || is_below(host, domain) {
            return Err(invalid(format!(
                "[sandboxes] domain `{domain}` and the control host `{host}` contain each other: a sandbox could claim \
                 the control host's passkeys or cookies; give sandboxes a registrable domain of their own"
            )));
        }
        let registrable = |name: &str| psl::domain_str(name).map(str::to_owned);
        if registrable(domain).is_some() && registrable(domain) == registrable(host) {
            if !self.control.allow_shared_domain {
                return Err(invalid(format!(
                    "[sandboxes] domain `{domain}` shares a registrable domain with the control host `{host}`; use \
                     another domain, or accept the risk with [control] allow_shared_domain = true"
                )));
            }
            warnings.push(format!(
                "sandboxes at `{domain}` are same-site with the control host `{host}`: a sandbox page can set cookies for both"
            ));
        }
        Ok(())
    }

    /// Who can read backups.
    pub fn backup_recipients(&self) -> Result<Vec<age::x25519::Recipient>, ConfigError> {
        let parse = |text: &String| {
            text.parse()
                .map_err(|_| invalid(format!("[backup] recipients: `{text}` is not a public key `age1…`")))
        };
        self.backup.recipients.iter().map(parse).collect()
    }

    /// The hosts to serve.
    pub fn hosts(&self) -> Hosts {
        Hosts::new(self.control_host(), &self.sandboxes.domain, self.control.origin.port())
    }

    /// The control host without its port.
    pub fn control_host(&self) -> &str {
        self.control.origin.host_str().unwrap_or_default()
    }

    /// The default limits of a sandbox.
    pub fn limits(&self) -> Limits {
        Limits::default().patched(&self.sandboxes.limits)
    }

    /// A path beside the database.
    pub fn beside_store(&self, name: &str) -> PathBuf {
        self.store.path.parent().unwrap_or(Path::new(".")).join(name)
    }

    pub fn volumes_dir(&self) -> PathBuf {
        self.sandboxes
            .volumes
            .clone()
            .unwrap_or_else(|| self.beside_store("volumes"))
    }

    pub fn run_dir(&self) -> PathBuf {
        self.sandboxes
            .run
            .clone()
            .unwrap_or_else(|| self.beside_store("run/sandboxes"))
    }

    pub fn key_file(&self) -> PathBuf {
        self.keys.file.clone().unwrap_or_else(|| self.beside_store("key"))
    }

    pub fn idle_pause(&self) -> Duration {
        Duration::from_secs(self.sandboxes.idle_pause_s)
    }

    pub fn snapshot_every(&self) -> Duration {
        Duration::from_secs(self.sandboxes.snapshot_every_s)
    }

    pub fn idle_stop(&self) -> Duration {
        Duration::from_secs(self.sandboxes.idle_stop_s)
    }
}

fn is_below(name: &str, parent: &str) -> bool {
    name.strip_suffix(parent).is_some_and(|rest| rest.ends_with('.'))
}

fn invalid(text: impl Into<String>) -> ConfigError {
    ConfigError::Invalid(text.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(text: &str) -> Result<Warnings, String> {
        let config: Config = toml::from_str(text).map_err(|e| e.to_string())?;
        config.judge().map_err(|e| e.to_string())
    }

    fn origins(origin: &str, domain: &str, extra: &str) -> Result<Warnings, String> {
        judge(&format!(
            "[control]\norigin = \"{origin}\"\n{extra}\n[sandboxes]\ndomain = \"{domain}\"\n"
        ))
    }

    #[test]
    fn the_defaults_are_a_safe_development_setup() {
        assert_eq!(judge("").unwrap(), Warnings::new());
    }

    #[test]
    fn unknown_keys_are_refused_with_their_line() {
        let error = judge("[listen]\nport = 1\ncolour = 3\n").unwrap_err();
        assert!(error.contains("line 3") && error.contains("colour"), "{error}");
    }

    #[test]
    fn origins_that_would_share_cookies_or_passkeys_are_refused() {
        assert!(origins("https://choir.example.com", "choir-apps.net", "").is_ok());
        for (origin, domain) in [
            ("https://choir.example.com", "choir.example.com"),
            ("https://choir.example.com", "apps.choir.example.com"),
            ("https://choir.example.com", "example.com"),
            ("https://choir.example.com", "apps.example.com"),
            ("https://192.0.2.1", "apps.example"),
            ("http://choir.example.com", "apps.example"),
            ("https://choir.example.com/x", "apps.example"),
            ("https://choir.example.com", "Apps.example"),
            ("https://choir.example.com", "192.0.2.1"),
            ("ftp://choir.example.com", "apps.example"),
        ] {
            assert!(origins(origin, domain, "").is_err(), "{origin} {domain}");
        }
    }

    #[test]
    fn a_shared_registrable_domain_needs_a_flag_and_warns() {
        let extra = "allow_shared_domain = true";
        assert_eq!(
            origins("https://choir.example.com", "apps.example.com", extra)
                .unwrap()
                .len(),
            1
        );
        assert!(origins("https://choir.example.com", "choir.example.com", extra).is_err());
    }

    #[test]
    fn the_relying_party_is_the_control_host_and_nothing_above_it() {
        assert!(origins("https://choir.example.com", "apps.example", "rp_id = \"example.com\"").is_err());
        assert!(
            origins(
                "https://choir.example.com",
                "apps.example",
                "rp_id = \"choir.example.com\""
            )
            .is_ok()
        );
    }

    #[test]
    fn the_runtime_without_isolation_listens_on_loopback_only() {
        let text = |address| format!("[listen]\naddress = \"{address}\"\n[sandboxes]\nruntime = \"process\"\n");
        assert!(judge(&text("0.0.0.0")).is_err());
        assert_eq!(judge(&text("127.0.0.1")).unwrap().len(), 1);
    }
}
