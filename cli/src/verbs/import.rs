//! `choir import`: a workspace of what `choir export` wrote, on this box. It must not leave half of one there, nor give a
//! grant for a secret that is not here.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use age::{Identity, IdentityFile, scrypt};
use choir_api::client::Client;
use choir_api::grants::{CreateGrant, Grant};
use choir_api::workspaces::{CreateRelease, CreateWorkspace, Deploy, Fork, Snapshot};
use choir_core::{Name, ReleaseConfig, ReleaseId, SecretName, Slot, SnapshotId, WorkspaceSettings};
use serde::Serialize;
use serde_json::{Value, json};

use crate::bundle::{Archive, Manifest, Sealed};
use crate::context::Context;
use crate::deploying::{self, CALL};
use crate::failure::Failure;
use crate::output::{self, bytes, plain};
use crate::progress::Line;
use crate::prompt;
use crate::report::Report;
use crate::throwaway::unmake;
use crate::verbs::grants;
use crate::verbs::swap::swap;

/// A passphrase is not tried with more work than 2 to this: 4 GiB of memory. As the tool `age` does.
const MOST_WORK: u8 = 22;

/// Make a workspace of a file that `choir export` wrote
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  choir import main-2026-01-02.choir\n  choir import blog.choir --identity key.txt --name blog-2\nBoth slots hold then what was exported, under a release of its own. If anything fails, all that was made is deleted again. Whoever wrote the file chose what the workspace runs and what it may do: grants are only listed, with what to type for each, unless you ask for them with --grants."
)]
pub struct Args {
    /// What `choir export` wrote
    pub file: PathBuf,
    /// What the workspace is called here [default: as where it was exported]
    #[arg(long)]
    pub name: Option<Name>,
    /// A file with the identity that opens it, as `age-keygen` writes it; several times for several
    #[arg(long = "identity", value_name = "FILE")]
    pub identities: Vec<PathBuf>,
    /// Take the passphrase from this file instead of asking for it
    #[arg(long, value_name = "FILE", conflicts_with = "identities")]
    pub passphrase_file: Option<PathBuf>,
    /// Let the workspace use your secrets as it did where it was exported
    #[arg(long)]
    pub grants: bool,
}

type Files = Archive<BufReader<File>>;

/// A grant that was not made.
#[derive(Serialize)]
struct Left {
    capability: String,
    slot: Slot,
    secret: SecretName,
    reason: String,
    /// What to type, once the reason is out of the way.
    command: String,
}

#[derive(Default)]
struct Granted {
    made: Vec<Grant>,
    left: Vec<Left>,
    missing: Vec<SecretName>,
}

pub async fn run(ctx: &Context, args: &Args) -> Result<(), Failure> {
    let (export, files) = open(args)?;
    let client = ctx.client()?;
    let place = Place {
        client: &client,
        name: args.name.clone().unwrap_or_else(|| export.workspace.clone()),
        json: ctx.json,
        stop: Arc::default(),
    };
    let (mut report, mut release) = (Report::new(ctx.json), None);
    let stop = place.stop.clone();
    // A step that has begun ends: only then is it known what there is to delete.
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            stop.store(true, Ordering::Relaxed);
        }
    });
    let beginning = report
        .step("make the workspace", place.make(&export.release.config))
        .await?;
    if let Err(failure) = place.fill(&export, files, &mut report, &mut release).await {
        let mut undone = unmake(&client, &place.name, release.as_ref()).await;
        if let (Ok(()), Some(beginning)) = (&undone, beginning) {
            undone = unmake(&client, &place.name, Some(&beginning)).await;
        }
        return Err(taken_back(failure, undone, &place.name));
    }
    let granted = place.grant(&export, args.grants).await?;
    if ctx.json {
        return output::json(&json!({
            "workspace": place.name, "release": release, "steps": report.steps, "grants_made": granted.made,
            "grants_left": granted.left, "secrets_missing": granted.missing,
        }));
    }
    output::line(&told(&export, &place.name, &granted))
}

