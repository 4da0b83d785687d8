//! `choir releases`: what a sandbox can start from. It must not know how one is made.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use choir_api::client::Client;
use choir_api::workspaces::{CreateRelease, Page, Release};
use choir_core::{ReleaseConfig, ReleaseId, Slot};
use clap::Subcommand;
use serde_json::json;

use crate::build::{self, Asked};
use crate::context::Context;
use crate::failure::Failure;
use crate::output::{ago, bytes, table};
use crate::verbs::exec::variable;
use crate::{progress, registry};

/// How long one call waits for an import; then it asks again.
const CALL: Duration = Duration::from_secs(60);
/// Of the boxes that this is for.
pub const ARCHITECTURE: &str = "amd64";
/// Between two looks at one that takes longer.
const LOOK: Duration = Duration::from_secs(1);

/// List, make and delete what sandboxes can start from
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  choir releases\n  choir releases make --from dev --name with-postgres\n  choir releases import image.tar --name alpine --config config.json\n  choir releases pull debian:12\n  choir releases build . --name blog --arg VERSION=3\n  choir releases rm r-…\nAn image archive is what `podman save` or `docker save` writes. From a registry this program fetches an image itself; the hypervisor speaks to none, and no sandbox sees your logins. Of what the image says of how to run it nothing is used: give `start`, `env`, `app_port` and `health` in the configuration."
)]
pub struct Args {
    #[command(subcommand)]
    pub what: Option<What>,
}

