//! What `prove` found, and the signature under it. It must not know how anything is searched.

use choir_core::{Name, SandboxId, Slot};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The events of `POST /me/prove` and `POST /admin/prove`, by their names.
pub mod event {
    /// With a [`super::Progress`].
    pub const PROGRESS: &str = "progress";
    /// The last one: with a [`super::Signed`].
    pub const REPORT: &str = "report";
    /// The last one where there is no report: with an [`crate::error::ErrorDetail`].
    pub const FAILED: &str = "failed";
}

/// How far a search is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What is being searched.
    pub place: String,
    /// Bytes searched so far, everywhere.
    pub bytes: u64,
    pub places_done: u64,
    pub places: u64,
    pub hits: u64,
}

/// What a search was of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// The caller's secrets, in the caller's sandboxes.
    Own,
    /// All secrets and keys, in the whole box.
    Box,
}

/// In one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Nothing was found, and everything was searched.
    Clean,
    /// Nothing was found, and something was not searched.
    Incomplete,
    /// Only secrets that their owner lets sandboxes read were found, in sandboxes of that owner.
    Revealed,
    /// A secret was found where it should not be.
    Hits,
}

impl Verdict {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Clean => "clean",
            Self::Incomplete => "incomplete",
            Self::Revealed => "revealed",
            Self::Hits => "hits",
        }
    }
}

/// The report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// 1.
    pub format: u32,
    /// Names the box; the same as long as its database is.
    pub box_id: String,
    /// The control host's origin.
    pub origin: String,
    pub version: String,
    pub scope: Scope,
    pub asked_by: Name,
    pub began_at: Timestamp,
    pub ended_at: Timestamp,
    pub verdict: Verdict,
    /// Whether every secret was looked for and every place was searched to its end.
    pub complete: bool,
    /// The verdict in a sentence.
    pub summary: String,
    /// Bytes searched.
    pub bytes: u64,
    pub sought: Vec<Sought>,
    /// Secrets that cannot be looked for.
    pub unsought: Vec<Unsought>,
    pub places: Vec<Place>,
    /// How many there were; `hits` has the first of them.
    pub hits_total: u64,
    pub hits: Vec<Hit>,
    /// Logins of tools, found as files.
    pub logins_total: u64,
    pub logins: Vec<Login>,
    /// What no search of this kind sees.
    pub beyond: Vec<String>,
}

/// A secret by name, never by value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sought {
    /// `user`, `platform` or `key`.
    pub kind: String,
    /// The user whose it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u64>,
}

/// A secret that was not looked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unsought {
    pub secret: Sought,
    pub why: String,
}

/// Where something is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "of", rename_all = "snake_case")]
pub enum Owner {
    /// The box itself.
    Box,
    Sandbox {
        id: SandboxId,
        user: Name,
        workspace: Name,
        slot: Slot,
    },
    /// A release's or snapshot's volume.
    Volume { id: String },
}

/// One place that was searched, or was not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    pub owner: Owner,
    /// `files`, `environment`, `database`, …
    pub what: String,
    /// Bytes searched, and in how many items: files, processes, lines.
    pub bytes: u64,
    pub items: u64,
    pub hits: u64,
    /// Items that could not be read.
    pub unread: u64,
    /// Why, the first few; also why a place was not searched at all.
    pub why: Vec<String>,
    /// Whether all of it was searched.
    pub searched: bool,
}

/// A secret was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hit {
    pub secret: Sought,
    /// `clear`, `hex`, `base64`, `url` or `json`.
    pub form: String,
    pub owner: Owner,
    pub what: String,
    /// The file or process. A part of a path that holds the secret itself is written `…`.
    pub item: String,
    /// In bytes from the beginning of the item; none where the item's name has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// `reveal`, where the owner lets sandboxes have the value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed: Option<String>,
}

/// A tool is logged in, with a token in a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Login {
    pub tool: String,
    pub owner: Owner,
    pub file: String,
    pub advice: String,
}

