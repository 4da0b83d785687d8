//! What root may do on the host's own console, beside a running hypervisor or without one.

use std::sync::Arc;

use anyhow::{Context, bail};
use choir_core::Name;
use choir_store::Store;

use crate::auth::Auth;
use crate::clock::SystemClock;
use crate::config::Config;
use crate::keys;
use crate::random::OsRandom;
use crate::serve::auth_deps;

async fn auth(config: &Config) -> anyhow::Result<Auth> {
    let path = &config.store.path;
    if !path.exists() {
        bail!(
            "there is no database at {}; start the hypervisor first or name its configuration",
            path.display()
        );
    }
    let store = Store::open(path)?;
    let key = keys::load(&config.key_file(), &store, &OsRandom).await?;
    Ok(Auth::new(auth_deps(
        config,
        store,
        Arc::new(SystemClock),
        Arc::new(OsRandom),
        &key,
    ))?)
}

/// A new claim link, while nobody has registered.
pub async fn claim(config: Config) -> anyhow::Result<String> {
    let auth = auth(&config).await?;
    match auth.ensure_claim().await? {
        Some(token) => Ok(auth.register_url(&token)),
        None => bail!("this box is claimed; an admin can invite people with `choir invites create`"),
    }
}

/// A one-time link with which an existing user registers a new passkey.
pub async fn recover(config: Config, user: &str) -> anyhow::Result<String> {
    let name: Name = user.parse()?;
    let auth = auth(&config).await?;
    let link = auth
        .recover_link(&name)
        .await
        .with_context(|| format!("no link for {user}; see `choir users`"))?;
    Ok(auth.recover_url(&link))
}
