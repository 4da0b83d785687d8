//! `choir export`: what a slot holds, its release's configuration and the workspace's policy, in one encrypted file. It must
//! not put a secret's value there, which it never sees.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use age::{Recipient, scrypt, x25519};
use choir_api::client::Client;
use choir_api::workspaces::Snapshot;
use choir_core::{SecretName, Slot, SnapshotId};
use serde_json::json;

use crate::bundle::{ExportedRelease, FORMAT, Manifest, Writer};
use crate::context::Context;
use crate::failure::Failure;
use crate::output::bytes;
use crate::progress::{self, Line};
use crate::prompt;
use crate::verbs::snapshots;

/// Write what a slot holds to an encrypted file that `choir import` brings to another box
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  choir export\n  choir export blog.choir --to age1…\nThe file holds all files of the slot, the configuration of its release, and the workspace's settings and grants. Of secrets it holds the names that the grants use, and no value. It is an age file: `age -d FILE | gunzip | tar t` lists what is in it."
)]
pub struct Args {
    /// Where to write it to [default: the workspace's name and the day, as in main-2026-01-02.choir]
    pub file: Option<PathBuf>,
    /// What to take a snapshot of
    #[arg(long, default_value = "live")]
    pub slot: Slot,
    /// A snapshot that `choir snapshots` shows, instead of a new one
    #[arg(long, value_name = "ID", conflicts_with = "slot")]
    pub snapshot: Option<SnapshotId>,
    /// Whose identity opens it, as `age-keygen` shows it; several times for several [default: who knows a passphrase]
    #[arg(long = "to", value_name = "AGE_RECIPIENT")]
    pub recipients: Vec<x25519::Recipient>,
    /// Take the passphrase from this file instead of asking for it
    #[arg(long, value_name = "FILE", conflicts_with = "recipients")]
    pub passphrase_file: Option<PathBuf>,
}

pub async fn run(ctx: &Context, args: &Args) -> Result<(), Failure> {
    let day = ctx.now.strftime("%Y-%m-%d");
    let usual = || PathBuf::from(format!("{}-{day}.choir", ctx.workspace));
    let file = args.file.clone().unwrap_or_else(usual);
    if file.symlink_metadata().is_ok() {
        return Err(Failure::Failed(format!(
            "{} is there already; name another file, or delete it",
            file.display()
        )));
    }
    let recipients = recipients(args)?;
    let client = ctx.client()?;
    let snapshot = match &args.snapshot {
        Some(id) => known(ctx, &client, id).await?,
        None => {
            let taking = client.take_snapshot(&ctx.workspace, args.slot);
            progress::watch("snapshot", ctx.json, taking).await?
        }
    };
    let written = tokio::select! {
        written = write(ctx, &client, &file, &snapshot, &recipients) => written,
        _ = tokio::signal::ctrl_c() => Err(Failure::Exit(130)),
    };
    if args.snapshot.is_none()
        && let Err(error) = client
            .delete_snapshot(&ctx.workspace, snapshot.slot, &snapshot.id)
            .await
    {
        let id = &snapshot.id;
        eprintln!("choir: the snapshot that was taken stays: {error}; delete it with: choir snapshots rm {id}");
    }
    let size = written?;
    let shown = json!({
        "file": file.display().to_string(), "bytes": size, "workspace": ctx.workspace, "slot": snapshot.slot,
        "snapshot": snapshot.id,
    });
    ctx.show(&shown, || {
        format!(
            "{0} holds {1} of {2} ({3}); bring it to another box with: choir import {0}",
            file.display(),
            snapshot.slot,
            ctx.workspace,
            bytes(size)
        )
    })
}

fn recipients(args: &Args) -> Result<Vec<Box<dyn Recipient>>, Failure> {
    if args.recipients.is_empty() {
        let passphrase = prompt::passphrase(args.passphrase_file.as_deref(), true)?;
        let recipient: Box<dyn Recipient> = Box::new(scrypt::Recipient::new(passphrase));
        return Ok(vec![recipient]);
    }
    let given = args.recipients.iter().cloned();
    Ok(given.map(|one| -> Box<dyn Recipient> { Box::new(one) }).collect())
}

async fn known(ctx: &Context, client: &Client, id: &SnapshotId) -> Result<Snapshot, Failure> {
    let page = snapshots::all(client, &ctx.workspace).await?;
    let found = page.items.into_iter().find(|snapshot| snapshot.id == *id);
    found.ok_or_else(|| {
        let workspace = &ctx.workspace;
        Failure::Failed(format!(
            "there is no snapshot {id} of {workspace}; `choir snapshots` lists those that are there"
        ))
    })
}

/// Writes beside the file and moves the whole there; how many bytes it has.
async fn write(
    ctx: &Context,
    client: &Client,
    file: &Path,
    snapshot: &Snapshot,
    recipients: &[Box<dyn Recipient>],
) -> Result<u64, Failure> {
    let wrong = |e: io::Error| Failure::Failed(format!("cannot write {}: {e}", file.display()));
    let manifest = manifest(ctx, client, snapshot).await?;
    let (part, opened) = Part::of(file)?;
    let mut writer = Writer::begin(BufWriter::new(opened), recipients, &manifest).map_err(wrong)?;
    let mut archive = client
        .export_snapshot(&ctx.workspace, snapshot.slot, &snapshot.id)
        .await?;
    let (mut line, mut read) = (Line::begin(ctx.json), 0);
    while let Some(received) = archive.next().await? {
        writer.write_all(&received).map_err(wrong)?;
        read += received.len() as u64;
        line.tell(&format!("export … {}", bytes(read)));
    }
    drop(line);
    let mut written = writer.finish().map_err(wrong)?;
    written.flush().map_err(wrong)?;
    let whole = written.get_ref();
    whole.sync_all().map_err(wrong)?;
    let size = whole.metadata().map_err(wrong)?.len();
    fs::rename(&part.0, file).map_err(wrong)?;
    Ok(size)
}

async fn manifest(ctx: &Context, client: &Client, snapshot: &Snapshot) -> Result<Manifest, Failure> {
    let settings = client.workspace(&ctx.workspace).await?.settings;
    let release = client.release(&snapshot.release).await?;
    let mut grants = client.grants().await?.items;
    grants.retain(|grant| grant.workspace == ctx.workspace);
    let mut secrets: Vec<SecretName> = grants.iter().map(|grant| grant.secret.clone()).collect();
    secrets.sort();
    secrets.dedup();
    Ok(Manifest {
        format: FORMAT,
        exported_at: ctx.now,
        origin: client.origin(),
        workspace: ctx.workspace.clone(),
        slot: snapshot.slot,
        snapshot: snapshot.id.clone(),
        settings,
        release: ExportedRelease {
            name: release.name,
            image_digest: release.image_digest,
            config: release.config,
        },
        secrets,
        grants,
    })
}

/// A file that is not whole yet, and goes when this does; moved away, it stays.
struct Part(PathBuf);

impl Part {
    fn of(file: &Path) -> Result<(Self, File), Failure> {
        let mut path = file.as_os_str().to_owned();
        path.push(".part");
        let path = PathBuf::from(path);
        let opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        match opened {
            Ok(opened) => Ok((Self(path), opened)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(Failure::Failed(format!(
                "{} is there: another export writes it, or one was killed; delete it if none runs",
                path.display()
            ))),
            Err(error) => Err(Failure::Failed(format!("cannot write {}: {error}", path.display()))),
        }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}
