//! From settings to a spec: which limits, which environment, which commands. Pure but for reading the database.

use std::collections::BTreeMap;
use std::time::Duration;

use choir_core::settings::{DEFAULT_APP_PORT, ProviderMode, ReleaseConfig};
use choir_core::{Generation, Limits, Own, Slot, WorkspaceId};
use choir_runtime::{AGENT_DIR, AgentConfig, BUNDLE, ListenerKind, MAX_CONFIG, Spec};
use choir_store::WorkspaceView;

use super::Services;
use crate::config::Config;

/// How long a program may take from its start until it listens, where nothing else is said.
const STARTS_WITHIN: Duration = Duration::from_secs(10);

/// What SDKs want to see before they send anything; the gateway takes it out. Some look at how a key begins.
const PLACEHOLDERS: [(&str, &str); 2] = [
    ("OPENAI_API_KEY", "sk-choir-placeholder"),
    ("ANTHROPIC_API_KEY", "sk-ant-choir-placeholder"),
];

/// What one generation is to be made from, as the database says now.
pub async fn spec(
    services: &Services,
    workspace: &WorkspaceId,
    generation: &Generation,
    nonce: String,
) -> Result<Spec, String> {
    let view = services.store.workspace(workspace).await.map_err(|e| e.to_string())?;
    let slot = if view.live.id == generation.sandbox {
        Slot::Live
    } else {
        Slot::Dev
    };
    let release = services.releases.config(&view.slot(slot).release).await?;
    let agent = AgentConfig {
        sandbox_id: generation.sandbox.to_string(),
        generation: generation.number,
        nonce: nonce.clone(),
        env: environment(&view, slot, &generation.sandbox.to_string(), &release),
        services: release.commands(),
        authority: authority(services, generation)?,
        unheeded: None,
    };
    let length = serde_json::to_vec(&agent).map_err(|e| e.to_string())?.len();
    if length > MAX_CONFIG {
        return Err(format!(
            "environment and services are {length} bytes together, and {MAX_CONFIG} is the most; make them shorter"
        ));
    }
    Ok(Spec {
        generation: generation.clone(),
        nonce,
        ids: view.workspace.ids,
        // Before it runs nobody knows what its home asks for.
        limits: limits(&view, &services.config, &release, &Own::Silent),
        slot,
        hostname: format!("{}-{slot}", view.workspace.name),
        agent,
    })
}

/// Whom the generation's programs believe when the gateway answers in a granted host's name.
fn authority(services: &Services, generation: &Generation) -> Result<Option<String>, String> {
    let Some(authorities) = &services.authorities else {
        return Ok(None);
    };
    let authority = authorities.of(&generation.to_string()).map_err(|e| e.to_string())?;
    Ok(Some(authority.pem().to_owned()))
}

/// The workspace's limits over the release's over the box's, or less where the home asks for less.
pub fn limits(view: &WorkspaceView, config: &Config, release: &ReleaseConfig, own: &Own) -> Limits {
    let set = view.workspace.settings.limits.unwrap_or_default();
    own.within(config.limits().patched(&release.limits).patched(&set))
}

/// The port the app listens on.
pub fn app_port(view: &WorkspaceView, release: &ReleaseConfig, own: &Own) -> u16 {
    own.config()
        .and_then(|own| own.app_port)
        .or(view.workspace.settings.app_port)
        .or(release.app_port)
        .unwrap_or(DEFAULT_APP_PORT)
}

/// How long the programs that are started may take to listen: what their health check gives them.
pub fn starts_within(config: &ReleaseConfig) -> Duration {
    match &config.health {
        _ if config.commands().is_empty() => Duration::ZERO,
        Some(check) => Duration::from_secs(check.timeout_s),
        None => STARTS_WITHIN,
    }
}

/// What any program needs to run as the user `choir`.
pub fn basics() -> BTreeMap<String, String> {
    let path = "/home/choir/.local/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    [
        ("HOME", "/home/choir"),
        ("USER", "choir"),
        ("LOGNAME", "choir"),
        ("SHELL", "/bin/bash"),
        ("LANG", "C.UTF-8"),
        ("PATH", path),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into()
}

/// The whole environment of a user's process. Later entries win: what a person set wins over what a release brings,
/// and nothing wins over the names that are ours.
fn environment(view: &WorkspaceView, slot: Slot, sandbox: &str, release: &ReleaseConfig) -> BTreeMap<String, String> {
    let settings = &view.workspace.settings;
    let mut env = basics();
    let mut set = |name: &str, value: &str| env.insert(name.to_owned(), value.to_owned());
    let bundle = format!("{AGENT_DIR}/{BUNDLE}");
    for name in [
        "SSL_CERT_FILE",
        "CURL_CA_BUNDLE",
        "GIT_SSL_CAINFO",
        "REQUESTS_CA_BUNDLE",
        "PIP_CERT",
        "NODE_EXTRA_CA_CERTS",
    ] {
        set(name, &bundle);
    }
    // Node's own fetch ignores proxy variables unless told.
    set("NODE_USE_ENV_PROXY", "1");
    let proxy = format!("http://127.0.0.1:{}", ListenerKind::Egress.port());
    for name in [
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "http_proxy",
        "https_proxy",
        "all_proxy",
    ] {
        set(name, &proxy);
    }
    for name in ["NO_PROXY", "no_proxy"] {
        set(name, "localhost,127.0.0.1,::1");
    }
    set("npm_config_noproxy", "localhost,127.0.0.1,::1");
    // Where npm has a file of its own it asks nobody else.
    set("npm_config_cafile", &bundle);
    set("CARGO_HTTP_PROXY", &proxy);
    set("CARGO_HTTP_CAINFO", &bundle);
    // The keys behind it are the hypervisor's; see `broker/ssh.rs`.
    set("SSH_AUTH_SOCK", "/run/choir-agent/ssh.sock");
    if let Some(git) = &settings.git {
        for role in ["AUTHOR", "COMMITTER"] {
            set(&format!("GIT_{role}_NAME"), &git.name);
            set(&format!("GIT_{role}_EMAIL"), &git.email);
        }
    }
    if let Some(zone) = &settings.timezone {
        set("TZ", zone);
    }
    if settings.provider_mode == Some(ProviderMode::ApiKey) {
        let providers = format!("http://127.0.0.1:{}/v1/providers", ListenerKind::Broker.port());
        // OpenAI's clients append `/chat/completions`, Anthropic's `/v1/messages`.
        set("OPENAI_BASE_URL", &format!("{providers}/openai/v1"));
        set("ANTHROPIC_BASE_URL", &format!("{providers}/anthropic"));
        for (name, placeholder) in PLACEHOLDERS {
            set(name, placeholder);
        }
    }
    env.extend(release.env.clone());
    env.extend(settings.env.clone().unwrap_or_default());
    let mut set = |name: &str, value: &str| env.insert(name.to_owned(), value.to_owned());
    set("CHOIR_SANDBOX_ID", sandbox);
    set("CHOIR_WORKSPACE", view.workspace.name.as_str());
    set("CHOIR_SLOT_AT_START", slot.as_str());
    set(
        "CHOIR_BROKER_URL",
        &format!("http://127.0.0.1:{}", ListenerKind::Broker.port()),
    );
    env
}
