//! What leaves a sandbox, and with which secrets: the only crate that sees a secret's plaintext.
//! It must not know of containers or of HTTP routing.

pub mod address;
mod authority;
pub mod grant;
pub mod inject;
mod keys;
mod page;
pub mod platform;
pub mod prove;
mod rotate;
pub mod scan;
mod seal;
mod signer;
pub mod ssh;
pub mod template;
mod value;
mod vault;

pub use address::{AddressPolicy, Refusal};
pub use authority::{Authorities, Authority, AuthorityError};
pub use keys::{Fill, Key, KeyFile, KeyFileError, Keyring, derive};
pub use platform::{PlatformError, PlatformSecrets};
pub use rotate::{RotateError, Rotation, RotationStep};
pub use scan::{Form, Reflected, Scanner, Scanners};
pub use signer::Signer;
pub use value::SecretValue;
pub use vault::{NewValue, Opened, UnlockError, Vault, VaultError};
