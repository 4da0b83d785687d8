//! What a default release is made of, and the hash that names it. Pure but for `Recipe::read`.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use data_encoding::HEXLOWER;
use sha2::{Digest, Sha256};

use crate::image::host;

/// Raise it when xtask's own part of the build changes the outcome.
const VERSION: &str = "2";

/// Everything that decides what the tar holds, except the archive's state on the day it is built.
pub struct Recipe {
    /// The Debian release, as its code name.
    pub suite: String,
    /// The host's Debian sources in deb822 form, then those in one-line form.
    pub sources: String,
    pub source_lines: String,
    /// `Key "value"` settings for apt during the build.
    pub apt_options: Vec<String>,
    /// packages.txt and customize.sh as committed.
    pub packages: String,
    pub customize: String,
    /// A tar of the host's certificates and registry settings, unpacked over the tree.
    pub host_files: Vec<u8>,
}

impl Recipe {
    /// Reads the committed half from `recipe` and the other half from the host; `scratch` is a
    /// directory that may be written to.
    pub fn read(recipe: &Path, scratch: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = recipe.join(name);
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        let suite = host::suite()?;
        let (sources, source_lines) = host::sources(&suite)?;
        let tree = tempdir_in(scratch)?;
        let host_files = host::write_files(&tree).and_then(|()| tar_of(&tree));
        fs::remove_dir_all(&tree)?;
        Ok(Self {
            suite,
            sources,
            source_lines,
            apt_options: host::apt_options()?,
            packages: read("packages.txt")?,
            customize: read("customize.sh")?,
            host_files: host_files?,
        })
    }

    /// 16 hexadecimal digits; any change of any part gives another.
    pub fn hash(&self) -> String {
        let mut hash = Sha256::new();
        let options = self.apt_options.join("\n");
        let parts = [
            VERSION.as_bytes(),
            self.suite.as_bytes(),
            self.sources.as_bytes(),
            self.source_lines.as_bytes(),
            options.as_bytes(),
            self.packages.as_bytes(),
            self.customize.as_bytes(),
            &self.host_files,
        ];
        for part in parts {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        HEXLOWER.encode(&hash.finalize()[..8])
    }

    /// One name for each line of packages.txt: where a line gives alternatives (`a | b`), the
    /// first that this Debian has.
    pub fn choose_packages(&self, is_available: impl Fn(&str) -> bool) -> Result<Vec<&str>> {
        let lines = self.packages.lines().map(str::trim);
        lines
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(|line| {
                let mut names = line.split('|').map(str::trim);
                match line.contains('|') {
                    false => Ok(line),
                    true => names
                        .find(|name| is_available(name))
                        .with_context(|| format!("Debian {} has none of the packages `{line}`", self.suite)),
                }
            })
            .collect()
    }
}

fn tempdir_in(scratch: &Path) -> Result<std::path::PathBuf> {
    let path = scratch.join(format!("host-{}", std::process::id()));
    fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
    Ok(path)
}

/// The same tree always gives the same bytes.
fn tar_of(tree: &Path) -> Result<Vec<u8>> {
    let output = Command::new("tar")
        .args(["--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner"])
        .args(["--mode=u=rwX,go=rX", "--format=ustar", "-cf", "-", "-C"])
        .arg(tree)
        .arg(".")
        .output()
        .context("cannot start `tar`")?;
    if !output.status.success() {
        bail!("`tar` failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::Recipe;

    fn recipe() -> Recipe {
        Recipe {
            suite: "bookworm".into(),
            sources: String::new(),
            source_lines: String::new(),
            apt_options: Vec::new(),
            packages: "# tools\nbash\n\nnew | old\n".into(),
            customize: "set -eu".into(),
            host_files: Vec::new(),
        }
    }

    #[test]
    fn the_same_recipe_has_the_same_name() {
        assert_eq!(recipe().hash(), recipe().hash());
        assert_eq!(recipe().hash().len(), 16);
    }

    #[test]
    fn any_change_of_the_recipe_changes_its_name() {
        let changed = [
            Recipe {
                suite: "trixie".into(),
                ..recipe()
            },
            Recipe {
                sources: "x".into(),
                ..recipe()
            },
            Recipe {
                source_lines: "x".into(),
                ..recipe()
            },
            Recipe {
                apt_options: vec!["x".into()],
                ..recipe()
            },
            Recipe {
                packages: "bash\n".into(),
                ..recipe()
            },
            Recipe {
                customize: String::new(),
                ..recipe()
            },
            Recipe {
                host_files: vec![0],
                ..recipe()
            },
        ];
        let mut names: Vec<_> = changed.iter().map(Recipe::hash).collect();
        names.push(recipe().hash());
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 8);
    }

    #[test]
    fn text_moved_from_one_part_to_the_next_changes_the_name() {
        let first = Recipe {
            sources: "ab".into(),
            source_lines: "c".into(),
            ..recipe()
        };
        let second = Recipe {
            sources: "a".into(),
            source_lines: "bc".into(),
            ..recipe()
        };
        assert_ne!(first.hash(), second.hash());
    }

    #[test]
    fn the_first_alternative_that_exists_is_taken() {
        assert_eq!(recipe().choose_packages(|_| true).unwrap(), ["bash", "new"]);
        assert_eq!(recipe().choose_packages(|name| name == "old").unwrap(), ["bash", "old"]);
        assert!(recipe().choose_packages(|_| false).is_err());
    }
}
