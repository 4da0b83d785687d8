//! A user's secrets as they go over the wire: values only inwards. It must not know how they are kept.

use std::fmt;

use choir_core::SecretName;
use jiff::Timestamp;
use serde::de::{Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::grants::Grant;

/// `PUT /me/secrets/{name}`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PutSecret {
    pub value: SecretText,
    /// Whether a sandbox with a grant may ask for the value itself; a fresh passkey assertion is needed to say so.
    #[serde(default)]
    pub reveal: bool,
}

/// `GET /me/secrets`, and the answer to a new value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret {
    pub name: SecretName,
    /// Grows by one with each new value.
    pub version: u64,
    pub reveal: bool,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    /// To the minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_used_at: Option<Timestamp>,
}

/// The answer to `DELETE /me/secrets/{name}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeletedSecret {
    pub name: SecretName,
    /// Those that named it: a secret of the same name needs new ones.
    pub ended_grants: Vec<Grant>,
}

/// The text of a secret on its way in. It is wiped when it goes, and no error about it repeats any of it.
pub struct SecretText(Zeroizing<String>);

impl SecretText {
    pub fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    /// The plaintext. Whoever copies it must wipe the copy.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl Serialize for SecretText {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for SecretText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Not `deserialize_str`: its error for a number would repeat the number.
        deserializer.deserialize_any(TextOnly)
    }
}

struct TextOnly;

fn not_text<T, E: Error>() -> Result<T, E> {
    Err(E::custom("`value` must be a string"))
}

impl<'de> Visitor<'de> for TextOnly {
    type Value = SecretText;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<SecretText, E> {
        Ok(SecretText::new(text.to_owned()))
    }

    fn visit_string<E: Error>(self, text: String) -> Result<SecretText, E> {
        Ok(SecretText::new(text))
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<SecretText, E> {
        not_text()
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<SecretText, E> {
        not_text()
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<SecretText, E> {
        not_text()
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<SecretText, E> {
        not_text()
    }

    fn visit_unit<E: Error>(self) -> Result<SecretText, E> {
        not_text()
    }

    fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Result<SecretText, A::Error> {
        not_text()
    }

    fn visit_map<A: MapAccess<'de>>(self, _: A) -> Result<SecretText, A::Error> {
        not_text()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_of_another_kind_is_refused_without_repeating_it() {
        for value in [
            "73735",
            "-73735",
            "7.3735",
            "73735e300",
            "[\"73735\"]",
            "{\"73735\":73735}",
            "true",
            "null",
        ] {
            let Err(error) = serde_json::from_str::<PutSecret>(&format!("{{\"value\":{value}}}")) else {
                panic!("{value} was taken")
            };
            let said = error.to_string();
            assert!(said.contains("must be a string") && !said.contains("3735"), "{said}");
        }
        // The control: an ordinary field does repeat it, and a string is taken.
        let ordinary = serde_json::from_str::<String>("73735").unwrap_err().to_string();
        assert!(ordinary.contains("73735"));
        let put: PutSecret = serde_json::from_str("{\"value\":\"\\u00e4\\n\"}").unwrap();
        assert_eq!((put.value.expose(), put.reveal), ("ä\n", false));
    }
}