/// A report and who vouches for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signed {
    /// A [`Report`]; as it came, so that what a later version adds is signed too.
    pub report: Value,
    pub signature: Signature,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature {
    /// `ed25519`, over the report's [`canonical`] text.
    pub algorithm: String,
    /// The public key, in hexadecimal.
    pub key: String,
    /// In hexadecimal.
    pub value: String,
}

/// `GET /api/prove/key`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublicKey {
    pub box_id: String,
    pub algorithm: String,
    /// In hexadecimal.
    pub key: String,
}

/// The one text of a JSON value that is signed: members sorted, no space (RFC 8785, whose order of names and form of
/// numbers this has for names in ASCII and whole numbers, which is all that reports have).
pub fn canonical(value: &Value) -> String {
    match value {
        Value::Object(members) => {
            let mut members: Vec<_> = members.iter().collect();
            members.sort_by_key(|(name, _)| *name);
            let members = members.into_iter().map(|(name, value)| {
                let name = Value::from(name.as_str());
                format!("{name}:{}", canonical(value))
            });
            format!("{{{}}}", members.collect::<Vec<_>>().join(","))
        }
        Value::Array(values) => {
            let values: Vec<_> = values.iter().map(canonical).collect();
            format!("[{}]", values.join(","))
        }
        plain => plain.to_string(),
    }
}

#[cfg(feature = "client")]
mod verify {
    //! Whether a report is as it was signed.

    use data_encoding::HEXLOWER_PERMISSIVE;
    use ed25519_dalek::{Signature, VerifyingKey};

    use super::{Report, Signed, canonical};

    /// Why a report is not to be believed.
    #[derive(Debug, thiserror::Error, PartialEq, Eq)]
    pub enum NotGenuine {
        #[error("the signature is not this report's: it was changed, or signed with another key")]
        Changed,
        #[error("the report is signed with another key than the one asked for")]
        OtherKey,
        #[error("the signature or the key is not an Ed25519 one")]
        Malformed,
        #[error("the signature is good, and what is signed is no report that this version knows: {0}")]
        Unknown(String),
    }

    impl Signed {
        /// The report, if it was signed with this key (hexadecimal).
        ///
        /// # Errors
        /// It was not.
        pub fn verify(&self, key: &str) -> Result<Report, NotGenuine> {
            if !self.signature.key.eq_ignore_ascii_case(key.trim()) {
                return Err(NotGenuine::OtherKey);
            }
            let bytes = |text: &str| HEXLOWER_PERMISSIVE.decode(text.trim().as_bytes()).ok();
            let key: [u8; 32] = bytes(key)
                .and_then(|b| b.try_into().ok())
                .ok_or(NotGenuine::Malformed)?;
            let value = bytes(&self.signature.value).ok_or(NotGenuine::Malformed)?;
            let signature = Signature::from_slice(&value).map_err(|_| NotGenuine::Malformed)?;
            let key = VerifyingKey::from_bytes(&key).map_err(|_| NotGenuine::Malformed)?;
            let text = canonical(&self.report);
            key.verify_strict(text.as_bytes(), &signature)
                .map_err(|_| NotGenuine::Changed)?;
            serde_json::from_value(self.report.clone()).map_err(|e| NotGenuine::Unknown(e.to_string()))
        }
    }
}
#[cfg(feature = "client")]
pub use verify::NotGenuine;

#[cfg(test)]
mod tests {
    use super::canonical;

    #[test]
    fn the_signed_text_does_not_depend_on_order_or_space() {
        let one: serde_json::Value =
            serde_json::from_str("{\"b\": [1, {\"z\":null,\"a\":\"\\u00e4\\n\"}],\n \"a\": true}").unwrap();
        assert_eq!(
            canonical(&one),
            "{\"a\":true,\"b\":[1,{\"a\":\"\u{e4}\\n\",\"z\":null}]}"
        );
    }
}
