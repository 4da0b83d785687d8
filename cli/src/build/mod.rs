//! `choir releases build`: a release of a Dockerfile or a devcontainer.json. It must not run any of it on this machine:
//! the steps run in a workspace that is made for them and deleted at the end.

mod devcontainer;
mod dockerfile;
mod site;
mod sources;
mod steps;
mod words;

use std::fs;
use std::path::{Path, PathBuf};

use choir_api::client::Client;
use choir_api::workspaces::Release;
use choir_core::{Name, ReleaseConfig};

use self::devcontainer::{Base, Devcontainer};
use self::dockerfile::Dockerfile;
use self::site::Site;
use self::steps::{Plan, Values};
use crate::context::Context;
use crate::failure::Failure;
use crate::throwaway::letters;
use crate::verbs::releases;
use crate::verbs::workspaces::DELETION;

/// What is looked for where no file is named.
const FILES: [&str; 3] = ["Dockerfile", ".devcontainer/devcontainer.json", ".devcontainer.json"];
/// The base that new workspaces start from.
const DEFAULT: &str = "default";

/// What was typed.
pub struct Asked<'a> {
    pub directory: &'a Path,
    pub file: Option<&'a Path>,
    pub name: Option<&'a str>,
    pub args: Values,
}

/// What was read of it.
#[derive(Default)]
struct Recipe {
    /// Where copies come from; canonical.
    context: PathBuf,
    /// Where the base is named, and how.
    base: (String, String),
    dockerfile: Option<Dockerfile>,
    args: Values,
    /// With how messages name it.
    devcontainer: Option<(String, Devcontainer)>,
    name: String,
}

/// Builds it.
pub async fn build(ctx: &Context, asked: Asked<'_>) -> Result<Release, Failure> {
    let recipe = Recipe::read(asked).map_err(Failure::Failed)?;
    let client = ctx.client()?;
    let base = base(ctx, &client, &recipe.base).await?;
    let (context, name) = (recipe.context.clone(), recipe.name.clone());
    let plan = recipe.plan(&base.config).map_err(Failure::Failed)?;
    if context.join(".dockerignore").exists() {
        eprintln!("choir: .dockerignore is not read; a COPY of a directory copies all that is in it");
    }
    for note in &plan.notes {
        eprintln!("choir: {note}");
    }
    let workspace: Name = format!("build-{}", letters()?)
        .parse()
        .map_err(|e: choir_core::name::NameError| Failure::Failed(e.to_string()))?;
    let site = Site {
        client: &client,
        workspace,
        context: &context,
    };
    let made = tokio::select! {
        made = site.build(&base.id, &plan, &name) => made,
        _ = tokio::signal::ctrl_c() => {
            eprintln!("\nThe build was stopped; what it made is deleted.");
            Err(Failure::Exit(130))
        }
    };
    match client.delete_workspace(&site.workspace, DELETION).await {
        Err(error) if error.status() != Some(404) => {
            let name = &site.workspace;
            eprintln!(
                "choir: workspace {name} is still there: {error}; delete it with: choir workspaces delete {name} --yes"
            );
        }
        _ => {}
    }
    made
}

impl Recipe {
    fn read(asked: Asked<'_>) -> Result<Self, String> {
        let top = asked.directory;
        let top = top
            .canonicalize()
            .map_err(|e| format!("{} cannot be read: {e}", top.display()))?;
        let file = match asked.file {
            Some(file) => file.to_owned(),
            None => FILES
                .map(|name| top.join(name))
                .into_iter()
                .find(|file| file.exists())
                .ok_or_else(|| {
                    format!(
                        "{} has no {}; name a file with --file",
                        top.display(),
                        FILES.join(" and no ")
                    )
                })?,
        };
        let mut recipe = if file.extension().is_some_and(|ending| ending == "json") {
            Self::of_devcontainer(&top, &file, asked.args)?
        } else {
            Self::of_dockerfile(top.clone(), &file, asked.args)?
        };
        let of_directory = || top.file_name().map(|name| name.to_string_lossy().into_owned());
        let own = recipe.devcontainer.as_ref().and_then(|(_, read)| read.name.clone());
        let name = asked.name.map(str::to_owned).or(own).or_else(of_directory);
        recipe.name = name.ok_or("the directory has no name; name the release with --name")?;
        Ok(recipe)
    }

    fn of_dockerfile(context: PathBuf, file: &Path, args: Values) -> Result<Self, String> {
        let dockerfile = Dockerfile::parse(&shown(file), &text(file)?)?;
        Ok(Self {
            base: steps::base(&dockerfile, &args)?,
            context,
            dockerfile: Some(dockerfile),
            args,
            ..Self::default()
        })
    }

    fn of_devcontainer(top: &Path, file: &Path, given: Values) -> Result<Self, String> {
        let shown = shown(file);
        let read = Devcontainer::parse(&shown, &text(file)?)?;
        let mut recipe = match &read.base {
            Base::Named(_) if !given.is_empty() => {
                return Err(format!(
                    "{shown}: --arg is for a Dockerfile, and none is built here; leave it out"
                ));
            }
            Base::Named(name) => Self {
                base: (shown.clone(), name.clone()),
                context: top.to_owned(),
                ..Self::default()
            },
            Base::Dockerfile(build) => {
                let beside = file.parent().unwrap_or(top);
                let below = |path: &str| {
                    sources::inside(top, &beside.join(path)).map_err(|why| format!("{shown}: {path} {why}"))
                };
                let mut args = build.args.clone();
                args.extend(given);
                Self::of_dockerfile(below(&build.context)?, &below(&build.dockerfile)?, args)?
            }
        };
        recipe.devcontainer = Some((shown, read));
        Ok(recipe)
    }

