//! What root may do on the host's own console, beside a running hypervisor or without one.

use std::sync::Arc;

use anyhow::{Context, bail};
use choir_broker::{KeyFile, Rotation, RotationStep};
use choir_core::Name;
use choir_runtime::VolumesClient;
use choir_store::{AuditEvent, Store};

use crate::auth::Auth;
use crate::clock::{Clock as _, SystemClock};
use crate::config::Config;
use crate::doctor::{self, Verdict};
use crate::keys;
use crate::random::{OsRandom, Random};
use crate::serve::auth_deps;
use crate::{fsck, serve};

fn store(config: &Config) -> anyhow::Result<Store> {
    let path = &config.store.path;
    if !path.exists() {
        bail!(
            "there is no database at {}; start the hypervisor first or name its configuration",
            path.display()
        );
    }
    Ok(Store::open(path)?)
}

async fn auth(config: &Config) -> anyhow::Result<Auth> {
    let store = store(config)?;
    let random: Arc<dyn Random> = Arc::new(OsRandom);
    let key = keys::load(&config.key_file(), &store, &random).await?;
    store.settle_audit(SystemClock.now()).await?;
    Ok(Auth::new(auth_deps(
        config,
        store,
        Arc::new(SystemClock),
        random,
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

/// Replaces the master key, or finishes a replacement that was stopped; says which.
pub async fn rotate_key(config: Config) -> anyhow::Result<String> {
    let (file, random): (_, Arc<dyn Random>) = (config.key_file(), Arc::new(OsRandom));
    let store = store(&config)?;
    // What is audited here belongs to the chain, too.
    keys::load(&file, &store, &random).await?;
    store.settle_audit(SystemClock.now()).await?;
    let rotation = Rotation::new(store, KeyFile::new(&file), keys::fill(&random));
    let begun = rotation.begin().await?;
    let mut resealed = 0;
    loop {
        let event = AuditEvent {
            at: SystemClock.now(),
            actor: "root".into(),
            user: None,
            action: "key.rotate",
            subject: "master key".into(),
            outcome: "ok",
        };
        match rotation.step(event).await? {
            RotationStep::OwnKey => {}
            RotationStep::DataKeys(some) => resealed += some,
            RotationStep::Finished => break,
        }
    }
    let what = if begun {
        "a new master key is in use"
    } else {
        "an earlier rotation is finished; run this again for one more new key"
    };
    Ok(format!(
        "{what} ({resealed} users' keys were sealed under it); copy {} to where you keep it offline, and keep the old \
         copy for as long as you keep backups from before",
        file.display()
    ))
}

/// Prints how each part is.
pub async fn doctor(config: Config, warnings: Vec<String>, json: bool) -> anyhow::Result<()> {
    let checks = doctor::look(&config, warnings).await;
    if json {
        println!("{}", serde_json::to_string_pretty(&checks)?);
    } else {
        for check in &checks {
            let line = format!("{:<7} {:<14} {}", check.result.as_str(), check.name, check.detail);
            println!("{}", line.trim_end());
        }
    }
    match checks.iter().filter(|check| check.result == Verdict::Failed).count() {
        0 => Ok(()),
        failed => bail!("{failed} of {} checks failed", checks.len()),
    }
}

/// Prints what does not fit together, after removing what belongs to nobody if that is asked for.
pub async fn fsck(config: Config, repair: bool, json: bool) -> anyhow::Result<()> {
    let path = &config.store.path;
    let store = Store::open_read_only(path)
        .with_context(|| format!("there is no database at {}; name its configuration", path.display()))?;
    let runtime = serve::runtime(&config)?;
    let volumes = VolumesClient::new(config.sandboxes.volumes_socket.clone());
    let mut findings = fsck::beside(&store, &*runtime, &volumes).await?;
    if repair {
        fsck::repair(&mut findings, &*runtime, &volumes).await?;
    }
    let told: Vec<_> = findings.into_iter().map(|finding| finding.told).collect();
    if json {
        println!("{}", serde_json::to_string_pretty(&told)?);
    } else {
        for finding in &told {
            let done = if finding.repaired { " (removed)" } else { "" };
            println!("{} {}{done}", finding.invariant, finding.what);
        }
    }
    match told.iter().filter(|finding| !finding.repaired).count() {
        0 if json => Ok(()),
        0 => {
            println!("clean: database, containers and volumes fit together");
            Ok(())
        }
        left => bail!("{left} things do not fit together"),
    }
}
