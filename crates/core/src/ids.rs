//! Opaque identifiers. Randomness comes in as bytes; this module must not draw any itself.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Text that is not an identifier of the wanted kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this is not a {kind} id")]
pub struct IdError {
    kind: &'static str,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// An id from 128 random bits: a prefix that names the kind and 26 base-32 characters.
            pub fn from_random(bytes: [u8; 16]) -> Self {
                Self(format!(concat!($prefix, "{}"), base32(&bytes)))
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                let ok = text.strip_prefix($prefix).is_some_and(|rest| {
                    rest.len() == 26 && rest.bytes().all(|b| matches!(b, b'a'..=b'z' | b'2'..=b'7'))
                });
                if ok { Ok(Self(text.to_owned())) } else { Err(IdError { kind: stringify!($name) }) }
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;

            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

/// RFC 4648 base 32 in lower case without padding: safe in file, container and volume names.
fn base32(bytes: &[u8; 16]) -> String {
    data_encoding::BASE32_NOPAD.encode(bytes).to_ascii_lowercase()
}

id!(
    /// A person with an account on this box.
    UserId, "u-"
);
id!(
    /// A user's pair of sandboxes.
    WorkspaceId, "w-"
);
id!(
    /// One isolated computer. Also the id of its volume.
    SandboxId, "s-"
);
id!(
    /// An immutable (image digest, config digest) pair.
    ReleaseId, "r-"
);
id!(
    /// One journalled attempt to change what a slot means.
    DeploymentId, "d-"
);
id!(
    /// A read-only copy of a volume.
    SnapshotId, "p-"
);
id!(
    /// A permission to use a secret.
    GrantId, "g-"
);
id!(
    /// Something a sandbox was refused and a person may allow.
    GrantRequestId, "q-"
);

/// One container of a sandbox. The number only grows and is never reused.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Generation {
    pub sandbox: SandboxId,
    pub number: u64,
}

impl Generation {
    /// The container's name. It carries the full sandbox id and the number, so no two generations collide.
    pub fn container_name(&self) -> String {
        format!("choir-{}-{}", self.sandbox, self.number)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.sandbox, self.number)
    }
}

/// A user's host uid and gid range, shared by all of that user's sandboxes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct IdRange {
    /// The first host id; container id 0 maps to it.
    pub base: u32,
}

impl IdRange {
    /// How many ids a range has.
    pub const SIZE: u32 = 65_536;
    /// Where the first range begins: above the ids that distributions give to people and services.
    pub const FIRST: u32 = 1_000_000;

    /// The n-th range of this box; `None` once the 32-bit ids are used up.
    pub fn nth(n: u32) -> Option<Self> {
        let base = Self::SIZE.checked_mul(n)?.checked_add(Self::FIRST)?;
        base.checked_add(Self::SIZE)?;
        Some(Self { base })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_id_survives_being_written_and_read(bytes: [u8; 16]) {
            let id = SandboxId::from_random(bytes);
            prop_assert_eq!(id.as_str().parse::<SandboxId>().unwrap(), id);
        }

        #[test]
        fn container_names_of_different_generations_never_collide(a: [u8; 16], b: [u8; 16], m: u64, n: u64) {
            let one = Generation { sandbox: SandboxId::from_random(a), number: m };
            let two = Generation { sandbox: SandboxId::from_random(b), number: n };
            prop_assert_eq!(one == two, one.container_name() == two.container_name());
        }

        #[test]
        fn id_ranges_never_overlap(m in 0u32..60_000, n in 0u32..60_000) {
            prop_assume!(m != n);
            let (a, b) = (IdRange::nth(m).unwrap().base, IdRange::nth(n).unwrap().base);
            prop_assert!(a.abs_diff(b) >= IdRange::SIZE);
        }

        #[test]
        fn text_of_another_kind_is_not_an_id(text in "\\PC{0,40}") {
            prop_assume!(!text.starts_with("s-"));
            prop_assert!(text.parse::<SandboxId>().is_err());
        }
    }

    #[test]
    fn ranges_end_before_the_ids_do() {
        assert!(IdRange::nth(u32::MAX / IdRange::SIZE).is_none());
    }
}