    fn plan(self, base: &ReleaseConfig) -> Result<Plan, String> {
        let mut plan = match &self.dockerfile {
            Some(file) => steps::plan(file, &self.args, base)?,
            None => Plan {
                config: base.clone(),
                ..Plan::default()
            },
        };
        if let Some((file, read)) = self.devcontainer {
            read.extend(&mut plan, &file);
        }
        plan.config.validate().map_err(|e| e.to_string())?;
        Ok(plan)
    }
}

/// How messages name a file.
fn shown(file: &Path) -> String {
    file.file_name()
        .unwrap_or(file.as_os_str())
        .to_string_lossy()
        .into_owned()
}

fn text(file: &Path) -> Result<String, String> {
    fs::read_to_string(file).map_err(|e| format!("{} cannot be read: {e}", file.display()))
}

/// The newest usable release that is meant, by its name, its id or its image; else the image of that name in a registry.
async fn base(ctx: &Context, client: &Client, (at, wanted): &(String, String)) -> Result<Release, Failure> {
    let releases = client.releases().await?.items;
    if let Some(found) = choose(releases, wanted) {
        return Ok(found);
    }
    eprintln!("choir: {at}: there is no release {wanted} here, so the image is fetched");
    releases::pull(ctx, client, wanted, releases::ARCHITECTURE, Some(wanted), None).await
}

fn choose(releases: Vec<Release>, wanted: &str) -> Option<Release> {
    let digest = wanted
        .rsplit('@')
        .next()
        .and_then(|digest| digest.strip_prefix("sha256:"));
    let mut usable: Vec<Release> = releases
        .into_iter()
        .filter(|r| matches!(r.state.as_str(), "candidate" | "verified"))
        .collect();
    let meant = |r: &Release| {
        r.name == wanted
            || r.id.as_str() == wanted
            || r.image_digest == wanted
            || digest == Some(r.image_digest.as_str())
    };
    let default = |r: &Release| wanted == DEFAULT && !r.own && r.config == ReleaseConfig::default();
    let at = usable
        .iter()
        .position(meant)
        .or_else(|| usable.iter().position(default))?;
    Some(usable.swap_remove(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(directory: &Path) -> Asked<'_> {
        Asked {
            directory,
            file: None,
            name: None,
            args: Values::new(),
        }
    }

    fn release(id: &str, name: &str, own: bool, state: &str) -> Release {
        let text = format!(
            r#"{{"id": "{id}", "name": "{name}", "own": {own}, "image_digest": "{name}-digest", "config": {{}},
                "state": "{state}", "created_at": "2026-01-01T00:00:00Z"}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn a_dockerfile_is_taken_before_a_devcontainer() {
        let place = tempfile::tempdir().unwrap();
        assert!(Recipe::read(asked(place.path())).is_err());
        fs::write(
            place.path().join(".devcontainer.json"),
            r#"{"image": "one", "name": "own"}"#,
        )
        .unwrap();
        let recipe = Recipe::read(asked(place.path())).unwrap();
        assert_eq!((recipe.base.1.as_str(), recipe.name.as_str()), ("one", "own"));
        fs::write(place.path().join("Dockerfile"), "FROM two\n").unwrap();
        let recipe = Recipe::read(asked(place.path())).unwrap();
        assert_eq!(recipe.base, ("Dockerfile:1".to_owned(), "two".to_owned()));
    }

    #[test]
    fn a_devcontainer_builds_only_what_is_in_the_directory() {
        let place = tempfile::tempdir().unwrap();
        let top = place.path().join("top");
        fs::create_dir_all(top.join(".devcontainer")).unwrap();
        let written = |context: &str| {
            let text = format!(r#"{{"build": {{"dockerfile": "Dockerfile", "context": "{context}"}}}}"#);
            fs::write(top.join(".devcontainer/devcontainer.json"), text).unwrap();
            Recipe::read(asked(&top))
        };
        fs::write(top.join(".devcontainer/Dockerfile"), "FROM a\n").unwrap();
        assert_eq!(written("..").unwrap().context, top.canonicalize().unwrap());
        let error = written("../..").err().unwrap();
        assert!(error.contains("leads out of"), "{error}");
    }

    #[test]
    fn the_newest_usable_release_of_a_name_is_the_base() {
        let releases = || {
            vec![
                release("r-aaaaaaaaaaaaaaaaaaaaaaaaaa", "py", true, "rejected"),
                release("r-bbbbbbbbbbbbbbbbbbbbbbbbbb", "py", true, "candidate"),
                release("r-cccccccccccccccccccccccccc", "default-1", false, "verified"),
            ]
        };
        let chosen = |wanted: &str| choose(releases(), wanted).map(|r| r.id.to_string());
        let second = Some("r-bbbbbbbbbbbbbbbbbbbbbbbbbb".to_owned());
        for wanted in ["py", "r-bbbbbbbbbbbbbbbbbbbbbbbbbb", "x@sha256:py-digest"] {
            assert_eq!(chosen(wanted), second, "{wanted}");
        }
        assert_eq!(chosen("default"), Some("r-cccccccccccccccccccccccccc".to_owned()));
        assert_eq!(chosen("python:3.12"), None);
    }
}
