//! Users, passkeys, sessions, tokens and invites. It must not know how a secret is made or checked, only its hash.

mod invites;
mod passkeys;
mod recovery;
mod sessions;
mod tokens;
mod users;

pub use invites::{Invite, InviteKind, NewInvite};
pub use passkeys::{NewPasskey, Passkey, PasskeyUse};
pub use recovery::{RecoverySession, RecoveryTry};
pub use sessions::{NewSession, Session, SessionKind};
pub use tokens::{NewToken, Token};
pub use users::{Registration, Role, User};

/// SHA-256 of a 256-bit token, or HMAC-SHA-256 of a recovery code.
pub type Hash = [u8; 32];

/// An enum that is kept as one word in a column.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident, $what:literal, { $($variant:ident = $word:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($variant),* }

        impl $name {
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),* }
            }
        }

        impl std::str::FromStr for $name {
            type Err = String;

            fn from_str(word: &str) -> Result<Self, String> {
                match word {
                    $($word => Ok(Self::$variant),)*
                    other => Err(format!(concat!("{:?} is not ", $what), other)),
                }
            }
        }
    };
}
pub(crate) use words;
