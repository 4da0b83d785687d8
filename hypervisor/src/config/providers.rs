//! The `[providers]` section: which model providers there are, with which key of the box, and how much of it one user may
//! use in a day. It must not read a key.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use choir_broker::{grant, platform};
use choir_core::{Capability, HostName, Inject, Rule};
use choir_store::Caps;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use url::{Host, Url};

use super::{ConfigError, invalid};

/// The port on which a user's own grants are good; an upstream may have another one.
pub const TLS_PORT: u16 = 443;

/// The whole section. `[providers.NAME]` adds a provider, or changes one of the two that are always there.
#[derive(Debug, Clone)]
pub struct Providers {
    /// Each file in it is one key of the box.
    pub secrets_dir: PathBuf,
    pub named: BTreeMap<Capability, Provider>,
}

/// What a provider's API looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProviderKind {
    OpenAi,
    Anthropic,
}

/// One provider as it is written down; what is missing is as for a box without configuration.
#[derive(Debug, Clone, Default, serde::Deserialize)]
#[serde(
    default,
    deny_unknown_fields,
    expecting = "a section [providers.NAME]; beside sections there is only `secrets_dir`"
)]
pub struct Provider {
    /// Needed for names other than `openai` and `anthropic`.
    pub kind: Option<ProviderKind>,
    /// `https://HOST`, perhaps with a port and a path to which the API's paths are appended; the kind's own where missing.
    pub upstream: Option<Url>,
    /// The file in `secrets_dir` with the box's key. Without one, only users' own grants are used.
    pub key: Option<String>,
    /// Requests of one user in a day (UTC) with the box's key.
    pub daily_requests: Option<u64>,
    /// Input and output tokens of one user in a day (UTC) with the box's key.
    pub daily_tokens: Option<u64>,
    /// The same for one sandbox; without a cap where missing.
    pub sandbox_daily_requests: Option<u64>,
    pub sandbox_daily_tokens: Option<u64>,
}

/// One provider, judged.
#[derive(Debug, Clone)]
pub struct Upstream {
    pub kind: ProviderKind,
    pub host: HostName,
    pub port: u16,
    /// What comes before the API's paths: empty, or without a slash at its end.
    pub prefix: String,
    pub key: Option<String>,
    pub caps: Caps,
}

const DAILY_REQUESTS: u64 = 2_000;
const DAILY_TOKENS: u64 = 20_000_000;

impl Default for Providers {
    fn default() -> Self {
        Self {
            secrets_dir: "/etc/choir/providers".into(),
            named: BTreeMap::new(),
        }
    }
}

impl<'de> Deserialize<'de> for Providers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Section;
        impl<'de> Visitor<'de> for Section {
            type Value = Providers;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`secrets_dir` and sections [providers.NAME]")
            }

            // By hand, because flattening would lose the lines that errors name.
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Providers, A::Error> {
                let mut section = Providers::default();
                while let Some(key) = map.next_key::<String>()? {
                    if key == "secrets_dir" {
                        section.secrets_dir = map.next_value()?;
                        continue;
                    }
                    let provider = map.next_value()?;
                    let name = key.parse().map_err(|error| {
                        serde::de::Error::custom(format!("[providers.{key}] cannot be named so: {error}"))
                    })?;
                    section.named.insert(name, provider);
                }
                Ok(section)
            }
        }
        deserializer.deserialize_map(Section)
    }
}

impl ProviderKind {
    fn upstream(self) -> &'static str {
        match self {
            Self::OpenAi => "https://api.openai.com",
            Self::Anthropic => "https://api.anthropic.com",
        }
    }

    /// The kind of the providers that are always there.
    fn of(name: &str) -> Option<Self> {
        match name {
            "openai" => Some(Self::OpenAi),
            "anthropic" => Some(Self::Anthropic),
            _ => None,
        }
    }

    /// Where this kind wants its key.
    pub fn inject(self) -> Inject {
        let (header, format) = match self {
            Self::OpenAi => ("authorization", "Bearer {secret}"),
            Self::Anthropic => ("x-api-key", "{secret}"),
        };
        Inject::Header {
            header: header.to_owned(),
            format: format.to_owned(),
        }
    }
}

impl Providers {
    /// Every provider by its name.
    pub fn judged(&self) -> Result<BTreeMap<Capability, Upstream>, ConfigError> {
        let mut named = self.named.clone();
        for built_in in ["openai", "anthropic"] {
            let name = built_in.parse().map_err(|e| invalid(format!("[providers]: {e}")))?;
            named.entry(name).or_default();
        }
        let judge = |(name, provider): (Capability, Provider)| {
            let judged = provider
                .judged(&name)
                .map_err(|text| invalid(format!("[providers.{name}] {text}")))?;
            Ok((name, judged))
        };
        named.into_iter().map(judge).collect()
    }
}

