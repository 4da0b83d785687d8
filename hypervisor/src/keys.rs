//! The vault at start, and the keys that the hypervisor derives from the box's own. It must not know what they key.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use choir_broker::{Authorities, Fill, KeyFile, Vault, derive};
use choir_store::Store;

use crate::random::Random;

/// The vault and what is derived from the box's own key.
pub struct Keys {
    pub vault: Vault,
    /// Keys the hashes of recovery codes; `None` while sealed, when codes can be neither made nor checked.
    pub pepper: Option<[u8; 32]>,
    /// `None` while sealed.
    pub authorities: Option<Arc<Authorities>>,
}

/// What the audit chain's key is derived under.
const AUDIT: &str = "choir audit chain";
/// What the key of the hashes of recovery codes is derived under.
const PEPPER: &str = "choir recovery code pepper";
/// What keys are derived under here.
pub const LABELS: [&str; 2] = [AUDIT, PEPPER];

/// Unlocks the vault and the chain of audit rows with the key file, which is made at the first start of a database and
/// never again.
pub async fn load(path: &Path, store: &Store, random: &Arc<dyn Random>) -> anyhow::Result<Keys> {
    let (vault, own) = Vault::unlock(store.clone(), KeyFile::new(path), fill(random))
        .await
        .context("the master key")?;
    if let Some(own) = &own {
        store.set_audit_key(derive(own, AUDIT));
    }
    Ok(Keys {
        vault,
        authorities: own.as_ref().map(|own| Arc::new(Authorities::new(own))),
        pepper: own.as_ref().map(|own| derive(own, PEPPER)),
    })
}

/// The hypervisor's randomness as the broker takes it.
pub fn fill(random: &Arc<dyn Random>) -> Fill {
    let random = random.clone();
    Arc::new(move |bytes| random.fill(bytes))
}
