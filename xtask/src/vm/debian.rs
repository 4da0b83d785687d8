//! A Debian of any suite in a directory, from the mirror that this machine's own comes from. Knows nothing of what becomes
//! of it.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use data_encoding::HEXLOWER;
use sha2::{Digest, Sha256};

use crate::command;
use crate::image::host;

/// A directory with the tree as `root`, which is called after all that went into it and made once. `settings` is a script
/// that gets the tree as `$1`, and may put more beside it, into `$OUT`.
pub fn tree(directory: &Path, suite: &str, packages: &[&str], settings: &str) -> Result<PathBuf> {
    let own = host::suite()?;
    // The mirror has the others, too.
    let (stanzas, lines) = host::sources(&own)?;
    let [stanzas, lines] = [stanzas, lines].map(|text| text.replace(&own, suite));
    let options = host::apt_options()?;
    let mut hash = Sha256::new();
    for part in [
        suite,
        &stanzas,
        &lines,
        &options.join("\n"),
        &packages.join(","),
        settings,
    ] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let name = format!("tree-{}", HEXLOWER.encode(&hash.finalize()[..8]));
    let tree = directory.join(name);
    if tree.exists() {
        return Ok(tree);
    }
    println!("    Debian {suite} is put together (a minute, once)");
    let partial = directory.join("tree.partial");
    if partial.exists() {
        fs::remove_dir_all(&partial)?;
    }
    fs::create_dir_all(&partial)?;
    fs::set_permissions(&partial, Permissions::from_mode(0o755))?;
    let mut mmdebstrap = Command::new("mmdebstrap");
    mmdebstrap.args(["--quiet", "--variant=minbase", "--format=directory"]);
    mmdebstrap.arg(format!("--include={}", packages.join(",")));
    for option in options {
        mmdebstrap.arg(format!("--aptopt={option}"));
    }
    mmdebstrap.arg(format!("--customize-hook={settings}"));
    mmdebstrap.arg(suite).arg(partial.join("root"));
    for (name, text) in [("debian.sources", stanzas), ("debian.list", lines)] {
        if !text.is_empty() {
            let file = partial.join(name);
            fs::write(&file, text)?;
            mmdebstrap.arg(file);
        }
    }
    command::run(mmdebstrap.env("TMPDIR", &partial).env("OUT", &partial))?;
    fs::rename(&partial, &tree)?;
    Ok(tree)
}

/// A sparse ext4 file system in a file, which begins with what is in a directory.
pub fn image(file: &Path, size: &str, content: &Path) -> Result<()> {
    let _former = fs::remove_file(file);
    command::run(Command::new("truncate").args(["--size", size]).arg(file))?;
    let mut mkfs = Command::new("mkfs.ext4");
    mkfs.args(["-q", "-F", "-E", "root_owner=0:0", "-d"]);
    command::run(mkfs.arg(content).arg(file)).with_context(|| format!("cannot make {}", file.display()))
}