/// What is in the file, once its beginning was found to be in order.
fn open(args: &Args) -> Result<(Manifest, Files), Failure> {
    let shown = args.file.display();
    let wrong = |why: String| Failure::Failed(format!("{shown} was not imported: {why}"));
    let file = File::open(&args.file).map_err(|e| wrong(format!("it cannot be read: {e}")))?;
    let sealed = Sealed::new(BufReader::new(file)).map_err(wrong)?;
    let identities = identities(args, sealed.has_passphrase())?;
    sealed.open(&identities).map_err(wrong)
}

fn identities(args: &Args, by_passphrase: bool) -> Result<Vec<Box<dyn Identity>>, Failure> {
    if by_passphrase {
        let mut identity = scrypt::Identity::new(prompt::passphrase(args.passphrase_file.as_deref(), false)?);
        identity.set_max_work_factor(MOST_WORK);
        let identity: Box<dyn Identity> = Box::new(identity);
        return Ok(vec![identity]);
    }
    if args.identities.is_empty() {
        let message = "it opens with an identity and no passphrase; name the identity's file with --identity";
        return Err(Failure::Usage(message.to_owned()));
    }
    let mut all: Vec<Box<dyn Identity>> = Vec::new();
    for path in &args.identities {
        let wrong = |why: &dyn std::fmt::Display| {
            let shown = path.display();
            Failure::Failed(format!(
                "{shown} holds no age identity, as `age-keygen` writes it: {why}"
            ))
        };
        let read = File::open(path).and_then(|file| IdentityFile::from_buffer(BufReader::new(file)));
        let found = read.map_err(|e| wrong(&e))?.into_identities();
        for identity in found.map_err(|e| wrong(&e))? {
            all.push(identity);
        }
    }
    Ok(all)
}

fn taken_back(failure: Failure, undone: Result<(), Failure>, name: &Name) -> Failure {
    let text = |failure| match failure {
        Failure::Usage(text) | Failure::Failed(text) => text.trim_end_matches('.').to_owned(),
        Failure::Exit(code) => format!("exit code {code}"),
    };
    let failed = text(failure);
    Failure::Failed(match undone {
        Ok(()) => format!("{failed}. All that was made for {name} is deleted again"),
        Err(why) => format!(
            "{failed}. What was made could not be deleted ({}): do it with `choir workspaces delete {name}`, and look at \
             `choir releases`",
            text(why)
        ),
    })
}

fn told(export: &Manifest, name: &Name, granted: &Granted) -> String {
    let (at, origin) = (export.exported_at, plain(&export.origin));
    let mut lines = vec![format!(
        "Workspace {name} is there: live and dev hold what {} of {} held at {origin} on {at}.",
        export.slot, export.workspace
    )];
    for setting in opened(&export.settings) {
        lines.push(format!("It came with {}.", plain(&setting)));
    }
    for grant in &granted.made {
        let (capability, slot, secret) = (&grant.capability, grant.slot, &grant.secret);
        lines.push(format!("{slot} may use {secret} as {capability}."));
    }
    if !granted.left.is_empty() {
        lines.push("Grants that were not made, and what to type for them:".to_owned());
    }
    for secret in &granted.missing {
        lines.push(format!("  choir secrets set {secret}"));
    }
    for left in &granted.left {
        lines.push(format!("  {}", plain(&left.command)));
        lines.push(format!("    ({})", plain(&left.reason)));
    }
    lines.join("\n")
}

/// The workspace that is made.
struct Place<'a> {
    client: &'a Client,
    name: Name,
    json: bool,
    /// Somebody wants it to end.
    stop: Arc<AtomicBool>,
}

