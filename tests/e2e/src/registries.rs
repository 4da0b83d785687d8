//! Which package registries the tools in a sandbox ask on this machine, which may know other ones than the tools' makers
//! and keep them on private addresses. It must not reach any of them.

use std::collections::BTreeSet;
use std::net::{IpAddr, ToSocketAddrs as _};

use anyhow::{Context as _, Result, ensure};
use choir_api::client::Client;
use choir_core::Slot;

use crate::person::exec;

/// How each tool names the servers it would ask.
pub const APT: &str = "apt-get update --print-uris";
pub const NPM: &str = "npm config get registry";
pub const PIP: &str = "pip config list; python3 -c 'from pip._internal.models.index import PyPI as it; \
                       print(it.simple_url, \"https://\" + it.file_storage_domain)'";
/// Cargo says it only to who debugs it.
pub const CARGO: &str = "cd $(mktemp -d) && cargo init -q --name a && echo 'itoa = \"1\"' >> Cargo.toml; \
                         CARGO_HTTP_DEBUG=true CARGO_LOG=network=debug cargo fetch 2>&1 | sed -n 's|.*CONNECT |https://|p'";

/// Every one of them.
pub const ALL: [&str; 4] = [APT, NPM, PIP, CARGO];

/// The addresses of the servers that these tools, asked in dev, name, as this machine resolves them.
pub async fn networks(client: &Client, tools: &[&str]) -> Result<Vec<String>> {
    let mut hosts = BTreeSet::new();
    for asked in tools {
        let told = exec(client, Slot::Dev, asked).await?;
        let text = told.stdout + &told.stderr;
        let found: Vec<_> = text.split("://").skip(1).filter_map(host).map(str::to_owned).collect();
        ensure!(!found.is_empty(), "`{asked}` names no server: {text}");
        hosts.extend(found);
    }
    let mut networks = BTreeSet::new();
    for host in hosts {
        let resolved = (host.as_str(), 443)
            .to_socket_addrs()
            .with_context(|| format!("{host} does not resolve"))?;
        networks.extend(resolved.map(|it| match it.ip() {
            IpAddr::V4(ip) => format!("{ip}/32"),
            IpAddr::V6(ip) => format!("{ip}/128"),
        }));
    }
    Ok(networks.into_iter().collect())
}

/// The host at the start of what follows a URL's scheme.
fn host(rest: &str) -> Option<&str> {
    let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || ".-".contains(c)));
    Some(&rest[..end.unwrap_or(rest.len())]).filter(|host| host.contains('.'))
}