impl Provider {
    fn judged(self, name: &Capability) -> Result<Upstream, String> {
        let kind = self.kind.or_else(|| ProviderKind::of(name.as_str()));
        let kind = kind.ok_or("kind must be `openai` or `anthropic`: whose API it speaks")?;
        let (host, port, prefix) = match &self.upstream {
            Some(url) => address(url, kind)?,
            None => address(&Url::parse(kind.upstream()).map_err(|e| e.to_string())?, kind)?,
        };
        if let Some(key) = self.key.as_ref().filter(|key| !platform::is_file_name(key)) {
            return Err(format!(
                "key {key:?} must be the name of a file in [providers] secrets_dir"
            ));
        }
        Ok(Upstream {
            kind,
            host,
            port,
            prefix,
            key: self.key,
            caps: Caps {
                requests: Some(self.daily_requests.unwrap_or(DAILY_REQUESTS)),
                tokens: Some(self.daily_tokens.unwrap_or(DAILY_TOKENS)),
                sandbox_requests: self.sandbox_daily_requests,
                sandbox_tokens: self.sandbox_daily_tokens,
            },
        })
    }
}

/// Host, port and what comes before the API's paths.
fn address(url: &Url, kind: ProviderKind) -> Result<(HostName, u16, String), String> {
    let must = || "upstream must look like https://api.example.com, perhaps with a port and a plain path".to_owned();
    let bare = url.username().is_empty() && url.password().is_none() && url.query().is_none();
    let Some(Host::Domain(host)) = url.host() else {
        return Err(must());
    };
    if url.scheme() != "https" || !bare || url.fragment().is_some() {
        return Err(must());
    }
    let host: HostName = host.parse().map_err(|_| must())?;
    let path = url.path();
    let rule = Rule {
        hosts: vec![host.clone()],
        methods: vec!["GET".to_owned()],
        path_prefix: path.to_owned(),
        inject: kind.inject(),
    };
    grant::check(&rule).map_err(|_| must())?;
    let prefix = path.strip_suffix('/').unwrap_or(path).to_owned();
    Ok((host, url.port().unwrap_or(TLS_PORT), prefix))
}

#[cfg(test)]
mod tests {
    use crate::config::Config;

    use super::*;

    fn judged(text: &str) -> Result<BTreeMap<Capability, Upstream>, String> {
        let config: Config = toml::from_str(text).map_err(|e| e.to_string())?;
        config.judge().map_err(|e| e.to_string())?;
        config.providers.judged().map_err(|e| e.to_string())
    }

    fn one(text: &str, name: &str) -> Upstream {
        judged(text).unwrap()[&name.parse::<Capability>().unwrap()].clone()
    }

    #[test]
    fn a_box_without_configuration_has_both_providers_and_no_key() {
        let found = judged("").unwrap();
        let hosts: Vec<&str> = found.values().map(|it| it.host.as_str()).collect();
        assert_eq!(hosts, ["api.anthropic.com", "api.openai.com"]);
        assert!(
            found
                .values()
                .all(|it| it.key.is_none() && it.port == 443 && it.prefix.is_empty())
        );
        assert!(
            found
                .values()
                .all(|it| it.caps.requests.is_some() && it.caps.tokens.is_some())
        );
    }

    #[test]
    fn a_provider_may_be_elsewhere_at_another_port_and_below_a_path() {
        let text = "[providers.llm]\nkind = \"openai\"\nupstream = \"https://llm.example:8443/openai/\"\nkey = \"llm\"\n\
                    daily_requests = 5\nsandbox_daily_tokens = 7\n";
        let llm = one(text, "llm");
        assert_eq!(
            (llm.host.as_str(), llm.port, llm.prefix.as_str(), llm.key.as_deref()),
            ("llm.example", 8443, "/openai", Some("llm"))
        );
        assert_eq!((llm.caps.requests, llm.caps.sandbox_tokens), (Some(5), Some(7)));
        // A change of one field leaves the rest as it was.
        let changed = one("[providers.anthropic]\nkey = \"anthropic-key\"\n", "anthropic");
        assert_eq!(
            (changed.host.as_str(), changed.kind),
            ("api.anthropic.com", ProviderKind::Anthropic)
        );
    }

    #[test]
    fn what_is_unknown_or_unsafe_is_refused_with_where_it_stands() {
        for (text, named) in [
            ("[providers]\ncolour = 3\n", "line 2"),
            ("[providers.openai]\nkey = \"k\"\ncolour = 3\n", "line 3"),
            ("[providers.openai]\nupstream = \"http://api.openai.com\"\n", "upstream"),
            ("[providers.openai]\nupstream = \"https://127.0.0.1\"\n", "upstream"),
            (
                "[providers.openai]\nupstream = \"https://u:p@api.openai.com\"\n",
                "upstream",
            ),
            (
                "[providers.openai]\nupstream = \"https://api.openai.com/?a=b\"\n",
                "upstream",
            ),
            (
                "[providers.openai]\nupstream = \"https://api.openai.com/a//b\"\n",
                "upstream",
            ),
            ("[providers.openai]\nkey = \"../key\"\n", "key"),
            ("[providers.openai]\nkey = \"/etc/shadow\"\n", "key"),
            ("[providers.openai]\ndaily_requests = -1\n", "line 2"),
            ("[providers.llm]\n", "kind"),
            ("[providers.LLM]\nkind = \"openai\"\n", "LLM"),
        ] {
            let error = judged(text).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
