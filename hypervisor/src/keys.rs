//! The master key: made at the first start, never made again. What it is used for derives its own key from it.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, bail};
use choir_store::Store;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::places;
use crate::random::{Random, draw};

/// What the hypervisor derives from the master key.
pub struct Keys {
    /// Keys the hashes of recovery codes.
    pub pepper: [u8; 32],
    /// The key file is missing though there are users: codes cannot be checked, everything else goes on.
    pub sealed: bool,
}

/// Reads the key file, or makes it while there is no user yet.
pub async fn load(path: &Path, store: &Store, random: &dyn Random) -> anyhow::Result<Keys> {
    match std::fs::read_to_string(path) {
        Ok(text) => {
            let mode = std::fs::metadata(path)?.permissions().mode() & 0o777;
            if mode & 0o077 != 0 {
                bail!(
                    "the key file {} is readable by others (mode {mode:o}); run `chmod 600` on it",
                    path.display()
                );
            }
            let master = data_encoding::HEXLOWER_PERMISSIVE
                .decode(text.trim().as_bytes())
                .ok()
                .filter(|key| key.len() == 32)
                .with_context(|| format!("the key file {} must hold 64 hexadecimal digits", path.display()))?;
            Ok(Keys {
                pepper: derive(&master, "choir recovery code pepper"),
                sealed: false,
            })
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !store.has_users().await? => {
            let master: [u8; 32] = draw(random);
            places::write_private(path, &format!("{}\n", data_encoding::HEXLOWER.encode(&master)))?;
            Ok(Keys {
                pepper: derive(&master, "choir recovery code pepper"),
                sealed: false,
            })
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            tracing::error!(path = %path.display(), "the key file is missing: recovery codes cannot be checked; put it back");
            Ok(Keys {
                pepper: draw(random),
                sealed: true,
            })
        }
        Err(error) => Err(error).with_context(|| format!("cannot read the key file {}", path.display())),
    }
}

/// One key per purpose: HMAC-SHA-256 of the label under the master key.
fn derive(master: &[u8], label: &str) -> [u8; 32] {
    let mut mac = Hmac::<Sha256>::new_from_slice(master).expect("HMAC takes keys of any length");
    mac.update(label.as_bytes());
    mac.finalize().into_bytes().into()
}
