//! The file that remembers logins: `$XDG_CONFIG_HOME/choir/config.json`, readable by its owner alone. It must not
//! know what a token is good for.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::failure::Failure;

/// What the file holds.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The hypervisor last logged in to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Logins by the hypervisor's origin.
    #[serde(default)]
    pub logins: BTreeMap<String, Login>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Login {
    pub username: String,
    pub token: String,
}

/// Where the file is, given `XDG_CONFIG_HOME` and `HOME`.
pub fn path(xdg: Option<PathBuf>, home: Option<PathBuf>) -> Result<PathBuf, Failure> {
    let base = xdg
        .filter(|p| p.is_absolute())
        .or_else(|| home.map(|h| h.join(".config")));
    let base = base.ok_or_else(|| Failure::Failed("there is no home directory; set HOME".to_owned()))?;
    Ok(base.join("choir").join("config.json"))
}

impl Config {
    /// The file's content, or nothing where there is none yet.
    pub fn load(path: &Path) -> Result<Self, Failure> {
        let shown = path.display();
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(e) => {
                return Err(Failure::Failed(format!(
                    "cannot read {shown}: {e}; check its owner and mode"
                )));
            }
        };
        let mode = fs::metadata(path)?.mode();
        if mode & 0o077 != 0 {
            return Err(Failure::Failed(format!(
                "others can read {shown}, which holds tokens; run `chmod 600 {shown}`"
            )));
        }
        serde_json::from_str(&text)
            .map_err(|e| Failure::Failed(format!("{shown} is not valid ({e}); correct or delete it")))
    }

    /// Replaces the file in one step, so that no crash leaves half of it.
    pub fn save(&self, path: &Path) -> Result<(), Failure> {
        self.write(path).map_err(|e| {
            Failure::Failed(format!(
                "cannot write {}: {e}; check the directory's owner and free space",
                path.display()
            ))
        })
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        if let Some(dir) = path.parent() {
            DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        }
        let fresh = path.with_extension(format!("new-{}", std::process::id()));
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&fresh)?;
        let text = serde_json::to_string_pretty(self)?;
        let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
        written.and_then(|()| fs::rename(&fresh, path)).inspect_err(|_| {
            // The first error is the one to tell.
            let _leftover = fs::remove_file(&fresh);
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn with_login() -> Config {
        let login = Login {
            username: "ada".into(),
            token: "choir_x".into(),
        };
        Config {
            url: Some("http://a".into()),
            logins: [("http://a".to_owned(), login)].into(),
        }
    }

    #[test]
    fn a_saved_login_is_read_back_and_only_its_owner_can_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("choir/config.json");
        with_login().save(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o777, 0o700);
        assert_eq!(Config::load(&path).unwrap().logins["http://a"].token, "choir_x");
        with_login().save(&path).unwrap();
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        with_login().save(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(Config::load(&path), Err(Failure::Failed(text)) if text.contains("chmod 600")));
    }

    #[test]
    fn a_damaged_file_is_named_and_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        with_login().save(&path).unwrap();
        fs::write(&path, "{").unwrap();
        assert!(matches!(Config::load(&path), Err(Failure::Failed(text)) if text.contains("config.json")));
    }

    #[test]
    fn the_place_follows_the_xdg_rules() {
        let home = Some(PathBuf::from("/home/ada"));
        let plain = path(None, home.clone()).unwrap();
        assert_eq!(plain, Path::new("/home/ada/.config/choir/config.json"));
        let relative = path(Some("x".into()), home.clone()).unwrap();
        assert_eq!(relative, plain);
        assert_eq!(
            path(Some("/x".into()), home).unwrap(),
            Path::new("/x/choir/config.json")
        );
    }
}
