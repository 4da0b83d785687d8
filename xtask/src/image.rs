//! `cargo xtask image`: the default release's root file system as a tar, from Debian packages and
//! without an image registry. Its name holds a hash of everything that went in, so a second call
//! finds it. Knows nothing of how a sandbox is started from it.

pub mod host;
mod recipe;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::packages::{self, Purpose};
use crate::workspace::Workspace;
use crate::{command, image::recipe::Recipe};

#[derive(Args)]
pub struct Options {
    /// Where the tar goes [default: target/image]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    packages::ensure(&[Purpose::Image])?;
    let workspace = Workspace::load()?;
    let tar = build(&workspace, options.out.as_deref())?;
    println!("{}", tar.display());
    Ok(ExitCode::SUCCESS)
}

/// The tar's absolute path, built first when this recipe was never built here.
pub fn build(workspace: &Workspace, out: Option<&Path>) -> Result<PathBuf> {
    let directory = match out {
        Some(directory) => std::path::absolute(directory)?,
        None => workspace.target_directory.join("image"),
    };
    made(&recipe(workspace, &directory)?, &directory)
}

/// The same of other packages than packages.txt has.
pub fn build_of(workspace: &Workspace, packages: &str, directory: &Path) -> Result<PathBuf> {
    let recipe = Recipe {
        packages: packages.to_owned(),
        ..recipe(workspace, directory)?
    };
    made(&recipe, directory)
}

fn recipe(workspace: &Workspace, directory: &Path) -> Result<Recipe> {
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    Recipe::read(&workspace.workspace_root.join("sandbox/image"), directory)
}

fn made(recipe: &Recipe, directory: &Path) -> Result<PathBuf> {
    let tar = directory.join(format!("default-{}.tar", recipe.hash()));
    if !tar.exists() {
        bootstrap(recipe, directory, &tar)?;
    }
    Ok(tar)
}

fn bootstrap(recipe: &Recipe, directory: &Path, tar: &Path) -> Result<()> {
    packages::ensure_lists()?;
    let packages = recipe.choose_packages(packages::is_available)?;
    println!(
        "==> building the default release: Debian {} with {} packages and what they need \
         (a few minutes, once)",
        recipe.suite,
        packages.len()
    );
    let begun = Instant::now();
    let work = directory.join(format!("work-{}", std::process::id()));
    fs::create_dir_all(&work)?;
    let partial = tar.with_extension("tar.partial");
    let result = debootstrap(recipe, &packages, &work, &partial);
    let _leftover = fs::remove_dir_all(&work);
    if let Err(error) = result {
        let _leftover = fs::remove_file(&partial);
        return Err(error.context("the default release could not be built; its log is above"));
    }
    fs::rename(&partial, tar)?;
    println!(
        "==> the default release is ready: {} MB in {} s",
        fs::metadata(tar)?.len() / 1_000_000,
        begun.elapsed().as_secs()
    );
    Ok(())
}

fn debootstrap(recipe: &Recipe, packages: &[&str], work: &Path, partial: &Path) -> Result<()> {
    let settings = work.join("host.tar");
    fs::write(&settings, &recipe.host_files)?;
    let mut mmdebstrap = Command::new("mmdebstrap");
    mmdebstrap.args(["--variant=minbase", "--format=tar"]);
    mmdebstrap.arg(format!("--include={}", packages.join(",")));
    for option in &recipe.apt_options {
        mmdebstrap.arg(format!("--aptopt={option}"));
    }
    for option in DPKG_OPTIONS {
        mmdebstrap.arg(format!("--dpkgopt={option}"));
    }
    // Device nodes come from the container runtime; an archive that has some is refused at import.
    mmdebstrap.args(["--skip=chroot/policy-rc.d", "--skip=output/dev"]);
    mmdebstrap.arg(format!("--extract-hook={NO_SERVICES}"));
    mmdebstrap.arg(format!("--customize-hook=tar-in {} /", quoted(&settings)?));
    mmdebstrap.arg(format!("--customize-hook={}", recipe.customize));
    mmdebstrap.arg(&recipe.suite).arg(partial);
    for (name, text) in [
        ("debian.sources", &recipe.sources),
        ("debian.list", &recipe.source_lines),
    ] {
        if !text.is_empty() {
            let file = work.join(name);
            fs::write(&file, text)?;
            mmdebstrap.arg(file);
        }
    }
    if rustix::process::geteuid().is_root() {
        // The tree needs about 1.5 GB, which /tmp in memory may not have. An ordinary user's
        // mapped ids could not reach into this directory.
        mmdebstrap.env("TMPDIR", work);
    }
    command::run(&mut mmdebstrap)
}

/// No init runs in a sandbox, nor here: installing a service must not start it. mmdebstrap's own
/// policy would be gone from the finished tree.
const NO_SERVICES: &str = r#"printf '#!/bin/sh\nexit 101\n' > "$1/usr/sbin/policy-rc.d"
chmod 0755 "$1/usr/sbin/policy-rc.d""#;

/// Manuals and translations are half of a package and nobody reads them in a sandbox; the
/// licences stay. These options stay in effect inside.
const DPKG_OPTIONS: &[&str] = &[
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
];

/// mmdebstrap splits the arguments of its own hooks as a shell would.
fn quoted(path: &Path) -> Result<String> {
    let text = path.to_str().context("the target directory's path is not UTF-8")?;
    if text.contains('\'') {
        bail!("{text} has an apostrophe in it: give another directory with --out");
    }
    Ok(format!("'{text}'"))
}