#[derive(Debug, Subcommand)]
pub enum What {
    /// List them, with who uses them (the default)
    List,
    /// Make one of what the system of a slot is now; its home stays where it is
    Make {
        /// Whose system
        #[arg(long, value_name = "SLOT")]
        from: Slot,
        #[arg(long)]
        name: Option<String>,
        /// A JSON file: `env`, `start`, `services`, `app_port`, `health`, `limits` [default: as the slot's release says]
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Make one of an image archive
    Import {
        archive: PathBuf,
        /// [default: the file's name]
        #[arg(long)]
        name: Option<String>,
        /// A JSON file: `env`, `start`, `services`, `app_port`, `health`, `limits`
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Make one of an image in a registry, with the logins of `podman login` or `docker login`
    Pull {
        /// Such as `debian:12`, `ghcr.io/owner/name:tag` or `…@sha256:…`
        image: String,
        /// [default: the image's name and tag]
        #[arg(long)]
        name: Option<String>,
        /// A JSON file: `env`, `start`, `services`, `app_port`, `health`, `limits`
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Of the images of one name, that for Linux on this
        #[arg(long, default_value = ARCHITECTURE)]
        arch: String,
    },
    /// Make one of a Dockerfile or a devcontainer.json, whose steps run in a workspace that is deleted at the end
    #[command(after_help = BUILDING)]
    Build {
        /// What COPY copies from, and where the file is looked for
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// One that ends with .json is a devcontainer.json [default: DIR/Dockerfile, else its devcontainer.json]
        #[arg(long, value_name = "PATH")]
        file: Option<PathBuf>,
        /// [default: as the devcontainer.json says, else the directory's name]
        #[arg(long)]
        name: Option<String>,
        /// The value of an ARG; may be repeated
        #[arg(long = "arg", value_name = "KEY=VALUE", value_parser = variable)]
        args: Vec<(String, String)>,
    },
    /// Delete one that nothing uses
    Rm { id: ReleaseId },
}

const BUILDING: &str = "Example:\n  choir releases build .\n  choir releases build blog --file blog/web.Dockerfile --name web --arg VERSION=3\n\nFROM names a release of this box by its name, id or image; `default` is the one that new workspaces start from. One that is not here is fetched as by `choir releases pull`, for linux/amd64. What that release starts runs while the steps do.\nRUN is root until USER says otherwise, and has 30 minutes. CMD and ENTRYPOINT become what the release starts, as the user choir in WORKDIR; the first EXPOSE is the app's port. One stage can be built; here-documents, --mount, HEALTHCHECK, SHELL and ONBUILD are refused, LABEL, MAINTAINER, STOPSIGNAL and VOLUME are of no effect, and .dockerignore is not read.\nThe commands of a devcontainer.json run as the user choir in its home, without a copy of DIR. What a step writes to /home/choir is not in the release; `sudo` puts things elsewhere.";

pub async fn run(ctx: &Context, args: &Args) -> Result<(), Failure> {
    let client = ctx.client()?;
    match &args.what {
        None | Some(What::List) => {
            let page = client.releases().await?;
            ctx.show(&page, || list(ctx, &page))
        }
        Some(What::Make { from, name, config }) => {
            let slots = client.workspace(&ctx.workspace).await?.slots;
            let asked = CreateRelease {
                sandbox: Some(slots.get(*from).sandbox.clone()),
                name: name.clone(),
                config: config.as_deref().map(read).transpose()?,
                image: None,
            };
            let making = client.create_release(&asked);
            let made = progress::watch("release", ctx.json, making).await?;
            tell(ctx, &made)
        }
        Some(What::Import { archive, name, config }) => {
            let named = archive.file_stem().map(|stem| stem.to_string_lossy().into_owned());
            let name = name.clone().or(named).unwrap_or_default();
            let config = config.as_deref().map(read).transpose()?;
            let cannot = |e| Failure::Failed(format!("{} cannot be read: {e}", archive.display()));
            let file = File::open(archive).map_err(cannot)?;
            let importing = import(&client, file, &name, config.as_ref());
            let made = progress::watch("import", ctx.json, importing).await?;
            tell(ctx, &made)
        }
        Some(What::Pull {
            image,
            name,
            config,
            arch,
        }) => {
            let config = config.as_deref().map(read).transpose()?;
            let made = pull(ctx, &client, image, arch, name.as_deref(), config.as_ref()).await?;
            tell(ctx, &made)
        }
        Some(What::Build {
            directory,
            file,
            name,
            args,
        }) => {
            let asked = Asked {
                directory,
                file: file.as_deref(),
                name: name.as_deref(),
                args: args.iter().cloned().collect(),
            };
            let made = build::build(ctx, asked).await?;
            tell(ctx, &made)
        }
        Some(What::Rm { id }) => {
            client.delete_release(id).await?;
            ctx.show(&json!({"deleted": id}), || format!("{id} is gone"))
        }
    }
}

/// Fetches an image and imports it.
pub async fn pull(
    ctx: &Context,
    client: &Client,
    image: &str,
    arch: &str,
    name: Option<&str>,
    config: Option<&ReleaseConfig>,
) -> Result<Release, Failure> {
    let pulled = progress::watch("pull", ctx.json, registry::pull(image, arch)).await?;
    eprintln!("{}", pulled.pinned);
    let importing = import(client, pulled.archive, name.unwrap_or(&pulled.name), config);
    progress::watch("import", ctx.json, importing).await
}

async fn import(
    client: &Client,
    archive: File,
    name: &str,
    config: Option<&ReleaseConfig>,
) -> Result<Release, Failure> {
    let mut release = client.upload_release(name, config, archive, CALL).await?;
    while release.state == "importing" {
        tokio::time::sleep(LOOK).await;
        release = client.release(&release.id).await?;
    }
    match release.reason {
        Some(reason) if release.state == "rejected" => Err(Failure::Failed(reason)),
        _ => Ok(release),
    }
}

fn read(path: &Path) -> Result<ReleaseConfig, Failure> {
    let wrong = |e: &dyn std::fmt::Display| Failure::Failed(format!("{}: {e}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|e| wrong(&e))?;
    serde_json::from_str(&text).map_err(|e| wrong(&e))
}

fn tell(ctx: &Context, made: &Release) -> Result<(), Failure> {
    ctx.show(made, || {
        let (id, name) = (&made.id, &made.name);
        format!("{id} is {name}; try it with: choir deploy dev {id}")
    })
}

fn list(ctx: &Context, page: &Page<Release>) -> String {
    let rows: Vec<Vec<String>> = page
        .items
        .iter()
        .map(|r| {
            let mut used = r.used_by.clone();
            if r.used_elsewhere > 0 {
                used.push(format!("{} of others", r.used_elsewhere));
            }
            vec![
                r.id.to_string(),
                r.name.clone(),
                if r.own { "you" } else { "the box" }.to_owned(),
                r.state.clone(),
                ago(Some(r.created_at), ctx.now),
                r.bytes.map_or_else(|| "-".to_owned(), bytes),
                r.image_digest.chars().take(12).collect(),
                if used.is_empty() {
                    "-".to_owned()
                } else {
                    used.join(", ")
                },
            ]
        })
        .collect();
    table(
        &["ID", "NAME", "OF", "STATE", "CREATED", "HOLDS", "IMAGE", "USED BY"],
        &rows,
    )
}