impl Place<'_> {
    /// With what its release said from the beginning: what its files say of how it is checked may need that. The release that it
    /// begins with, where it is no other's.
    async fn make(&self, config: &ReleaseConfig) -> Result<Option<ReleaseId>, Failure> {
        let release = match *config == ReleaseConfig::default() {
            true => None,
            false => Some(self.begin_with(config).await?),
        };
        let asked = CreateWorkspace {
            name: self.name.clone(),
            release: release.clone(),
        };
        let Err(error) = self.client.create_workspace_from(&asked).await else {
            return Ok(release);
        };
        if let Some(release) = release {
            let _ = self.client.delete_release(&release).await;
        }
        match error {
            error if error.code() == Some("name_taken") => {
                let why = error.to_string();
                Err(Failure::Failed(format!("{} (with --name)", why.trim_end_matches('.'))))
            }
            error => Err(error.into()),
        }
    }

    async fn begin_with(&self, config: &ReleaseConfig) -> Result<ReleaseId, Failure> {
        let releases = self.client.releases().await?.items;
        let of_the_box = releases
            .iter()
            .find(|r| !r.own && matches!(r.state.as_str(), "candidate" | "verified"));
        let none = || Failure::Failed("the box has no release yet; see `choir releases`".to_owned());
        let image = &of_the_box.ok_or_else(none)?.image_digest;
        let asked = CreateRelease {
            name: Some(format!("what {} began with", self.name)),
            ..CreateRelease::of_image(image, config.clone())
        };
        Ok(self.client.create_release(&asked).await?.id)
    }

    /// Dev gets everything first, and live by a swap. The release is told of as soon as it is there.
    async fn fill(
        &self,
        export: &Manifest,
        files: Files,
        report: &mut Report,
        release: &mut Option<ReleaseId>,
    ) -> Result<(), Failure> {
        let (client, name) = (self.client, &self.name);
        if export.settings != WorkspaceSettings::default() {
            let settling = self.unless_stopped(self.settle(&export.settings));
            report.step("put its settings in place", settling).await?;
        }
        let sent = report.step("send its files", self.send(files)).await?;
        let restoring = self.unless_stopped(self.restore(&sent.id));
        report.step("restore them into dev", restoring).await?;
        let making = self.unless_stopped(self.make_release(export));
        let made = report.step("make a release of its system", making).await?;
        let made = release.insert(made);
        let deploying = self.unless_stopped(self.deploy(made));
        report.step("deploy it into dev", deploying).await?;
        let swapping = self.unless_stopped(swap(client, name));
        report.step("swap: make it live", swapping).await?;
        let forking = self.unless_stopped(self.fork());
        report.step("fork: give dev the same files", forking).await?;
        // It has served; where it stays, it is a snapshot like any other.
        let _ = client.delete_snapshot(name, Slot::Dev, &sent.id).await;
        Ok(())
    }

    async fn settle(&self, settings: &WorkspaceSettings) -> Result<(), Failure> {
        Ok(self.client.patch_workspace(&self.name, settings).await.map(drop)?)
    }

    async fn send(&self, files: Files) -> Result<Snapshot, Failure> {
        let broken = Arc::new(OnceLock::new());
        let sending = Sending {
            files,
            sent: 0,
            line: Line::begin(self.json),
            broken: broken.clone(),
            stop: self.stop.clone(),
        };
        let made = self.client.import_snapshot(&self.name, Slot::Dev, sending).await;
        match broken.get() {
            _ if self.stop.load(Ordering::Relaxed) => Err(stopped()),
            // What the connection says then is only that it was cut.
            Some(why) => Err(Failure::Failed(format!("the file is damaged or not whole: {why}"))),
            None => Ok(made?),
        }
    }

    async fn restore(&self, snapshot: &SnapshotId) -> Result<(), Failure> {
        let (client, name) = (self.client, &self.name);
        let mut quiet = Line::begin(true);
        let done = deploying::carry_out(client, name, "restore", &mut quiet, async |key| {
            client.restore(name, Slot::Dev, snapshot, &key, CALL).await
        });
        done.await.map(drop)
    }

    async fn make_release(&self, export: &Manifest) -> Result<ReleaseId, Failure> {
        let sandbox = self.client.workspace(&self.name).await?.slots.dev.sandbox;
        let asked = CreateRelease {
            name: Some(export.release.name.clone()),
            config: Some(export.release.config.clone()),
            ..CreateRelease::of_sandbox(sandbox)
        };
        Ok(self.client.create_release(&asked).await?.id)
    }

    async fn deploy(&self, release: &ReleaseId) -> Result<(), Failure> {
        let (client, name) = (self.client, &self.name);
        let asked = Deploy {
            release: release.clone(),
        };
        let mut quiet = Line::begin(true);
        let done = deploying::carry_out(client, name, "deploy", &mut quiet, async |key| {
            client.deploy(name, Slot::Dev, &asked, &key, CALL).await
        });
        done.await.map(drop)
    }

    async fn fork(&self) -> Result<(), Failure> {
        let (client, name, asked) = (self.client, &self.name, Fork { from: None });
        let mut quiet = Line::begin(true);
        let done = deploying::carry_out(client, name, "fork", &mut quiet, async |key| {
            client.fork(name, &asked, &key, CALL).await
        });
        done.await.map(drop)
    }

    async fn unless_stopped<T>(&self, step: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(stopped());
        }
        step.await
    }

    /// Makes the grants again, if that was asked for. One that cannot be made is no reason to take the workspace back.
    async fn grant(&self, export: &Manifest, asked_for: bool) -> Result<Granted, Failure> {
        let mut granted = Granted::default();
        let here: Vec<SecretName> = self
            .client
            .secrets()
            .await?
            .items
            .into_iter()
            .map(|it| it.name)
            .collect();
        for grant in &export.grants {
            let reason = if !here.contains(&grant.secret) {
                if !granted.missing.contains(&grant.secret) {
                    granted.missing.push(grant.secret.clone());
                }
                "there is no such secret here".to_owned()
            } else if !asked_for {
                "grants are made with --grants only".to_owned()
            } else {
                match self.client.create_grant(&self.asked(grant)).await {
                    Ok(made) => {
                        granted.made.push(made);
                        continue;
                    }
                    Err(error) => error.to_string(),
                }
            };
            granted.left.push(Left {
                capability: grant.capability.to_string(),
                slot: grant.slot,
                secret: grant.secret.clone(),
                reason,
                command: grants::command(&self.name, grant),
            });
        }
        Ok(granted)
    }

    fn asked(&self, grant: &Grant) -> CreateGrant {
        CreateGrant {
            workspace: self.name.clone(),
            slot: grant.slot,
            capability: grant.capability.clone(),
            secret: grant.secret.clone(),
            template: None,
            hosts: Some(grant.hosts.clone()),
            methods: Some(grant.methods.clone()),
            path_prefix: Some(grant.path_prefix.clone()),
            inject: Some(grant.inject.clone()),
            expires_at: grant.expires_at,
        }
    }
}

fn stopped() -> Failure {
    Failure::Failed("the import was stopped".to_owned())
}

/// What was set on the workspace that lets others in, or what runs there out.
fn opened(settings: &WorkspaceSettings) -> Vec<String> {
    let Ok(Value::Object(settings)) = serde_json::to_value(settings) else {
        return Vec::new();
    };
    let opens = [
        "access",
        "ports",
        "egress",
        "intercept_tls",
        "provider_mode",
        "forward_authorization",
    ];
    let set = settings.iter().filter(|(name, _)| opens.contains(&name.as_str()));
    set.map(|(name, value)| format!("{name}={value}")).collect()
}

/// The files as they are sent. Why they cannot be read further is kept, since the request only breaks off.
struct Sending {
    files: Files,
    /// Bytes.
    sent: u64,
    line: Line,
    broken: Arc<OnceLock<String>>,
    stop: Arc<AtomicBool>,
}

impl Read for Sending {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(io::Error::other("the import was stopped"));
        }
        let read = self.files.read(into).inspect_err(|error| {
            // The first reason is the one to tell.
            let _ = self.broken.set(error.to_string());
        })?;
        self.sent += read as u64;
        self.line.tell(&format!("send … {}", bytes(self.sent)));
        Ok(read)
    }
}
